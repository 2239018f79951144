"""A training step of SmolLM2-135M's shape with smolctl and other programs, for the scripts that compare them.

Every engine starts from the same weights and sees the same tokens, with the same fused AdamW and the same
clipping, so that their losses agree from step to step. `transformers` and `litgpt` are the packages;
"nanogpt" is a step as nanoGPT takes it, written here for this shape: plain modules, all logits at once.
Memory is the peak of a process, so every engine has one of its own, as in `smolctl bench`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smolctl.benchmark.engine_files import huggingface_folder
from smolctl.benchmark.engines import RandomWeights
from smolctl.benchmark.peers import load_litgpt
from smolctl.benchmark.training_suite import Loss, TrainingStep, open_smolctl, open_transformers
from smolctl.benchmark.workload import Measurement
from smolctl.config import ModelConfig
from smolctl.model.network import Transformer
from smolctl.sources import open_source
from smolctl.timing import in_turns
from smolctl.training.graph import GradientGraph
from smolctl.training.process import prepare_process
from smolctl.worker import Worker


@dataclass(frozen=True)
class Case:
    """What is measured."""

    engine: str  # a key of ENGINES
    model: str  # a folder from `llama_folder`
    compiled: bool = False  # with torch.compile, as that engine does it
    checkpointed: bool = False  # smolctl alone: blocks are computed again instead of kept
    bfloat16: bool = False  # matmuls in bfloat16, by autocast
    batch: int = 4  # sequences
    length: int = 512  # tokens of each
    device: str = "cpu"

    @property
    def name(self) -> str:
        flags = ("compiled", "checkpointed", "bfloat16")
        return ", ".join([self.engine, *(flag for flag in flags if getattr(self, flag))])


@contextmanager
def llama_folder(preset: str) -> Iterator[str]:
    """A Hugging Face folder with random weights in the shape of a preset, as a Llama."""
    source = open_source(preset)
    config = source.require_config().model_copy(update={"position_embedding": "rope", "residual_scale": 1.0})
    with TemporaryDirectory() as folder:
        source = dataclasses.replace(source, config=config, weights=RandomWeights(config))
        yield huggingface_folder(source, Path(folder) / "llama")


def steps_in_turns(
    cases: Sequence[Case], rounds: int, warmups: int, tolerance: float, compared: int | None = None
) -> list[list[Measurement]]:
    """For each case its first step, which allocates and compiles, then those of the rounds that count.

    The cases take turns, each in a process of its own. In the first `compared` rounds (None: in all) their
    losses must agree within a tolerance, relative.
    """
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(case.name, torch.get_num_threads())) for case in cases]
        works = [partial(worker.call, take_step, case) for worker, case in zip(workers, cases, strict=True)]
        # A GPU leaves the processor's cores free to compile all of them at once.
        with ThreadPoolExecutor(len(works) if cases[0].device == "cuda" else 1) as pool:
            first = list(pool.map(lambda work: work(), works))
        measured = in_turns(works, rounds, warmups, lambda number: print(f"round {number}", file=sys.stderr))
    for steps in list(zip(*measured, strict=True))[:compared]:
        losses = [step.output.item() for step in steps]
        if any(abs(loss / losses[0] - 1) > tolerance for loss in losses):
            raise SystemExit(f"losses differ: {losses}")
    return [[one, *rest] for one, rest in zip(first, measured, strict=True)]


def take_step(case: Case) -> Measurement:
    """One more step of a case in this process."""
    return training_step(case)()


@cache
def training_step(case: Case) -> TrainingStep:
    """The step of a case on one fixed batch."""
    torch.set_float32_matmul_precision("high")  # as `smolctl train` does, for all engines
    network, loss = ENGINES[case.engine](case.model)
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()  # allocated alike everywhere, not mapped from a file
    if isinstance(network, Transformer):
        network.model.checkpoint_activations = case.checkpointed
    if case.compiled:
        network.compile_blocks() if isinstance(network, Transformer) else network.compile()
    device = torch.device(case.device)
    network.to(device).train()
    generator = torch.Generator().manual_seed(0)
    vocabulary = open_source(case.model).require_config().vocab_size
    tokens = torch.randint(0, vocabulary, (case.batch, case.length + 1), generator=generator).to(device)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    step = TrainingStep(lambda: loss(inputs, targets), optimizer, device, case.bfloat16)
    if device.type == "cuda" and isinstance(network, Transformer):
        prepare_process()
        torch.use_deterministic_algorithms(True)  # as `smolctl train`
        return graphed(step, network, tokens)
    return step


def graphed(step: TrainingStep, network: Transformer, tokens: Tensor) -> TrainingStep:
    """The step as `smolctl train` takes it: its gradient is one CUDA graph."""

    def gradient(rows: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=step.bfloat16):
            loss = network.loss(rows[:, :-1], rows[:, 1:]) / rows[:, 1:].numel()
        loss.backward()
        return loss.detach()

    graph = GradientGraph(network, gradient, tokens)
    # The gradient is there with the loss; a pass back to a number of its own changes nothing of it.
    return dataclasses.replace(step, loss=lambda: graph(tokens).clone().requires_grad_())


def open_litgpt(model: str) -> tuple[nn.Module, Loss]:
    """litgpt's GPT and its chunked cross entropy, as its pretraining runs them."""
    from litgpt.utils import chunked_cross_entropy

    network = load_litgpt(model, open_source(model).require_config())
    network.lm_head.weight = network.transformer.wte.weight  # as its pretraining ties them
    return network, lambda inputs, targets: chunked_cross_entropy(network(inputs), targets, chunk_size=0)


