"""The MODEL argument: opens a string as a `ModelSource`, by content and not by name."""

from __future__ import annotations

import codecs
import dataclasses
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smolctl.config import ModelConfig, RunConfig
from smolctl.config.data import DataConfig
from smolctl.config.load import (
    changed_recipe,
    is_preset,
    merge,
    parse_settings,
    preset_meant,
    preset_names,
    presets_folder,
    read_yaml,
    resolve_model_config,
    resolve_run_config,
)
from smolctl.errors import InputError, UsageError
from smolctl.outside import path_meant, refuse_pointer
from smolctl.ownership import RECORD, require_inside
from smolctl.runs.folder import RunFolder
from smolctl.runs.layout import CONFIG, is_run
from smolctl.runs.layout import FILES as RUN_FILES
from smolctl.runs.reference import split_step
from smolctl.runs.root import LATEST, RUNS, latest_run, run_meant
from smolctl.sources.address import hub_id_of, is_file_name, is_hub_id, refuse_tag
from smolctl.sources.base import NO_RECIPE, WITH_WEIGHTS, ModelSource, SourceKind
from smolctl.sources.checkpoint import ZIP_MAGIC, open_checkpoint
from smolctl.sources.gguf.header import GGUF_MAGIC
from smolctl.sources.gguf.model import open_gguf
from smolctl.sources.huggingface.folder import (
    LONE_ENDINGS,
    broken_link,
    files_of_model,
    is_huggingface_folder,
    open_config_json,
    open_folder,
    open_safetensors,
    require_parts,
)
from smolctl.sources.huggingface.safetensors_file import is_safetensors
from smolctl.sources.huggingface.tokenizer import TOKENIZER_FILES, tokenizer_reader
from smolctl.sources.nanotron.open import is_nanotron, open_nanotron
from smolctl.sources.quantized_folder import DESCRIPTION, FILE, is_quantized_folder, open_quantized_folder

