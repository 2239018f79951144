"""Builds the engines that `decode.py` measures, and converts their models, unless that has been done."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from smolctl.benchmark.engine_files import huggingface_folder
from smolctl.quantization.quantize import QuantizeOptions, quantize
from smolctl.sources import open_source

PEERS = Path(__file__).with_name("peers")
REFERENCE = "transformers float32"
# Formats with the number of bits: llama.cpp's by their llama_ftype.
OURS = {"bf16": 16, "int8": 8, "int4": 4}
LLAMA = {
    "llama.cpp": ("bf16", "q8_0", "q4_0", "q4_1"),
    "ik_llama.cpp": ("bf16", "q8_0", "q4_0", "q4_1", "iq4_nl"),
}
FTYPES = {"bf16": 32, "q8_0": 7, "q4_0": 2, "q4_1": 3, "iq4_nl": 25}
PACKAGED = {
    "openvino": ("float16", "int8", "int4"),
    "onnxruntime": ("int8", "int4"),
    "ctranslate2": ("int8",),
    "mistralrs": ("q8_0", "q4_0"),
}
# The settings that each engine's documentation recommends for a CPU, besides the number of threads.
SETTINGS = {
    "llama.cpp": "flash attention; repacks by itself",
    "ik_llama.cpp": "flash attention, -rtr",
    "openvino": "LATENCY hint; compressed by NNCF",
    "onnxruntime": "blocks of 32, accuracy level 4",
    "ctranslate2": "compute_type auto",
    "mistralrs": "the GGUF",
}


def bits_of(scheme: str) -> int:
    return next(bits for part, bits in {"16": 16, "8": 8, "4": 4}.items() if part in scheme)


@dataclass
class Peer:
    """An engine with its model, and what was measured of it."""

    program: str
    scheme: str
    bits: int
    command: list[str]  # that starts its process
    version: str = ""  # "": what the process says
    settings: str = ""
    load_s: float = 0.0
    kl: float | None = None  # nats per token; None: it gives no logits
    rates: dict[str, list[float]] = field(default_factory=dict)  # tokens/s of every case, round by round

    @property
    def name(self) -> str:
        return f"{self.program} {self.scheme}"


def every_engine(options: argparse.Namespace, threads: int) -> list[Peer]:
    """Those that are asked for, built and with their models."""
    source, folder = options.source.absolute(), options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    peers = our_engines(source, folder, threads)
    for described in options.peer_source:
        peers += built_engines(described, source, folder, threads)
    if options.venvs:
        peers += packaged_engines(options.venvs.absolute(), source, folder, threads)
    for peer in peers:
        peer.settings = SETTINGS.get(peer.program, "")
    return [one for one in peers if options.only is None or one.name in {*options.only, REFERENCE}]


def command(*words: object) -> None:
    """Run a command whose messages are for stderr."""
    subprocess.run([str(word) for word in words], check=True, stdout=sys.stderr)


def our_engines(source: Path, folder: Path, threads: int) -> list[Peer]:
    """smolctl's, and the reference."""
    models = {REFERENCE: source}
    for scheme in OURS:
        models[scheme] = folder / scheme
        if not models[scheme].exists():
            quantize(str(source), QuantizeOptions((scheme,), out=models[scheme], measure=False))
    serve = [sys.executable, str(PEERS / "with_smolctl.py"), "serve"]
    return [
        Peer("smolctl", scheme, OURS[scheme], [*serve, str(models[scheme]), str(threads), "smolctl"])
        for scheme in OURS
    ] + [Peer("transformers", "float32", 32, [*serve, str(source), str(threads), "transformers"])]


def built_engines(described: str, source: Path, folder: Path, threads: int) -> list[Peer]:
    """Those of llama.cpp's or ik_llama.cpp's source code, built where it has not been."""
    place, _, version = described.partition("@")
    code = Path(place).absolute()
    program = "ik_llama.cpp" if (code / "ggml/src/iqk").exists() else "llama.cpp"
    build = folder / f"build-{program}"
    switches = [f"-DLLAMA_BUILD_{part}=OFF" for part in ("TESTS", "EXAMPLES", "TOOLS", "SERVER", "COMMON")]
    command(
        *("cmake", "-S", code, "-B", build, "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON"),
        *("-DBUILD_SHARED_LIBS=ON", "-DGGML_IQK_FA_ALL_QUANTS=OFF", "-DLLAMA_CURL=OFF", *switches),
    )
    command("cmake", "--build", build, "--target", "llama", "-j", os.cpu_count())
    engine = build / "with_llama"
    libraries = sorted({path.parent for path in build.rglob("lib*.so")})
    command(
        *("c++", "-O2", "-std=c++20", PEERS / "with_llama.cpp", "-o", engine),
        *(f"-I{code / part}" for part in ("include", "ggml/include")),
        *(word for path in libraries for word in (f"-L{path}", f"-Wl,-rpath,{path}")),
        *("-lllama", *(f"-l{path.stem[3:]}" for path in sorted(build.rglob("libggml*.so")))),
    )
    found = []
    for scheme in LLAMA[program]:
        # The file as it is, where its quantizer would round it once more.
        as_it_is = scheme == "q4_1" and "Q4_1" in source.name.upper()
        model = source if as_it_is else folder / f"{program}-{scheme}.gguf"
        if not model.exists():
            command(engine, "make", source, model, FTYPES[scheme])
        repack = ["repack"] if program == "ik_llama.cpp" else []
        serve = [str(engine), "serve", str(model), str(threads), *repack]
        found.append(Peer(program, scheme, bits_of(scheme), serve, version or commit_of(code)))
    return found


def commit_of(code: Path) -> str:
    """The commit that a folder of git is at, with its date."""
    asked = ["git", "-C", str(code), "log", "-1", "--format=%h of %cs"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


def packaged_engines(venvs: Path, source: Path, folder: Path, threads: int) -> list[Peer]:
    """Those of the package index that have a virtual environment."""
    found = []
    for program in PACKAGED:
        python = venvs / program / "bin" / "python"
        if not python.exists():
            print(f"{program} is left out: there is no {python}", file=sys.stderr)
            continue
        script = PEERS / f"with_{program}.py"
        for scheme in PACKAGED[program]:
            target = folder / f"{program}-{scheme}"
            if program == "mistralrs":
                target = gguf(source, folder, scheme)
            elif not target.exists():
                if program == "openvino":
                    taken = gguf(source, folder, "f16")
                else:
                    taken = Path(huggingface_folder(open_source(str(source)), folder / "huggingface"))
                command(python, script, "make", taken, target, scheme)
            serve = [str(python), str(script), "serve", str(target), str(threads)]
            found.append(Peer(program, scheme, bits_of(scheme), serve))
    return found


def gguf(source: Path, folder: Path, scheme: str) -> Path:
    """A GGUF that smolctl writes."""
    target = folder / f"gguf-{scheme}"
    if not target.exists():
        quantize(str(source), QuantizeOptions((f"gguf-{scheme}",), out=target, measure=False))
    return next(target.glob("*.gguf"))
