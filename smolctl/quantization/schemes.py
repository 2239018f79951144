"""Plans how each scheme stores every tensor; a plan can be shown before anything is computed."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import get_args

from smolctl.arithmetic import parameter_rows
from smolctl.config import ModelConfig
from smolctl.errors import InputError, UsageError
from smolctl.sources.gguf.header import K_BLOCK
from smolctl.sources.gguf.write import BITS, BLOCK_SCHEMES, block_of, require_gguf, wider_blocks
from smolctl.sources.quantized.packed import BLOCK
from smolctl.sources.quantized_folder import DYNAMIC, FolderScheme, PackedScheme
from smolctl.sources.shapes import HEAD, TABLE

GGUF_SCHEMES = tuple(f"gguf-{scheme}" for scheme in ("bf16", "f16", *BLOCK_SCHEMES))
PACKED_SCHEMES: tuple[str, ...] = get_args(PackedScheme)
SCHEMES: tuple[str, ...] = (*get_args(FolderScheme), *GGUF_SCHEMES)
USUAL_GROUP = 128  # the largest that other tools offer
STORED = {4: "int4", 8: "int8", 16: "bfloat16", 32: "float32"}  # a tensor, by its bits


@dataclass(frozen=True)
class SchemeOptions:
    """Options of a scheme."""

    group: int = 32  # columns that share a scale
    skip: tuple[str, ...] = ()  # patterns of tensors that are not quantized
    bits_map: tuple[tuple[str, int], ...] = ()  # patterns with bits; the first match counts
    activations: str = "per-tensor"  # of int8-dynamic
    per_row: bool = False  # for int8-dynamic: a scale for each row of a matrix
    calibrate: bool = False

    @property
    def patterns(self) -> tuple[str, ...]:
        return (*self.skip, *(pattern for pattern, _ in self.bits_map))


@dataclass(frozen=True)
class TensorPlan:
    """How one tensor will be stored."""

    name: str
    shape: tuple[int, ...]
    bits: int  # 4 or 8 (5 too in a GGUF): packed; 16: bfloat16 (float16 too in a GGUF); 32: float32
    group: int | None = None  # columns that share a scale, of a packed matrix
    block: str = ""  # for a GGUF: the type of its blocks, such as "q4_0"

    @property
    def packed(self) -> bool:
        return self.bits in (4, 8)

    @property
    def label(self) -> str:
        return self.block or STORED[self.bits]


@dataclass(frozen=True)
class QuantizationPlan:
    """How a whole model will be stored."""

    scheme: str
    tensors: tuple[TensorPlan, ...]
    options: SchemeOptions = field(default_factory=SchemeOptions)

    def summary(self) -> tuple[str, ...]:
        """One line for each kind of storage: how many tensors, which, and how many numbers."""
        groups: dict[str, list[TensorPlan]] = {}
        for tensor in self.tensors:
            key = f"{tensor.label} in groups of {tensor.group}" if tensor.group else tensor.label
            groups.setdefault(key, []).append(tensor)
        return tuple(f"{key}: {_what(tensors)}" for key, tensors in groups.items())


def _what(tensors: Sequence[TensorPlan]) -> str:
    kinds = Counter(tensor.name.removesuffix(".weight").split(".")[-1] for tensor in tensors)
    names: dict[int, list[str]] = {}
    for name, count in kinds.items():
        names.setdefault(count, []).append(name)
    named = "; ".join(
        (f"{count} × " if count > 1 else "") + ", ".join(those) for count, those in names.items()
    )
    numbers = sum(math.prod(tensor.shape) for tensor in tensors)
    return f"{numbers:,} numbers ({named})"


def check_scheme(scheme: str, config: ModelConfig) -> None:
    """Refuse a scheme that does not exist or does not support the model, with the reason.

    Raises:
        UsageError: there is no such scheme.
        InputError: the scheme does not support the model.
    """
    name = scheme.removeprefix("gguf-")
    if re.fullmatch(r"i?q\d_(k|k_[sml]|nl|xs|xxs|s|m)|i?q\d_\w*k\w*", name.lower()):
        rows = (config.hidden_size, config.intermediate_size)
        odd = [size for size in rows if size % K_BLOCK]
        reason = f"{odd[0]} is not a multiple of {K_BLOCK}" if odd else "they cannot be written from Python"
        raise InputError(
            f"{scheme}: K-quants pack {K_BLOCK} values of a row together, and {reason}",
            f"Use one of {', '.join(f'gguf-{one}' for one in BLOCK_SCHEMES)}; their blocks are of {BLOCK}. "
            "Or quantize the file of gguf-bf16 with llama.cpp's llama-quantize.",
        )
    if scheme not in SCHEMES:
        meant = f"Did you mean gguf-{scheme}? " if f"gguf-{scheme}" in SCHEMES else ""
        raise UsageError(
            f"--to {scheme or repr(scheme)}: no such scheme", f"{meant}Schemes: {', '.join(SCHEMES)}."
        )
    if scheme in GGUF_SCHEMES:
        require_gguf(config, name)


def plan_quantization(config: ModelConfig, scheme: str, options: SchemeOptions) -> QuantizationPlan:
    """Plan a scheme for a model. A tied head has no entry of its own, because it shares its table's.

    Raises:
        UsageError: there is no such scheme, a pattern matches nothing, or a group size is not valid.
        InputError: the scheme does not support the model.
    """
    check_scheme(scheme, config)
    if options.group < BLOCK or options.group % BLOCK:
        raise UsageError(f"--group {options.group}: groups are multiples of {BLOCK}", "Use 32, 64 or 128.")
    widest = max(
        columns for _, columns in (row.shape for row in parameter_rows(config) if len(row.shape) == 2)
    )
    if options.group > max(USUAL_GROUP, widest + BLOCK):
        raise UsageError(
            f"--group {options.group}: no row has more than {widest:,} columns", "Use 32, 64 or 128."
        )
    if options.patterns and (scheme in GGUF_SCHEMES or scheme == "bf16"):
        raise UsageError(f"--skip and --bits-map do not apply to {scheme}", "They are for int8 and int4.")
    if options.bits_map and scheme == DYNAMIC:
        raise UsageError(f"--bits-map does not apply to {DYNAMIC}", "Use --skip: those layers stay float32.")
    if options.calibrate and scheme not in PACKED_SCHEMES:
        raise UsageError(f"--calibrate does not apply to {scheme}", "It is for int8 and int4.")
    shapes = {row.tensor: row.shape for row in parameter_rows(config) if not row.tied}
    for pattern in options.patterns:
        if not any(_matches(pattern, name, config) for name in shapes):
            raise UsageError(
                f"{pattern}: no tensor has a name like this",
                "`smolctl count-params MODEL --depth 4` lists the names.",
            )
    tensors = (_tensor_plan(name, shape, config, scheme, options) for name, shape in shapes.items())
    return QuantizationPlan(scheme, tuple(tensors), options)


def _tensor_plan(
    name: str, shape: tuple[int, ...], config: ModelConfig, scheme: str, options: SchemeOptions
) -> TensorPlan:
    if scheme == "bf16":
        return TensorPlan(name, shape, 16)
    if scheme in GGUF_SCHEMES:
        block = block_of(name, len(shape), scheme.removeprefix("gguf-"))
        return _blocks(TensorPlan(name, shape, 32), block)
    if len(shape) == 1 or any(_matches(pattern, name, config) for pattern in options.skip):
        return TensorPlan(name, shape, 32)
    if scheme == DYNAMIC:
        # Tables that are only looked up are not linear layers; a tied table is also the head.
        looked_up = "embed_positions" in name or (name == TABLE and not config.tie_word_embeddings)
        return TensorPlan(name, shape, 32 if looked_up else 8)
    asked = next((bits for pattern, bits in options.bits_map if _matches(pattern, name, config)), None)
    if asked is None:
        # Tables affect both ends of the network, so they keep 8 bits, as in published GGUF files.
        asked = 8 if scheme == "int8" or name in (TABLE, HEAD) or "embed_positions" in name else 4
    return TensorPlan(name, shape, asked, options.group if asked in (4, 8) else None)


def _blocks(entry: TensorPlan, block: str) -> TensorPlan:
    """The plan of a tensor in a GGUF."""
    return dataclasses.replace(entry, bits=BITS[block], block="" if block == "f32" else block)


def wider(entry: TensorPlan) -> Iterator[TensorPlan]:
    """A tensor's plan, followed by its fallbacks; the last one can store any values."""
    yield entry
    if entry.block:
        yield from (_blocks(entry, block) for block in wider_blocks(entry.block))
        return
    if entry.bits == 4:
        yield dataclasses.replace(entry, bits=8)
    yield dataclasses.replace(entry, bits=32, group=None)


