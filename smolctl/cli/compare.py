"""smolctl compare"""

from __future__ import annotations

from typing import Annotated

import typer

from smolctl.cli.completion import complete_weights
from smolctl.cli.options import WEIGHTS, command
from smolctl.errors import GateError
from smolctl.views.output import Output


@command
def compare(
    output: Output,
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help=f"Two or more of: {WEIGHTS[0].lower()}{WEIGHTS[1:]}.",
            show_default=False,
            autocompletion=complete_weights,
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="TEXT",
            help="Text or conversations to compare on; repeatable. Default: the runs' held-out "
            "documents, else built-in text.",
        ),
    ] = None,
    size: Annotated[
        int,
        typer.Option(
            "--bytes", min=1, help="Maximum bytes of text; of a longer text, some documents are used."
        ),
    ] = 500_000,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            help="Tokens per sequence. Default: the shortest context of the models, up to 1,024.",
        ),
    ] = None,
    require_better: Annotated[
        bool,
        typer.Option(
            "--require-better",
            help="Exit with code 5 unless the first model is significantly better than all others.",
        ),
    ] = False,
) -> None:
    """Compare how well models predict the same text.

    The verdict says whether the difference is more than chance. In conversations, only the answers are
    scored, in each model's own chat template.

    \b
    smolctl compare runs/nano-001 runs/nano-002      # on their held-out documents
    smolctl compare runs/nano-001 runs/nano-001@150  # two steps of a run
    smolctl compare a-1 a-2 a-3 b-1 b-2 b-3          # the seeds of a and of b
    smolctl compare FILE.gguf FOLDER --data notes/   # whatever their tokenizers
    smolctl compare runs/chat-001 FILE.gguf          # on held-out answers
    smolctl compare runs/new runs/old --require-better  # a gate: exit code 5
    """
    from smolctl.evaluation.compare import CompareOptions
    from smolctl.evaluation.compare import compare as run
    from smolctl.views.compare import show_comparison

    comparison = run(models, CompareOptions(tuple(data or ()), size, context), output.message)
    show_comparison(output, comparison)
    if require_better and not comparison.first_is_best:
        failed = [pair.verdict for pair in comparison.pairs if pair.a is comparison.measures[0]]
        raise GateError(
            f"A is not better than every other model: {'; '.join(failed)}",
            "Keep the other model, or compare on more text.",
        )
