"""The page's engine compared with wllama (llama.cpp) and ONNX Runtime Web, in headless Chromium.

    pip install playwright
    python benchmarks/browser.py SmolLM2-135M-Instruct.Q4_1.gguf --rounds 5

MODEL is a Q4_1 GGUF, from which smolctl makes int8, int4 and Q8_0. Peers come from the npm registry through
`npm`. For ONNX Runtime Web, name a graph with `--onnx FILE`; `benchmarks/browser/make_onnx.py` says how to
make it. Chromium is the system's.

Each engine has its own browser, all of them stay open, and they take turns in every round; the first round is
a warm-up. Speeds are tokens per second of CPU time of the renderer process, which other load on the machine
hardly changes. With several threads, wall time is what counts; it is shown too.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import shutil
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any

from smolctl.benchmark.machine import describe_machine
from smolctl.page.folder import CODE, ENGINES, write_page_model
from smolctl.page.tokenization import page_tokenizer
from smolctl.quantization.quantize import QuantizeOptions, quantize
from smolctl.sources import open_source

HERE = Path(__file__).parent / "browser"
PACKAGES = {"wllama": ("@wllama/wllama", "3.13.0"), "onnxruntime-web": ("onnxruntime-web", "1.30.0")}
POSITIONS = 2048
# The number of the round stands first, so that no engine finds the text in a cache.
SHORT = "Round {}. Once upon a time"
SENTENCE = "The old clock in the hall had not been wound since the winter, and nobody spoke of it. "
LONG = "Round {}. " + SENTENCE * 6
FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
# A page with these headers may have threads.
ISOLATED = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "cross-origin",
}


@dataclass
class Measured:
    """What one engine did in the rounds that count."""

    name: str
    options: Mapping[str, Any]
    decode: list[float] = field(default_factory=list)  # tokens per second of processor time
    prefill: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)  # tokens per second of decoding, by the clock
    load_s: float = 0.0
    runtime_bytes: int = 0  # of code, compressed
    weights_bytes: int = 0
    memory_mb: float = 0.0  # of the renderer when it is done


def engines(source: Path, folder: Path, onnx: Path | None) -> list[Measured]:
    """Every engine with its model, made from `source` where it is missing."""
    found: list[Measured] = []
    options: dict[str, Any]
    for scheme in ("int8", "int4"):
        quantized, page = folder / scheme, folder / f"{scheme}-page"
        if not quantized.exists():
            quantize(str(source), QuantizeOptions((scheme,), out=quantized, measure=False))
        shutil.rmtree(page, ignore_errors=True)
        write_page_model(quantized, page)
        model = open_source(str(quantized))
        options = {"engine": "smolctl", "model": f"/models/{page.name}", "tokenizer": page_tokenizer(model)}
        for threads in (1, 2):
            shown = f"smolctl, {scheme}, {threads} thread{'s' * (threads > 1)}"
            found.append(Measured(shown, options | {"threads": threads, "positions": POSITIONS}))
    q8 = folder / "q8_0"
    if not q8.exists():
        quantize(str(source), QuantizeOptions(("gguf-q8_0",), out=q8, measure=False))
    shutil.copyfile(source, folder / "q4_1.gguf")
    for name, file in (("Q8_0", next(q8.glob("*.gguf"))), ("Q4_1", folder / "q4_1.gguf")):
        path = f"/models/{file.relative_to(folder)}"
        options = {"engine": "wllama", "model": path, "threads": 1, "positions": POSITIONS}
        found.append(Measured(f"wllama {PACKAGES['wllama'][1]}, {name}, 1 thread", options))
    if onnx is not None:
        shutil.copyfile(onnx, folder / "model.onnx")
        config = model.require_config()
        options = {
            "engine": "onnxruntime", "model": "/models/model.onnx", "threads": 1,
            "tokenizer": page_tokenizer(model), "tokenizerJson": "/models/int8-page/tokenizer.json",
            "kvHeads": config.num_key_value_heads, "headSize": config.head_dim,
        }  # fmt: skip
        version = PACKAGES["onnxruntime-web"][1]
        found.append(Measured(f"ONNX Runtime Web {version}, q8 dynamic, 1 thread", options))
    return found


def fetch_packages(folder: Path) -> None:
    """The peers as the npm registry has them, unpacked into folders of their names."""
    for name, (package, version) in PACKAGES.items():
        target = folder / name
        if target.exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        asked = ["npm", "pack", "--silent", f"{package}@{version}"]
        packed = subprocess.run(asked, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
        with tarfile.open(folder / packed.stdout.split()[-1]) as archive:
            archive.extractall(folder / "unpacked", filter="data")
        (folder / "unpacked" / "package").rename(target)


class Handler(SimpleHTTPRequestHandler):
    """Serves several folders under one address."""

    def __init__(self, *arguments: Any, folders: Mapping[str, Path], **options: Any) -> None:
        self.folders = folders
        super().__init__(*arguments, **options)

    def translate_path(self, path: str) -> str:
        return str(served(path, self.folders))

    def end_headers(self) -> None:
        for name, value in ISOLATED.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def served(path: str, folders: Mapping[str, Path]) -> Path:
    """The file at a path of the server. The compiled engines lie elsewhere than the page's other code."""
    first, _, rest = path.split("?")[0].lstrip("/").partition("/")
    beside = [engine for engine in ENGINES if first == "code" and engine.name == rest]
    return beside[0] if beside else folders.get(first, HERE / "nothing") / rest


