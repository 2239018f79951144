"""`quantize`: reads a source once, writes every scheme, and measures each result against the source."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from smolctl.arithmetic import count_parameters
from smolctl.config import ModelConfig
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.generation.engine import Engine
from smolctl.generation.load import load_model
from smolctl.generation.torch_engine import TorchEngine
from smolctl.model.dynamic import dynamic_network
from smolctl.model.weights import from_state
from smolctl.ownership import kept_files, require_replaceable, require_replaceable_file
from smolctl.quantization.build import build_items, dequantized, read_tensors, widened
from smolctl.quantization.calibrate import TensorCost, dynamic_errors, input_squares, output_errors
from smolctl.quantization.folder import (
    CHECKPOINT_SUFFIX,
    QUANTIZED_MODEL,
    Origin,
    write_errors,
    write_folder,
)
from smolctl.quantization.footprint import measure_footprint
from smolctl.quantization.measure import mean_kl, measure_quality, measure_speed
from smolctl.quantization.record import record_variants
from smolctl.quantization.schemes import (
    GGUF_SCHEMES,
    PACKED_SCHEMES,
    QuantizationPlan,
    SchemeOptions,
    plan_quantization,
)
from smolctl.quantization.texts import Windows, choose_windows
from smolctl.quantization.verdict import Calibration, Gates, SourceFacts, Variant, advise, judge
from smolctl.runs.layout import QUANTIZED
from smolctl.sources import open_source, open_weights
from smolctl.sources.address import WEIGHT_ENDINGS
from smolctl.sources.base import ModelSource, TokenizerFiles
from smolctl.sources.gguf.write import is_own_gguf, write_gguf
from smolctl.sources.open import require_own_files
from smolctl.sources.provenance import provenance_of
from smolctl.sources.quantized.scaled import StoredTensor
from smolctl.sources.quantized_folder import DYNAMIC, FILE

COSTLIEST = 5  # tensors whose KL is measured separately
COST_WINDOWS = 4
# Suffixes by which people name the storage of a model, which no longer applies to the result.
FORMAT_ENDING = r"(?i)[.-](i?q\d(_\w+)?|bf16|f16|fp16|f32|fp32)$"


@dataclass(frozen=True)
class QuantizeOptions:
    """The options of a call."""

    schemes: tuple[str, ...] = ("int8",)
    scheme_options: SchemeOptions = dataclasses.field(default_factory=SchemeOptions)
    out: Path | None = None
    force: bool = False
    measure: bool = True
    data: tuple[str, ...] = ()  # text to measure on; empty: held-out text
    windows: int = 24
    per_tensor: bool = False
    gates: Gates = dataclasses.field(default_factory=Gates)
    accept_guesses: bool = False  # of config values that are in no file


@dataclass(frozen=True)
class QuantizeReport:
    """The results of a call."""

    source: SourceFacts
    text: str  # the text that was measured on; "" if nothing was measured
    tokens: int
    variants: tuple[Variant, ...]
    costs: Mapping[str, tuple[TensorCost, ...]]  # by scheme, if requested
    failed_gates: tuple[str, ...]


@dataclass(frozen=True)
class _Job:
    """Shared by all schemes of a call."""

    source: ModelSource
    config: ModelConfig
    tensors: Mapping[str, Tensor]
    files: TokenizerFiles | None
    windows: Windows | None
    squares: Mapping[str, Tensor] | None
    reference: Engine | None  # the source in float32
    options: QuantizeOptions
    note: Callable[[str], None]


def quantize(
    model: str, options: QuantizeOptions, note: Callable[[str], None] = lambda _text: None
) -> QuantizeReport:
    """Write a model in smaller schemes and report what each of them costs and gains.

    Args:
        model: any MODEL with weights.
        options: schemes, targets, and how to measure.
        note: called with each line of progress.

    Raises:
        SmolError: the model cannot be read, a scheme does not support it, or a file cannot be written;
            nothing is written before all checks that are possible in advance have passed.
    """
    options.gates.require_checkable(options.measure)
    source = _open(model, options, note)
    config = source.require_config()
    plans = [
        plan_quantization(config, scheme, _options_for(options, scheme))
        for scheme in dict.fromkeys(options.schemes or ("",))
    ]
    targets = {plan.scheme: _free_target(source, plan.scheme, options) for plan in plans}
    job = _prepare(source, config, options, any(plan.options.calibrate for plan in plans), note)
    variants, costs = [], {}
    for index, asked in enumerate(plans):
        plans[index], wider = widened(asked, job.tensors)
        plan = plans[index]
        for line in (*plan.summary(), *wider):
            note(f"{plan.scheme}  {line}")
        items, calibration = _build(job, plan)
        if items is not None and options.per_tensor and any(entry.packed for entry in plan.tensors):
            costs[plan.scheme] = _costs(job, plan, items)
        variants.append(_write(job, plan, items, targets[plan.scheme], calibration))
        for path in filter(None, (variants[-1].path, variants[-1].checkpoint)):
            note(f"{plan.scheme}  written: {path}")
    run = source.run_folder
    name = source.id if run is None else f"{run.path}@{source.step}"
    facts = SourceFacts(name, *_size(source, config))
    if options.measure:
        facts, variants = _measure(job, model, facts, variants)
    judged = tuple(
        dataclasses.replace(one, verdict=judge(one, variants, facts), hint=advise(one, plan.options))
        for one, plan in zip(variants, plans, strict=True)
    )
    if run is not None and options.measure:
        record_variants(run.path, source.step, judged)
    text, tokens = (job.windows.name, job.windows.tokens) if job.windows and options.measure else ("", 0)
    return QuantizeReport(facts, text, tokens, judged, costs, options.gates.broken_by(judged))


def _options_for(options: QuantizeOptions, scheme: str) -> SchemeOptions:
    """The options that apply to a scheme if several were named; a single scheme gets all of them."""
    asked = options.scheme_options
    if len(options.schemes) == 1:
        return asked
    if scheme in GGUF_SCHEMES or scheme == "bf16":
        return dataclasses.replace(asked, skip=(), bits_map=(), calibrate=False)
    if scheme == DYNAMIC:
        return dataclasses.replace(asked, bits_map=(), calibrate=False)
    return asked


def _open(model: str, options: QuantizeOptions, note: Callable[[str], None]) -> ModelSource:
    """Open the model if it can be quantized; notes describe anything unusual."""
    source = open_weights(model)
    source.require_certainty(options.accept_guesses)
    for problem in source.problems:
        note(f"{source.id}: {problem}")
    require_own_files(source, carried_only=True)
    if source.quantization is not None:
        note(f"{source.id} is already quantized: its {source.quantization['scheme']} loss is permanent.")
    return source


def _prepare(
    source: ModelSource,
    config: ModelConfig,
    options: QuantizeOptions,
    calibrate: bool,
    note: Callable[[str], None],
) -> _Job:
    needs_text = options.measure or calibrate or options.per_tensor
    needs_tokenizer = needs_text or any(scheme in GGUF_SCHEMES for scheme in options.schemes)
    remedy = "Put its tokenizer.json there, or give --no-measure."
    files = source.require_tokenizer(remedy) if needs_tokenizer else source.read_tokenizer()
    windows = squares = reference = None
    needs_activations = calibrate or options.per_tensor
    if files is not None and needs_text:
        tokenizer = Tokenizer.from_files(files, source.id)
        tokenizer.require_fit(config.vocab_size)
        windows = choose_windows(source, config, tokenizer, options.data, options.windows, needs_activations)
    tensors = read_tensors(source)
    if windows is not None and needs_activations:
        # The last few sequences decide between the plain and the searched scales.
        if calibrate or set(options.schemes) & set(PACKED_SCHEMES):
            squares = input_squares(config, tensors, windows.calibration[:-COST_WINDOWS])
        reference = _engine(config, tensors)
    return _Job(source, config, tensors, files, windows, squares, reference, options, note)


def _engine(config: ModelConfig, tensors: Mapping[str, Tensor]) -> Engine:
    return TorchEngine(from_state(config, tensors, "in memory").requires_grad_(False).eval())


def _free_target(source: ModelSource, scheme: str, options: QuantizeOptions) -> Path:
    """The target of a scheme. Raises UsageError if something is there that must not be replaced."""
    target = _target(source, scheme, options)
    if scheme in GGUF_SCHEMES:
        require_replaceable_file(target, "--out", options.force, (source.id,), is_own_gguf, True)
    else:
        require_replaceable(target, QUANTIZED_MODEL, "--out", options.force, (source.id,))
    return target


def _target(source: ModelSource, scheme: str, options: QuantizeOptions) -> Path:
    """The target of a scheme: a folder, or a file for GGUF."""
    name, run = model_name(source), source.run_folder
    folder = options.out or (run.path / QUANTIZED if run is not None else None)
    if scheme in GGUF_SCHEMES:
        return (folder or Path()) / f"{name}-{scheme.removeprefix('gguf-')}.gguf"
    if folder is None:
        return Path(f"{name}-{scheme}")
    return options.out if options.out and len(options.schemes) == 1 else folder / scheme


def model_name(source: ModelSource) -> str:
    """A base name for files: the last part of the model's name, without file suffixes."""
    if (run := source.run_folder) is not None:
        return run.path.name
    path = Path(source.id.partition("@")[0])
    if path.exists():
        path = path.resolve()
    name = path.stem if path.suffix in WEIGHT_ENDINGS else path.name
    return re.sub(FORMAT_ENDING, "", name) or name


