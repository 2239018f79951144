"""Tensor names and shapes: whether they fit a config, and a config derived from them if there is none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypeVar

from smolctl.arithmetic import ParameterRow, parameter_rows
from smolctl.config import ModelConfig
from smolctl.errors import InputError
from smolctl.sources.base import TensorHeader

TABLE = "model.embed_tokens.weight"
POSITIONS = "model.embed_positions.weight"
HEAD = "lm_head.weight"
LAYER = re.compile(r"model\.layers\.(\d+)\.")
FIRST = "model.layers.0."
# Old transformers, llama.cpp and Meta store these; they follow from rope_theta and rope_scaling.
DERIVED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq|rope_freqs\.weight|rope\.freqs")
NO_WEIGHT = re.compile(r"(?:^|\W)(u?int\d+|bool|complex\d+)$")  # types of NumPy and PyTorch
MAX_LAYERS = 10_000  # more would be a damaged file
NAMED_PROBLEMS = 5  # maximum number in an error message


class Shaped(Protocol):
    """An array, a tensor, or a matrix of integers."""

    @property
    def shape(self) -> Any: ...


S = TypeVar("S", bound=Shaped)
T = TypeVar("T")


def check_state(config: ModelConfig, tensors: Mapping[str, S], origin: str) -> dict[str, S]:
    """The tensors that a network of this config loads, without a tied head's copy and derived tensors.

    Args:
        config: of the network.
        tensors: under their Hugging Face names.
        origin: their name in an error.

    Raises:
        InputError: tensors are missing, unexpected or mis-shaped, each of them named, or of integers, or a
            tied model's head differs from its table.
    """
    state = {name: tensor for name, tensor in tensors.items() if not is_derived(name)}
    for name, tensor in state.items():
        # A quantized matrix has no type of its own.
        if found := NO_WEIGHT.search(str(getattr(tensor, "dtype", ""))):
            kind = "complex numbers" if found[1].startswith("complex") else "integers"
            raise InputError(
                f"{origin}: {name} contains {kind}, and nothing says how to convert them to weights",
                "Save the model in floats, or in a format that smolctl reads.",
            )
    if config.tie_word_embeddings and HEAD in state and TABLE in state:
        head, table = state.pop(HEAD), state[TABLE]
        if not _equal(head, table):
            raise InputError(
                f"{origin}: the config ties lm_head to the token table, but the file holds another lm_head",
                "Set tie_word_embeddings: false in the config if the head is meant to be its own.",
            )
    problems = check_shapes(config, {name: tuple(tensor.shape) for name, tensor in state.items()})
    if problems:
        more = len(problems) - NAMED_PROBLEMS
        raise InputError(
            f"{origin}: the weights do not fit the config: {', '.join(problems[:NAMED_PROBLEMS])}"
            + (f" and {more} more" if more > 0 else ""),
            "Is this the right config for these weights? `smolctl inspect-config` compares both.",
        )
    return state


def with_table(tensors: Mapping[str, T], tied: bool) -> dict[str, T]:
    """Tensors of a tied model that stores one for table and head, under the table's name."""
    found = dict(tensors)
    if tied and HEAD in found and TABLE not in found:
        found[TABLE] = found.pop(HEAD)
    return found


def check_tensors(config: ModelConfig, tensors: Iterable[TensorHeader]) -> tuple[str, ...]:
    """`check_shapes` of a file's header."""
    return check_shapes(config, {tensor.name: tensor.shape for tensor in tensors})


def _equal(one: Any, other: Any) -> bool:
    """Whether two arrays or tensors are equal; matrices of integers are not compared."""
    if not hasattr(one, "dtype") or not hasattr(other, "dtype"):
        return False
    return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())


