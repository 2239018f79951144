"""The device of a run: what it can compute, how fast, and the settings chosen for it."""

from __future__ import annotations

import platform
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from smolctl import __version__
from smolctl.arithmetic import training_flops_per_token
from smolctl.config import RunConfig
from smolctl.errors import InputError
from smolctl.extras import installed_version
from smolctl.runs.events import Listener, Note
from smolctl.training.lightning import pl

# Dense matmuls, in 10¹² operations per second: (16 bits, float32). 16 bits: bfloat16 and float16 with
# accumulation in float32. float32: through TF32 on chips that have it (SM 8.0 and later), else on CUDA cores.
# Sources: NVIDIA's data sheets of the data-centre chips (halved where they quote the double rate of sparse
# matrices) and its architecture whitepapers for GeForce: Turing (2018; reference clocks), Ampere GA102
# (2020), Ada (2022), RTX Blackwell (2025). GB10: an eighth of the FP4 figure with sparsity, the only
# published one. The first name whose words occur in the device's name is used, so longer names come before
# those that they contain. Lightning's table is not used, because it has sparse figures for some chips and no
# plain "H200".
PEAK_TERAFLOPS = (
    ("B200", 2250.0, 1125.0),
    ("GB10", 125.0, 62.5),
    ("H200 NVL", 835.5, 417.7),
    ("H200", 989.5, 494.7),
    ("H100 NVL", 835.5, 417.7),
    ("H100 PCIe", 756.0, 378.0),
    ("H100 80GB HBM3", 989.5, 494.7),
    ("A100", 312.0, 156.0),
    ("A10", 125.0, 62.5),
    ("A40", 149.7, 74.8),
    ("L40S", 362.0, 183.0),
    ("L40", 181.0, 90.5),
    ("L4", 121.0, 60.0),
    ("V100-SXM2", 125.0, 15.7),
    ("V100-PCIE", 112.0, 14.0),
    ("T4", 65.0, 8.1),
    ("RTX A6000", 154.8, 77.4),
    ("RTX 5090", 209.5, 104.8),
    ("RTX 5080", 112.6, 56.3),
    ("RTX 5070 Ti", 87.9, 43.9),
    ("RTX 5070", 61.7, 30.9),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 4080 SUPER", 104.4, 52.2),
    ("RTX 4080", 97.5, 48.7),
    ("RTX 4070 Ti SUPER", 88.2, 44.1),
    ("RTX 4070 Ti", 80.2, 40.1),
    ("RTX 4070 SUPER", 71.0, 35.5),
    ("RTX 4070", 58.3, 29.1),
    ("RTX 4060 Ti", 44.1, 22.1),
    ("RTX 4060", 30.2, 15.1),
    ("RTX 3090 Ti", 80.0, 40.0),
    ("RTX 3090", 71.0, 35.6),
    ("RTX 3080 Ti", 68.2, 34.1),
    ("RTX 3080", 59.5, 29.8),
    ("RTX 3070 Ti", 43.5, 21.7),
    ("RTX 3070", 40.6, 20.3),
    ("RTX 3060 Ti", 32.4, 16.2),
    ("RTX 3060", 25.5, 12.7),
    ("RTX 2080 Ti", 53.8, 13.4),
    ("RTX 2080 SUPER", 44.6, 11.2),
    ("RTX 2080", 40.3, 10.1),
    ("RTX 2070 SUPER", 36.3, 9.1),
    ("RTX 2070", 29.9, 7.5),
    ("RTX 2060", 25.8, 6.5),
)
# Chips with only float16 in 16 bits: a bfloat16 run has no peak there.
WITHOUT_BFLOAT16 = ("V100-SXM2", "V100-PCIE", "T4", "RTX 20")
# Slices of a device, and chips that share a name with larger ones.
NOT_THE_WHOLE_CHIP = re.compile(r"\b(MIG|Laptop|Max-Q)\b")

# For fewer steps, compiling costs more time than it saves. It took 12 s on an H100; on an H200 it saves 22 ms
# per step of 8,192 tokens of a 135M model (docs/benchmarks.md). With 16 cores, 600 steps suffice. Machines
# with fewer cores take up to a minute to compile.
STEPS_WORTH_COMPILING = 1_000
# Settings whose "auto" is replaced by a choice for the device.
DECIDED = ("train.precision", "train.compile", "trainer.accelerator")
RECORDED_PACKAGES = ("torch", "lightning", "transformers", "tokenizers", "numpy", "safetensors")