def _matches(pattern: str, name: str, config: ModelConfig) -> bool:
    """Whether a pattern matches a tensor: a part of its name with wildcards, or `re:` and a regular
    expression.
    """
    names = [name.removesuffix(".weight"), name]
    if name == TABLE and config.tie_word_embeddings:
        names.append("lm_head")
    if pattern.startswith("re:"):
        return any(re.fullmatch(pattern[3:], candidate) for candidate in names)
    return any(
        fnmatch.fnmatchcase(candidate, wanted)
        for candidate in names
        for wanted in (pattern, f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*")
    )


def split_commas(items: Iterable[str]) -> tuple[str, ...]:
    """The values of a repeatable option that also accepts commas, without duplicates."""
    parts = (part.strip() for item in items for part in item.split(","))
    return tuple(dict.fromkeys(part for part in parts if part))


def parse_skip(items: Sequence[str]) -> tuple[str, ...]:
    """Patterns of `--skip`."""
    patterns = split_commas(items)
    for pattern in patterns:
        _check_pattern(pattern, "--skip")
    return patterns


def parse_bits_map(items: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """`PATTERN=8,re:EXPRESSION=4` as pairs.

    Raises:
        UsageError: a value does not have this form.
    """
    pairs = []
    for part in split_commas(items):
        pattern, _, bits = part.rpartition("=")
        if not pattern or bits not in map(str, STORED):
            raise UsageError(
                f"--bits-map {part}: expected PATTERN=BITS with {', '.join(map(str, STORED))} bits",
                "For example down_proj=8 or 're:.*layers.[0-3]..*=8'.",
            )
        _check_pattern(pattern, "--bits-map")
        pairs.append((pattern, int(bits)))
    return tuple(pairs)


def _check_pattern(pattern: str, option: str) -> None:
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise UsageError(
                f"{option} {pattern}: not a regular expression ({error})", "Correct the expression."
            ) from None
