"""Keys and values of the tokens seen so far, in buffers that are allocated once."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from smolctl.config import ModelConfig
from smolctl.errors import InputError


def check_capacity(config: ModelConfig, capacity: int) -> None:
    """Refuse a cache longer than the model's context."""
    if capacity > config.max_position_embeddings:
        raise InputError(
            f"{capacity} tokens do not fit the model's context of {config.max_position_embeddings}",
            "Shorten the prompt or lower --max-tokens.",
        )


class LayerCache:
    """One layer's keys and values, each (B, K, capacity, D), filled up to `length`."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, K, T, D) behind what is there and return views of all, (B, K, S, D)."""
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def rows(self, rows: slice, length: int) -> LayerCache:
        """A view of some of the sequences, of which `length` tokens are filled."""
        view = copy(self)
        view.keys, view.values, view.length = self.keys[rows], self.values[rows], length
        return view


@dataclass
class KVCache:
    """The cache of a whole network."""

    layers: list[LayerCache]

    @property
    def length(self) -> int:
        """Tokens stored in every layer."""
        return self.layers[0].length

    @staticmethod
    def allocate(
        config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        """Room for `capacity` tokens of `batch` sequences.

        Raises:
            InputError: more tokens than the model has positions for.
        """
        check_capacity(config, capacity)
        shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        return KVCache([LayerCache(shape, dtype, device) for _ in range(config.num_hidden_layers)])

    def rows(self, rows: slice, length: int) -> KVCache:
        """A view of some of the sequences, of which `length` tokens are filled."""
        return KVCache([layer.rows(rows, length) for layer in self.layers])
