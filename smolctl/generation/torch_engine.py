"""The PyTorch engine, which runs on any device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from smolctl.cores import compute_threads
from smolctl.generation.engine import Cache, Cancellation, Engine, Logits
from smolctl.generation.native_engine import kind_of, read_bytes
from smolctl.model.cache import KVCache
from smolctl.model.dynamic import dynamic_network
from smolctl.model.network import Transformer
from smolctl.model.weights import from_state
from smolctl.sources.arrays import as_tensor
from smolctl.sources.base import ModelSource
from smolctl.sources.quantized.packed import PackedMatrix
from smolctl.sources.quantized.scaled import ScaledMatrix, StoredTensor, dense

# Tokens of a long prompt per call: enough for efficient matmuls, few enough that the MLP's intermediate
# values stay small.
PREFILL_CHUNK = 512


class TorchCache(Cache):
    """One buffer for all sequences, so that sequences of equal length are processed together."""

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
        weight = network.model.norm.weight  # packed matrices are not parameters
        kind = str(weight.dtype).removeprefix("torch.")
        super().__init__(network.config, name or f"torch {weight.device.type}, {kind}", note)
        self.network = network
        self.device, self.dtype = weight.device, weight.dtype

    def allocate(self, sequences: int, capacity: int) -> TorchCache:
        buffers = KVCache.allocate(self.config, sequences, capacity, self.dtype, self.device)
        return TorchCache(buffers, sequences, capacity)

    @torch.inference_mode()
    def forward(self, tokens: Sequence[Sequence[int]], cache: Cache, every: bool = False) -> Logits:
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
        found: Logits = torch.cat(logits).float().cpu().numpy()
        return found

    def _read(self, ids: Tensor, buffers: KVCache, cancellation: Cancellation, every: bool) -> Tensor:
        logits = []
        for part in ids.split(PREFILL_CHUNK, dim=1):
            cancellation.check()
            hidden = self.network.model(part, buffers)
            if every:
                logits.append(self.network.logits(hidden))
        return torch.cat(logits, dim=1).flatten(0, 1) if every else self.network.logits(hidden[:, -1])


def open_torch_engine(
    source: ModelSource, stored: Mapping[str, StoredTensor], note: str = "", threads: int | None = None
) -> TorchEngine:
    """An engine for a source's tensors in float32; matrices of `quantize_dynamic` run as they are.

    Args:
        source: describes the tensors.
        stored: the tensors that a network of its config loads.
        note: why it is not the fastest engine.
        threads: of PyTorch in this process, see `compute_threads`; None: unchanged.
    """
    if threads is not None:
        torch.set_num_threads(compute_threads(threads))
    if any(isinstance(one, ScaledMatrix) for one in stored.values()):
        return _dynamic_engine(source, stored)
    arrays = {name: dense(one) for name, one in stored.items()}
    tensors = {name: as_tensor(array) for name, array in arrays.items()}
    network = from_state(source.require_config(), tensors, source.id).eval().requires_grad_(False)
    packed = {name: one for name, one in stored.items() if not isinstance(one, ScaledMatrix)}
    is_packed = any(isinstance(one, PackedMatrix) for one in packed.values())
    engine = TorchEngine(network, note, f"torch cpu, {kind_of(packed)} as float32" if is_packed else "")
    engine.precision, engine.weight_bytes = kind_of(arrays), read_bytes(arrays)
    return engine


def _dynamic_engine(source: ModelSource, stored: Mapping[str, StoredTensor]) -> TorchEngine:
    activations = str((source.quantization or {}).get("activations", "per-tensor"))
    network = dynamic_network(source.require_config(), stored, activations)
    engine = TorchEngine(network, name=f"torch cpu, int8 weights, activations {activations}")
    engine.precision = "int8-dynamic"
    engine.weight_bytes = sum(tensor.bytes for tensor in source.tensors or () if len(tensor.shape) > 1)
    return engine
