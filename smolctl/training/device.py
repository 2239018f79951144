"""The device a run trains on: the arithmetic it is capable of."""

from __future__ import annotations

import re
from typing import Literal

import torch

from smolctl.arithmetic import training_flops_per_token
from smolctl.config import RunConfig

# Dense matrix products a second, in 10¹² operations: (bfloat16, float32 by way of TF32). From NVIDIA's
# data sheets; where those quote the double for sparse matrices, halved. The first name that occurs as
# words in the device's own decides, so that longer names stand before those they contain. Lightning's
# table is not used: it has sparse figures for some chips, and no plain "H200".
PEAK_TERAFLOPS = (
    ("B200", 2250.0, 1125.0),
    ("H200 NVL", 835.5, 417.7),
    ("H200", 989.5, 494.7),
    ("H100 NVL", 835.5, 417.7),
    ("H100 PCIe", 756.0, 378.0),
    ("H100 80GB HBM3", 989.5, 494.7),
    ("A100", 312.0, 156.0),
    ("L40S", 362.0, 183.0),
    ("L40", 181.0, 90.5),
    ("L4", 121.0, 60.0),
    ("A40", 149.7, 74.8),
    ("RTX A6000", 154.8, 77.4),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 3090 Ti", 80.0, 40.0),
    ("RTX 3090", 71.0, 35.6),
)
# A slice of a device, and chips that share a name with larger ones.
NOT_THE_WHOLE_CHIP = re.compile(r"\b(MIG|Laptop|Max-Q)\b")


def peak_flops(name: str, precision: str) -> float | None:
    """Operations a second that a device's matrix units reach at most.

    Args:
        name: as `torch.cuda.get_device_name` has it.
        precision: Lightning's name: "32-true", "bf16-mixed" or "bf16-true".

    Returns:
        None for a device that is not in the table, or for a part of one.
    """
    if NOT_THE_WHOLE_CHIP.search(name):
        return None
    for chip, bfloat16, float32 in PEAK_TERAFLOPS:
        if re.search(rf"\b{chip}\b", name):
            return 1e12 * (bfloat16 if precision.startswith("bf16") else float32)
    return None


def run_peak_flops(device: torch.device, precision: str, devices: int) -> float | None:
    """`peak_flops` of all devices of a run together; None where it is not known, as for a CPU."""
    if device.type != "cuda":
        return None
    one = peak_flops(torch.cuda.get_device_name(device), precision)
    return one * devices if one is not None else None


def flops_utilization(config: RunConfig, tokens_per_second: float, peak: float | None) -> float | None:
    """MFU: the share of `peak` (operations a second) that goes into the model's own arithmetic.

    The head's product counts also when its weights are tied; what is computed twice to save memory does
    not count.
    """
    if peak is None:
        return None
    return tokens_per_second * training_flops_per_token(config.model, config.data.sequence_length) / peak


# Compiling takes about a minute, and a step of a 135M model on a large GPU some tens of milliseconds, of
# which it saves a quarter or so: the steps that win the minute back. To be measured by benchmarks/gpu.py.
STEPS_WORTH_COMPILING = 2_000


def resolved_compile(config: RunConfig) -> bool:
    """Whether to use torch.compile: as the config says; with "auto", where it pays.

    On a CPU it does not: the blocks' operations are fused by hand, and compiled blocks took 0.93 to 0.99
    of the time but a fifth more memory (benchmarks/README.md).
    """
    if config.train.compile != "auto":
        return config.train.compile
    return on_gpu(config) and config.train.steps >= STEPS_WORTH_COMPILING


def on_gpu(config: RunConfig) -> bool:
    """Whether the run will use CUDA."""
    return torch.cuda.is_available() and config.trainer.accelerator in ("auto", "gpu", "cuda")


def process_count(config: RunConfig) -> int:
    """Devices that share a step, over all machines."""
    devices = config.trainer.devices
    if devices == "auto":
        devices = torch.cuda.device_count() if on_gpu(config) else 1
    return devices * config.trainer.num_nodes


def resolved_precision(config: RunConfig) -> Literal["32-true", "bf16-mixed", "bf16-true"]:
    """bf16 where a GPU computes in it, float32 elsewhere.

    Most CPUs emulate bf16, slowly. Those that do not are told of in a note: the same config shall give the
    same numbers on both.
    """
    if config.train.precision != "auto":
        return config.train.precision
    return "bf16-mixed" if on_gpu(config) and torch.cuda.is_bf16_supported() else "32-true"


def cpu_multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16: AVX-512 BF16 or AMX."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
