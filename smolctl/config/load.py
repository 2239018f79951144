"""Combines files, `--set key=value` and options into one validated `RunConfig`.

Precedence, highest first: options, `--set`, the file, the defaults.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from smolctl.config.model import ModelConfig
from smolctl.config.run import RunConfig
from smolctl.errors import InputError, SettingError, UsageError
from smolctl.outside import (
    MAX_DEPTH,
    MAX_YAML_BYTES,
    YamlSyntaxError,
    first_fault,
    key_of,
    parse_yaml,
    path_meant,
    read_file,
    shown,
)

C = TypeVar("C", bound=BaseModel)
CHAT = "chat"  # the preset for conversations
LARGEST_CHAT_RATE = 3e-3
PER_SOURCE = ("text_field", "split")  # keys of data that may be a list with one entry per source


def presets_folder() -> Path:
    """The folder of the shipped configs: inside an installed package, or next to it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def preset_names() -> list[str]:
    """Names that `train` and every MODEL argument accept without a path."""
    return sorted(path.stem for path in presets_folder().glob("*.yaml"))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        InputError: the file is missing, is not YAML, or is not a mapping.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file", f"{path_meant(path)}Presets: {', '.join(preset_names())}.")
    remedy = "Correct the YAML; `smolctl inspect-config nano --yaml` shows one."
    try:
        text = read_file(path, remedy, MAX_YAML_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read as text ({error})", "Give a YAML config file.") from None
    content = parse_yaml(text, str(path), remedy)
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: not a config: the top level must be a mapping", "Start from a file in configs/."
        )
    return content


def config_path(name_or_path: str) -> Path:
    """The file of a preset name or of a path. A folder with a preset's name is ignored.

    Raises:
        InputError: neither exists.
    """
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        return path
    if name_or_path in preset_names():
        return presets_folder() / f"{name_or_path}.yaml"
    if path.is_dir():
        raise InputError(
            f"{name_or_path}: this is a folder, not a config",
            f"To train on the text in it: --data {name_or_path}",
        )
    raise InputError(
        f"{name_or_path}: no preset or file has this name",
        f"{preset_meant(name_or_path) or path_meant(path)}Presets: {', '.join(preset_names())}.",
    )


