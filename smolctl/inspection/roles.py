"""The roles of the tensors of any architecture: token table, positions, head, experts, or other.

Roles are determined by names: those of transformers' models, of llama.cpp and of Meta. If a table has an
unknown name, the totals that depend on it are unknown, because a wrong number is worse than none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from smolctl.arithmetic import ParameterRow

TOKENS = frozenset(
    (
        *("embed_tokens", "wte", "embed_in", "word_embeddings", "word_embedding", "shared"),
        *("embeddings", "embedding", "token_embd", "tok_embeddings", "tok_emb"),
        *("embed_tokens_per_layer", "per_layer_token_embd"),  # Gemma 3n's second table
    )
)
POSITIONS = re.compile(
    r"(.*\.)?(wpe|embed_positions|token_type(s|_embeddings)(_\d+)?|(\w+_)?pos(ition(s|al)?)?_emb\w*(\.\w+)?)"
)
# Modules of heads, including their biases. "output" and "head" are heads only as whole names.
HEADS = re.compile(
    r"(.*\.)?(lm_head|lm_loss|embed_out|proj_out|vocab_projector|generator_lm_head|mlm_head)(\.decoder)?"
    r"|(.*\.)?predictions(\.decoder)?|output|head|decoder|unembed"
)
EXPERTS = re.compile(r"(.*\.)?(experts(\..+)?|experts_.+|ffn_\w+_exps)")
NUMBER = re.compile(r"(^|\.)\d+(\.|$)")  # in the names of layers and their parts
# Suffixes of architecture classes whose head is as large as the token table.
WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")
# Model types whose config omits `tie_word_embeddings` when it is true, and whose files may contain both
# copies.
TIED_BY_DEFAULT = frozenset(
    (
        *("gpt2", "gpt_bigcode", "gpt_neo", "openai-gpt", "opt", "bloom", "falcon", "mpt", "mamba", "xglm"),
        *("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "albert", "electra", "deberta"),
        *("deberta-v2", "mpnet", "modernbert", "xlnet", "t5", "umt5", "bart", "mbart", "pegasus", "marian"),
        *("m2m_100", "led", "whisper", "gemma", "gemma2", "gemma3", "gemma3_text", "cohere", "cohere2"),
        *("starcoder2", "smollm3", "lfm2"),
    )
)
# Config keys for the number of experts per layer, and for the experts per token.
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "expert_count")
USED_EXPERTS = (
    *("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k"),
    *("moe_k", "top_k_experts", "num_selected_experts", "expert_used_count"),
)


class Role(Enum):
    """The role of a tensor."""

    TOKENS = auto()
    POSITIONS = auto()
    HEAD = auto()
    BODY = auto()
    UNKNOWN = auto()  # as long as the vocabulary, under an unknown name


@dataclass(frozen=True)
class Totals:
    """The numbers that people mean by "the number of parameters"; None if unknown."""

    unique: int | None  # every stored number once
    naive: int | None  # a tied head counted again
    non_embedding: int | None  # without token table, positions and head
    active: int | None  # used by one token: all of `unique` if there are no experts


def role_of(row: ParameterRow, vocabulary: int | None) -> Role:
    """The role of a tensor.

    Args:
        row: of the tensor.
        vocabulary: number of tokens of the model, if known.
    """
    module = row.module.removesuffix(".bias")
    last = module.rsplit(".", 1)[-1]
    if NUMBER.search(module):
        return Role.BODY
    if POSITIONS.fullmatch(module):
        return Role.POSITIONS
    if HEADS.fullmatch(module):
        return Role.HEAD
    if last in TOKENS and len(row.shape) == 2:
        return Role.TOKENS
    return Role.UNKNOWN if len(row.shape) > 1 and vocabulary in row.shape else Role.BODY


def total(
    rows: tuple[ParameterRow, ...],
    declared: Mapping[str, Any],
    known_roles: Mapping[str, Role] | None = None,
) -> Totals:
    """Add up the rows of any architecture.

    Args:
        rows: every parameter. A tied one adds to `naive` only.
        declared: the config as written in the source; contains the number of experts per token.
        known_roles: of modules, if they are known from more than their names.
    """
    vocabulary = vocabulary_of(rows, declared)
    roles = [(known_roles or {}).get(row.module) or role_of(row, vocabulary) for row in rows]
    unique = sum(row.parameters for row in rows if not row.tied)
    known = Role.TOKENS in roles and Role.UNKNOWN not in roles
    body = sum(row.parameters for row, role in zip(rows, roles, strict=True) if role is Role.BODY)
    return Totals(
        unique=unique,
        naive=sum(row.parameters for row in rows) if known else None,
        non_embedding=body if known else None,
        active=active_parameters(rows, declared),
    )


def with_tied_head(
    rows: tuple[ParameterRow, ...], declared: Mapping[str, Any]
) -> tuple[ParameterRow, ...] | None:
    """The rows of a file with a tied head as a separate row, whether the file contains a copy of it or not.

    Returns:
        None if neither the names nor the config show whether the head is tied.
    """
    vocabulary = vocabulary_of(rows, declared)
    roles = [role_of(row, vocabulary) for row in rows]
    placed = list(zip(rows, roles, strict=True))
    tables = [row for row, role in placed if role is Role.TOKENS and "per_layer" not in row.module]
    heads = [row for row, role in placed if role is Role.HEAD and len(row.shape) == 2 and not row.tied]
    if not tables or any(row.tied for row in rows):
        return rows
    tied = _tie_of(declared)
    if heads:
        copies = [row for row in heads if row.shape == tables[0].shape] if tied else []
        return tuple(_tied(row) if row in copies else row for row in rows)
    # The bias of a head is stored even if the head is tied.
    expected = Role.HEAD in roles or _expects_head(declared)
    if expected is False:
        return rows
    if len(tables) > 1 or (not expected and not tied) or declared.get("tie_word_embeddings") is False:
        return None
    return (*rows, _tied(tables[0], "lm_head"))


def _tied(row: ParameterRow, module: str = "") -> ParameterRow:
    return ParameterRow(module or row.module, row.shape, row.formula, row.parameters, tied=True)


def _tie_of(declared: Mapping[str, Any]) -> bool:
    """Whether a config ties the head to the table, explicitly or by the default of its type."""
    tied = declared.get("tie_word_embeddings")
    return bool(tied) if isinstance(tied, bool) else declared.get("model_type") in TIED_BY_DEFAULT


def _expects_head(declared: Mapping[str, Any]) -> bool | None:
    """Whether a model predicts tokens; None if its source does not show it."""
    architecture = declared.get("general.architecture")
    if architecture is not None:  # a GGUF: llama.cpp uses the table if there is no output tensor
        encodes = f"{architecture}.pooling_type" in declared
        causal = declared.get(f"{architecture}.attention.causal", not encodes)
        return bool(causal) and declared.get("general.type", "model") == "model"
    listed = declared.get("architectures")
    if not isinstance(listed, list) or not listed:
        return None
    name = str(listed[0])
    if name.endswith(WITH_HEAD):
        return True
    return False if "For" in name or name.endswith("Model") else None


def vocabulary_of(rows: Iterable[ParameterRow], declared: Mapping[str, Any]) -> int | None:
    """Number of tokens of a model: from its config, else from the table if its name is known."""
    for values in _sections(declared):
        if type(size := values.get("vocab_size")) is int:
            return int(size)
    tables = (row.shape[0] for row in rows if row.module.rsplit(".", 1)[-1] in TOKENS and len(row.shape) == 2)
    return next(tables, None)


def active_parameters(rows: tuple[ParameterRow, ...], declared: Mapping[str, Any]) -> int | None:
    """Parameters that one token uses, with its share of the experts; None if unknown.

    A token uses k of n experts, and therefore k/n of their parameters.
    """
    experts, used = _number(declared, EXPERT_COUNTS), _number(declared, USED_EXPERTS)
    own = [row for row in rows if not row.tied]
    unique = sum(row.parameters for row in own)
    inside = sum(row.parameters for row in own if _is_expert(row, experts))
    if not inside and (experts or 0) <= 1:
        return unique
    if not experts or not used or not inside or inside % experts or _number(declared, ("zero_expert_num",)):
        return None
    return unique - inside + inside // experts * used


def _is_expert(row: ParameterRow, experts: int | None) -> bool:
    stacked = len(row.shape) > 2 and row.shape[0] == experts and NUMBER.search(row.module) is not None
    return EXPERTS.fullmatch(row.module) is not None or stacked


def _number(declared: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    """The first integer under these names in a config, its text part, or a GGUF's metadata."""
    architecture = declared.get("general.architecture")
    keys = (*names, *(f"{architecture}.{name}" for name in names)) if architecture else names
    for values in _sections(declared):
        for key in keys:
            if type(value := values.get(key)) is int:
                return int(value)
    return None


def _sections(declared: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    nested = (declared.get(key) for key in ("text_config", "ffn_config", "llm_config", "language_config"))
    return (declared, *(values for values in nested if isinstance(values, Mapping)))
