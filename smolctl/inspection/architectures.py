"""The parameters of an architecture that smolctl does not support, built by transformers without memory.

Only this module imports PyTorch for counting. A module on the meta device has shapes but no data: one with
100 billion parameters is built in a second.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smolctl.arithmetic import ParameterRow, tensor_rows
from smolctl.inspection.roles import Role
from smolctl.outside import shown
from smolctl.sources.huggingface.config import SIZES, assumption

if TYPE_CHECKING:
    import transformers

# More would mean a damaged file or an attack, and take minutes. Published models have up to 126 layers (Llama
# 3.1 405B) and 512 experts (Qwen3-Next).
MAX_BLOCKS, MAX_EXPERTS = 1_000, 4_096
# Words in the names of sizes that count modules, and in the names of other sizes of layers, such as
# vocab_size_per_layer_input.
EXPERTS = {"expert", "experts", "nexperts"}
COUNTED = {"layer", "layers", "nlayers", "block", "blocks", "depth", "depths", *EXPERTS}
MEASURED = {"size", "dim"}


@dataclass(frozen=True)
class Architecture:
    """A network built by transformers."""

    rows: tuple[ParameterRow, ...]  # every parameter, a tied head last
    config: Mapping[str, Any]  # with the values that the config.json omits
    roles: Mapping[str, Role]  # of the modules that the network identifies itself
    assumed: tuple[str, ...] = ()  # sizes that the config.json omits


def build_architecture(declared: Mapping[str, Any]) -> Architecture | str:
    """Build the network that a config.json describes, and list its parameters.

    Args:
        declared: the config.json. Code that it names is never executed.

    Returns:
        The network, or the reason why there is none: transformers does not support the architecture, or
        cannot build it from the config.
    """
    if reason := _not_buildable(declared):
        return reason
    try:
        network = _network(declared)
    except Exception as error:  # whatever a class of transformers raises for the values
        text = " ".join(str(error).split())
        return f"transformers: {text[:200] or type(error).__name__}"
    if isinstance(network, str):
        return network
    rows = tensor_rows((name, tuple(tensor.shape)) for name, tensor in network.named_parameters())
    if not rows:
        return f"transformers' {type(network).__name__} has no parameters"
    assumed: list[str] = []
    with suppress(Exception):  # some classes of transformers raise when a size is read
        assumed += _assumed(network.config, declared)
    rows = (*rows, *_tied_head(network))
    return Architecture(rows, network.config.to_dict(), _roles(network), tuple(assumed))


def _roles(network: Any) -> dict[str, Role]:
    """The modules that the network itself identifies as token table and head."""
    names = {id(tensor): name.removesuffix(".weight") for name, tensor in network.named_parameters()}
    found: dict[str, Role] = {}
    for get, role in (("get_output_embeddings", Role.HEAD), ("get_input_embeddings", Role.TOKENS)):
        with suppress(NotImplementedError, AttributeError):  # for images or audio
            module = getattr(network, get)()
            tensors = (getattr(module, key, None) for key in ("weight", "bias"))
            found |= {names[id(tensor)]: role for tensor in tensors if id(tensor) in names}
    return found


def _assumed(config: Any, declared: Mapping[str, Any], part: str = "") -> Iterator[str]:
    """Sizes of a config and of its parts that a config.json omits, so that their defaults apply."""
    names = type(config).attribute_map
    usual = type(config)()
    for size in SIZES:
        key = names.get(size, size)
        value = getattr(config, key, None)
        is_given = key in declared or size in declared
        if not is_given and type(value) is int and value == getattr(usual, key, None):
            yield assumption(f"{part}{key}", value)
    for key in type(config).sub_configs:
        inner = declared.get(key)
        if (below := getattr(config, key, None)) is not None:
            yield from _assumed(below, inner if isinstance(inner, Mapping) else {}, f"{part}{key}.")


def _network(declared: Mapping[str, Any]) -> transformers.PreTrainedModel | str:
    """The network on the meta device, or the reason why transformers has none."""
    import torch
    import transformers

    listed = declared.get("architectures")
    name = str(listed[0]) if isinstance(listed, list) and listed else ""
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        found = None
    model_type = declared.get("model_type") or getattr(found and found.config_class, "model_type", None)
    if model_type not in transformers.CONFIG_MAPPING:
        named = f"model_type {shown(model_type)}" if model_type else "a config.json without model_type"
        return f"transformers {transformers.__version__} does not know {named}"
    with _silent():
        values = {key: value for key, value in declared.items() if key not in IGNORED}
        config = transformers.AutoConfig.for_model(**{**_with_infinities(values), "model_type": model_type})
        if not hasattr(config, "pad_token_id"):  # some classes read it although their config has it in a part
            config.pad_token_id = None
        kind = found or _usual_class(config)
        with torch.device("meta"):
            built: transformers.PreTrainedModel = kind._from_config(config, attn_implementation="eager")
        return built


def _with_infinities(value: Any) -> Any:
    """Nested values with the numbers that JSON lacks, which transformers writes as objects with one key."""
    if isinstance(value, list):
        return [_with_infinities(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    if value.keys() == {"__float__"}:
        return float(value["__float__"])
    return {key: _with_infinities(item) for key, item in value.items()}


# Neither a network's storage nor its authors' code changes its parameters.
IGNORED = ("quantization_config", "quantization", "auto_map", "torch_dtype", "dtype", "transformers_version")


def _usual_class(config: Any) -> Any:
    """The class for a config that names none of transformers' classes: with a head if one exists."""
    import transformers

    autos = ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
    for auto in (*autos, "AutoModelForMaskedLM", "AutoModel"):
        mapping = getattr(transformers, auto)._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise ValueError(f"no model class for {type(config).__name__}")


def _tied_head(network: Any) -> tuple[ParameterRow, ...]:
    """The head as a separate row if it is tied to the token table."""
    try:
        head, table = network.get_output_embeddings(), network.get_input_embeddings()
    except NotImplementedError:  # for images or audio
        return ()
    if head is None or getattr(head, "weight", None) is not getattr(table, "weight", network):
        return ()
    row = tensor_rows([("lm_head", tuple(head.weight.shape))])[0]
    return (ParameterRow(row.module, row.shape, row.formula, row.parameters, tied=True),)


def _not_buildable(declared: Mapping[str, Any]) -> str:
    """The first number of modules that no published model has, or a part that would have to be downloaded."""
    if isinstance(backbone := declared.get("backbone"), str):
        return f"its backbone {shown(backbone)} is another model, whose config is not here"
    for key, value in _numbers(declared):
        words = set(key.lower().split("_"))
        most = MAX_EXPERTS if words & EXPERTS else MAX_BLOCKS
        if words & COUNTED and not words & MEASURED and value > most:
            return f"{key} {value:,} is more than {most:,}, and is not built"
    return ""


def _numbers(declared: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for key, value in declared.items():
        if type(value) is int:
            yield str(key), value
        elif isinstance(value, Mapping):
            yield from _numbers(value)


@contextmanager
def _silent() -> Iterator[None]:
    """Suppresses transformers' warnings about unknown keys."""
    from transformers.utils import logging as logs

    level = logs.get_verbosity()
    logs.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logs.set_verbosity(level)