def preset_meant(name: str) -> str:
    """The beginning of a hint to the preset of a similar name; no text where there is none."""
    near = difflib.get_close_matches(name, preset_names(), n=1)
    return f"Did you mean {near[0]}? " if near else ""


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """`["train.steps=10"]` as a nested mapping; values are read as YAML.

    Raises:
        UsageError: an item has no `=`.
        InputError: a value exceeds the bounds of `smolctl.outside`.
    """
    values: dict[str, Any] = {}
    for item in settings:
        key, equals, value = item.partition("=")
        if not equals or not key or key.count(".") >= MAX_DEPTH:
            raise UsageError(
                f"--set {shown(item)[1:-1]}: expected key=value",
                "For example --set optimizer.learning_rate=3e-4.",
            )
        try:
            values[key.strip()] = parse_yaml(value, f"--set {key.strip()}", "Give a value such as 3e-4.")
        except YamlSyntaxError:
            values[key.strip()] = value
    return nested(values)


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with dotted names as sections: {"train.steps": 5} as {"train": {"steps": 5}}."""
    sections: dict[str, Any] = {}
    for key, value in settings.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        sections = merge(sections, value)
    return sections


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base`, with every leaf of `over` replacing its own."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = (
            merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
        )
    return merged


def load_run_config(
    name_or_path: str,
    settings: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
    model: ModelConfig | None = None,
) -> RunConfig:
    """Read a preset or a YAML file, and apply `--set` items and options to it.

    Args:
        name_or_path: a name in `configs/`, or the path of a YAML file.
        settings: `section.key=value` items.
        flags: nested values of the command's own options, which have the highest precedence.
        model: of the weights to start from. It replaces the file's model section, which describes new
            weights, except dropout, which is not a property of weights. A preset's sequences are limited to
            its context.
    """
    path = config_path(name_or_path)
    content, changes = read_yaml(path), merge(parse_settings(settings), flags or {})
    if _given(content, "model", "model_config") is not None:
        raise InputError(
            f"{name_or_path}: this is a nanotron recipe, which train cannot use directly",
            f"Translate it first: smolctl inspect-config {name_or_path} --yaml > mine.yaml",
        )
    if model is not None:
        dropout = _given(content, "model", "attention_dropout") or 0.0
        content = {**content, "model": {**model.model_dump(), "attention_dropout": dropout}}
        if is_preset(path):
            length = min(content["data"]["sequence_length"], model.max_position_embeddings)
            content = merge(content, {"data": {"sequence_length": length}})
            if path.stem == CHAT:
                rate = _chat_rate(content["optimizer"]["learning_rate"], model)
                content = merge(content, {"optimizer": {"learning_rate": rate}})
    return resolve_run_config(changed_recipe(path, content, changes), origin=str(name_or_path))


def _chat_rate(rate: float, model: ModelConfig) -> float:
    """The chat preset's peak rate for models other than SmolLM2-135M, for which it was written.

    It is inversely proportional to the number of weights in the blocks, that is, to layers × hidden_size².
    This formula is smolctl's own: nano, with a 45th of these weights, reaches 1.53 bits per byte of held-out
    answers with 3e-3 and 1.82 with 1e-4.
    """
    smollm2 = 30 * 576**2
    scaled = rate * smollm2 / (model.num_hidden_layers * model.hidden_size**2)
    return float(f"{min(scaled, LARGEST_CHAT_RATE):.2g}")


def is_preset(path: Path) -> bool:
    """Whether a file is one of the shipped configs."""
    return path.resolve().parent == presets_folder().resolve() and path.stem in preset_names()


def changed_recipe(path: Path, content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a config file with a user's changes and their consequences.

    A preset's schedule fits its own number of steps and its own peak. With another number of steps, its
    numbers of steps are scaled; with another peak, its minimum rate; under another `schedule.name`, that
    schedule's default decay applies. The user's own settings are never scaled, and neither is the user's own
    file. Of steps, epochs and minutes, the one that the user sets replaces the file's.

    Args:
        path: of the file; determines whether it is a preset or the user's own.
        content: of the file.
        changes: nested values that override the file's.

    Raises:
        UsageError: several of them set the length of the run.
    """
    if _given(changes, "data", "source") is not None:
        content = merge(content, {"data": {"weights": None}})  # they belonged to the file's own sources
        own = content["data"]
        kept = {key: own[key] for key in own if key not in PER_SOURCE or isinstance(own[key], str)}
        content = {**content, "data": kept}
    lengths = [key for key in ("steps", "epochs", "minutes") if _given(changes, "train", key) is not None]
    if len(lengths) > 1:
        raise UsageError(f"train.{lengths[0]} and train.{lengths[1]} cannot be combined", "Give one of them.")
    if lengths:
        content = merge(content, {"train": {"epochs": None, "minutes": None}})
    if not is_preset(path):
        return changed_run(content, changes)
    schedule = dict(content["schedule"])
    name = _given(changes, "schedule", "name") or schedule["name"]
    if name != schedule["name"]:  # 0: cosine and linear decay to the last step; wsd's share is SmolLM2's
        schedule |= {"decay_start": None, "decay_steps": 0.2 if name == "wsd" else 0}
    steps = _ratio(_given(changes, "train", "steps"), content["train"]["steps"])
    if lengths == ["minutes"]:  # the number of steps is not known yet, and shares fit any number
        schedule = _in_shares(schedule, content["train"]["steps"])
    for key in ("warmup_steps", "decay_start", "decay_steps"):
        if (schedule[key] or 0) >= 1:
            schedule[key] = max(1, round(schedule[key] * steps))
    return changed_run(with_scaled_floor({**content, "schedule": schedule}, changes), changes)


