"""A training step of SmolLM2-135M's shape: smolctl against transformers, litgpt and nanoGPT's step.

    python benchmarks/train_step.py                # as they come
    python benchmarks/train_step.py --compiled     # the others through torch.compile, smolctl as it comes
    python benchmarks/train_step.py --bfloat16     # all with products in bfloat16
    python benchmarks/train_step.py --settings     # smolctl against itself with other settings

134,515,008 parameters, float32, fused AdamW, clipped gradients. Two sides take turns, step by step; the
losses have to agree while they do. litgpt joins in where it is installed. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib.metadata import version
from statistics import median

from training_sides import SIDES, Case, Side

from smolctl.timing import in_turns, ratio_of

# Of the loss, relative: sums are added up in other orders, and bfloat16 rounds to 0.4 %.
TOLERANCE = {False: 2e-3, True: 2e-2}


def duel(ours: Case, theirs: Case, rounds: int) -> dict[str, object]:
    """Two sides, step by step in turns, after a step that allocates and compiles and one that warms up."""
    with ExitStack() as stack:
        sides = [stack.enter_context(Side(case)) for case in (ours, theirs)]
        first = [side() for side in sides]
        steps = in_turns(sides, rounds, warmups=1)
    for one, other in zip(*steps, strict=True):
        if abs(one["loss"] / other["loss"] - 1) > TOLERANCE[ours.bfloat16 or theirs.bfloat16]:
            raise SystemExit(f"losses differ: {one['loss']} and {other['loss']}")
    seconds = [[step["seconds"] for step in of_side] for of_side in steps]
    tokens = ours.batch * ours.length
    peaks = [max(step["peak_bytes"] for step in of_side) for of_side in steps]
    return {
        "sides": [side.name for side in sides],
        "tokens_per_second": [[round(tokens / one, 1) for one in of_side] for of_side in seconds],
        "median_tokens_per_second": [round(tokens / median(of_side), 1) for of_side in seconds],
        "first_step_seconds": [round(step["seconds"], 1) for step in first],
        "speed_ratio": asdict(ratio_of(seconds[1], seconds[0])),
        "peak_gb": [round(peak / 1e9, 2) for peak in peaks],
        "memory_ratio": round(peaks[0] / peaks[1], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4, help="sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--compiled", action="store_true", help="the others through torch.compile")
    parser.add_argument("--bfloat16", action="store_true", help="products in bfloat16")
    parser.add_argument("--settings", action="store_true", help="smolctl against itself")
    parser.add_argument("--against", nargs="+", default=SIDES[1:], choices=SIDES[1:])
    arguments = parser.parse_args()
    plain = Case("smolctl", bfloat16=arguments.bfloat16, batch=arguments.batch, length=arguments.length)
    installed = [side for side in arguments.against if side == "nanogpt" or importlib.util.find_spec(side)]
    if arguments.settings:
        others = [replace(plain, **{name: True}) for name in ("compiled", "checkpointed", "bfloat16")]
    else:
        others = [replace(plain, side=side, compiled=arguments.compiled) for side in installed]
    results = [duel(plain, other, arguments.rounds) for other in others]
    packages = ["torch", *(side for side in installed if side != "nanogpt")]
    found = {
        "tokens": [arguments.batch, arguments.length],
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in packages},
        "duels": results,
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
