"""What a model says to fixed prompts while it is trained."""

from __future__ import annotations

import pytest
import torch

from smolctl.config.run import PredictionsConfig
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.generation.answer import spell
from smolctl.training.predictions import predict
from tests.support.tiny_models import tiny_network
from tests.support.tokenizers import tokenizer


def test_predictions_are_of_the_ids_that_transformers_gives_a_prompt() -> None:
    given = Tokenizer(tokenizer("llama"), bos_token_id=1, eos_token_id=2)
    network = tiny_network(vocab_size=given.vocab_size)
    ids = [1, *given.backend.encode("the old clock", add_special_tokens=False).ids]
    with torch.inference_mode():
        logits = network(torch.tensor([ids]))[0]
    expected = logits[-1].softmax(-1).topk(5)
    found = predict(network, given, PredictionsConfig(max_tokens=4), "the old clock", step=3)
    assert [one.probability for one in found.top] == pytest.approx(expected.values.tolist(), rel=1e-4)
    assert [one.text for one in found.top] == [spell(given, token) for token in expected.indices.tolist()]
    loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]))
    assert found.loss == pytest.approx(loss.item(), rel=1e-4)
