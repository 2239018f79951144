"""A model's config, derived figures, costs and problems."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from smolctl.config import ModelConfig, Provenance
from smolctl.inspection.report import CheckpointFacts, Derived, MemoryPlan, ModelReport, RecipeFacts
from smolctl.views.numbers import quantity, size
from smolctl.views.output import Output, fields
from smolctl.views.parameters import number_or_unknown, source_document, title
from smolctl.views.tables import GAP, facts, first_lines

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

# Hoffmann et al., 2022: about this many tokens per parameter are compute-optimal.
COMPUTE_OPTIMAL_TOKENS_PER_PARAMETER = 20
PROBLEMS_SHOWN = 12

MEMORY_MEANINGS = {
    "weights": "every parameter once",
    "gradients": "one per parameter; on a GPU, a tied table has two",
    "optimizer": "AdamW's two moments of each parameter",
    "activations": "kept for the backward pass",
    "logits": "one chunk of the loss, and its gradient",
}

MUON_STATE = "AdamW's two moments of each parameter, Muon's one for the matrices of the layers"

Row = tuple[str, str, str]  # name, value, meaning


def show_report(out: Output, report: ModelReport) -> None:
    """The whole report as tables or as the JSON document."""
    out.document(report_document(report))
    if out.json:
        return
    from rich.text import Text

    out.show(title(report.source))
    for heading, body in _sections(report):
        out.show("", Text(heading, style="bold"), body)
    out.show("")
    for mark, lines in (
        (Text("problem", style="red"), report.problems),
        (Text("note", style="dim"), report.notes),
    ):
        if lines:
            out.show(facts((mark, Text(line)) for line in first_lines(lines, PROBLEMS_SHOWN)))
    if not report.problems:
        out.show(Text("no problems found", style="green"))


def report_document(report: ModelReport) -> Mapping[str, Any]:
    """The JSON document."""
    source, count = report.source, report.parameters
    config = source.config.model_dump(mode="json") if source.config is not None else dict(source.declared)
    return {
        "source": source_document(source),
        "supported": source.config is not None,
        "config": config,
        "derived": _derived_document(report.derived, report.recipe),
        "parameters": {"counted": count.basis.value, **vars(count.totals)} if count else None,
        "recipe": report.recipe.run.model_dump(mode="json", exclude={"model"}) if report.recipe else None,
        "checkpoint": asdict(report.checkpoint) if report.checkpoint else None,
        "provenance": report.provenance.model_dump(mode="json") if report.provenance else None,
        "stops": [{"id": token_id, "token": token} for token_id, token in report.stops.items()],
        "problems": list(report.problems),
        "notes": list(report.notes),
    }


def _derived_document(derived: Derived | None, recipe: RecipeFacts | None) -> Mapping[str, Any] | None:
    if derived is None:
        return None
    plan = derived.memory
    sizes = fields(plan, without=("bytes", "optimizer"))
    return {
        **vars(derived),
        "parameters": fields(derived.parameters, without=("rows",)),
        "memory": {**sizes, **asdict(plan.bytes), "total": plan.bytes.total},
        **(fields(recipe, without=("run",)) if recipe else {}),
    }


def _sections(report: ModelReport) -> Iterator[tuple[str, RenderableType]]:
    from rich.text import Text

    source = report.source
    if source.config is not None:
        yield "config", _explained(_config_rows(source.config, report.stops))
    else:
        rows = [(Text(key), Text(written(value))) for key, value in source.declared.items()]
        yield "config, with the source's own names", facts(rows)
    count = report.parameters
    if source.config is None and count is not None:
        counted = f"counted from the {count.basis.value}; `smolctl count-params` shows where"
        yield "parameters", _explained(iter([("unique", number_or_unknown(count.totals.unique), counted)]))
    if report.derived is not None:
        plan = report.derived.memory
        yield "derived", _explained(_derived_rows(report.derived))
        yield (
            f"memory of a training step: {plan.batch_size:,} × {plan.sequence_length:,} tokens, {plan.dtype}",
            _explained(_memory_rows(plan)),
        )
    if report.recipe is not None:
        yield "recipe", _explained(_recipe_rows(report.recipe))
    if report.checkpoint is not None:
        yield "weights", _explained(_checkpoint_rows(report.checkpoint))
    if report.provenance is not None and (report.provenance.license or report.provenance.made_from):
        yield "where the weights come from", _explained(_provenance_rows(report.provenance))


def _config_rows(config: ModelConfig, stops: Mapping[int, str | None]) -> Iterator[Row]:
    for key, field in type(config).model_fields.items():
        yield key, written(getattr(config, key)), field.description or ""
    spelled = ", ".join(f"{token_id} {token or ''}".strip() for token_id, token in stops.items())
    yield "stops", spelled or "none", "tokens at which an answer ends"


def _derived_rows(derived: Derived) -> Iterator[Row]:
    count, kv = derived.parameters, derived.kv_cache_bytes_per_token
    length = derived.memory.sequence_length
    yield "parameters", f"{count.unique:,}", "`smolctl count-params` shows where"
    yield "head_dim", f"{derived.head_dim:,}", "width of a head"
    yield "query heads per KV head", f"{derived.gqa_ratio:,}", "the KV cache is smaller by this factor"
    yield "KV cache per token", f"{kv['float32']:,} B", f"float32; in bfloat16 {kv['bfloat16']:,} B"
    yield (
        "forward FLOPs per token",
        quantity(derived.forward_flops_per_token),
        f"2 per multiply-add, attention over half of {length:,} tokens on average",
    )
    yield (
        "training FLOPs per token",
        quantity(derived.training_flops_per_token),
        "the backward pass costs as much as two forward passes",
    )


def _recipe_rows(recipe: RecipeFacts) -> Iterator[Row]:
    run = recipe.run.with_whole_steps()
    schedule, optimizer = run.schedule, run.optimizer
    sequences = f"{run.train.batch_size:,} sequences × {run.data.sequence_length:,}"
    yield "steps", f"{run.train.steps:,}", "optimizer steps"
    yield (
        "tokens per step",
        f"{recipe.tokens_per_step:,}",
        f"{sequences}, {run.micro_batch_size:,} in memory at once",
    )
    yield "total tokens", f"{recipe.total_tokens:,}", f"from {', '.join(run.data.source)}"
    yield (
        "tokens per parameter",
        f"{recipe.tokens_per_parameter:,.{0 if recipe.tokens_per_parameter >= 100 else 2}f}",
        f"about {COMPUTE_OPTIMAL_TOKENS_PER_PARAMETER} are compute-optimal (Hoffmann et al., 2022)",
    )
    yield "training FLOPs", f"{recipe.training_flops:.3g}", "for the whole run"
    multiplier = optimizer.embedding_lr_multiplier
    tables = f" ({optimizer.learning_rate * multiplier:g} for the tables)" if multiplier != 1 else ""
    yield (
        "optimizer",
        optimizer.name,
        f"peak rate {optimizer.learning_rate:g}{tables}, "
        f"betas {optimizer.betas[0]:g} and {optimizer.betas[1]:g}, "
        f"weight decay {optimizer.weight_decay:g}, gradients clipped at {run.train.gradient_clip:g}",
    )
    decay = (
        f", falls over {schedule.decay_steps:,} steps from step {schedule.decay_start:,}"
        if schedule.decay_steps
        else ""
    )
    yield "schedule", schedule.name, f"rises over {schedule.warmup_steps:,} steps{decay}"
    yield "checkpoints", f"every {run.checkpoint.every:,}", "steps"


def _checkpoint_rows(checkpoint: CheckpointFacts) -> Iterator[Row]:
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in checkpoint.dtypes.items())
    yield "tensors", f"{checkpoint.tensors:,}", dtypes
    known = checkpoint.parameters
    yield "parameters", number_or_unknown(known), "listed in the header, with packed ones unpacked"
    yield (
        "size",
        size(checkpoint.bytes),
        f"{8 * checkpoint.bytes / known:.3g} bits per parameter" if known else "",
    )
    if checkpoint.matches is not None:
        yield "fits the config", "yes" if checkpoint.matches else "no", "every name and shape compared"


def _provenance_rows(provenance: Provenance) -> Iterator[Row]:
    for index, one in enumerate(provenance.chain):
        at = {"revision": one.revision, "commit": one.commit, "step": one.step}
        said = [f"{what} {value}" for what, value in at.items() if value is not None]
        said.append(f"license {one.license}" if one.license else "license not stated")
        said += [f"not certain: {', '.join(one.assumed)}"] if one.assumed else []
        place = "on the Hub" if one.kind == "hub" else one.id
        yield "made from" if index else "this model", one.public().id, ", ".join([place, *said])


def _memory_rows(plan: MemoryPlan) -> Iterator[Row]:
    for name, formula in plan.bytes.formulas.items():
        meaning = MUON_STATE if (name, plan.optimizer) == ("optimizer", "muon") else MEMORY_MEANINGS[name]
        yield name, size(getattr(plan.bytes, name)), f"{formula}: {meaning}"
    yield "total", size(plan.bytes.total), "at the peak, without Python and PyTorch themselves"


def _explained(rows: Iterator[Row]) -> Table:
    from rich.table import Column, Table
    from rich.text import Text

    value = Column(justify="right", no_wrap=True)
    table = Table.grid(Column(no_wrap=True), value, Column(style="dim", overflow="fold"), padding=GAP)
    for name, text, meaning in rows:
        table.add_row(name, text, Text(meaning))
    return table


def written(value: Any) -> str:
    """A config value in a readable form: 49,152, true, null, 1e-05."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1_000 and value.is_integer() else f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(written(item) for item in value)
    return str(value)
