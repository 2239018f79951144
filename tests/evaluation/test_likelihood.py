"""How likely tokens are behind others: right, and with shared beginnings read once."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch

from smolctl.errors import InputError
from smolctl.evaluation import likelihood
from smolctl.evaluation.likelihood import Target, likelihoods
from smolctl.generation.native_engine import NativeEngine
from smolctl.generation.torch_engine import TorchEngine
from smolctl.model.network import Transformer
from smolctl.native.library import Library, load_library
from smolctl.sources.arrays import as_array
from tests.support.tiny_models import CountingEngine, tiny_network


def targets_of(context: Sequence[int], *continuations: Sequence[int]) -> list[Target]:
    return [Target((*context, *one)[:-1], tuple(one)) for one in continuations]


def alone(network: Transformer, target: Target) -> tuple[float, bool]:
    """The same by reading all inputs at once."""
    with torch.inference_mode():
        rows = network(torch.tensor([target.inputs]))[0].log_softmax(-1)[target.first :]
    chosen = torch.tensor(target.targets)
    return float(rows.gather(-1, chosen[:, None]).double().sum()), bool((rows.argmax(-1) == chosen).all())


@pytest.fixture(scope="module")
def network() -> Transformer:
    return tiny_network()


@pytest.fixture(scope="module")
def engine(network: Transformer) -> CountingEngine:
    return CountingEngine(TorchEngine(network))


@pytest.mark.parametrize(("sequences", "worth"), [(1, 1), (4, 1), (4, 16), (32, 1), (32, 16), (32, 10_000)])
def test_every_likelihood_is_what_it_is_alone(
    network: Transformer,
    engine: CountingEngine,
    monkeypatch: pytest.MonkeyPatch,
    sequences: int,
    worth: int,
) -> None:
    """Of few tokens, so that beginnings, whole inputs and answers coincide in every way."""
    monkeypatch.setattr(likelihood, "MOST_SEQUENCES", sequences)
    monkeypatch.setattr(likelihood, "WORTH", worth)
    monkeypatch.setattr(likelihood, "AT_ONCE", 7)
    chance = random.Random(sequences + worth)
    preamble = chance.choices(range(2), k=20)
    asked: list[Target] = []
    for _ in range(7):
        context = preamble[: chance.randrange(21)] + chance.choices(range(3), k=chance.randrange(1, 9))
        with torch.inference_mode():
            likeliest = int(network(torch.tensor([context]))[0, -1].argmax())
        ends = [chance.choices(range(2), k=chance.randrange(1, 6)) for _ in range(2)]
        asked += targets_of(context, [likeliest], *ends)
    chance.shuffle(asked)
    found = likelihoods(engine, asked)
    for one, target in zip(found, asked, strict=True):
        nats, is_greedy = alone(network, target)
        assert math.isclose(one.nats, nats, rel_tol=1e-5, abs_tol=1e-4)
        assert one.is_greedy is is_greedy
    assert any(one.is_greedy for one in found)


def test_the_compiled_engine_finds_the_same(network: Transformer) -> None:
    library = load_library()
    if not isinstance(library, Library):
        pytest.skip(library)
    weights = {name: as_array(tensor) for name, tensor in network.state_dict().items()}
    asked = targets_of(range(40), [1, 2, 3], [1, 2, 4], [5]) + targets_of(range(30), [7, 7])
    found = likelihoods(NativeEngine(library, network.config, weights, threads=1), asked)
    for one, target in zip(found, asked, strict=True):
        assert one.nats == pytest.approx(alone(network, target)[0], abs=1e-3)


def test_a_context_is_read_once_for_all_its_answers(engine: CountingEngine) -> None:
    engine.calls.clear()
    likelihoods(engine, targets_of(range(60), [1, 2, 3], [4, 5, 6, 7], [8], [9]))
    assert engine.tokens_read == 60 + 2 + 3  # of an answer's last token nothing is asked
    assert max(len(row) for row in engine.calls[-1]) == 3


def test_what_all_items_begin_with_is_read_once_however_few_fit_the_cache(
    engine: CountingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likelihood, "MOST_SEQUENCES", 2)
    engine.calls.clear()
    asked = []
    for item in range(5):
        asked += targets_of([3] * 50 + [10 + item] * 20, [1, 2], [3, 4], [5, 6])
    likelihoods(engine, asked)
    again = 10  # of a context in two batches the last token, as its logits were not kept
    assert 50 + 5 * (20 + 3) <= engine.tokens_read <= 50 + 5 * (20 + 3) + again


def test_predictions_of_nan_are_refused(network: Transformer) -> None:
    broken = tiny_network()
    broken.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(InputError, match="not finite"):
        likelihoods(TorchEngine(broken), targets_of([1, 2], [3]))
