"""Matmuls with the library that is fastest on this machine.

PyTorch uses MKL for float32 matmuls on a CPU, which is slower on processors other than Intel's. oneDNN, which
PyTorch includes as well, is not: it computes the matmuls of SmolLM2-135M's training step 10 to 50 % faster on
a Zen 4, and twice as fast on a Zen 5 (docs/benchmarks.md). The choice depends only on the processor, so a run
on one machine always has the same bits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

FEWEST_ROWS = 32  # with fewer rows, calling oneDNN costs more than it gains
COPIED_COLUMNS = 2_000  # of logits' gradient at a time; more of them do not fit in the cache
ZEN_5 = 26  # its number of the processor family


def _amd_family() -> int:
    """The number of this AMD processor's family; 0 on other processors."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return 0
    with cpuinfo.open("rb") as file:
        lines = file.read(1024)  # of the first core
    family = re.search(rb"cpu family\s*: (\d+)", lines)
    return int(family[1]) if family and b"AuthenticAMD" in lines else 0


_FAMILY = _amd_family()
PREFERS_ONEDNN = torch.backends.mkldnn.is_available() and _FAMILY > 0
# A Zen 5 multiplies vectors of 512 bits at full speed, but MKL uses 256 bits on AMD processors. oneDNN is
# therefore faster there even if it has to copy matrices first.
HAS_WIDE_ONEDNN = PREFERS_ONEDNN and _FAMILY >= ZEN_5 and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _on_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        PREFERS_ONEDNN
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and (torch.compiler.is_compiling() or x.numel() >= FEWEST_ROWS * x.shape[-1])
    )


def multiplies_fast(x: Tensor) -> bool:
    """Whether matmuls with x are so fast here that transposed matrices can be copied for oneDNN, and that
    results which take much memory can be computed twice.
    """
    is_plain = x.device.type == "cpu" and x.dtype == torch.float32
    return HAS_WIDE_ONEDNN and is_plain and not torch.compiler.is_compiling()


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weightᵀ, (…, I) with (O, I) to (…, O). It has no gradient, which `functional.py` adds."""
    if _on_onednn(x, weight):
        return _opaque_product(x, weight) if torch.compiler.is_compiling() else _onednn(x, weight)
    return F.linear(x, weight)


def add_product(sum: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """sum + x @ weightᵀ, with the addition fused into the matmul."""
    if torch.compiler.is_compiling():  # which fuses it itself
        return sum + product(x, weight)
    if _on_onednn(x, weight):
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, sum, weight, None, "add")
        return found
    out = product(x, weight)
    return out.add_(sum) if out.dtype == sum.dtype else sum + out


def weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient (O, I) of a matrix, if its output for x (…, I) has the gradient (…, O)."""
    rows, inputs = gradient.flatten(0, -2).mT, x.flatten(0, -2)  # (O, N), (N, I)
    is_onednn = multiplies_fast(x) and _on_onednn(gradient, x)
    return _onednn(rows, inputs.mT) if is_onednn else rows @ inputs


def add_weight_gradient(sum: Tensor, gradient: Tensor, x: Tensor) -> None:
    """Add `weight_gradient` of gradient (N, O) and x (N, I) to a sum (O, I), without another matrix of its
    size where possible.
    """
    if multiplies_fast(x) and _on_onednn(gradient, x):
        parts = -(-gradient.shape[1] // COPIED_COLUMNS)
        for part, columns in zip(sum.tensor_split(parts), gradient.tensor_split(parts, dim=1), strict=True):
            part += weight_gradient(columns.contiguous(), x)
    elif gradient.dtype == sum.dtype:
        sum.addmm_(gradient.mT, x)
    else:
        sum += gradient.mT @ x


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