# Files that trainers write next to weights, and further parts of a split file.
NO_LONE_FILE = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state).*|.+-(?!00001)\d{5}-of-\d{5}\..+"
)
# Magic bytes of files of other kinds, their names, and what to do with them.
OTHER_FILES = {
    **dict.fromkeys(
        (b"lmgg", b"fmgg", b"tjgg"), ("a GGML file, the format before GGUF", "Get the model as GGUF.")
    ),
    b"\x89HDF": ("a Keras or TensorFlow file (HDF5)", "Get the model as safetensors."),
    b"\x93NUMPY": ("a NumPy array", "Save the model as safetensors."),
    **dict.fromkeys(
        (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd"),
        ("an archive", "Unpack it first."),
    ),
}
META_PART = re.compile(r"consolidated\.\d\d\.pth")
TORCH_PART = re.compile(r".+-\d{5}-of-(\d{5})\.(?:bin|pt|pth)")
MAX_CONFIG_BYTES = 20_000_000  # larger texts are corpora
KINDS = "Give a preset, YAML, Hub id, Hugging Face or quantized folder, .safetensors, .gguf, .ckpt or run."


def open_source(model: str, settings: Sequence[str] = ()) -> ModelSource:
    """Open whatever MODEL names.

    Args:
        model: a preset, a path, `RUN@STEP`, `RUN@best`, or `org/name[@revision]` on the Hub.
        settings: `key=value` items for a what-if, such as `num_hidden_layers=12` or
            `model.num_hidden_layers=12`. A model with weights can then only be counted, because the weights
            no longer fit.

    Raises:
        InputError: there is no such model, or its files are damaged.
        HubError: the Hub did not provide it.
        UsageError: a setting does not apply.
    """
    values = _model_settings(settings)
    source = _open(model, values)
    laid_over = source.kind in (SourceKind.PRESET, SourceKind.CONFIG)  # before the config was resolved
    return source if laid_over or not values else _what_if(source, values)


def open_weights(model: str) -> ModelSource:
    """Open a model with a config and weights, whose errors list only what has weights; see `open_source`."""
    try:
        source = open_source(model)
    except InputError as error:
        error.hint = error.hint.removeprefix(preset_meant(model)).replace(KINDS, WITH_WEIGHTS)
        raise
    source.require_config()
    source.require_weights()
    return source


def require_own_files(source: ModelSource, carried_only: bool = False) -> None:
    """Check that the files of a model are in its folder, before they are published or copied.

    A file that the user named may be a link; files that are read next to it may not.

    Args:
        source: the model.
        carried_only: check only files that are copied unchanged: configs and tokenizer.

    Raises:
        InputError: one of them is not really in the folder, see `ownership.require_inside`.
    """
    path = Path(source.id)
    if run := source.run_folder:
        named = [name for name in RUN_FILES if "*" not in name]
        if carried_only:
            named = [name for name in named if name.startswith(run.tokenizer.name)]
        else:
            named.append(run.checkpoint_path(source.step or 0).relative_to(run.path).as_posix())
        require_inside(run.path, named)
    elif source.kind is not SourceKind.HUB and path.is_dir():
        require_inside(path, TOKENIZER_FILES if carried_only else files_of_model(path))
    elif source.kind in (SourceKind.FOLDER, SourceKind.SAFETENSORS, SourceKind.CHECKPOINT):
        require_inside(path.parent, TOKENIZER_FILES)


def _open(model: str, values: Mapping[str, Any]) -> ModelSource:
    if not model.strip():
        raise InputError("MODEL is empty", KINDS)
    if model == "-":
        return _open_stdin(values)
    model = hub_id_of(model)
    path = Path(model)
    preset = model in preset_names()
    if _exists(path) and not (preset and path.is_dir() and not _holds_model(path)):
        return _open_path(path, model, values)
    if path == RUNS / LATEST:  # even if its run was deleted or moved
        return _open_run(latest_run(), None, model)
    if path.is_symlink():
        raise broken_link(path)
    if preset:
        return _open_recipe(presets_folder() / f"{model}.yaml", model, values)
    run, at, _ = model.rpartition("@")
    if (at and is_run(Path(run))) or path.parts[:1] == RUNS.parts:
        folder, step = split_step(model)
        return _open_run(folder, step, model)
    if is_hub_id(model):
        from smolctl.sources.hub import open_hub

        return open_hub(model)
    refuse_tag(model)
    if "/" not in model and not is_file_name(model):
        hint = run_meant(model) or (preset_meant(model) or path_meant(path)) + KINDS
        raise InputError(f"{model}: no preset or file has this name", hint)
    raise InputError(f"{model}: no such file or folder", path_meant(path) + KINDS)


def _open_stdin(values: Mapping[str, Any]) -> ModelSource:
    """Open a config.json or a YAML from standard input."""
    content = sys.stdin.buffer.read(MAX_CONFIG_BYTES)
    with tempfile.TemporaryDirectory(prefix="smolctl-stdin-") as folder:
        path = Path(folder) / "config"
        path.write_bytes(content)
        return _open_file(path, "-", values)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # too long for a file name, such as a prompt in the wrong place
        raise InputError(f"{str(path)[:60]}: no such file ({error.strerror})", KINDS) from None


def _open_path(path: Path, name: str, values: Mapping[str, Any]) -> ModelSource:
    try:
        if path.is_dir():
            return _open_folder(path, name)
        if not path.is_file():
            raise InputError(f"{path}: neither a file nor a folder", KINDS)
        return _open_file(path, name, values)
    except PermissionError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror})", "Check the file's permissions."
        ) from None


def _holds_model(folder: Path) -> bool:
    return is_run(folder) or is_quantized_folder(folder) or is_huggingface_folder(folder)


