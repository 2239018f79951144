"""Where a training step of SmolLM2-135M's shape spends its time, and how near the products are to the limit.

    python benchmarks/step_profile.py

The limit is the fastest product of square matrices that PyTorch's libraries reach on this machine, measured
around the step. Then the step's own shapes, on MKL and on oneDNN in turns: why `smolctl/model/products.py`
chooses. Float32, 4 × 512 tokens. Prints one JSON document.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile
from training_sides import Case, Step

from smolctl.arithmetic import forward_flops_per_token
from smolctl.config import load_run_config
from smolctl.timing import in_turns, ratio_of

CASE = Case("smolctl")
TOKENS = CASE.batch * CASE.length
SQUARE = 2_048
# PyTorch's operations by what they do; what is not here passes over memory and computes little.
KINDS = {
    "mkldnn::_linear_pointwise": "products",
    "aten::mm": "products",
    "aten::addmm": "products",
    "aten::addmm_": "products",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "attention",
    "aten::_fused_adamw_": "optimizer",
}
# (rows, inputs, outputs) of the step's products.
SHAPES = {
    "q_proj, o_proj": (TOKENS, 576, 576),
    "k_proj, v_proj": (TOKENS, 576, 192),
    "gate_proj, up_proj": (TOKENS, 576, 1_536),
    "down_proj": (TOKENS, 1_536, 576),
    "lm_head, a chunk": (256, 576, 49_152),
}


def timed(work: Callable[[], object]) -> Callable[[], float]:
    def run() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return run


def onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def limit() -> float:
    """FLOP/s of the faster library on square matrices."""
    one, two = torch.randn(SQUARE, SQUARE), torch.randn(SQUARE, SQUARE)
    runs = in_turns([timed(lambda: one @ two), timed(lambda: onednn(one, two))], 9)
    return 2 * SQUARE**3 / min(median(seconds) for seconds in runs)


def profile_step() -> dict[str, object]:
    """Seconds by kind, and the rate of those that multiply matrices."""
    step = Step(CASE)
    step()
    before = limit()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    peak = (before + limit()) / 2
    seconds: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        seconds[KINDS.get(event.key, "everything else")] += event.self_cpu_time_total / 1e6
    model, tokens = load_run_config(CASE.preset).model, TOKENS
    matrices = 3 * tokens * forward_flops_per_token(model, 0)
    attention = 3 * tokens * forward_flops_per_token(model, CASE.length) - matrices
    flops = {"products": matrices, "attention": attention}
    total = sum(seconds.values())
    return {
        "limit_gflops": round(peak / 1e9),
        "step_seconds": round(total, 2),
        "share_of_limit": round((matrices + attention) / total / peak, 3),
        "parts": [
            {
                "part": kind,
                "seconds": round(of_kind, 3),
                "share": round(of_kind / total, 3),
                "gflops": round(flops[kind] / of_kind / 1e9) if kind in flops else None,
                "share_of_limit": round(flops[kind] / of_kind / peak, 3) if kind in flops else None,
            }
            for kind, of_kind in sorted(seconds.items(), key=lambda item: -item[1])
        ],
    }


def compare_libraries(rows: int, inputs: int, outputs: int) -> dict[str, dict[str, float]]:
    """The three products of a layer on both libraries."""
    x, weight, gradient = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
    works: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "forward": (lambda: x @ weight.T, lambda: onednn(x, weight)),
        "gradient of the input": (lambda: gradient @ weight, lambda: onednn(gradient, weight.T)),
        "gradient of the matrix": (lambda: gradient.T @ x, lambda: onednn(gradient.T, x.T)),
    }
    flops = 2 * rows * inputs * outputs
    found = {}
    for name, pair in works.items():
        mkl, other = in_turns([timed(work) for work in pair], 11, warmups=2)
        found[name] = {
            "mkl_gflops": round(flops / median(mkl) / 1e9),
            "onednn_gflops": round(flops / median(other) / 1e9),
            "onednn_is_faster": round(ratio_of(mkl, other).spread.median, 2),
        }
    return found


def main() -> None:
    libraries = {name: compare_libraries(*shape) for name, shape in SHAPES.items()}
    print(json.dumps({"step": profile_step(), "libraries": libraries}, indent=2))


if __name__ == "__main__":
    main()