@contextmanager
def serving(folders: Mapping[str, Path]) -> Iterator[str]:
    """A server on this machine, and its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, folders=folders))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()


class Tab:
    """A page in a browser of its own, with an engine in it."""

    def __init__(self, browser: Any, address: str) -> None:
        self._browser = browser
        self.page = browser.new_page()
        self.page.set_default_timeout(600_000)
        self.asked: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url.removeprefix(address)))
        self.page.goto(f"{address}/bench/index.html")
        self.page.wait_for_function("() => Boolean(globalThis.openEngine)")

    @property
    def processes(self) -> list[int]:
        """The renderer's, by the browser's own account."""
        session = self._browser.new_browser_cdp_session()
        listed = session.send("SystemInfo.getProcessInfo")["processInfo"]
        session.detach()
        return [int(process["id"]) for process in listed if process["type"] == "renderer"]

    def continued(self, text: str, count: int) -> tuple[dict[str, int], float, float]:
        """What the engine read and wrote, and the seconds of processor time and by the clock."""
        processes = self.processes
        cpu, began = sum(map(cpu_seconds, processes)), time.perf_counter()
        answer: dict[str, int] = self.page.evaluate(
            "([text, count]) => continueText(text, count)", [text, count]
        )
        wall = time.perf_counter() - began
        return answer, sum(map(cpu_seconds, processes)) - cpu, wall


def cpu_seconds(process: int) -> float:
    """Processor time that all threads of a process have used."""
    nanoseconds = 0
    for file in Path(f"/proc/{process}/task").glob("*/schedstat"):
        with suppress(OSError):  # a thread that has just ended
            nanoseconds += int(file.read_text().split()[0])
    return nanoseconds / 1e9


def memory_mb(process: int) -> float:
    """MB of a million bytes that a process has, without the files that it maps: the browser's code."""
    status = Path(f"/proc/{process}/status").read_text()
    return sum(int(size) * 1024 / 1e6 for size in re.findall(r"(?:RssAnon|RssShmem):\s+(\d+) kB", status))


