"""smolctl eval"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smolctl.cli.options import Dtype, KvCache, ModelOrNewest, Threads, capped_threads, command
from smolctl.errors import UsageError
from smolctl.views.output import Output


@command
def eval(
    output: Output,
    tasks: Annotated[
        list[str],
        typer.Option(
            "--tasks",
            metavar="TASK",
            help="Name of an lm-eval task, a YAML file with a task of your own, or a folder of such files; "
            "repeatable, or separated by commas.",
            show_default=False,
        ),
    ],
    model: ModelOrNewest = "runs/latest",
    shots: Annotated[
        int | None,
        typer.Option(
            "--num-fewshot",
            min=0,
            help="Solved examples before each question. Default: the task's own number.",
        ),
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option("--limit", help="Maximum items per task; below 1, a share of them. For quick trials."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask the questions in the model's chat template.")
    ] = False,
    system: Annotated[
        str | None, typer.Option("--system-instruction", metavar="TEXT", help="System message.")
    ] = None,
    generation: Annotated[
        str | None,
        typer.Option(
            "--gen-kwargs",
            metavar="KEY=VALUE,...",
            help="Generation settings of tasks with free answers, such as max_gen_toks=64,do_sample=True.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option(
            "--samples",
            metavar="FILE",
            help="Write every item and the model's answers to FILE as JSON lines.",
        ),
    ] = None,
    dtype: Dtype = None,
    kv_cache: KvCache = "auto",
    threads: Threads = None,
) -> None:
    """Evaluate a model on benchmark tasks with lm-eval.

    Requires the extra 'eval'.

    \b
    smolctl eval HuggingFaceTB/SmolLM2-135M --tasks arc_easy,hellaswag
    smolctl eval runs/chat-001 --tasks ifeval --apply-chat-template
    smolctl eval --tasks questions.yaml --samples answers.jsonl  # your own task
    """
    from smolctl.evaluation.tasks import TaskOptions, evaluate_tasks, record_report
    from smolctl.generation.engines import EngineOptions
    from smolctl.ownership import require_replaceable_file
    from smolctl.views.tasks import is_samples, show_tasks, write_samples

    if limit is not None and not (0 < limit < 1 or (limit >= 1 and limit.is_integer())):
        raise UsageError(
            f"--limit {limit:g} is out of range", "Use a whole number of items, or a share below 1."
        )
    options = TaskOptions(
        tasks=tuple(tasks),
        shots=shots,
        limit=limit,
        chat=chat,
        system=system,
        generation=generation,
        engine=EngineOptions(dtype=dtype, threads=capped_threads(output, threads), kv_cache=kv_cache),
    )
    if samples is not None:
        require_replaceable_file(samples, "--samples", force=True, reads=(), is_own=is_samples)
    report = evaluate_tasks(model, options, output.message)
    show_tasks(output, report)
    if samples is not None:
        write_samples(samples, report)
    if record := record_report(report):
        output.message(f"Added to {record}.")
