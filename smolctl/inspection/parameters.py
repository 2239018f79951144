"""The parameter count of a source: by formula if smolctl supports the network, else from its header, else
from its architecture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import prod
from typing import Any

from smolctl.arithmetic import ParameterRow, count_rows, parameter_rows, tensor_rows
from smolctl.config import ModelConfig
from smolctl.errors import InputError
from smolctl.inspection.roles import Totals, total, with_tied_head
from smolctl.inspection.stored import BYTES, SortedTensors, sort_tensors
from smolctl.inspection.tree import ModuleNode, module_tree
from smolctl.sources.base import ModelSource, TensorHeader
from smolctl.sources.huggingface.config import assumed_keys
from smolctl.sources.shapes import check_rows

# The name of the number of layers in formulas for smolctl's network.
LAYERS = "num_hidden_layers"
WIDTHS = ("hidden_size", "d_model", "n_embd", "dim")  # the width of tables in different architectures


class NothingToCountError(InputError):
    """A source has neither a config nor a header."""


class Basis(StrEnum):
    """The basis of a count."""

    CONFIG = "config"
    HEADER = "header"
    TRANSFORMERS = "transformers"  # the network that transformers builds from the config
    FIELDS = "fields"  # a config of an unknown architecture: only a part of the model


@dataclass(frozen=True)
class Aside:
    """Tensors in a header that are not parameters."""

    tensors: int
    numbers: int


@dataclass(frozen=True)
class ParameterReport:
    """The parameter count of one source."""

    source: ModelSource
    basis: Basis
    totals: Totals
    tree: tuple[ModuleNode, ...]
    agrees: bool | None  # header and config; None if there is only one of them
    notes: tuple[str, ...] = ()  # for the reader of the numbers
    what_if: tuple[str, ...] = ()  # settings that make it a different model from the source's
    partial: bool = False  # the rows are only a part of the model
    aside: Mapping[str, Aside] = field(default_factory=dict)  # in the file but not counted, by kind

    def rows(self, depth: int) -> tuple[ModuleNode, ...]:
        """The tree of names cut at `depth` parts; the untied rows add up to `unique`."""
        return tuple(node for top in self.tree for node in top.at_depth(depth))


def count_source(source: ModelSource, what_if: Sequence[str] = ()) -> ParameterReport:
    """Count a model's parameters without its weights.

    Args:
        source: its config, its header, or both.
        what_if: settings by which its config was changed deliberately.

    Raises:
        NothingToCountError: there is neither a config nor a header.
        InputError: they contradict each other.
    """
    stored = None if source.tensors is None or what_if else _sorted(source)
    shape = source.config or source.shape
    if shape is not None:
        return _count_config(source, shape, stored, tuple(what_if))
    if stored is not None:
        return _count_header(source, stored)
    if not source.declared:
        raise NothingToCountError(
            f"{source.id}: {source.unsupported}, and there is no header of weights to count",
            "Name a config.json, or a file or Hub model with weights in .safetensors or .gguf.",
        )
    return _count_architecture(source)


def parameters_in(source: ModelSource) -> int | None:
    """Parameters in a header, unpacked; None if some are packed in an unknown way."""
    stored = _sorted(source)
    counted = [tensor.parameters for tensor in stored.parameters if not tensor.shares]
    return None if stored.unknown else sum(counted)


def _sorted(source: ModelSource) -> SortedTensors:
    return sort_tensors(source.tensors or (), source.declared, source.id)


def _count_config(
    source: ModelSource, shape: ModelConfig, stored: SortedTensors | None, what_if: tuple[str, ...]
) -> ParameterReport:
    rows = _with_its_head(parameter_rows(shape), source.declared)
    mismatches: tuple[str, ...] = ()
    if stored is not None:
        expected = {row.tensor: row.shape for row in rows}
        shapes = {one.name: _unflattened(one, expected.get(one.name)) for one in stored.parameters}
        mismatches = check_rows(rows, shapes)
        if stored.unknown:  # only the config determines how many weights these contain
            mismatches = ()
        elif mismatches and source.config is None:  # without a runnable model, the file counts
            return _count_header(source, stored)
    count = count_rows(rows)
    totals = Totals(count.unique, count.naive, count.non_embedding, count.unique)
    assumed = assumed_keys(source.declared)
    tree = module_tree(rows, LAYERS)
    report = ParameterReport(source, Basis.CONFIG, totals, tree, None, assumed, what_if=what_if)
    if stored is None:
        return report
    notes = (*mismatches, *assumed, *_notes(stored))
    agrees = None if stored.unknown else not mismatches
    return replace(report, agrees=agrees, notes=notes, aside=_aside(stored))


def _unflattened(tensor: TensorHeader, expected: tuple[int, ...] | None) -> tuple[int, ...]:
    """A matrix's shape if a format packs its numbers into a flat list (bitsandbytes)."""
    is_flat = tensor.dtype in BYTES and len(tensor.shape) == 1 and expected is not None
    return expected if is_flat and expected and prod(expected) == tensor.parameters else tensor.shape


