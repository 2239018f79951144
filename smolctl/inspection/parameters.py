"""How many parameters a source has: by arithmetic where the network is ours, else by its header."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from smolctl.arithmetic import ParameterCount, ParameterRow, count_parameters, count_rows, tensor_rows
from smolctl.errors import InputError
from smolctl.inspection.tree import ModuleNode, module_tree
from smolctl.sources.base import ModelSource, TensorHeader
from smolctl.sources.shapes import check_tensors, is_derived

# What the formulas call the number of layers of our own network.
LAYERS = "num_hidden_layers"
# Numbers that hold several packed weights each (GPTQ, AWQ, bitsandbytes and the like).
PACKED_DTYPES = {"U8", "I8", "I16", "I32", "I64"}


class Basis(StrEnum):
    """What was counted."""

    CONFIG = "config"
    HEADER = "header"


@dataclass(frozen=True)
class ParameterReport:
    """The parameters of one source."""

    source: ModelSource
    basis: Basis
    count: ParameterCount
    tree: tuple[ModuleNode, ...]
    agrees: bool | None  # header with config; None when there is only one of them
    notes: tuple[str, ...] = ()  # what a reader of the numbers should know
    what_if: tuple[str, ...] = ()  # settings that make this another model than the source's

    def rows(self, depth: int) -> tuple[ModuleNode, ...]:
        """The tree cut where names have `depth` parts; those not tied add up to `unique`."""
        return tuple(node for top in self.tree for node in top.at_depth(depth))


def count_source(source: ModelSource, what_if: Sequence[str] = ()) -> ParameterReport:
    """Count a model without its weights.

    Args:
        source: its config, its header, or both.
        what_if: the settings that its config was changed by on purpose.

    Raises:
        InputError: there is neither a config for this network nor a header.
    """
    if source.config is None:
        return _count_header(source)
    count = count_parameters(source.config)
    tree = module_tree(count.rows, LAYERS)
    if source.tensors is None or what_if:
        return ParameterReport(source, Basis.CONFIG, count, tree, None, what_if=tuple(what_if))
    mismatches = check_tensors(source.config, source.tensors)
    return ParameterReport(source, Basis.CONFIG, count, tree, not mismatches, mismatches)


def stored_parameters(tensors: Iterable[TensorHeader]) -> int:
    """Numbers in a file, without those that follow from the config."""
    return sum(tensor.parameters for tensor in tensors if not is_derived(tensor.name))


def _count_header(source: ModelSource) -> ParameterReport:
    if source.tensors is None:
        raise InputError(
            f"{source.id}: {source.unsupported}, and there is no header of weights to count",
            "Name a file or a Hub model with weights in .safetensors or .gguf.",
        )
    rows = tensor_rows((tensor.name, tensor.shape) for tensor in source.tensors)
    notes = [f"{source.unsupported}: smolctl cannot run this network and counts what the header lists"]
    head = _tied_head(source, rows)
    if head:
        rows = (*rows, head)
    packed = sum(tensor.dtype in PACKED_DTYPES for tensor in source.tensors)
    if packed:
        notes.append(
            f"{packed:,} tensors hold packed integers, several weights in one number: the totals are too low"
        )
    return ParameterReport(source, Basis.HEADER, count_rows(rows), module_tree(rows), None, tuple(notes))


def _tied_head(source: ModelSource, rows: tuple[ParameterRow, ...]) -> ParameterRow | None:
    """The head that a config calls tied and the header therefore leaves out."""
    tables = [row for row in rows if row.module.endswith((".embed_tokens", ".wte")) and len(row.shape) == 2]
    stored = any(row.module.split(".")[-1] in ("lm_head", "embed_out") for row in rows)
    if not source.declared.get("tie_word_embeddings") or stored or not tables:
        return None
    table = tables[0]
    return ParameterRow("lm_head", table.shape, table.formula, table.parameters, tied=True)