def _build(job: _Job, plan: QuantizationPlan) -> tuple[dict[str, StoredTensor] | None, Calibration | None]:
    if plan.scheme in GGUF_SCHEMES:
        return None, None
    plain = build_items(job.config, job.tensors, plan)
    if not plan.options.calibrate or job.windows is None or job.reference is None:
        return plain, None
    job.note(f"{plan.scheme}  searching the scales: for a model of 135 million parameters a minute or two")
    searched = build_items(job.config, job.tensors, plan, job.squares)
    chosen = job.windows.calibration[-COST_WINDOWS:]
    engines = (_engine(job.config, dequantized(items)) for items in (plain, searched))
    calibration = Calibration(*(mean_kl(job.reference, engine, chosen) for engine in engines))
    job.note(
        f"{plan.scheme}  searched scales: KL {calibration.searched_kl:.5f}, "
        f"plain rounding {calibration.plain_kl:.5f}, the same bytes"
        + ("" if calibration.helped else "; the search did not help, so the plain ones are kept")
    )
    return (searched if calibration.helped else plain), calibration


def _costs(job: _Job, plan: QuantizationPlan, items: Mapping[str, StoredTensor]) -> tuple[TensorCost, ...]:
    """Every tensor's relative output error, and the KL of the costliest tensors when only that tensor is
    rounded.
    """
    assert job.windows is not None
    assert job.reference is not None
    windows = job.windows.calibration[-COST_WINDOWS:]
    dynamic = plan.scheme == DYNAMIC
    if dynamic:
        costs = dynamic_errors(job.config, job.tensors, items, plan.options.activations, windows)
    else:
        assert job.squares is not None
        costs = output_errors(job.tensors, items, job.squares)
    for index, cost in enumerate(costs[:COSTLIEST]):
        alone = {cost.name: items[cost.name]}
        variant: Engine
        if dynamic:
            mixed: dict[str, Any] = {**job.tensors, **alone}
            variant = TorchEngine(dynamic_network(job.config, mixed, plan.options.activations))
        else:
            variant = _engine(job.config, {**job.tensors, **dequantized(alone)})
        costs[index] = dataclasses.replace(cost, kl=mean_kl(job.reference, variant, windows))
    return tuple(costs)