def _in_shares(schedule: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """A preset's schedule with its numbers of steps as shares of the preset's run."""
    start, shares = schedule["decay_start"], dict(schedule)
    if start is not None:
        shares |= {"decay_start": None, "decay_steps": max(0, steps - start)}
    for key in ("warmup_steps", "decay_steps"):
        if shares[key] >= 1:
            shares[key] /= steps
    return shares


def with_scaled_floor(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A run's nested values with the minimum learning rate scaled like the peak that the changes set."""
    peak = _ratio(_given(changes, "optimizer", "learning_rate"), values["optimizer"]["learning_rate"])
    if peak == 1:
        return dict(values)
    least = values["schedule"]["min_learning_rate"] * peak
    return merge(values, {"schedule": {"min_learning_rate": float(f"{least:.6g}")}})


def changed_run(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A run's nested values with changes applied.

    A new batch size lowers a micro-batch size that does not divide it, which affects only memory, unless the
    changes set both.
    """
    merged = merge(values, changes)
    batch, micro = (_given(merged, "train", key) for key in ("batch_size", "micro_batch_size"))
    train = changes.get("train")
    asked = train if isinstance(train, Mapping) else {}
    is_batch_alone = "batch_size" in asked and "micro_batch_size" not in asked
    if is_batch_alone and type(batch) is type(micro) is int:
        fitting = (size for size in range(min(micro, batch), 0, -1) if batch % size == 0)
        merged = merge(merged, {"train": {"micro_batch_size": next(fitting, micro)}})
    return merged


def _given(values: Mapping[str, Any], section: str, key: str) -> Any:
    """A key of a section; None if either is missing."""
    found = values.get(section)
    return found.get(key) if isinstance(found, Mapping) else None


def _ratio(asked: Any, own: float) -> float:
    """The factor between the requested value and the old one; 1 if the request is invalid, which
    validation reports later.
    """
    is_number = isinstance(asked, int | float) and not isinstance(asked, bool) and 0 < asked < math.inf
    return asked / own if is_number else 1


def resolve_run_config(values: Mapping[str, Any], origin: str) -> RunConfig:
    """Validate nested values.

    Raises:
        InputError: naming the first invalid key, with a suggestion if it is unknown.
    """
    return _validate(RunConfig, values, origin)


def resolve_model_config(values: Mapping[str, Any], origin: str) -> ModelConfig:
    """Validate only the fields of a model. Raises as `resolve_run_config`."""
    return _validate(ModelConfig, values, origin)


def _validate(schema: type[C], values: Mapping[str, Any], origin: str) -> C:
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        raise _config_error(schema, error, origin) from None


def _config_error(schema: type[BaseModel], error: ValidationError, origin: str) -> InputError:
    problems = error.errors(include_url=False)
    first = problems[0]
    keys = list(dict.fromkeys(key_of(problem) for problem in problems))
    key, more = keys[0], f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
    if first["type"] == "extra_forbidden":
        *section, name = (str(part) for part in first["loc"])
        known = _keys_beside(schema, [*section, name])
        elsewhere = [path for path, _ in settings_of(schema) if path.rpartition(".")[2] == name]
        near = elsewhere or [".".join((*section, one)) for one in _near(name, known)]
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Known keys here: {', '.join(known)}."
        return InputError(f"{origin}: unknown key {key}{more}", hint)
    remedy = "Change the value and run again."
    if not key:
        return InputError(f"{origin}: {first_fault(error)}{more}", remedy)
    return SettingError(origin, key, first_fault(error).removeprefix(f"{key}: ") + more, remedy)


def settings_of(schema: type[BaseModel], section: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """All settings of a schema with their dotted names: `train.steps`."""
    for name, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from settings_of(field.annotation, f"{section}{name}.")
        else:
            yield f"{section}{name}", field


def _near(key: str, known: list[str]) -> list[str]:
    """The key that was probably meant, or the two best candidates."""
    return difflib.get_close_matches(key, known, 1, 0.8) or difflib.get_close_matches(key, known, 2, 0.5)


def _keys_beside(schema: type[BaseModel], location: list[str]) -> list[str]:
    for part in location[:-1]:
        annotation = schema.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        schema = annotation
    return list(schema.model_fields)