def peak_flops(name: str, precision: str) -> float | None:
    """Peak operations per second of a device's matrix units.

    Args:
        name: from `torch.cuda.get_device_name`.
        precision: Lightning's name: "32-true", "bf16-mixed", "bf16-true" or "16-mixed".

    Returns:
        None for a device that is not in the table, for a slice of one, and for bfloat16 on a device that
        emulates it.
    """
    if NOT_THE_WHOLE_CHIP.search(name):
        return None
    for chip, half, float32 in PEAK_TERAFLOPS:
        if re.search(rf"\b{chip}\b", name):
            if precision.startswith("bf16") and chip.startswith(WITHOUT_BFLOAT16):
                return None
            return 1e12 * (float32 if precision == "32-true" else half)
    return None


def run_peak_flops(device: torch.device, precision: str, devices: int) -> float | None:
    """`peak_flops` of all devices of a run together; None if not known, as for a CPU."""
    if device.type != "cuda":
        return None
    one = peak_flops(torch.cuda.get_device_name(device), precision)
    return one * devices if one is not None else None


def flops_utilization(config: RunConfig, tokens_per_second: float, peak: float | None) -> float | None:
    """MFU: the share of `peak` (operations per second) that the model's own arithmetic uses.

    The head's matmul counts even if its weights are tied; recomputation that saves memory does not count.
    """
    if peak is None:
        return None
    return tokens_per_second * training_flops_per_token(config.model, config.data.sequence_length) / peak


@dataclass(frozen=True)
class Device:
    """The device of a run."""

    kind: str  # PyTorch's: "cpu", "cuda", "mps"
    name: str  # "cpu", or the GPU's name
    bfloat16: bool  # has bfloat16 matmuls in hardware, without emulation


