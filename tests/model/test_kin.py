"""Llama's near kin: the same network as transformers' class of the same name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from smolctl.arithmetic import parameter_rows
from smolctl.config import ModelConfig
from smolctl.generation.native_engine import NativeEngine
from smolctl.model.dynamic import dynamic_network
from smolctl.model.positions import rotary_frequencies
from smolctl.quantization.build import build_items
from smolctl.quantization.schemes import SchemeOptions, plan_quantization
from smolctl.sources.arrays import as_array
from smolctl.sources.huggingface.config import from_huggingface_config, to_huggingface_config
from smolctl.sources.quantized.scaled import ScaledMatrix
from tests.support.kin import CLASSES, KINDS, kin_config, kin_network
from tests.support.native import library


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_both_engines_equal_transformers(kind: str) -> None:
    config = kin_config(kind)
    network = kin_network(config)
    values = to_huggingface_config(config)
    reference = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)).eval()
    assert type(reference).__name__ == CLASSES[kind]
    state = network.state_dict()
    missing, unexpected = reference.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if config.tie_word_embeddings else [], [])
    reference.tie_weights()
    ids = torch.randint(config.vocab_size, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        theirs, ours = reference(ids).logits[0], network(ids)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    weights = {name: as_array(one) for name, one in state.items()}
    native = NativeEngine(library("baseline"), config, weights, 1)
    logits = native.forward([ids[0].tolist()], native.allocate(1, 200), every=True)
    compiled = torch.from_numpy(np.array(logits))
    torch.testing.assert_close(compiled, theirs, rtol=1e-5, atol=2e-5)
    if config.rope_scaling is not None:
        frequencies = torch.from_numpy(rotary_frequencies(config))
        torch.testing.assert_close(frequencies, reference.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_is_read_back_as_it_was_written(kind: str) -> None:
    config = kin_config(kind)
    values = to_huggingface_config(config)
    found, reason = from_huggingface_config(values, "config.json")
    assert (found, reason) == (config, "")


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_without_the_keys_that_have_defaults_takes_those_of_its_class(kind: str) -> None:
    values = to_huggingface_config(kin_config(kind))
    del values["num_key_value_heads"], values["rope_parameters"], values["rope_scaling"], values["rope_theta"]
    del values["max_position_embeddings"], values["rms_norm_eps"], values["head_dim"]
    values.pop("no_rope_layers", None)
    theirs = AutoConfig.for_model(**values)
    ours, reason = from_huggingface_config({**values, "num_key_value_heads": 2}, "config.json")
    assert ours is not None, reason
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.head_dim == getattr(theirs, "head_dim", 16)
    assert list(ours.no_rope_layers or ()) == getattr(theirs, "no_rope_layers", [])


@pytest.mark.parametrize(
    ("values", "window"),
    [
        ({"model_type": "mistral"}, 4_096),  # which transformers assumes
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral", "sliding_window": 4_096, "max_position_embeddings": 4_096}, None),
        ({"model_type": "qwen2", "sliding_window": 64}, None),
        ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True}, 64),
        ({"model_type": "smollm3", "sliding_window": 64, "use_sliding_window": False}, None),
    ],
)
def test_only_windows_that_end_before_the_context_are_refused(
    values: dict[str, object], window: int | None
) -> None:
    config, reason = from_huggingface_config(values, "config.json")
    assert reason == ("" if window is None else f"sliding_window is not supported ({window})")
    assert (config is None) is (window is not None)


def test_two_kinds_in_one_model_are_refused() -> None:
    with pytest.raises(ValueError, match="qkv_bias and use_qk_norm in one model"):
        kin_config("qwen2", use_qk_norm=True)
    with pytest.raises(ValueError, match="use_qk_norm needs position_embedding rope"):
        ModelConfig(use_qk_norm=True)
    with pytest.raises(ValueError, match="no_rope_layers has 2 entries"):
        kin_config("smollm3", no_rope_layers=(1, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_counted(kind: str) -> None:
    config = kin_config(kind)
    counted = {row.tensor: row.shape for row in parameter_rows(config) if not row.tied}
    assert counted == {name: tuple(one.shape) for name, one in kin_network(config).named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["int8", "int4", "int8-dynamic"])
def test_quantized_weights_stay_close(kind: str, scheme: str) -> None:
    config = kin_config(kind)
    network = kin_network(config)
    tensors = dict(network.state_dict())
    plan = plan_quantization(config, scheme, SchemeOptions(activations="per-token"))
    items = build_items(config, tensors, plan)
    ids = torch.arange(60)[None]
    if scheme == "int8-dynamic":
        with torch.inference_mode():
            found = dynamic_network(config, items, "per-token")(ids)[0]
    else:
        stored = {name: one for name, one in items.items() if not isinstance(one, ScaledMatrix)}
        engine = NativeEngine(library("avx2"), config, stored, 1)
        found = torch.from_numpy(np.array(engine.forward([ids[0].tolist()], engine.allocate(1, 60), True)))
    with torch.inference_mode():
        expected = network(ids)[0].log_softmax(-1)
    kl = (expected.exp() * (expected - found.log_softmax(-1))).sum(-1).mean()
    assert kl < {"int8": 0.01, "int8-dynamic": 0.05, "int4": 0.6}[scheme]
