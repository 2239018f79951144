"""Weights of the network: initialized from a seed, or read from a source and checked name by name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from smolctl.arithmetic import count_parameters
from smolctl.config import ModelConfig
from smolctl.cores import machine_memory
from smolctl.errors import InputError
from smolctl.model.network import Transformer
from smolctl.sources.base import ModelSource
from smolctl.sources.shapes import check_state


def initialize(config: ModelConfig, seed: int) -> Transformer:
    """A new network whose weights are a pure function of (config, seed).

    Matrices are normal with standard deviation `initializer_range`. The two that write to the residual
    stream, o_proj and down_proj, are scaled by 1/sqrt(2 × layers), as in SmolLM2's training with nanotron.
    Norms are one, biases zero.

    Raises:
        InputError: this machine does not have enough memory for the weights.
    """
    size, memory = 4 * count_parameters(config).unique, machine_memory()
    if memory is not None and size > memory:
        raise InputError(
            f"the weights take {size / 1e9:,.0f} GB, but this machine has {memory / 1e9:,.0f} GB",
            "Choose a smaller vocab_size, hidden_size, intermediate_size or num_hidden_layers.",
        )
    generator = torch.Generator().manual_seed(seed)
    network = Transformer(config)
    std = config.initializer_range
    branch_std = std / (2 * config.num_hidden_layers) ** 0.5
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
            else:
                writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                parameter.normal_(0.0, branch_std if writes_residual else std, generator=generator)
    return network


def load_network(source: ModelSource, dtype: torch.dtype | None = None) -> Transformer:
    """The network of a source, in evaluation mode.

    Args:
        source: anything with a config and weights.
        dtype: of the parameters; None keeps the file's.

    Raises:
        InputError: the model cannot be represented, the file is damaged, or tensors are missing, unexpected
            or mis-shaped, each of them named.
    """
    config, weights = source.require_config(), source.require_weights()
    return from_state(config, dict(weights.tensors()), source.id, dtype).eval()


def weights_sha256(network: Transformer) -> str:
    """The SHA-256 of a network's parameters by name, independent of how a file stores them."""
    digest = hashlib.sha256()
    for name, parameter in sorted(network.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def require_finite(network: Transformer, source: ModelSource) -> None:
    """Check a source's weights after loading. Raises as `finite_tensors`."""
    for _ in _finite(network.named_parameters(), source):
        pass


def finite_tensors(source: ModelSource) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a source that will be written in another form.

    Raises:
        InputError: the weights cannot be read, or contain NaN or infinite values; names the tensor.
    """
    return _finite(source.require_weights().tensors(), source)


def _finite(tensors: Iterable[tuple[str, Tensor]], source: ModelSource) -> Iterator[tuple[str, Tensor]]:
    step = "" if source.step is None else f" at step {source.step:,}"
    for name, tensor in tensors:
        if not torch.isfinite(tensor).all():
            raise InputError(
                f"{source.id}{step}: {name} holds NaN or infinite values",
                "Use another checkpoint: this one is damaged, or its training diverged.",
            )
        yield name, tensor


def from_state(
    config: ModelConfig, tensors: Mapping[str, Tensor], origin: str, dtype: torch.dtype | None = None
) -> Transformer:
    """A network with the given tensors as its parameters, without a copy if they have the right type.

    Args:
        config: of the network.
        tensors: under their Hugging Face names, in their stored types.
        origin: what to call them in an error.
        dtype: of the parameters; None keeps the tensors'.

    Raises:
        InputError: as `load_network`.
    """
    state = {name: tensor.to(dtype) for name, tensor in check_state(config, tensors, origin).items()}
    with torch.device("meta"):
        network = Transformer(config)
    network.load_state_dict(state, strict=True, assign=True)
    return network.requires_grad_(True)


def parameter_count(module: nn.Module) -> int:
    """Numbers stored in a module, each tensor once."""
    return sum(parameter.numel() for parameter in module.parameters())