def find_device(accelerator: str) -> Device:
    """The device on this machine that Lightning's `accelerator` selects.

    Emulated bfloat16 does not count: a T4 or V100 (SM below 8.0) emulates it, slowly.

    Raises:
        InputError: the machine has no such device.
    """
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if accelerator in ("auto", "gpu", "cuda") and has_cuda:
        return Device(
            "cuda", torch.cuda.get_device_name(0), torch.cuda.is_bf16_supported(including_emulation=False)
        )
    if accelerator in ("auto", "gpu", "mps") and has_mps:
        return Device("mps", platform.processor() or "mps", False)  # float32 is not slower there
    if accelerator not in ("auto", "cpu"):
        known = accelerator in ("gpu", "cuda", "mps")
        raise InputError(
            f"trainer.accelerator {accelerator}: "
            + ("this machine has no such device" if known else "expected cpu, gpu, mps or auto"),
            "Use --set trainer.accelerator=auto, or cpu.",
        )
    capabilities = torch.cpu.get_capabilities()
    return Device("cpu", "cpu", bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")))


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """The autocast context of a run's precision for forward passes."""
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(config.train.precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def muon_dtype(config: RunConfig, device: torch.device) -> torch.dtype | None:
    """The dtype in which Muon computes orthogonal factors; None: the default of `orthogonalize`.

    A run in bfloat16 uses it for these too, on CPUs with bfloat16 matmuls: it takes half the time.
    """
    is_used = device.type == "cpu" and config.train.precision.startswith("bf16")
    return torch.bfloat16 if is_used and find_device("cpu").bfloat16 else None


def process_count(config: RunConfig) -> int:
    """Number of devices that share a step, over all machines."""
    devices = config.trainer.devices
    if devices == "auto":
        devices = torch.cuda.device_count() if config.trainer.accelerator == "cuda" else 1
    return devices * config.trainer.num_nodes


def require_trainer(config: RunConfig) -> None:
    """Let Lightning check the trainer's settings before anything is written. No process is started.

    Raises:
        InputError: Lightning refuses them, with its reason.
    """
    wanted = config.trainer
    try:
        with warnings.catch_warnings(action="ignore"):
            pl.Trainer(
                accelerator=wanted.accelerator,
                devices=wanted.devices,
                num_nodes=wanted.num_nodes,
                strategy=wanted.strategy,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
    except Exception as error:  # of many types, each with its own message
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        raise InputError(
            f"the trainer cannot be made on this machine: {reason}",
            "Change accelerator, devices, num_nodes or strategy in the trainer section.",
        ) from error


@dataclass(frozen=True)
class Decisions:
    """The settings that were chosen for a device, stored in the run's checkpoints."""

    device: str
    asked: tuple[str, ...]  # the settings that were "auto"


def decided_settings(config: RunConfig) -> dict[str, Any]:
    """The settings named in `DECIDED`, with their values."""
    settings = config.settings()
    return {key: settings[key] for key in DECIDED}


def with_settings(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """The config with other values for the settings in `DECIDED`."""
    values = config.model_dump()
    for key, value in settings.items():
        section, _, name = key.partition(".")
        values[section][name] = value
    return RunConfig.model_validate(values)


def decide(config: RunConfig, emit: Listener) -> tuple[RunConfig, Decisions]:
    """Replace "auto" in precision, compile and accelerator by a choice for the device, and report why.

    On a CPU, blocks are not compiled, because their operations are already fused by hand: compiled blocks
    took 0.93 to 0.99 of the time but a fifth more memory (docs/benchmarks.md). A CPU with bfloat16 matmuls
    still uses float32, so that the same config gives the same numbers on every CPU.

    Raises:
        InputError: the config names a device that this machine does not have.
    """
    device = find_device(config.trainer.accelerator)
    asked = tuple(key for key, value in decided_settings(config).items() if value == "auto")
    compiles = device.kind == "cuda" and config.train.steps >= STEPS_WORTH_COMPILING
    best = {
        "train.precision": "bf16-mixed" if device.kind == "cuda" and device.bfloat16 else "32-true",
        "train.compile": compiles,
        "trainer.accelerator": device.kind,
    }
    decided = with_settings(config, {key: best[key] for key in asked})
    if "train.compile" in asked and device.kind == "cuda":
        emit(Note(_compile_note(compiles, config.train.steps)))
    if "train.precision" in asked and device.kind == "cpu" and device.bfloat16:
        emit(Note("This CPU multiplies bfloat16: --set train.precision=bf16-mixed trains faster."))
    if device.kind == "cuda" and config.micro_batch_size < config.train.batch_size:
        at_once = f"--micro-batch-size {config.train.batch_size}"
        emit(
            Note(f"{at_once} computes a step in one part: faster if the GPU has the memory, the same result.")
        )
    if config.train.precision.startswith("bf16") and device.kind == "cuda" and not device.bfloat16:
        emit(Note(f"{device.name} emulates bfloat16, which is slow: 32-true or 16-mixed is faster there."))
    return decided, Decisions(device.name, asked)


def _compile_note(compiles: bool, steps: int) -> str:
    if compiles:
        return "The blocks are compiled (train.compile): the first step takes about a minute longer."
    return f"Not compiled (train.compile): for {steps:,} steps compiling costs more time than it saves."


def decide_again(
    config: RunConfig, before: Decisions, changed: Mapping[str, Any], emit: Listener
) -> tuple[RunConfig, Decisions]:
    """The settings of a resumed run: unchanged on the same device, chosen again on another one.

    Args:
        config: of the next steps, with the earlier choices.
        before: the earlier choices.
        changed: nested settings that the user has just given; they are not chosen again.
        emit: gets a note if the device has changed.

    Raises:
        InputError: the config names a device that this machine does not have.
    """
    current = decided_settings(config)

    def is_asked(key: str) -> bool:
        section, _, name = key.partition(".")
        return current[key] == "auto" or (key in before.asked and name not in changed.get(section, ()))

    asked = tuple(key for key in DECIDED if is_asked(key))
    device = find_device("auto" if "trainer.accelerator" in asked else config.trainer.accelerator)
    if device.name == before.device:
        return decide(config, emit)[0], Decisions(device.name, asked)
    emit(
        Note(f"The run was trained on {before.device or 'an unknown device'}; this device is {device.name}.")
    )
    return decide(with_settings(config, dict.fromkeys(asked, "auto")), emit)


def describe_environment(config: RunConfig, decisions: Decisions, read: Sequence[str]) -> dict[str, Any]:
    """Machine, versions, chosen settings, and the data that was read, for environment.json."""
    return {
        "smolctl": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: installed_version(package) for package in RECORDED_PACKAGES},
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "device": decisions.device,
        "decided": decided_settings(config),
        "decided_from_auto": list(decisions.asked),
        "data": list(read),
    }
