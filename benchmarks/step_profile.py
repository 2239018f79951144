"""Where a training step of SmolLM2-135M's shape spends its time, and how close its matmuls are to the limit.

    python benchmarks/step_profile.py

The limit is the fastest matmul of square matrices that PyTorch's libraries reach on this machine, measured
before and after the step. Then the step's own shapes, on MKL and on oneDNN in turns: the reason why
`smolctl/model/products.py` chooses. Float32, 4 × 512 tokens. Prints one JSON document.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from training_engines import Case, llama_folder, training_step

from smolctl.arithmetic import forward_flops_per_token
from smolctl.benchmark.limits import fastest_run
from smolctl.sources import open_source
from smolctl.timing import in_turns, ratio_of

BATCH, LENGTH = 4, 512
TOKENS = BATCH * LENGTH
SQUARE = 2_048
# The names of PyTorch's operations begin like this; all others move memory and compute little.
KINDS = {
    "products": ("mkldnn::_linear_pointwise", "aten::mm", "aten::addmm"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu",),
    "optimizer": ("aten::_fused_adamw_",),
}
# (rows, inputs, outputs) of the step's matmuls.
SHAPES = {
    "q_proj, o_proj": (TOKENS, 576, 576),
    "k_proj, v_proj": (TOKENS, 576, 192),
    "gate_proj, up_proj": (TOKENS, 576, 1_536),
    "down_proj": (TOKENS, 1_536, 576),
    "lm_head, a chunk": (256, 576, 49_152),
}


def onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return found


def limit() -> float:
    """GFLOP/s of the faster library on square matrices."""
    found = compare_libraries(SQUARE, SQUARE, SQUARE)["forward"]
    return max(found["mkl_gflops"], found["onednn_gflops"])


def profile_step(model: str) -> dict[str, object]:
    """Seconds by kind, and the rate of the kinds that multiply matrices."""
    step = training_step(Case("smolctl", model, batch=BATCH, length=LENGTH))
    step()
    before = limit()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    peak = 1e9 * (before + limit()) / 2
    seconds: dict[str, float] = defaultdict(float)
    for event in profiler.events() or ():
        seconds[kind_of(event)] += event.self_cpu_time_total / 1e6
    config = open_source(model).require_config()
    matrices = 3 * TOKENS * forward_flops_per_token(config, 0)
    flops = {
        "products": matrices,
        "attention": 3 * TOKENS * forward_flops_per_token(config, LENGTH) - matrices,
    }
    total = sum(seconds.values())
    parts: list[dict[str, object]] = []
    for kind, of_kind in sorted(seconds.items(), key=lambda item: -item[1]):
        parts.append({"part": kind, "seconds": round(of_kind, 3), "share": round(of_kind / total, 3)})
        if kind in flops:
            rate = flops[kind] / of_kind
            parts[-1] |= {"gflops": round(rate / 1e9), "share_of_limit": round(rate / peak, 3)}
    share = round(sum(flops.values()) / total / peak, 3)
    facts = {"limit_gflops": round(peak / 1e9), "step_seconds": round(total, 2), "share_of_limit": share}
    return {**facts, "parts": parts}


def kind_of(event: Any) -> str:
    """The kind of a profiler's event. Matmuls of `model/attention.py` are attention."""
    caller = event
    while caller is not None and not caller.name.startswith("_"):  # as classes of autograd functions here
        caller = caller.cpu_parent
    if caller is not None and caller.name.startswith("_CausalAttention"):
        return "attention"
    return next((kind for kind, names in KINDS.items() if event.name.startswith(names)), "everything else")


def compare_libraries(rows: int, inputs: int, outputs: int) -> dict[str, dict[str, float]]:
    """The three matmuls of a layer on both libraries."""
    x, weight, gradient = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
    works: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "forward": (lambda: x @ weight.T, lambda: onednn(x, weight)),
        "gradient of the input": (lambda: gradient @ weight, lambda: onednn(gradient, weight.T)),
        "gradient of the matrix": (lambda: gradient.T @ x, lambda: onednn(gradient.T, x.T)),
    }
    flops = 2 * rows * inputs * outputs
    found = {}
    for name, pair in works.items():
        mkl, other = in_turns([partial(fastest_run, work) for work in pair], 11, warmups=2)
        found[name] = {
            "mkl_gflops": round(flops / median(mkl) / 1e9),
            "onednn_gflops": round(flops / median(other) / 1e9),
            "onednn_is_faster": round(ratio_of(mkl, other).spread.median, 2),
        }
    return found


def main() -> None:
    libraries = {name: compare_libraries(*shape) for name, shape in SHAPES.items()}
    with llama_folder("smollm2-135m-hub") as model:
        print(json.dumps({"step": profile_step(model), "libraries": libraries}, indent=2))


if __name__ == "__main__":
    main()
