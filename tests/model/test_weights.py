"""Weights that do not fit a config are named, by the check that reads headers too."""

from __future__ import annotations

import pytest
import torch

from smolctl.errors import InputError
from smolctl.model.weights import from_state
from smolctl.sources.shapes import HEAD, TABLE, check_shapes, check_state
from tests.support.tiny_models import tiny_network

NETWORK = tiny_network()


def test_weights_are_refused_in_the_words_of_the_header_check() -> None:
    state = dict(NETWORK.state_dict())
    del state["model.norm.weight"]
    state["model.extra.weight"] = torch.zeros(2)
    state["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 4)
    problems = check_shapes(NETWORK.config, {name: tuple(tensor.shape) for name, tensor in state.items()})
    assert len(problems) == 3
    with pytest.raises(InputError) as caught:
        from_state(NETWORK.config, state, "here")
    assert caught.value.message == f"here: the weights do not fit the config: {', '.join(problems)}"


def test_many_problems_are_counted() -> None:
    with pytest.raises(InputError, match=r"missing .* and \d+ more$"):
        check_state(NETWORK.config, {}, "here")


def test_what_the_header_check_accepts_is_loaded() -> None:
    state = dict(NETWORK.state_dict())
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    state[HEAD] = state[TABLE].clone()
    assert not check_shapes(NETWORK.config, {name: tuple(tensor.shape) for name, tensor in state.items()})
    loaded = from_state(NETWORK.config, state, "here").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in NETWORK.state_dict().items())