def measure(
    found: Sequence[Measured],
    address: str,
    chromium: str,
    rounds: int,
    tokens: int,
    folders: Mapping[str, Path],
) -> str:
    """Have all engines take turns; the browser's version."""
    from playwright.sync_api import sync_playwright

    with ExitStack() as stack:
        playwright = stack.enter_context(sync_playwright())
        tabs = []
        for engine in found:
            browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
            stack.callback(browser.close)
            tab = Tab(browser, address)
            began = time.perf_counter()
            tab.page.evaluate("(options) => openEngine(options)", dict(engine.options))
            engine.load_s = time.perf_counter() - began
            for path in dict.fromkeys(tab.asked):
                file = served(path, folders)
                if path.startswith("/models/") and file.suffix != ".json":
                    engine.weights_bytes += file.stat().st_size
                elif file.is_file() and "tokenizer.json" not in path and not path.startswith("/bench/"):
                    engine.runtime_bytes += len(gzip.compress(file.read_bytes(), 9))
            tabs.append(tab)
            print(f"{engine.name}: loaded in {engine.load_s:.1f} s", flush=True)
        for number in range(rounds + 1):
            for engine, tab in zip(found, tabs, strict=True):
                read, read_cpu, _ = tab.continued(LONG.format(number), 1)
                wrote, cpu, wall = tab.continued(SHORT.format(number), tokens)
                if number:
                    engine.prefill.append(read["read"] / read_cpu)
                    engine.decode.append(wrote["written"] / cpu)
                    engine.wall.append(wrote["written"] / wall)
                engine.memory_mb = sum(map(memory_mb, tab.processes))
            print(f"round {number} of {rounds}", flush=True)
        return str(browser.version)


def table(found: Sequence[Measured], version: str, rounds: int) -> str:
    """The measurements as Markdown."""
    lines = [
        f"{machine()}, {datetime.now(UTC):%Y-%m-%d}, Chromium {version} headless, {rounds} rounds.",
        "Tokens per second of processor time, medians with their range; MB of a million bytes.",
        "",
        "| engine | decode | prefill | decode, by the clock | code, compressed | weights MB | memory MB |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one.name} | {spread(one.decode)} | {spread(one.prefill)} | {spread(one.wall)} "
        f"| {one.runtime_bytes / 1e3:,.0f} kB | {one.weights_bytes / 1e6:.1f} | {one.memory_mb:.0f} |"
        for one in found
    ]
    ours = {
        one.name: one for one in found if one.options["engine"] == "smolctl" and one.options["threads"] == 1
    }
    lines += ["", "| ratio, one thread | decode | prefill |", "|---|---|---|"]
    for name, one in ours.items():
        for peer in found:
            if peer.options["engine"] != "smolctl":
                pairs = [(one.decode, peer.decode), (one.prefill, peer.prefill)]
                ratios = [spread([a / b for a, b in zip(*pair, strict=True)]) for pair in pairs]
                lines.append(f"| {name} / {peer.name} | {ratios[0]} | {ratios[1]} |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> str:
    """The median, with the range."""
    return f"**{median(values):.1f}** ({min(values):.1f}–{max(values):.1f})"


def machine() -> str:
    """The processor's name and the cores that this process may use."""
    found = describe_machine(1)
    return f"{found.cpu}, {found.logical_cpus} cores"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a GGUF in Q4_1")
    parser.add_argument("--folder", type=Path, default=Path("browser-models"), help="for models and packages")
    parser.add_argument("--onnx", type=Path, help="the same model as a graph with a KV cache")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="that are decoded in a round")
    parser.add_argument("--only", help="a regular expression: engines whose names it finds")
    parser.add_argument("--json", type=Path, help="write every round here too")
    arguments = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        parser.error("there is no Chromium on this machine")
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    fetch_packages(folder / "npm")
    found = engines(arguments.model, folder, arguments.onnx)
    found = [one for one in found if re.search(arguments.only or "", one.name)]
    folders = {"bench": HERE, "code": CODE, "models": folder, "npm": folder / "npm"}
    with serving(folders) as address:
        version = measure(found, address, chromium, arguments.rounds, arguments.tokens, folders)
    print(table(found, version, arguments.rounds))
    if arguments.json:
        rows = [{key: value for key, value in vars(one).items() if key != "options"} for one in found]
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