def _write(
    job: _Job,
    plan: QuantizationPlan,
    items: Mapping[str, StoredTensor] | None,
    target: Path,
    calibration: Calibration | None,
) -> Variant:
    source, name, provenance = job.source, model_name(job.source), provenance_of(job.source)
    if items is None:
        assert job.files is not None
        scheme = plan.scheme.removeprefix("gguf-")
        with write_errors(target):
            tensors = job.tensors.items()
            write_gguf(job.config, tensors, job.files, scheme, target, name, provenance)
        weights = target
    else:
        origin = Origin(source.id, source.kind.value, source.revision, source.step, provenance)
        stays = write_folder(target, job.config, plan, items, job.files, origin, name)
        if stays:
            job.note(kept_files(target, stays))
        weights = target / FILE
    bits = _size(open_source(str(target)), job.config)[1]
    return Variant(
        plan.scheme,
        str(target),
        weights.stat().st_size,
        bits,
        plan.summary(),
        checkpoint=str(target / f"{name}{CHECKPOINT_SUFFIX}") if plan.scheme == DYNAMIC else "",
        calibration=calibration,
    )


def _size(source: ModelSource, config: ModelConfig) -> tuple[int, float]:
    """Bytes of the weights as stored, and bits per parameter of the model."""
    stored = sum(tensor.bytes for tensor in source.tensors or ())
    return stored, 8 * stored / count_parameters(config).unique


def _measure(
    job: _Job, model: str, facts: SourceFacts, variants: Sequence[Variant]
) -> tuple[SourceFacts, list[Variant]]:
    """Measure every variant, loaded from its file, in turns with the source."""
    assert job.windows is not None
    source = load_model(model)
    loaded = [load_model(variant.path).engine for variant in variants]
    schemes = ", ".join(variant.scheme for variant in variants)
    job.note(f"measuring {schemes} on {job.windows.tokens:,} tokens of the {job.windows.name}")
    qualities = measure_quality(source.engine, loaded, job.windows)
    speeds = measure_speed(source.engine, loaded, source.tokenizer)
    engines = [engine.name for engine in loaded]
    facts = dataclasses.replace(facts, engine=source.engine.name)
    del source, loaded  # frees memory for the models that are loaded next
    facts = dataclasses.replace(facts, footprint=measure_footprint(model))
    return facts, [
        dataclasses.replace(
            variant,
            quality=quality,
            speed=speed,
            divergence=divergence,
            footprint=measure_footprint(variant.path),
            engine=engine,
        )
        for variant, quality, (speed, divergence), engine in zip(
            variants, qualities, speeds, engines, strict=True
        )
    ]
