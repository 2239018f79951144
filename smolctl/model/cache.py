"""Keys and values of the tokens so far, in buffers that are allocated once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smolctl.config import ModelConfig
from smolctl.model.positions import check_capacity


@dataclass
class KVCache:
    """Keys and values of every layer, each (L, B, K, capacity, D), filled up to `length`."""

    keys: Tensor
    values: Tensor
    length: int = 0

    @staticmethod
    def allocate(
        config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        """Allocate room for `capacity` tokens of `batch` sequences.

        Raises:
            InputError: the capacity exceeds the model's context.
        """
        check_capacity(config, capacity)
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        keys = torch.empty(shape, dtype=dtype, device=device)
        return KVCache(keys, torch.empty_like(keys))

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's (B, K, T, D) after the existing ones, and return views of all, (B, K, S, D).

        `length` does not change until every layer has stored its own.
        """
        end = self.length + keys.shape[2]
        all_keys, all_values = self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
        all_keys[:, :, self.length :] = keys
        all_values[:, :, self.length :] = values
        return all_keys, all_values
