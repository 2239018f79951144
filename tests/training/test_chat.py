"""Training on conversations."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from smolctl.data.batches import sequences_of, validation_batches
from smolctl.data.tokens.marks import CONTEXT, FIRST, IDS
from smolctl.errors import InputError
from smolctl.evaluation import bits_per_byte, mean_loss
from smolctl.model.network import Transformer
from smolctl.model.weights import initialize
from smolctl.runs.events import Event, Note
from smolctl.runs.folder import RunFolder
from smolctl.training.prepare import Prepared
from smolctl.training.train import plan_run
from tests.support.tiny_chats import PAIRS, SHAPES, WORDS, prepare_chat, write_rows
from tests.support.tiny_runs import assert_same_run, go_on, losses, run


def conversations(prepared: Prepared) -> list[torch.Tensor]:
    """Every conversation to train on alone, with its marks."""
    stream = prepared.corpus.train.parts[0].tokens
    words = torch.from_numpy(stream.read(0, len(stream)))
    begins = (words & FIRST).nonzero().flatten().tolist()
    parts = [words[start:end] for start, end in pairwise(begins)]
    return [part for part in parts if ((part & CONTEXT) == 0).any()]  # not the filler


def summed(network: Transformer, words: torch.Tensor) -> torch.Tensor:
    asked = sequences_of(words)
    loss, _ = network.training_loss(asked.inputs, asked.targets, 0.0, asked.documents, asked.trained)
    return loss


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_are_those_of_transformers_with_labels_made_by_hand(
    tmp_path: Path, shape: str
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    prepared = prepare_chat(write_rows(tmp_path / "rows.jsonl", shape))
    ours, model = prepared.network, prepared.config.model
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    theirs = LlamaForCausalLM(
        LlamaConfig(
            **{name: getattr(model, name) for name in (*sizes, "num_key_value_heads")},
            max_position_embeddings=model.max_position_embeddings,
            rms_norm_eps=model.rms_norm_eps,
            tie_word_embeddings=True,
        )
    )
    theirs.load_state_dict(ours.state_dict(), strict=False)
    by = prepared.tokenizer
    turn_end = by.backend.token_to_id("<|im_end|>")
    total, count = torch.zeros(()), 0
    for words in conversations(prepared):
        ids = (words & IDS).tolist()
        # ChatML by hand: what follows the second header, up to and with the end of the turn.
        header = by.backend.encode("<|im_start|>assistant\n", add_special_tokens=False).ids
        start = next(at for at in range(len(ids)) if ids[at : at + len(header)] == header) + len(header)
        labels = [-100] * start + ids[start : ids.index(turn_end, start) + 1]
        labels += [-100] * (len(ids) - len(labels))
        logits = theirs(torch.tensor([ids])).logits[0, :-1]
        total = total + F.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum")
        count += sum(label >= 0 for label in labels)
    (total / count).backward()

    stream = prepared.corpus.train.parts[0].tokens
    size = prepared.config.data.sequence_length
    rows = torch.from_numpy(stream.read(0, len(stream))).unfold(0, size + 1, size)
    trained = sequences_of(rows).trained_tokens
    assert trained == count
    (summed(ours, rows) / count).backward()
    assert (summed(ours, rows) / count).item() == pytest.approx((total / count).item(), rel=1e-5)
    named = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, named[name].grad, rtol=1e-4, atol=1e-6)


def test_packed_conversations_do_not_see_each_other(tmp_path: Path) -> None:
    prepared = prepare_chat(write_rows(tmp_path / "rows.jsonl"))
    network = initialize(prepared.config.model.model_copy(update={"initializer_range": 0.3}), 1)
    stream = prepared.corpus.train.parts[0].tokens
    size = prepared.config.data.sequence_length
    rows = torch.from_numpy(stream.read(0, len(stream))).unfold(0, size + 1, size)
    packed = summed(network, rows)
    alone = sum(
        summed(network, F.pad(words, (0, 1), value=CONTEXT)[None]) for words in conversations(prepared)
    )
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=0)
    ids = rows & IDS
    assert not torch.isclose(network.loss(ids[:, :-1], ids[:, 1:]), packed, rtol=1e-2)


def test_scores_are_of_the_answers_alone(tmp_path: Path) -> None:
    prepared = prepare_chat(write_rows(tmp_path / "rows.jsonl"))
    assert prepared.corpus.validation is not None
    network, size = prepared.network, prepared.config.data.sequence_length
    batches = list(validation_batches(prepared.corpus.validation, size, 2, 8))
    lengths = torch.from_numpy(prepared.tokenizer.token_byte_lengths())
    score = bits_per_byte(network, batches, lengths)
    asked = sequences_of(torch.cat(batches))
    assert asked.trained is not None
    losses = network.token_losses(asked.inputs, asked.targets, asked.documents)[asked.trained]
    assert score.loss == pytest.approx(losses.mean().item(), rel=1e-5)
    said = lengths[asked.targets[asked.trained]].sum().item()
    assert score.bits_per_byte == pytest.approx(losses.sum().item() / said / 0.6931472, rel=1e-5)
    assert mean_loss(network, prepared.held_out) > 0


def test_an_interrupted_run_equals_a_continuous_run_even_when_its_data_is_gone(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl")
    one = run(prepare_chat(source, train={"steps": 6}), "one")
    two = run(prepare_chat(source, train={"steps": 2}), "two")
    go_on(two, extra=2)
    source.rename("moved.jsonl")
    events = go_on(two, extra=2)
    assert any("still in the cache" in event.text for event in events if isinstance(event, Note))
    assert_same_run(one, two, 6)
    tokenizer = json.loads((RunFolder(one).tokenizer / "tokenizer_config.json").read_text())
    assert tokenizer["eos_token"] == "<|im_end|>"


def test_micro_batches_weigh_by_the_tokens_that_count(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl")
    found: list[list[float]] = []
    for micro in (4, 2, 1):
        prepared = prepare_chat(source, train={"steps": 3, "micro_batch_size": micro})
        found.append([loss for _, loss, *_ in losses(run(prepared, f"run-{micro}"))])
    assert found[1:] == [pytest.approx(found[0], rel=1e-5)] * 2


def test_the_plan_says_what_became_of_the_rows(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", pairs=[*PAIRS, PAIRS[0], ("why?", " ".join(WORDS * 20))])
    with source.open("a") as file:
        file.write('{"messages": [{"role": "wizard", "content": "a"}]}\n{broken\n')
    events: list[Event] = []
    prepared = prepare_chat(source, events)
    plan = plan_run(prepared, tmp_path)
    facts = plan.conversations
    assert facts is not None
    assert (facts["conversations"], facts["skipped"], facts["cut"]) == (32, 2, 1)
    assert facts["shapes"] == ("messages",)
    assert [trained for _, trained in facts["example"]] == [False, True, False]
    assert facts["example"][1][0] == f"{PAIRS[0][1]}<|im_end|>"
    notes = " ".join(event.text for event in events if isinstance(event, Note))
    assert "unknown role 'wizard'" in notes
    assert "line 33" in notes
    assert plan.duplicates == 1
    for too_long, kept in (("end", 32), ("drop", 31)):
        again = prepare_chat(source, too_long=too_long).corpus.conversations
        assert again is not None
        assert again.conversations == kept
    with pytest.raises(InputError, match="line 33: unknown role"):
        prepare_chat(source, strict=True)
    with pytest.raises(InputError, match="no text to train a tokenizer on"):
        prepare_chat(write_rows(tmp_path / "other.jsonl"), shape="sharegpt")
