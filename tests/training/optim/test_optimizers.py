"""Which parameters decay, and what a step's number decides."""

from __future__ import annotations

import pytest

from smolctl.config import ModelConfig, load_run_config
from smolctl.config.run import OptimizerConfig
from smolctl.model.network import Transformer
from smolctl.training.optim.optimizers import apply_settings, make_optimizer, set_step

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.mark.parametrize("multiplier", [1.0, 2.0])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_tables_are_left_out_of_weight_decay_before_and_after_a_resume(name: str, multiplier: float) -> None:
    network = Transformer(ModelConfig.model_validate({**SIZES, **HEADS, "tie_word_embeddings": False}))
    names = {id(parameter): key for key, parameter in network.named_parameters()}
    settings = {"name": name, "weight_decay": 0.1, "decay_embeddings": False}
    config = OptimizerConfig.model_validate({**settings, "embedding_lr_multiplier": multiplier})
    optimizer = make_optimizer(network, config)

    def decaying(rate: float) -> set[str]:
        groups = [group for group in optimizer.param_groups if group["weight_decay"] == rate]
        return {names[id(parameter)] for group in groups for parameter in group["params"]}

    expected = {key for key in names.values() if key == "lm_head.weight" or "_proj" in key}
    assert decaying(0.1) == expected
    apply_settings(optimizer, config.model_copy(update={"weight_decay": 0.2}))
    assert decaying(0.2) == expected


@pytest.mark.parametrize("decays", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_tables_of_tokens_and_positions_alone_have_the_multiplied_learning_rate(
    name: str, tied: bool, decays: bool
) -> None:
    sizes = {**SIZES, **HEADS, "tie_word_embeddings": tied, "position_embedding": "learned"}
    network = Transformer(ModelConfig.model_validate(sizes))
    names = {id(parameter): key for key, parameter in network.named_parameters()}
    settings = {"name": name, "embedding_lr_multiplier": 3.0, "decay_embeddings": decays}
    config = OptimizerConfig.model_validate(settings)
    optimizer = make_optimizer(network, config)
    rates: dict[str, float] = {}
    for rate in (config.learning_rate, 0.5):
        for group in optimizer.param_groups:
            rates |= {names[id(parameter)]: group["lr"] for parameter in group["params"]}
        assert rates.keys() == set(names.values())
        tables = {key for key, found in rates.items() if found == pytest.approx(3 * rate)}
        assert tables == {"model.embed_tokens.weight", "model.embed_positions.weight"}
        assert {rates[key] for key in rates.keys() - tables} == {rate}
        set_step(optimizer, config, 0.5, 1)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizer_of_a_run_without_the_multiplier_is_as_in_its_checkpoints(name: str) -> None:
    network = Transformer(ModelConfig.model_validate({**SIZES, **HEADS}))
    groups = make_optimizer(network, OptimizerConfig.model_validate({"name": name})).state_dict()
    kinds = {"adamw": [9, 3], "muon": [7, 2, 3]}[name]
    assert [len(group["params"]) for group in groups["param_groups"]] == kinds
    assert not any("lr_multiplier" in group for group in groups["param_groups"])


@pytest.mark.parametrize(
    ("warmup", "momenta"), [(0, [0.95, 0.95, 0.95]), (10, [0.86, 0.9, 0.95]), (0.5, [0.86, 0.9, 0.95])]
)
def test_momentum_rises_over_steps_or_a_share_of_them(warmup: float, momenta: list[float]) -> None:
    network = Transformer(ModelConfig.model_validate({**SIZES, **HEADS}))
    settings = [
        f"optimizer.momentum_warmup={warmup}",
        "train.steps=20",
        "optimizer.embedding_lr_multiplier=1",
    ]
    config = load_run_config("nano", settings).with_whole_steps().optimizer
    optimizer = make_optimizer(network, config)
    found = []
    for step in (1, 5, 20):
        set_step(optimizer, config, 0.1, step)
        found.append(optimizer.param_groups[0]["momentum"])
    assert found == pytest.approx(momenta)
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}
