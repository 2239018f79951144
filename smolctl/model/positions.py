"""Positions of tokens: how many a model has, and the angles by which RoPE turns queries and keys there."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from smolctl.config import ModelConfig
from smolctl.errors import InputError


def check_capacity(config: ModelConfig, capacity: int) -> None:
    """Refuse a cache longer than the model's context. Raises InputError."""
    if capacity > config.max_position_embeddings:
        raise InputError(
            f"{capacity} tokens do not fit the model's context of {config.max_position_embeddings}",
            "Shorten the prompt or lower --max-tokens.",
        )


def rotary_angles(config: ModelConfig, positions: int) -> NDArray[np.float32]:
    """The RoPE angles of the first positions, (positions, 1, D/2), rounded as in transformers."""
    angles: NDArray[np.float32] = np.outer(np.arange(positions, dtype=np.float32), rotary_frequencies(config))
    return angles[:, None]


def rotary_frequencies(config: ModelConfig) -> NDArray[np.float32]:
    """The angle in radians by which each pair of a head rotates from one position to the next: (D/2,)."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    powers = np.power(config.rope_theta, exponents, dtype=np.float64).astype(np.float32)
    frequencies: NDArray[np.float32] = 1 / powers
    if config.rope_scaling is None:
        return frequencies
    return np.array([config.rope_scaling.slowed(one) for one in frequencies], np.float32)