def _with_its_head(rows: tuple[ParameterRow, ...], declared: Mapping[str, Any]) -> tuple[ParameterRow, ...]:
    """The rows of a Llama with the head of its architecture: none, or one for sequence classification."""
    listed = declared.get("architectures")
    name = str(listed[0]) if isinstance(listed, list) and listed else ""
    if not name.endswith(("Model", "ForSequenceClassification")):
        return rows
    body = tuple(row for row in rows if row.module != "lm_head")
    if name.endswith("Model"):
        return body
    labels, names = declared.get("num_labels"), declared.get("id2label")
    count = len(names) if isinstance(names, Mapping) and names else labels if type(labels) is int else 2
    width = rows[0].shape[1]
    score = ParameterRow("score", (count, width), "num_labels × hidden_size", count * width)
    return (*body, score)


def _count_header(source: ModelSource, stored: SortedTensors) -> ParameterReport:
    rows = tensor_rows((tensor.name, tensor.shape) for tensor in stored.parameters)
    shared = {tensor.name.removesuffix(".weight") for tensor in stored.parameters if tensor.shares}
    rows = tuple(replace(row, tied=row.module in shared) for row in rows)
    tied = with_tied_head(rows, source.declared)
    totals = total(tied or rows, source.declared)
    if tied is None:
        totals = replace(totals, naive=None)
    missing = source.missing_parts
    if stored.unknown or missing:
        totals = Totals(None, None, None, None)
    notes: tuple[str, ...] = (
        f"{source.unsupported}: smolctl cannot run this network and counts what the header lists",
    )
    if missing:
        here = sum(row.parameters for row in rows if not row.tied)
        notes += (f"{missing}: the parts that are present have {here:,} parameters",)
    return ParameterReport(
        source,
        Basis.HEADER,
        totals,
        module_tree(tied or rows),
        None,
        (*notes, *_notes(stored)),
        partial=bool(missing or stored.unknown),
        aside=_aside(stored),
    )


def _count_architecture(source: ModelSource) -> ParameterReport:
    from smolctl.inspection.architectures import Architecture, build_architecture

    known = source.declared.get("model_type") or source.declared.get("architectures")
    built = build_architecture(source.declared) if known else source.unsupported
    if isinstance(built, Architecture):
        rows = built.rows
        totals, note = total(rows, built.config, built.roles), "counted as transformers builds it"
        totals = replace(totals, naive=sum(row.parameters for row in rows))
        notes = (f"{source.unsupported}: {note}", *built.assumed)
        return ParameterReport(source, Basis.TRANSFORMERS, totals, module_tree(rows), None, notes)
    rows = _known_rows(source.declared)
    notes = (f"{built}: only the parts that the config describes are listed, not the whole model",)
    nothing = Totals(None, None, None, None)
    return ParameterReport(source, Basis.FIELDS, nothing, module_tree(rows), None, notes, partial=True)


def _known_rows(declared: Mapping[str, Any]) -> tuple[ParameterRow, ...]:
    """The rows that the fields of a config determine for any architecture: the token table."""
    text = declared.get("text_config")
    values: Mapping[str, Any] = {**declared, **text} if isinstance(text, Mapping) else declared
    widths = [values[key] for key in WIDTHS if values.get(key) is not None]
    sizes = (values.get("vocab_size"), *widths[:1])
    shape = tuple(size for size in sizes if type(size) is int and size > 0)
    return tensor_rows([("token table", shape)]) if len(shape) == 2 else ()


def _aside(stored: SortedTensors) -> dict[str, Aside]:
    kinds = {"scales": stored.scales, "buffers": stored.buffers, "packed": stored.unknown}
    return {
        kind: Aside(len(tensors), sum(tensor.parameters for tensor in tensors))
        for kind, tensors in kinds.items()
        if tensors
    }


def _notes(stored: SortedTensors) -> Iterable[str]:
    for tensors, what in (
        (stored.scales, "scales and offsets of quantized weights"),
        (stored.buffers, "buffers, which are not parameters"),
    ):
        if tensors:
            numbers = sum(tensor.parameters for tensor in tensors)
            yield f"not counted: {len(tensors):,} tensors of {numbers:,} numbers: {what}"
    if stored.unknown:
        yield (
            f"{len(stored.unknown):,} tensors contain packed integers in an unknown layout "
            f"({stored.unknown[0].name} is the first), so their number of weights is not known"
        )
