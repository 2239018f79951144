"""A training step of SmolLM2-135M's shape: smolctl against transformers, interleaved.

    python benchmarks/train_step.py --rounds 3

Each round runs both sides one after the other, each in a process of its own so that its peak memory is
its own. Same shape (134,515,008 parameters, RoPE), same tokens, float32, fused AdamW, clipped gradients.
Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time

BATCH, LENGTH, VOCABULARY = 4, 512, 49_152
SIDES = ("smolctl", "transformers")


def step_function(side: str):  # type: ignore[no-untyped-def]
    """The network of a side and its mean loss on the one batch that is trained on."""
    import torch

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
    if side == "smolctl":
        from smolctl.config import load_run_config
        from smolctl.model.weights import initialize
        from smolctl.training.allocator import keep_freed_memory

        keep_freed_memory()  # as `smolctl train` does
        network = initialize(load_run_config("smollm2-135m-hub").model, 0)
        return network, lambda: network.loss(tokens[:, :-1], tokens[:, 1:]) / (BATCH * LENGTH)

    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    network = LlamaForCausalLM(config)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
    # With shift_labels the targets are taken as they are: the same tokens as on our side.
    return (
        network,
        lambda: network(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False).loss,
    )


def measure(side: str, steps: int) -> dict[str, float]:
    """Median seconds of a step after one that warms up, and the peak memory of this process."""
    import torch

    network, loss = step_function(side)
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    seconds = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    return {"seconds": statistics.median(seconds[1:]), "peak_rss_bytes": peak}


def compare(rounds: int, steps: int) -> dict[str, object]:
    """Interleaved rounds of both sides and their ratios."""
    results: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            command = [sys.executable, __file__, "--side", side, "--steps", str(steps)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            results[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(side, results[side][-1], file=sys.stderr)
    rate = {
        side: [round(BATCH * LENGTH / result["seconds"], 1) for result in results[side]] for side in SIDES
    }
    ratios = [ours / theirs for ours, theirs in zip(*rate.values(), strict=True)]
    peaks = {side: statistics.median(result["peak_rss_bytes"] for result in results[side]) for side in SIDES}
    return {
        "tokens": [BATCH, LENGTH],
        "machine": f"{platform.processor() or platform.machine()}, Python {platform.python_version()}",
        "tokens_per_second": rate,
        "speed_ratio": {
            "median": round(statistics.median(ratios), 3),
            "min": round(min(ratios), 3),
            "max": round(max(ratios), 3),
        },
        "peak_rss_gb": {side: round(peak / 1e9, 2) for side, peak in peaks.items()},
        "memory_ratio": round(peaks["smolctl"] / peaks["transformers"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="timed steps a side and round")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments.side, arguments.steps)))
    else:
        print(json.dumps(compare(arguments.rounds, arguments.steps), indent=2))


if __name__ == "__main__":
    main()
