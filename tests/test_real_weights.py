"""The real SmolLM2-135M-Instruct: the same numbers and the same words as transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from smolctl.config.data import DataConfig
from smolctl.data.batches import sequences_of
from smolctl.data.tokens.corpus import tokenize_corpus
from smolctl.evaluation.measure import score_tokens
from smolctl.generation.complete import CompletionSettings, complete
from smolctl.generation.load import LoadedModel, load_model
from smolctl.generation.native_engine import NativeEngine, Stored
from smolctl.generation.sampling import SamplingSettings
from smolctl.model.cache import KVCache
from smolctl.model.network import Transformer
from smolctl.model.weights import load_network
from smolctl.native.library import BUILDS, Library, load_library
from smolctl.quantization.rounding import quantize_matrix
from smolctl.runs.folder import RunFolder
from smolctl.sources import open_source
from smolctl.sources.arrays import as_array
from smolctl.training.prepare import prepare
from tests.support.native import library
from tests.support.processes import call
from tests.support.tiny_models import continue_prompt

# One process loads the models for all tests.
pytestmark = [pytest.mark.real_weights, pytest.mark.xdist_group("real weights")]

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at a temperature of",
    "La recette de la ratatouille commence par",
    "1 2 3 4 5 6",
    "Dear Sir or Madam,\n\nI am writing to",
    "<|im_start|>user\nName three primary colours.<|im_end|>\n<|im_start|>assistant\n",
    "The mitochondria",
    "🙂 means happy, 😢 means",
]
TEXT = (
    "A tide gauge measures the level of the sea against a mark on land. Early ones were boards with a "
    "painted scale that a keeper read by day. Later a float in a well moved a pen on a drum of paper, and "
    "the pen drew the tides of a month on one sheet. Today most of them use a radar that looks down at the "
    "water from a bracket on the quay, and a small computer that sends a number every minute.\n"
)
GREEDY = SamplingSettings(temperature=0)


@pytest.fixture(scope="module")
def ours(gguf_file: Path) -> LoadedModel:
    return load_model(str(gguf_file))


@pytest.fixture(scope="module")
def network(gguf_file: Path) -> Transformer:
    return load_network(open_source(str(gguf_file)), dtype=torch.float32)


@pytest.fixture(scope="module")
def reference(gguf_file: Path) -> PreTrainedModel:
    folder, name = str(gguf_file.parent), gguf_file.name
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def reference_tokenizer(gguf_file: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(str(gguf_file.parent), gguf_file=gguf_file.name)


@pytest.mark.slow
def test_every_weight_equals_transformers(network: Transformer, reference: PreTrainedModel) -> None:
    theirs = reference.state_dict()
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
    assert sum(p.numel() for p in network.parameters()) == 134_515_008


@pytest.mark.slow
def test_tokens_and_chat_equal_transformers(
    ours: LoadedModel, reference_tokenizer: PreTrainedTokenizerBase
) -> None:
    for prompt in [*PROMPTS, TEXT]:
        assert ours.tokenizer.encode(prompt) == reference_tokenizer(prompt)["input_ids"]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    assert ours.chat_prompt(messages).text == reference_tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


def test_logits_equal_transformers_to_rounding(
    ours: LoadedModel, network: Transformer, reference: PreTrainedModel
) -> None:
    ids = torch.tensor([ours.tokenizer.encode(TEXT)])
    with torch.inference_mode():
        mine, theirs = network(ids), reference(ids).logits
    assert (mine - theirs).abs().max() < 2e-3  # logits reach 30: 1e-4 of them, after 30 layers
    assert (mine - theirs).abs().mean() < 1e-4
    assert torch.equal(mine.argmax(-1), theirs.argmax(-1))


@pytest.mark.slow
def test_cached_equals_uncached(ours: LoadedModel, network: Transformer) -> None:
    ids = torch.tensor([ours.tokenizer.encode(TEXT)])
    cache = KVCache.allocate(network.config, 1, ids.shape[1], torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        whole = network(ids)
        parts = torch.cat([network(part, cache) for part in ids.split([40, 1, 1, ids.shape[1] - 42], 1)], 1)
    assert (whole - parts).abs().max() < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_continuation_is_token_equal_to_transformers(
    ours: LoadedModel, network: Transformer, reference: PreTrainedModel, prompt: str
) -> None:
    library = load_library()
    assert isinstance(library, Library), library
    weights = {name: as_array(tensor) for name, tensor in network.state_dict().items()}
    engine = NativeEngine(library, network.config, weights)  # all in float32
    ids = torch.tensor([ours.tokenizer.encode(prompt)])
    theirs: list[int] = []
    past, latest = None, ids
    with torch.inference_mode():  # plain argmax without generate's rules: all 64 tokens are compared
        for _ in range(64):
            output = reference(latest, past_key_values=past, use_cache=True)
            past, latest = output.past_key_values, output.logits[:, -1:].argmax(-1)
            theirs.append(int(latest))
    assert continue_prompt(engine, ids[0].tolist(), 64) == [theirs]


@pytest.fixture(scope="module")
def text_ids(ours: LoadedModel) -> list[int]:
    return ours.tokenizer.encode(TEXT)


@pytest.fixture(scope="module")
def float32_logits(network: Transformer, text_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return network(torch.tensor([text_ids]))[0]


@pytest.fixture(scope="module")
def stored(network: Transformer) -> dict[str, dict[str, Stored]]:
    """The weights as float32 and with all matrices in int8."""
    state = network.state_dict()
    packed = {
        name: quantize_matrix(tensor, 8, 32) if tensor.dim() > 1 else as_array(tensor)
        for name, tensor in state.items()
    }
    return {"float32": {name: as_array(tensor) for name, tensor in state.items()}, "int8": packed}


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(
    ("kind", "bound"),
    [
        pytest.param("int8", 0.002, marks=pytest.mark.slow),
        pytest.param("float32", 1e-6, marks=pytest.mark.proof),
    ],
)
def test_every_build_is_as_close_to_float32_and_says_the_same(
    kind: str,
    bound: float,
    build: str,
    ours: LoadedModel,
    network: Transformer,
    stored: dict[str, dict[str, Stored]],
    text_ids: list[int],
    float32_logits: torch.Tensor,
) -> None:
    engine = NativeEngine(library(build), network.config, stored[kind])
    targets = torch.tensor(text_ids[1:])
    cache = engine.allocate(1, len(text_ids))
    logits = [engine.forward([text_ids[:-9]], cache, every=True)]  # at once, and then one by one
    logits += [engine.forward([[token]], cache, every=True) for token in text_ids[-9:-1]]
    found = score_tokens(torch.from_numpy(np.concatenate(logits)), targets, float32_logits[:-1])
    print(
        build,
        kind,
        found.kl.mean(),
        found.kl[-8:].mean(),
        found.kl.max(),
        found.agrees.double().mean(),
    )
    assert found.kl.mean() <= bound
    assert found.kl[-8:].mean() <= bound
    prompt = ours.chat_prompt([{"role": "user", "content": "What is the capital of France?"}])
    answer = complete(engine, ours.tokenizer, prompt, CompletionSettings(max_tokens=32, sampling=GREEDY))
    assert answer.completions[0].text == "The capital of France is Paris."


def test_chat_answers_paris(ours: LoadedModel) -> None:
    prompt = ours.chat_prompt([{"role": "user", "content": "What is the capital of France?"}])
    pieces: list[str] = []
    settings = CompletionSettings(max_tokens=32, sampling=GREEDY)
    result = complete(
        ours.engine, ours.tokenizer, prompt, settings, lambda _sample, text: pieces.append(text)
    )
    assert result.completions[0].text == "The capital of France is Paris."
    assert result.completions[0].finish_reason == "stop"
    assert "".join(pieces) == result.completions[0].text
    assert len(pieces) > 3  # it streams


@pytest.mark.slow
def test_fine_tuning_starts_at_the_loss_of_transformers_and_goes_down(
    gguf_file: Path, reference: PreTrainedModel, ours: LoadedModel, tmp_path: Path
) -> None:
    text = tmp_path / "notes.txt"
    text.write_text(TEXT * 12)
    done = call(
        *("train", "--init-from", gguf_file, "--data", text, "--out", tmp_path / "run", "--json"),
        *("--steps", "8", "--batch-size", "2", "--set", "data.sequence_length=128"),
        *("--set", "data.validation_fraction=0", "--set", "predictions.every=0"),
    )
    assert done.code == 0, done.err
    steps = [event for event in map(json.loads, done.out.splitlines()) if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 9))

    config = RunFolder.open(tmp_path / "run").config()
    batch = prepare(config, open_source(str(gguf_file)), lambda _event: None).dataset()[0]  # what step 1 saw
    with torch.inference_mode():
        theirs = reference(batch[:, :-1]).logits.flatten(0, 1).log_softmax(-1)
    expected = -theirs.gather(1, batch[:, 1:].flatten()[:, None]).mean().item()
    assert steps[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert math.isfinite(steps[-1]["loss"])
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]


ASKED, ANSWERED = "Who wrote Hamlet?", "William Shakespeare wrote it, around 1600."
# The same words in every shape of data, and the messages that they mean.
TURNS = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}]
TALK = [
    {"role": "system", "content": "Be brief."},
    *TURNS,
    {"role": "user", "content": "And «Faust»? 🎭"},
    {"role": "assistant", "content": " Goethe.\n"},
]
CONVERSATIONS = [
    ({"messages": TALK}, TALK),
    ({"conversations": [{"from": turn["role"], "value": turn["content"]} for turn in TALK]}, TALK),
    ({"prompt": f"{ASKED} ", "completion": ANSWERED}, TURNS),
    ({"prompt": TALK[:2], "completion": TALK[2:]}, TALK),
    ({"instruction": ASKED, "input": "", "output": ANSWERED}, TURNS),
]


@pytest.mark.slow
def test_chat_loss_and_gradients_are_those_of_transformers_with_labels_made_by_hand(
    network: Transformer,
    reference: PreTrainedModel,
    reference_tokenizer: PreTrainedTokenizerBase,
    ours: LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    header, end = (reference_tokenizer.encode(text) for text in ("<|im_start|>assistant\n", "<|im_end|>"))
    # transformers gives no gradient to the row of the padding token, which here is the end of a turn.
    monkeypatch.setattr(reference.get_input_embeddings(), "padding_idx", None)
    total, count = torch.zeros(()), 0
    for _, messages in CONVERSATIONS:
        ids: Any = reference_tokenizer.apply_chat_template(messages, return_dict=False)
        labels, at = [-100] * len(ids), 0
        for _ in (turn for turn in messages if turn["role"] == "assistant"):
            begin = next(i for i in range(at, len(ids)) if ids[i - len(header) : i] == header)
            at = ids.index(end[0], begin) + 1
            labels[begin:at] = ids[begin:at]
        logits = reference(torch.tensor([ids])).logits[0, :-1]
        total = total + F.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum")
        count += sum(label >= 0 for label in labels)
    (total / count).backward()

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f"{json.dumps(row)}\n" for row, _ in CONVERSATIONS))
    data = DataConfig(source=(str(rows),), format="chat", sequence_length=160, validation_fraction=0)
    stream = tokenize_corpus(data, ours.tokenizer, tmp_path).train.parts[0].tokens
    asked = sequences_of(torch.from_numpy(stream.read(0, len(stream))).unfold(0, 161, 160))
    assert asked.trained_tokens == count
    loss, _ = network.training_loss(asked.inputs, asked.targets, 0.0, asked.documents, asked.trained)
    (loss / count).backward()
    assert (loss / count).item() == pytest.approx((total / count).item(), rel=1e-5)
    named = dict(reference.named_parameters())
    off = together = 0.0
    for name, parameter in network.named_parameters():
        theirs = named[name].grad
        assert theirs is not None
        assert parameter.grad is not None
        squares = [value.square().sum().item() for value in (parameter.grad - theirs, theirs)]
        assert squares[0] < (5e-5) ** 2 * squares[1], name
        off, together = off + squares[0], together + squares[1]
    assert off < (1e-5) ** 2 * together
    network.zero_grad()
    reference.zero_grad()
