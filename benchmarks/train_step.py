"""A training step of SmolLM2-135M's shape: smolctl against transformers, litgpt and nanoGPT's step.

    python benchmarks/train_step.py --rounds 5                # as they come
    python benchmarks/train_step.py --rounds 5 --compiled     # everything through torch.compile

134,515,008 parameters, float32, fused AdamW, clipped gradients. Each peer takes turns with smolctl, step by
step; the losses have to agree while they do. litgpt joins in where it is installed. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from statistics import median

from training_sides import SIDES, Side

from smolctl.timing import in_turns, ratio_of

TOLERANCE = 2e-3  # of the loss, relative: sums are added up in other orders
WARM_UPS = 2  # allocations and AdamW's first step; compiling


def duel(
    ours: tuple[str, bool], theirs: tuple[str, bool], arguments: argparse.Namespace
) -> dict[str, object]:
    """Two sides, step by step in turns."""
    with ExitStack() as stack:
        sides = [
            stack.enter_context(Side(name, compiled, arguments.batch, arguments.length))
            for name, compiled in (ours, theirs)
        ]
        first = [side() for side in sides]  # compiles
        steps = in_turns(sides, arguments.rounds, WARM_UPS - 1)
    for one, other in zip(*steps, strict=True):
        if abs(one["loss"] / other["loss"] - 1) > TOLERANCE:
            raise SystemExit(f"losses differ: {one['loss']} and {other['loss']}")
    seconds = [[step["seconds"] for step in of_side] for of_side in steps]
    tokens = arguments.batch * arguments.length
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
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4, help="sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--compiled", action="store_true", help="both sides through torch.compile")
    parser.add_argument("--eager", action="store_true", help="with --compiled: smolctl stays eager")
    parser.add_argument("--against", nargs="+", default=[side for side in SIDES if side != "smolctl"])
    arguments = parser.parse_args()
    results = [
        duel(("smolctl", arguments.compiled and not arguments.eager), (side, arguments.compiled), arguments)
        for side in arguments.against
        if side == "nanogpt" or importlib.util.find_spec(side)
    ]
    packages = [
        "torch",
        *(side for side in arguments.against if side != "nanogpt" and importlib.util.find_spec(side)),
    ]
    print(
        json.dumps(
            {
                "tokens": [arguments.batch, arguments.length],
                "machine": f"{platform.machine()}, Python {platform.python_version()}",
                "versions": {name: version(name) for name in packages},
                "duels": results,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
