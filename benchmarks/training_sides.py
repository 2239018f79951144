"""A training step of SmolLM2-135M's shape by smolctl and by its peers, for the scripts that compare them.

Every side starts from the same weights and sees the same tokens, with the same fused AdamW and the same
clipping, so that their losses have to agree from step to step. `transformers` and `litgpt` are the packages;
"nanogpt" is a step as nanoGPT takes it, written here for this shape: plain modules, all logits at once.
Memory is the peak of the process, so a side is a process of its own: `Side` is that process seen from
outside.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smolctl.config import ModelConfig, load_run_config
from smolctl.model.weights import initialize
from smolctl.timing import peak_memory
from smolctl.training.fit import keep_freed_memory

SIDES = ("smolctl", "transformers", "litgpt", "nanogpt")
Loss = Callable[[Tensor, Tensor], Tensor]  # mean over tokens (B, T) and the tokens after them


def smolctl(config: ModelConfig, weights: dict[str, Tensor], compiled: bool) -> tuple[nn.Module, Loss]:
    """What `smolctl train` runs."""
    keep_freed_memory()
    network = initialize(config, 0)
    network.load_state_dict(weights)
    if compiled:
        network.compile_blocks()
    return network, lambda inputs, targets: network.loss(inputs, targets) / targets.numel()


def transformers(config: ModelConfig, weights: dict[str, Tensor], compiled: bool) -> tuple[nn.Module, Loss]:
    """LlamaForCausalLM in a plain loop, as Trainer runs it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
        )
    )
    network.load_state_dict(weights, strict=False)  # the tied head has no tensor of its own in ours
    network.tie_weights()
    if compiled:
        network.compile()

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        # With shift_labels the targets are taken as they are: the same tokens as on every side.
        found: Tensor = network(
            input_ids=inputs, labels=targets, shift_labels=targets.contiguous(), use_cache=False
        ).loss
        return found

    return network, loss


def litgpt(config: ModelConfig, weights: dict[str, Tensor], compiled: bool) -> tuple[nn.Module, Loss]:
    """litgpt's GPT and its chunked cross entropy, as its pretraining runs them."""
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import chunked_cross_entropy

    from smolctl.benchmark.peers import litgpt_settings

    settings = Config(**litgpt_settings(config))
    network = GPT(settings)
    state: dict[str, Tensor] = {}
    copy_weights_hf_llama(settings, {}, state, weights)
    network.load_state_dict(state, strict=False)
    network.lm_head.weight = network.transformer.wte.weight  # as its pretraining ties them
    if compiled:
        network.compile()
    return network, lambda inputs, targets: chunked_cross_entropy(
        network(inputs), targets.contiguous(), chunk_size=0
    )


class PlainGPT(nn.Module):
    """A decoder of this shape in nanoGPT's plain style: one product for q, k and v, all logits at once."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.table = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        frequencies = config.rope_theta ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
        angles = torch.outer(torch.arange(config.max_position_embeddings), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x = self.table(inputs)  # (B, T, C)
        cos, sin = self.cos[: inputs.shape[1]], self.sin[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = F.linear(self.norm(x), self.table.weight)  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class PlainBlock(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, queries = config.hidden_size, config.num_attention_heads * config.head_dim
        self.keys = config.num_key_value_heads * config.head_dim
        self.head_dim = config.head_dim
        self.norm1 = nn.RMSNorm(width, config.rms_norm_eps)
        self.qkv = nn.Linear(width, queries + 2 * self.keys, bias=False)
        self.out = nn.Linear(queries, width, bias=False)
        self.norm2 = nn.RMSNorm(width, config.rms_norm_eps)
        self.gate = nn.Linear(width, config.intermediate_size, bias=False)
        self.up = nn.Linear(width, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm1(x)).split([C, self.keys, self.keys], dim=-1)
        q, k, v = (part.view(B, T, -1, self.head_dim).transpose(1, 2) for part in (q, k, v))
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        normed = self.norm2(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)


def nanogpt(config: ModelConfig, weights: dict[str, Tensor], compiled: bool) -> tuple[nn.Module, Loss]:
    """A step as nanoGPT takes it."""
    network = PlainGPT(config)
    state = {
        "table.weight": weights["model.embed_tokens.weight"],
        "norm.weight": weights["model.norm.weight"],
    }
    names = {
        "norm1": "input_layernorm",
        "out": "self_attn.o_proj",
        "norm2": "post_attention_layernorm",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }
    for index in range(config.num_hidden_layers):
        layer, ours = f"blocks.{index}", f"model.layers.{index}"
        for theirs, name in names.items():
            state[f"{layer}.{theirs}.weight"] = weights[f"{ours}.{name}.weight"]
        parts = [weights[f"{ours}.self_attn.{part}_proj.weight"] for part in "qkv"]
        state[f"{layer}.qkv.weight"] = torch.cat(parts)
    network.load_state_dict(state)
    if compiled:
        network.compile()
    return network, network


BUILDERS = {"smolctl": smolctl, "transformers": transformers, "litgpt": litgpt, "nanogpt": nanogpt}


@dataclass(frozen=True)
class Case:
    """What is measured."""

    side: str  # one of SIDES
    compiled: bool = False  # with torch.compile, as that side does it
    checkpointed: bool = False  # smolctl alone: blocks are computed again instead of kept
    bfloat16: bool = False  # products in bfloat16, by autocast
    batch: int = 4  # sequences
    length: int = 512  # tokens of each
    device: str = "cpu"
    preset: str = "smollm2-135m-hub"  # the model's shape; a smaller one for a trial

    @property
    def name(self) -> str:
        flags = ("compiled", "checkpointed", "bfloat16")
        return ", ".join([self.side, *(flag for flag in flags if getattr(self, flag))])


class Step:
    """One side's training step on one fixed batch. Called, it takes it."""

    def __init__(self, case: Case) -> None:
        self.case = case
        torch.set_float32_matmul_precision("high")  # as `smolctl train` does, for all sides
        config = load_run_config(case.preset).model
        config = config.model_copy(update={"position_embedding": "rope", "residual_scale": 1.0})
        weights = {name: tensor.clone() for name, tensor in initialize(config, 8).state_dict().items()}
        self.network, self.loss = BUILDERS[case.side](config, weights, case.compiled)
        del weights
        if case.checkpointed:
            self.network.model.checkpoint_activations = True
        self.device = torch.device(case.device)
        self.network.to(self.device).train()
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, config.vocab_size, (case.batch, case.length + 1), generator=generator)
        self.inputs, self.targets = tokens[:, :-1].to(self.device), tokens[:, 1:].to(self.device)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4, fused=True)

    def __call__(self) -> dict[str, Any]:
        """Its seconds, its loss and the most bytes held so far."""
        self._wait()
        started = time.perf_counter()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.case.bfloat16):
            loss = self.loss(self.inputs, self.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._wait()
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "loss": loss.item(), "peak_bytes": peak_memory(self.device)}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Side:
    """The process of a side. Called, it takes a step."""

    def __init__(self, case: Case) -> None:
        self.name = case.name
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(asdict(case))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.name} ended; its message is above")
        found: dict[str, Any] = json.loads(answer)
        print(f"{self.name}: {found}", file=sys.stderr, flush=True)
        return found

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_error: object) -> None:
        self._process.kill()
        self._process.wait()


def main() -> None:
    step = Step(Case(**json.loads(sys.argv[1])))
    for _line in sys.stdin:
        print(json.dumps(step()), flush=True)


if __name__ == "__main__":
    main()
