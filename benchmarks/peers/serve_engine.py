"""How decode.py asks an engine, whatever program and interpreter it runs in.

An engine is a process of its own: `serve MODEL THREADS`. Once it has loaded the model it writes a line with
its version. Then every line that it reads asks for a run:

    PROMPT FILE IDS IDS ...

IDS are the tokens of a sequence with commas between them, of all sequences equally many. The first PROMPT of
each are read at once, the others one by one in all sequences together. The answer is a line with the seconds
that the latter took, or reading the prompt where nothing is behind it. FILE is `-`, or gets the logits after
each token that was read by itself, in float32; then the seconds mean nothing.

An engine that chooses its tokens itself generates as many as it is given. One that cannot do what is
asked answers with `!` and the reason.

`make SOURCE TARGET SCHEME` writes a model in the format of the engine.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

Tokens = Sequence[Sequence[int]]
Run = Callable[[Tokens, int, str], float]  # sequences, PROMPT, FILE or "": seconds
Make = Callable[[Path, Path, str], object]  # SOURCE, TARGET, SCHEME


def main(load: Callable[[str, int], Run], version: str, make: Make | None = None) -> None:
    """Do what the command line asks for."""
    if sys.argv[1] == "make":
        assert make is not None
        make(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
        return
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    run = load(sys.argv[2], int(sys.argv[3]))
    print(version, file=answers, flush=True)
    for line in sys.stdin:
        prompt, file, *sequences = line.split()
        tokens = [[int(one) for one in ids.split(",")] for ids in sequences]
        try:
            answer = str(run(tokens, int(prompt), file.removeprefix("-")))
        except Exception as error:  # whatever a peer raises is a reason to leave this out
            answer = f"! {error}".partition("\n")[0]
        print(answer, file=answers, flush=True)
