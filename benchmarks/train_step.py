"""A training step of SmolLM2-135M's shape: smolctl compared with transformers, litgpt and nanoGPT's step.

    python benchmarks/train_step.py                # as they come
    python benchmarks/train_step.py --compiled     # the others through torch.compile, smolctl as it comes
    python benchmarks/train_step.py --bfloat16     # all with matmuls in bfloat16
    python benchmarks/train_step.py --settings     # smolctl against itself with other settings

134,515,008 parameters, float32, fused AdamW, clipped gradients. Two engines take turns, step by step, and the
losses of every step must agree. litgpt is included where it is installed. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from statistics import median

import torch
from training_engines import PEERS, Case, llama_folder, steps_in_turns

from smolctl.benchmark.machine import describe_machine
from smolctl.benchmark.peers import is_installed
from smolctl.timing import ratio_of

# Of the loss, relative: sums are added up in other orders, and bfloat16 rounds to 0.4 %.
TOLERANCE = {False: 2e-3, True: 2e-2}


def duel(ours: Case, theirs: Case, rounds: int) -> dict[str, object]:
    """Two engines, step by step in turns, after a step that allocates and compiles and one that warms up."""
    tolerance = TOLERANCE[ours.bfloat16 or theirs.bfloat16]
    both = steps_in_turns((ours, theirs), rounds, warmups=1, tolerance=tolerance)
    seconds = [[step.seconds[0] for step in steps[1:]] for steps in both]
    peaks = [max(step.peak_bytes or 0 for step in steps) for steps in both]
    tokens = ours.batch * ours.length
    return {
        "sides": [ours.name, theirs.name],
        "tokens_per_second": [[round(tokens / one, 1) for one in of_engine] for of_engine in seconds],
        "median_tokens_per_second": [round(tokens / median(of_engine), 1) for of_engine in seconds],
        "first_step_seconds": [round(steps[0].seconds[0], 1) for steps in both],
        "speed_ratio": asdict(ratio_of(seconds[1], seconds[0])),
        "peak_gb": [round(peak / 1e9, 2) for peak in peaks],
        "memory_ratio": round(peaks[0] / peaks[1], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4, help="sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument(
        "--preset", default="smollm2-135m-hub", help="the model's shape; a smaller one to try"
    )
    parser.add_argument("--compiled", action="store_true", help="the others through torch.compile")
    parser.add_argument("--bfloat16", action="store_true", help="matmuls in bfloat16")
    parser.add_argument("--settings", action="store_true", help="smolctl against itself")
    parser.add_argument("--against", nargs="+", default=list(PEERS), choices=list(PEERS))
    arguments = parser.parse_args()
    installed = [peer for peer in arguments.against if peer == "nanogpt" or is_installed(peer)]
    with llama_folder(arguments.preset) as model:
        plain = Case("smolctl", model, False, False, arguments.bfloat16, arguments.batch, arguments.length)
        others = [replace(plain, engine=peer, compiled=arguments.compiled) for peer in installed]
        if arguments.settings:
            compiled, checkpointed = replace(plain, compiled=True), replace(plain, checkpointed=True)
            others = [compiled, checkpointed, replace(plain, bfloat16=True)]
        results = [duel(plain, other, arguments.rounds) for other in others]
    machine = describe_machine(torch.get_num_threads())
    found = {
        "tokens": [arguments.batch, arguments.length],
        "machine": f"{machine.cpu}, {machine.threads} threads",
        "versions": machine.versions,
        "duels": results,
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