def open_nanogpt(model: str) -> tuple[nn.Module, Loss]:
    """A step as nanoGPT takes it."""
    source = open_source(model)
    network = PlainGPT(source.require_config())
    state = {
        name.removeprefix("model.").replace("self_attn.", "").replace("mlp.", ""): tensor
        for name, tensor in source.require_weights().tensors()
    }
    for index in range(len(network.layers)):
        parts = [state.pop(f"layers.{index}.{part}_proj.weight") for part in "qkv"]
        state[f"layers.{index}.qkv_proj.weight"] = torch.cat(parts)
    network.load_state_dict(state)
    return network, network


class PlainGPT(nn.Module):
    """A decoder of this shape in nanoGPT's plain style: one matmul for q, k and v, all logits at once."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(PlainBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        frequencies = config.rope_theta ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
        angles = torch.outer(torch.arange(config.max_position_embeddings), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x = self.embed_tokens(inputs)  # (B, T, C)
        for layer in self.layers:
            x = layer(x, self.cos[: inputs.shape[1]], self.sin[: inputs.shape[1]])
        logits = F.linear(self.norm(x), self.embed_tokens.weight)  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class PlainBlock(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, inner, self.head_dim = config.hidden_size, config.intermediate_size, config.head_dim
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        self.sizes = [self.head_dim * count for count in heads]
        self.input_layernorm = nn.RMSNorm(width, config.rms_norm_eps)
        self.qkv_proj = nn.Linear(width, sum(self.sizes), bias=False)
        self.o_proj = nn.Linear(self.sizes[0], width, bias=False)
        self.post_attention_layernorm = nn.RMSNorm(width, config.rms_norm_eps)
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        parts = self.qkv_proj(self.input_layernorm(x)).split(self.sizes, dim=-1)
        q, k, v = (part.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o_proj(y.transpose(1, 2).flatten(2))
        normed = self.post_attention_layernorm(x)
        gated: Tensor = self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))
        return x + gated


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)


PEERS = {"transformers": open_transformers, "litgpt": open_litgpt, "nanogpt": open_nanogpt}
ENGINES = {"smolctl": open_smolctl, **PEERS}
