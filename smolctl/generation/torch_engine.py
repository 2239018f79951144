"""The engine that runs everywhere: the network as PyTorch runs it, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smolctl.generation.engine import Cache, Cancellation, Engine
from smolctl.model.cache import KVCache
from smolctl.model.network import Transformer

# Tokens of a long prompt that go through the network at once: enough to fill the matrix products,
# few enough that the MLP's intermediate values stay small.
PREFILL_CHUNK = 512


class TorchCache(Cache):
    """One buffer for all sequences, so that those of equal length are read together."""

    def __init__(self, buffers: KVCache, sequences: int, capacity: int) -> None:
        super().__init__(sequences, capacity)
        self.buffers = buffers

    def copy(self, source: int, target: int) -> None:
        length = self.lengths[source]
        for part in (self.buffers.keys, self.buffers.values):
            part[:, target, :, :length] = part[:, source, :, :length]
        self.lengths[target] = length


class TorchEngine(Engine):
    """Runs a network in evaluation mode, in the dtype and on the device of its parameters."""

    def __init__(self, network: Transformer, note: str = "", name: str = "") -> None:
        weight = network.model.norm.weight  # packed matrices are no parameters
        kind = str(weight.dtype).removeprefix("torch.")
        super().__init__(network.config, name or f"torch {weight.device.type}, {kind}", note)
        self.network = network
        self.device, self.dtype = weight.device, weight.dtype

    def allocate(self, sequences: int, capacity: int) -> TorchCache:
        buffers = KVCache.allocate(self.config, sequences, capacity, self.dtype, self.device)
        return TorchCache(buffers, sequences, capacity)

    @torch.inference_mode()
    def forward(self, tokens: Sequence[Sequence[int]], cache: Cache, every: bool = False) -> Tensor:
        assert isinstance(cache, TorchCache)
        self.check_room(tokens, cache)
        together = len({len(ids) for ids in tokens}) == 1 == len(set(cache.lengths))
        rows = [slice(None)] if together else [slice(at, at + 1) for at, ids in enumerate(tokens) if ids]
        keys, values = cache.buffers.keys, cache.buffers.values
        logits = []
        for row in rows:
            batch = torch.tensor([list(ids) for ids in tokens[row]], dtype=torch.long, device=self.device)
            buffers = KVCache(keys[:, row], values[:, row], cache.lengths[row][0])
            logits.append(self._read(batch, buffers, cache.cancellation, every))
        cache.lengths = [length + len(ids) for length, ids in zip(cache.lengths, tokens, strict=True)]
        return torch.cat(logits).float().cpu()

    def _read(self, ids: Tensor, buffers: KVCache, cancellation: Cancellation, every: bool) -> Tensor:
        logits = []
        for part in ids.split(PREFILL_CHUNK, dim=1):
            cancellation.check()
            hidden = self.network.model(part, buffers)
            if every:
                logits.append(self.network.logits(hidden))
        return torch.cat(logits, dim=1).flatten(0, 1) if every else self.network.logits(hidden[:, -1])
