"""llama.cpp behind smolctl's engine interface, using only the C functions of llama-cpp-python."""

from __future__ import annotations

from collections.abc import Sequence

import llama_cpp
import numpy as np

from smolctl.config import ModelConfig
from smolctl.errors import SmolError
from smolctl.generation.engine import Cache, Engine, Logits

BATCH = 512  # tokens per call of a prefill: llama.cpp's own default
REMEDY = "Leave out --against llama.cpp."


# Otherwise llama.cpp prints its messages into the middle of a table.
SILENCE = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)


class _LlamaCache(Cache):
    """A context of llama.cpp: its threads, its buffers and its KV cache for all sequences."""

    def __init__(self, engine: LlamaEngine, sequences: int, capacity: int) -> None:
        super().__init__(sequences, capacity)
        self.engine = engine  # keeps the model alive as long as the context
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = sequences * (capacity + -capacity % 256)
        settings.n_seq_max = sequences
        settings.n_batch = settings.n_ubatch = BATCH
        settings.n_threads = settings.n_threads_batch = engine.threads
        settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.context = llama_cpp.llama_init_from_model(engine.model, settings)
        if not self.context:
            raise SmolError("llama.cpp could not create a context for this model", REMEDY)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def truncate(self, sequence: int, length: int) -> None:
        super().truncate(sequence, length)
        llama_cpp.llama_memory_seq_rm(self.memory, sequence, length, -1)

    def __del__(self) -> None:
        if getattr(self, "context", None):
            llama_cpp.llama_batch_free(self.batch)
            llama_cpp.llama_free(self.context)


class LlamaEngine(Engine):
    """llama.cpp with flash attention, which is faster on a CPU."""

    def __init__(self, model: str, config: ModelConfig, threads: int) -> None:
        llama_cpp.llama_log_set(SILENCE, None)
        llama_cpp.llama_backend_init()
        self.threads = threads
        self.model = llama_cpp.llama_model_load_from_file(
            model.encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise SmolError(f"{model}: llama.cpp cannot load it", REMEDY)
        super().__init__(config, "llama.cpp, flash attention")
        self.weight_bytes = llama_cpp.llama_model_size(self.model)

    def __del__(self) -> None:
        if getattr(self, "model", None):
            llama_cpp.llama_model_free(self.model)

    def allocate(self, sequences: int, capacity: int) -> _LlamaCache:
        return _LlamaCache(self, sequences, capacity)

    def forward(self, tokens: Sequence[Sequence[int]], cache: Cache, every: bool = False) -> Logits:
        assert isinstance(cache, _LlamaCache)
        rows = [
            (token, sequence, cache.lengths[sequence] + at, every or at + 1 == len(ids))
            for sequence, ids in enumerate(tokens)
            for at, token in enumerate(ids)
        ]
        found = []
        batch = cache.batch
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            batch.n_tokens = len(part)
            for at, (token, sequence, position, wanted) in enumerate(part):
                batch.token[at], batch.pos[at], batch.logits[at] = token, position, wanted
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
            if llama_cpp.llama_decode(cache.context, batch):
                raise SmolError("llama.cpp could not read the tokens", REMEDY)
            if count := sum(row[3] for row in part):
                pointer = llama_cpp.llama_get_logits(cache.context)
                values = np.ctypeslib.as_array(pointer, (count, self.config.vocab_size))
                found.append(values.copy())
        cache.lengths = [length + len(ids) for length, ids in zip(cache.lengths, tokens, strict=True)]
        return np.concatenate(found) if len(found) > 1 else found[0]