def check_shapes(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Every missing, unexpected or mis-shaped tensor by name; empty if the shapes fit the config.

    A stored `lm_head.weight` of a tied model is accepted here; whether it equals the table is checked when
    the weights are read.
    """
    return check_rows(parameter_rows(config), shapes)


def check_rows(parameters: Iterable[ParameterRow], shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """`check_shapes` of a list of parameters."""
    rows = {row.tensor: row for row in parameters}
    given = {name: shape for name, shape in shapes.items() if not is_derived(name)}
    missing = [f"missing {name}" for name, row in rows.items() if name not in given and not row.tied]
    unexpected = [f"unexpected {name}" for name in given if name not in rows]
    misshaped = [
        f"{name} is {list(given[name])}, the config says {list(row.shape)}"
        for name, row in rows.items()
        if name in given and given[name] != row.shape
    ]
    return (*missing, *unexpected, *misshaped)


def tensor_name(module: str, config: ModelConfig) -> str:
    """The tensor of a module that multiplies or looks up; for a tied head, the token table."""
    return TABLE if module == "lm_head" and config.tie_word_embeddings else f"{module}.weight"


def no_rope_layers(layers: int, interval: int) -> list[int]:
    """`no_rope_layers` of a model in which every `interval`-th layer has no RoPE."""
    return [int(index % interval != 0) for index in range(1, min(layers, MAX_LAYERS) + 1)]


def is_derived(name: str) -> bool:
    """Whether a stored tensor is not a weight but derived from the config."""
    return DERIVED.fullmatch(name) is not None


def recover_config(tensors: Iterable[TensorHeader]) -> tuple[ModelConfig | None, str, tuple[str, ...]]:
    """The Llama-like network with these tensors, or the reason why there is none, and the assumed values.

    Shapes do not show head_dim, rope_theta or the context length.
    """
    headers = {tensor.name: tensor for tensor in tensors}
    shapes = {name: tensor.shape for name, tensor in headers.items()}
    sizes = {
        TABLE: shapes.get(TABLE),
        "q_proj": shapes.get(f"{FIRST}self_attn.q_proj.weight"),
        "k_proj": shapes.get(f"{FIRST}self_attn.k_proj.weight"),
        "gate_proj": shapes.get(f"{FIRST}mlp.gate_proj.weight"),
    }
    for name, shape in sizes.items():
        if shape is None or len(shape) != 2 or 0 in shape:
            return None, f"no config.json, and the tensor names are not Llama's (no {name})", ()
    vocab, hidden = shapes[TABLE]
    queries, keys = shapes[f"{FIRST}self_attn.q_proj.weight"][0], shapes[f"{FIRST}self_attn.k_proj.weight"][0]
    head_dim = likely_head_dim(hidden, queries, keys)
    layers = 1 + max(int(match[1]) for name in shapes if (match := LAYER.match(name)))
    if head_dim is None or layers > MAX_LAYERS:
        return None, "no config.json, and the tensor shapes are not a Llama's", ()
    fields: dict[str, object] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": shapes[f"{FIRST}mlp.gate_proj.weight"][0],
        "num_hidden_layers": layers,
        "num_attention_heads": queries // head_dim,
        "num_key_value_heads": keys // head_dim,
        "head_dim": head_dim,
        "tie_word_embeddings": HEAD not in shapes or headers[HEAD].shares == TABLE,
        **_positions(shapes),
    }
    try:
        config = ModelConfig.model_validate(fields)
    except ValueError:
        return None, "no config.json, and the tensor shapes are not a Llama's", ()
    if problems := check_shapes(config, shapes):
        return None, f"no config.json, and the tensors are not a Llama's ({problems[0]})", ()
    return config, "", _assumptions(config)


def likely_head_dim(hidden: int, queries: int, keys: int) -> int | None:
    """The usual head size of Llama models of this width; None if none divides it.

    Up to a width of 2,048 that is 64 (SmolLM, TinyLlama, Llama 3.2 1B), above it 128 (Llama 7B, 8B).
    """
    usual = (64, 128) if hidden < 3_072 else (128, 64)
    for size in (*usual, 96, 80, 256, 32, 16, 8, 4, 2):
        if queries % size == 0 and keys % size == 0 and (queries // size) % (keys // size) == 0:
            return size
    return None


def _positions(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object]:
    learned = shapes.get(POSITIONS)
    if learned is not None:
        return {"position_embedding": "learned", "max_position_embeddings": learned[0]}
    return {
        "position_embedding": "rope",
        "residual_scale": 1.0,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 2_048,
    }


def _assumptions(config: ModelConfig) -> tuple[str, ...]:
    common = (
        "no config: it was recovered from the tensor shapes",
        f"head_dim {config.head_dim} is assumed: shapes alone do not show it",
        f"rms_norm_eps {config.rms_norm_eps:g} is assumed: shapes do not show it",
    )
    if config.position_embedding == "learned":
        return (*common, f"residual_scale {config.residual_scale:.4f} is assumed: shapes do not show it")
    return (
        *common,
        f"rope_theta {config.rope_theta:,.0f} is assumed: put the model's config.json beside the file",
        f"a context of {config.max_position_embeddings:,} is assumed: shapes do not show it",
    )