def _open_folder(folder: Path, name: str) -> ModelSource:
    if is_run(folder):
        return _open_run(folder, None, name)
    require_parts(folder)
    if is_quantized_folder(folder):
        return open_quantized_folder(folder, name)
    if lone := _lone_file(folder):
        return _open_file(lone, name, {})
    if is_huggingface_folder(folder):
        return open_folder(folder, name)
    inside = sorted(folder.iterdir())
    shown = ", ".join(path.name for path in inside[:5]) or "nothing"
    models = [str(path) for path in inside if path.is_dir() and _holds_model(path)]
    raise InputError(
        f"{folder}: contains no model (config.json, safetensors or run), only {shown}",
        f"Name one of the models in it: {', '.join(models[:5])}." if models else KINDS,
    )


def _refuse_part(path: Path) -> None:
    """Refuse a PyTorch file that is only a part of a model.

    Raises:
        InputError: its name says so, or files of Meta's with other parts of every tensor are next to it.
    """
    count = len(list(path.parent.glob("consolidated.??.pth")))
    if META_PART.fullmatch(path.name) and count > 1:
        raise InputError(
            f"{path}: one of {count} files of a Meta checkpoint, each of which holds a part of every tensor",
            "Convert them with transformers' convert_llama_weights_to_hf.",
        )
    if (part := TORCH_PART.fullmatch(path.name)) and int(part[1]) > 1:
        raise InputError(
            f"{path}: one of {int(part[1])} files that PyTorch's weights are split into",
            "Load them with transformers and save them again: it writes safetensors.",
        )


def _lone_file(folder: Path) -> Path | None:
    """The only weights file in a folder without safetensors: a GGUF, or a file of PyTorch's.

    Raises:
        InputError: there are several.
    """
    if any(folder.glob("*.safetensors*")):
        return None
    found = sorted(path for ending in LONE_ENDINGS for path in folder.glob(f"*{ending}"))
    parts = [path for path in found if not NO_LONE_FILE.fullmatch(path.name)]
    for path in parts[:1]:
        _refuse_part(path)
    if len(parts) > 1 and not (folder / "config.json").is_file():
        names = ", ".join(path.name for path in parts[:5])
        raise InputError(f"{folder}: {len(parts)} files of weights: {names}", "Name one of them.")
    if not parts:  # of a split GGUF whose first part is missing
        parts = [path for path in found if path.suffix == ".gguf"][:1]
    return parts[0] if len(parts) == 1 else None


def _open_file(path: Path, name: str, values: Mapping[str, Any]) -> ModelSource:
    if is_run(path.parent) and path.name != CONFIG and path.name in (RECORD, *RUN_FILES):
        raise InputError(f"{path}: a record of a run, not a model", f"Name the run: {path.parent}")
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:  # of a failing read, which names no file
        raise InputError(f"{name}: {error.strerror}", "Check the path and its permissions.") from None
    if not start:
        raise InputError(f"{name}: the file is empty", KINDS)
    refuse_pointer(start, name)
    _refuse_part(path)
    if start.startswith(GGUF_MAGIC):
        return open_gguf(path, name)
    if start.startswith(ZIP_MAGIC):
        return open_checkpoint(path, name)
    if path.name in (FILE, "config.json", DESCRIPTION) and is_quantized_folder(path.parent):
        return open_quantized_folder(path.parent, name)
    if is_safetensors(start):
        return open_safetensors(path, name)
    if start.startswith(b"\x80"):
        raise InputError(
            f"{path}: a bare pickle is not read: it can execute code",
            "Save the weights as safetensors, or with a current torch.save (zip format).",
        )
    if _is_utf16_object(start):
        return open_config_json(path, name)
    for begin, (what, remedy) in OTHER_FILES.items():
        if start.startswith(begin):
            raise InputError(f"{path}: {what}, which is not read", remedy)
    if b"\0" in start or not _is_text(start):
        raise InputError(f"{path}: no known model file: it begins with {start[:8]!r}", KINDS)
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise InputError(f"{path}: {path.stat().st_size:,} bytes of text are not a config", KINDS)
    text = start.removeprefix(codecs.BOM_UTF8).lstrip()
    if text.startswith(b"<"):
        raise InputError(f"{path}: a web page, not a model", "Download the file itself, not its page.")
    if text.startswith(b"{"):
        return open_config_json(path, name)
    return _open_recipe(path, name, values)


