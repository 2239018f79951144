"""The file that each engine reads: quantized variants of the same weights, and each peer's own format."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from smolctl.benchmark.engines import PEERS, EngineName, EngineSpec
from smolctl.benchmark.peers import is_installed
from smolctl.errors import MissingPackageError, SmolError, UsageError
from smolctl.quantization.quantize import QuantizeOptions, quantize
from smolctl.sources import open_source
from smolctl.sources.base import ModelSource, SourceKind
from smolctl.sources.gguf.write import SCHEMES, require_gguf, write_gguf
from smolctl.sources.huggingface.write import write_model
from smolctl.sources.shapes import HEAD

# llama.cpp's scheme with the same number of bits as a scheme of smolctl, if its name differs.
LLAMA_SCHEMES = {"int8": "q8_0", "int8-dynamic": "q8_0", "int4": "q4_1"}


def check_peers(names: Sequence[str]) -> tuple[EngineName, ...]:
    """The requested peers without duplicates.

    Raises:
        UsageError: one is not known.
        MissingPackageError: one is not installed.
    """
    for name in names:
        if name not in PEERS:
            raise UsageError(f"--against {name} is not known", f"Use {', '.join(PEERS)}.")
        if not is_installed(name):
            raise MissingPackageError(
                f"--against {name}: the package {PEERS[name]} is not installed",
                f"Install it: pip install {PEERS[name]}",
            )
    return tuple(peer for peer in PEERS if peer in names)


def make_engine_files(
    source: ModelSource, schemes: Sequence[str], peers: Sequence[EngineName], threads: int, folder: Path
) -> tuple[list[EngineSpec], list[str]]:
    """Write the files that the engines read.

    Args:
        source: a model; one without weights gets random ones.
        schemes: of `quantize`, measured in addition to the stored weights.
        peers: from `check_peers`.
        threads: of each engine.
        folder: an empty folder for the files that have to be written.

    Returns:
        The engines, smolctl's first: the stored weights, the variants, the peers; and for each peer that is
        left out a line with the reason.

    Raises:
        SmolError: a scheme does not support this model.
    """
    engines = [EngineSpec("smolctl", source.id, threads)]
    if schemes:
        options = QuantizeOptions(tuple(schemes), out=folder / "variants", measure=False)
        made = quantize(source.id, options).variants
        engines += [EngineSpec("smolctl", one.path, threads, one.scheme) for one in made]
    left_out = []
    for peer in peers:
        try:
            engines += _peers(peer, source, engines, threads, folder)
        except SmolError as error:
            left_out.append(f"{peer} is left out: {error.message}")
    return engines, left_out


def _peers(
    peer: EngineName, source: ModelSource, so_far: Sequence[EngineSpec], threads: int, folder: Path
) -> list[EngineSpec]:
    config = source.require_config()
    if peer != "llama.cpp":
        if peer == "litgpt" and (config.model_type != "llama" or config.rope_scaling):
            raise SmolError("only a plain Llama is compared with it")
        return [EngineSpec(peer, huggingface_folder(source, folder / "huggingface"), threads, "float32")]
    found = []
    for ours in (one for one in so_far if one.engine == "smolctl"):
        path, scheme = _gguf(source, ours, folder)
        found.append(EngineSpec(peer, path, threads, scheme, rival_of=ours.model))
    return found


def huggingface_folder(source: ModelSource, folder: Path) -> str:
    """A folder that transformers loads: the source's own folder, or a new one with its weights in float32."""
    config = source.require_config()
    # transformers runs the code in the folder of a model of an unknown class: only smolctl's code is allowed.
    is_folder = source.kind is SourceKind.FOLDER and source.tensors and Path(source.id).is_dir()
    if is_folder and not config.needs_own_code:
        return source.id
    if folder.exists():
        return str(folder)
    folder.mkdir(parents=True)
    tensors = {name: tensor.float().contiguous() for name, tensor in source.require_weights().tensors()}
    if config.tie_word_embeddings:
        tensors.pop(HEAD, None)
    write_model(folder, config, tensors, "float32", source.read_tokenizer())
    return str(folder)


def _gguf(source: ModelSource, ours: EngineSpec, folder: Path) -> tuple[str, str]:
    """The file that llama.cpp reads for the comparison with a variant of smolctl, and its scheme."""
    stored = open_source(ours.model)
    if stored.kind is SourceKind.GGUF:
        return ours.model, stored_scheme(stored).lower()
    scheme = ours.precision.removeprefix("gguf-") if ours.precision else stored_scheme(source)
    scheme = LLAMA_SCHEMES.get(scheme, scheme.lower())
    if scheme not in SCHEMES:
        raise SmolError(f"no GGUF scheme corresponds to {scheme}")
    config = source.require_config()
    require_gguf(config, scheme)
    files = source.read_tokenizer()
    if files is None:
        raise SmolError("a GGUF needs a tokenizer, and there is none beside the weights")
    path = folder / f"{scheme}.gguf"
    if not path.exists():
        write_gguf(config, source.require_weights().tensors(), files, scheme, path, "bench")
    return str(path), scheme


def stored_scheme(source: ModelSource) -> str:
    """The scheme of a source that `quantize` wrote, else the type of most of its parameters, such as "F32"
    or "Q4_1"; float32 if it has no weights.
    """
    if quantized := (source.quantization or {}).get("scheme"):
        return str(quantized)
    sizes: dict[str, int] = {}
    for tensor in source.tensors or ():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.parameters
    return max(sizes, key=lambda kind: sizes[kind]) if sizes else "F32"


def weight_files(model: str) -> tuple[Path, ...]:
    """The files that loading a model reads; none for a preset or for a model in the Hub's cache."""
    source, path = open_source(model), Path(model)
    if run := source.run_folder:
        return (run.checkpoint(source.step).path,)
    if path.is_dir():
        return tuple(sorted(path.glob("*.safetensors")))
    return (path,) if source.tensors and path.is_file() else ()


def copy_apart(model: str, files: Sequence[Path], folder: Path) -> str:
    """Copy the `weight_files` of a model to a folder, and return the copy as a MODEL.

    The copy is not open in another process, whose mapping would keep it in the page cache.
    """
    target = folder / f"apart-{sum(1 for _ in folder.iterdir())}"
    if Path(model).is_dir() and files[0].parent == Path(model):
        shutil.copytree(model, target)
        return str(target)
    target.mkdir()
    return str(shutil.copyfile(files[0], target / files[0].name))
