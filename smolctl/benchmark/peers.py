"""Other engines behind smolctl's engine interface, so that all of them do the same work."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smolctl.config import ModelConfig
from smolctl.generation.engine import Cache, Engine, Logits
from smolctl.sources import open_source


def is_installed(peer: str) -> bool:
    """Whether a peer can be imported."""
    return importlib.util.find_spec(peer.replace("llama.cpp", "llama_cpp")) is not None


def open_peer(peer: str, model: str, config: ModelConfig, threads: int) -> Engine:
    """Load a model with a peer; `threads` applies to llama.cpp, the others use PyTorch's setting."""
    if peer == "transformers":
        return TransformersEngine(model, config)
    if peer == "litgpt":
        return LitgptEngine(model, config)
    from smolctl.benchmark.llama_cpp import LlamaEngine

    return LlamaEngine(model, config, threads)


def load_transformers(model: str, config: ModelConfig) -> Any:
    """AutoModelForCausalLM of a folder or a GGUF, in float32, without progress bars and warnings.

    A model that is not a Llama needs smolctl's modelling file, so its folder must come from
    `engine_files.huggingface_folder`, because transformers runs the code that it finds there.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    path = Path(model)
    if path.is_file():
        return AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, gguf_file=path.name)
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, trust_remote_code=config.needs_own_code
    )


class _PastCache(Cache):
    """transformers' own KV cache, which grows as it is used."""

    past: Any = None

    def truncate(self, sequence: int, length: int) -> None:
        super().truncate(sequence, length)
        if not any(self.lengths):
            self.past = None


class TransformersEngine(Engine):
    """`transformers` in eager mode with SDPA, its default on a CPU."""

    precision = "float32"

    def __init__(self, model: str, config: ModelConfig) -> None:
        self.network = load_transformers(model, config).eval().requires_grad_(False)
        super().__init__(config, "transformers, float32")
        names = inspect.signature(type(self.network).forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"  # name before transformers 5.24
        self.weight_bytes = matrix_bytes(self.network, self.network.lm_head.weight)

    def allocate(self, sequences: int, capacity: int) -> _PastCache:
        return _PastCache(sequences, capacity)

    @torch.inference_mode()
    def forward(self, tokens: Sequence[Sequence[int]], cache: Cache, every: bool = False) -> Logits:
        assert isinstance(cache, _PastCache)
        out = self.network(
            torch.tensor([list(ids) for ids in tokens]),
            use_cache=True,
            logits_to_keep=0 if every else 1,
            **{self.cache_name: cache.past},
        )
        cache.past = getattr(out, self.cache_name)
        cache.lengths = [length + len(ids) for length, ids in zip(cache.lengths, tokens, strict=True)]
        logits: Logits = out.logits.flatten(0, 1).numpy()
        return logits


class _GridCache(Cache):
    """litgpt stores keys and values inside its model, with the same length for all sequences: one cache at
    a time.
    """

    def __init__(self, engine: LitgptEngine, sequences: int, capacity: int) -> None:
        super().__init__(sequences, capacity)
        self.engine = engine

    def truncate(self, sequence: int, length: int) -> None:
        super().truncate(sequence, length)
        if not any(self.lengths):
            self.engine.use(self)


class LitgptEngine(Engine):
    """litgpt's GPT in eager mode with its key/value cache, from a Hugging Face folder."""

    precision = "float32"
    shape = (0, 0)  # sequences and capacity of the model's current cache

    def __init__(self, folder: str, config: ModelConfig) -> None:
        self.network = load_litgpt(folder, config).eval().requires_grad_(False)
        super().__init__(config, "litgpt, float32")
        self.weight_bytes = matrix_bytes(self.network, self.network.lm_head.weight)

    def allocate(self, sequences: int, capacity: int) -> _GridCache:
        cache = _GridCache(self, sequences, capacity)
        self.use(cache)
        return cache

    def use(self, cache: Cache) -> None:
        """Allocate a cache in the model, unless it already has one of this shape."""
        shape = len(cache.lengths), cache.capacity
        if shape != self.shape:
            self.shape = shape
            self.network.clear_kv_cache()
            self.network.max_seq_length = cache.capacity
            self.network.cos, self.network.sin = self.network.rope_cache(device=torch.device("cpu"))
            self.network.set_kv_cache(*shape, dtype=torch.float32)

    @torch.inference_mode()
    def forward(self, tokens: Sequence[Sequence[int]], cache: Cache, every: bool = False) -> Logits:
        start, count = cache.lengths[0], len(tokens[0])
        position = torch.arange(start, start + count)
        logits = self.network(torch.tensor([list(ids) for ids in tokens]), position, start + count)
        cache.lengths = [start + count] * len(tokens)
        kept: Logits = (logits if every else logits[:, -1:]).flatten(0, 1).numpy()
        return kept


def load_litgpt(folder: str, config: ModelConfig) -> Any:
    """litgpt's GPT in float32 from a Hugging Face folder."""
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama

    state: dict[str, Tensor] = {}
    weights = open_source(folder).require_weights()
    given = {name: tensor.float() for name, tensor in weights.tensors()}
    settings = Config(
        name="smolctl",
        block_size=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        padded_vocab_size=config.vocab_size,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        head_size=config.head_dim,
        n_embd=config.hidden_size,
        n_query_groups=config.num_key_value_heads,
        intermediate_size=config.intermediate_size,
        rope_base=int(config.rope_theta),
        norm_eps=config.rms_norm_eps,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
    )
    copy_weights_hf_llama(settings, {}, state, given)
    with torch.device("meta"):
        network = GPT(settings)
    network.load_state_dict(state, assign=True)
    network.cos, network.sin = network.rope_cache(device=torch.device("cpu"))
    return network


def matrix_bytes(network: torch.nn.Module, head: Tensor) -> int:
    """Bytes of the matrices that are multiplied for every token: tables are only looked up, unless tied."""
    tables = {
        id(module.weight)
        for module in network.modules()
        if isinstance(module, torch.nn.Embedding) and module.weight is not head
    }
    return sum(one.nbytes for one in network.parameters() if one.dim() > 1 and id(one) not in tables)