def _is_utf16_object(start: bytes) -> bool:
    """Whether a file starts as a JSON object in UTF-16."""
    marked = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return marked and start.decode("utf-16", "ignore").lstrip().startswith("{")


def _is_text(start: bytes) -> bool:
    try:
        start.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > len(start) - 4  # a character cut by the end of the sample
    return True


def _open_recipe(path: Path, name: str, values: Mapping[str, Any]) -> ModelSource:
    """Open smolctl's YAML, such as a preset, or nanotron's."""
    content = read_yaml(path)
    if is_nanotron(content):
        return open_nanotron(content, path, name)
    recipe = changed_recipe(path, content, values)
    problem = _too_long(recipe)
    if problem:  # does not affect the model; everything else of the recipe is checked
        recipe = merge(recipe, {"data": {"sequence_length": 1}})
    run = resolve_run_config(recipe, name)
    return ModelSource(
        kind=SourceKind.PRESET if is_preset(path) else SourceKind.CONFIG,
        id=name,
        config=run.model,
        declared=content.get("model") or {},
        run=None if problem else run,
        problems=(problem,) if problem else (),
    )


def _too_long(recipe: Mapping[str, Any]) -> str:
    """A problem if sequences do not fit the model's context; "" if they do, or if either is not a number."""
    data, model = recipe.get("data") or {}, recipe.get("model") or {}
    if not isinstance(data, Mapping) or not isinstance(model, Mapping):
        return ""
    length = data.get("sequence_length", DataConfig.model_fields["sequence_length"].default)
    key = "max_position_embeddings"
    context = model.get(key, ModelConfig.model_fields[key].default)
    if type(length) is not int or type(context) is not int or length <= context:
        return ""
    return f"data.sequence_length {length:,} is longer than the model's context of {context:,}: {NO_RECIPE}"


def _open_run(path: Path, step: int | None, name: str) -> ModelSource:
    """Open a run with its newest intact checkpoint; a run without one is opened as a config."""
    folder = RunFolder.open(path)
    config = folder.config()
    reader = tokenizer_reader(folder.tokenizer, carry=False)
    if step is None and not folder.checkpoints():
        return ModelSource(
            SourceKind.RUN,
            name,
            config.model,
            declared=config.model.model_dump(mode="json"),
            run=config,
            tokenizer_reader=reader,
            problems=("no checkpoint yet",),
        )
    file = folder.checkpoint(step)
    source = open_checkpoint(file.path, name)
    return dataclasses.replace(
        source,
        kind=SourceKind.RUN,
        run=source.run or config,
        step=file.step,
        tokenizer_reader=reader or source.tokenizer_reader,
    )


def _model_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Settings as nested values of a run config; a key that is not a section belongs to the model."""
    keys = RunConfig.model_fields
    return parse_settings(
        item if re.split("[.=]", item)[0].strip() in keys else f"model.{item}" for item in settings
    )


def _what_if(source: ModelSource, values: Mapping[str, Any]) -> ModelSource:
    """A source with a changed config. Its weights no longer fit and are dropped."""
    if source.run is None and set(values) - {"model"}:
        key = next(iter(set(values) - {"model"}))
        raise UsageError(f"--set {key}: {source.id} has no training recipe", "Set keys of its model only.")
    config, origin = source.require_config(), f"{source.id} with --set"
    fields = config.model_dump()
    if config.head_dim * config.num_attention_heads == config.hidden_size:
        del fields["head_dim"]  # it was derived from the width, and is again
    if source.run is None:
        config = resolve_model_config(merge(fields, values["model"]), origin)
        return dataclasses.replace(source, config=config, tensors=None, weights=None)
    run = resolve_run_config(merge({**source.run.model_dump(), "model": fields}, values), origin)
    return dataclasses.replace(source, config=run.model, run=run, tensors=None, weights=None)
