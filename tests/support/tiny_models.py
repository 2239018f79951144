"""Tiny random models that can speak, and an engine that counts what it reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from smolctl.config import ModelConfig
from smolctl.data.tokenizer.tokenizer import Tokenizer, train_tokenizer
from smolctl.generation.engine import Cache, Engine, Logits
from smolctl.generation.load import LoadedModel
from smolctl.generation.sampling import SamplingSettings, generator_for
from smolctl.generation.scheduler import Scheduler
from smolctl.generation.slots import Request, Token
from smolctl.generation.torch_engine import TorchEngine
from smolctl.model.network import Transformer
from smolctl.model.weights import initialize
from smolctl.sources.huggingface.config import to_huggingface_config

# A short answer of `smolctl sample`, the same each time.
SHORT = ("--max-tokens", "5", "--temperature", "0", "--threads", "1")
TEXTS = ["the cat sat on the mat, and the dog saw the cat. " * 4, "Größe 界面 🎉👩‍👧 e\u0301 12"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> Tokenizer:
    trained = train_tokenizer(iter(TEXTS), 320)
    return Tokenizer(trained.backend, TEMPLATE, bos_token_id=0, eos_token_id=2, pad_token_id=2)


def tiny_network(seed: int = 0, context: int = 96, **changes: object) -> Transformer:
    values: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "initializer_range": 0.4,
        "eos_token_id": 2,
    }
    return initialize(ModelConfig(**(values | changes)), seed).eval()


class CountingEngine(Engine):
    """Another engine, with a record of every call."""

    def __init__(self, engine: Engine, exact_tokens: int = 1, is_uniform: bool = False) -> None:
        super().__init__(engine.config, engine.name)
        self.exact_tokens, self.is_uniform = exact_tokens, is_uniform
        self.engine = engine
        self.calls: list[list[list[int]]] = []

    @property
    def tokens_read(self) -> int:
        return sum(len(ids) for call in self.calls for ids in call)

    def allocate(self, sequences: int, capacity: int) -> Cache:
        return self.engine.allocate(sequences, capacity)

    def forward(self, tokens: Sequence[Sequence[int]], cache: Cache, every: bool = False) -> Logits:
        self.calls.append([list(ids) for ids in tokens])
        return self.engine.forward(tokens, cache, every)


def tiny_model(seed: int = 0, context: int = 96) -> LoadedModel:
    engine = CountingEngine(TorchEngine(tiny_network(seed, context)))
    return LoadedModel(f"tiny-{seed}", engine, tiny_tokenizer(), 0.0)


def run_requests(
    scheduler: Scheduler,
    prompts: Sequence[Sequence[int]],
    counts: Sequence[int],
    seed: int = 0,
    alternatives: int = 0,
) -> list[list[Token]]:
    """All tokens of every prompt."""
    requests = [
        Request(prompt, count, generator_for(seed, index), alternatives=alternatives)
        for index, (prompt, count) in enumerate(zip(prompts, counts, strict=True))
    ]
    found: list[list[Token]] = [[] for _ in requests]
    for step in scheduler.run(requests):
        for index, token in step:
            found[index].append(token)
    return found


def continue_prompt(
    engine: Engine,
    prompt: Sequence[int],
    count: int,
    settings: SamplingSettings | None = None,
    samples: int = 1,
    seed: int = 0,
) -> list[list[int]]:
    """Token ids of `samples` continuations of a prompt without speculation, greedy by default."""
    capacity = min(len(prompt) + count, engine.config.max_position_embeddings)
    scheduler = Scheduler(engine, samples, capacity, settings or plain_settings(0), "off")
    rows = run_requests(scheduler, [prompt] * samples, [count] * samples, seed)
    return [[token.id for token in row] for row in rows]


def uncached(network: Transformer, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy tokens by reading everything again for each."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(network(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def plain_settings(temperature: float) -> SamplingSettings:
    return SamplingSettings(temperature, top_p=0.95 if temperature else 1.0)


def write_speaker(path: Path, tokenizer: Tokenizer, following: Mapping[str, str]) -> Path:
    """A model as a Hugging Face folder that says, greedily, after each token the one that follows it."""
    network = tiny_network(
        vocab_size=tokenizer.vocab_size,
        eos_token_id=None,
        position_embedding="rope",
        residual_scale=1.0,
        tie_word_embeddings=False,
    )
    state = network.state_dict()
    for name, tensor in state.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()  # no layer adds anything: the head sees the last token
    table, head = state["model.embed_tokens.weight"], state["lm_head.weight"]
    table.copy_(torch.nn.functional.normalize(table, dim=1))
    head.zero_()
    vocabulary = tokenizer.backend.get_vocab()
    for token, after in following.items():
        head[vocabulary[after]] += 8 * table[vocabulary[token]]
    tokenizer.save(path)
    save_file(state, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(to_huggingface_config(network.config, "float32")))
    return path


def write_folder(
    path: Path, seed: int = 0, template: str | None = TEMPLATE, context: int = 96, **changes: object
) -> Path:
    """A tiny random model as a Hugging Face folder with its tokenizer."""
    path.mkdir(parents=True)
    network = tiny_network(seed, context, position_embedding="rope", residual_scale=1.0, **changes)
    save_file(network.state_dict(), path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(to_huggingface_config(network.config, "float32")))
    (path / "tokenizer.json").write_text(tiny_tokenizer().backend.to_str())
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    return path
