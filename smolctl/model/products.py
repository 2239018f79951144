"""Matmuls with the library that is fastest on this machine.

PyTorch uses MKL for float32 matmuls on a CPU, which is slower on processors other than Intel's. oneDNN, which
PyTorch includes as well, is not: on a Zen 4 it computes the matmuls of SmolLM2-135M's training step 10 to 50
% faster (docs/benchmarks.md). The choice depends only on the processor, so a run on one machine always has
the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

FEWEST_ROWS = 32  # with fewer rows, calling oneDNN costs more than it gains


def _is_amd() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return False
    with cpuinfo.open("rb") as file:
        return b"AuthenticAMD" in file.read(1024)  # the vendor is in the first core's lines


PREFERS_ONEDNN = torch.backends.mkldnn.is_available() and _is_amd()


def _on_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        PREFERS_ONEDNN
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and (torch.compiler.is_compiling() or x.numel() >= FEWEST_ROWS * x.shape[-1])
    )


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weightᵀ, (…, I) with (O, I) to (…, O). It has no gradient, which `functional.py` adds."""
    if _on_onednn(x, weight):
        return _opaque_product(x, weight) if torch.compiler.is_compiling() else _onednn(x, weight)
    return F.linear(x, weight)


def add_product(sum: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """sum + x @ weightᵀ, with the addition fused into the matmul."""
    if _on_onednn(x, weight) and not torch.compiler.is_compiling():
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, sum, weight, None, "add")
        return out
    return sum + product(x, weight)


def row_chunks(x: Tensor, rows: int) -> Iterator[slice]:
    """Chunks of at most `rows` rows of x (N, I), for products with it.

    oneDNN keeps about half a megabyte for each number of rows that it has multiplied, and N may differ in
    every step. On a CPU, the rows beyond a multiple of `FEWEST_ROWS` are therefore a chunk of their own, so
    that chunks have few different sizes.
    """
    count = len(x)
    whole = count - count % FEWEST_ROWS if x.device.type == "cpu" else count
    for begin, end in ((0, whole), (whole, count)):
        for start in range(begin, end, rows):
            yield slice(start, min(start + rows, end))


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out


# torch.compile mistakes oneDNN's operation for one of its own, whose matrix must be a constant. It ignores
# the operation under another name, which is slower to call and therefore used only there.
@torch.library.custom_op("smolctl::product", mutates_args=())
def _opaque_product(x: Tensor, weight: Tensor) -> Tensor:
    return _onednn(x, weight)


@_opaque_product.register_fake
def _shape_of_product(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])
