"""Parameters are parameters: packed weights are unpacked, and scales and buffers are not counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from smolctl.errors import InputError
from smolctl.inspection.stored import sort_tensors
from smolctl.sources.base import TensorHeader

OUT, IN, GROUP = 96, 64, 32
Entry = tuple[str, tuple[int, ...]]  # dtype and shape


def headers(entries: Mapping[str, Entry]) -> tuple[TensorHeader, ...]:
    return tuple(TensorHeader(name, shape, dtype, 0) for name, (dtype, shape) in entries.items())


def awq(bits: int) -> dict[str, Entry]:
    packed = OUT * bits // 32
    return {
        "x.qweight": ("I32", (IN, packed)),
        "x.qzeros": ("I32", (IN // GROUP, packed)),
        "x.scales": ("F16", (IN // GROUP, OUT)),
    }


def gptq(bits: int) -> dict[str, Entry]:
    return {
        "x.qweight": ("I32", (IN * bits // 32, OUT)),
        "x.qzeros": ("I32", (IN // GROUP, OUT * bits // 32)),
        "x.scales": ("F16", (IN // GROUP, OUT)),
        "x.g_idx": ("I32", (IN,)),
        "x.bias": ("F16", (OUT,)),
    }


def mlx(bits: int) -> dict[str, Entry]:
    return {
        "x.weight": ("U32", (OUT, IN * bits // 32)),
        "x.scales": ("BF16", (OUT, IN // GROUP)),
        "x.biases": ("BF16", (OUT, IN // GROUP)),
        "x.bias": ("BF16", (OUT,)),
    }


def compressed(bits: int) -> dict[str, Entry]:
    return {
        "x.weight_packed": ("I32", (OUT, IN * bits // 32)),
        "x.weight_scale": ("BF16", (OUT, IN // GROUP)),
        "x.weight_zero_point": ("I32", (OUT // 8, IN // GROUP)),
        "x.weight_shape": ("I64", (2,)),
    }


def groups(bits: int) -> dict[str, Any]:
    return {"quantization_config": {"config_groups": {"group_0": {"weights": {"num_bits": bits}}}}}


PACKINGS: dict[str, tuple[dict[str, Entry], dict[str, Any]]] = {
    **{f"AWQ, {bits} bits": (awq(bits), {}) for bits in (4, 8)},
    **{f"GPTQ, {bits} bits": (gptq(bits), {}) for bits in (2, 4, 8)},
    **{f"MLX, {bits} bits": (mlx(bits), {"quantization": {"bits": bits}}) for bits in (2, 3, 4, 6, 8)},
    "MLX, a module of its own": (mlx(8), {"quantization": {"bits": 4, "x": {"bits": 8}}}),
    **{f"compressed-tensors, {bits} bits": (compressed(bits), groups(bits)) for bits in (4, 8)},
    "compressed-tensors, NVFP4": (
        {
            "x.weight_packed": ("U8", (OUT, IN // 2)),
            "x.weight_scale": ("F8_E4M3", (OUT, IN // 16)),
            "x.weight_global_scale": ("F32", (1,)),
            "x.input_global_scale": ("F32", (1,)),
        },
        {},
    ),
    "ModelOpt, NVFP4": (
        {
            "x.weight": ("U8", (OUT, IN // 2)),
            "x.weight_scale": ("F8_E4M3", (OUT, IN // 16)),
            "x.weight_scale_2": ("F32", ()),
            "x.input_scale": ("F32", ()),
            "x.k_scale": ("F32", (1,)),
        },
        {},
    ),
    "block FP8": (
        {"x.weight": ("F8_E4M3", (OUT, IN)), "x.weight_scale_inv": ("F32", (1, 1))},
        {},
    ),
    "FP8 of fbgemm": (
        {
            "x.weight": ("F8_E4M3", (OUT, IN)),
            "x.weight_scale": ("F32", (OUT, 1)),
            "x.input_scale_ub": ("F32", (1,)),
        },
        {},
    ),
    "quanto, 8 bits": (
        {
            "x.weight._data": ("I8", (OUT, IN)),
            "x.weight._scale": ("F32", (OUT, 1)),
            "x.input_scale": ("F32", ()),
            "x.output_scale": ("F32", ()),
        },
        {},
    ),
    "experts in FP8": (
        {"x": ("F8_E4M3", (4, OUT, IN)), "x_scale_inv": ("F32", (4, 1, 1))},
        {},
    ),
    "experts in MXFP4": (
        {"x_blocks": ("U8", (4, OUT, IN // 32, 16)), "x_scales": ("U8", (4, OUT, IN // 32))},
        {},
    ),
    "bitsandbytes, 4 bits": (
        {
            "x.weight": ("U8", (OUT * IN // 2, 1)),
            "x.weight.absmax": ("U8", (OUT * IN // 64,)),
            "x.weight.quant_map": ("F32", (16,)),
            "x.weight.nested_absmax": ("F32", (1,)),
            "x.weight.nested_quant_map": ("F32", (256,)),
            "x.weight.quant_state.bitsandbytes__nf4": ("U8", (80,)),
        },
        {},
    ),
    "bitsandbytes, 8 bits": (
        {"x.weight": ("I8", (OUT, IN)), "x.SCB": ("F32", (OUT,)), "x.weight_format": ("U8", ())},
        {},
    ),
    **{
        f"torchao, {dtype}": (
            {
                "x._weight_qdata": (dtype, (OUT, width)),
                "x._weight_scale": ("BF16", (OUT, 2)),
                "x._weight_zero_point": ("I8", (OUT, 2)),
            },
            {},
        )
        for dtype, width in (("I8", IN), ("U8", IN // 2))
    },
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_weights_are_counted_as_the_weights_that_they_hold(packing: str) -> None:
    entries, config = PACKINGS[packing]
    norm: Entry = ("F32", (IN,))
    found = sort_tensors(headers({"norm.weight": norm, **entries}), config, "m")
    biases = OUT if "x.bias" in entries else 0
    experts = 4 if "experts" in packing else 1
    assert sum(tensor.parameters for tensor in found.parameters) == experts * OUT * IN + biases + IN
    assert (found.unknown, found.buffers) == ((), ())
    assert len(found.parameters) + len(found.scales) == len(entries) + 1


@pytest.mark.parametrize(
    "entries",
    [
        {"x.weight": ("U32", (96, 8))},  # nothing beside it says how many bits
        {"x.W_q": ("U8", (96, 32)), "x.scale": ("F16", (96, 2))},
        {"x.codes": ("I16", (96, 8, 1)), "x.codebooks": ("F16", (1, 256, 1, 8))},
        {"x.qweight": ("I32", (7, 5)), "x.scales": ("F16", (2, 96))},
    ],
)
def test_integers_that_nothing_explains_are_not_taken_for_weights(entries: dict[str, Entry]) -> None:
    assert len(sort_tensors(headers(entries), {}, "m").unknown) == 1


@pytest.mark.parametrize(
    ("entries", "config"),
    [
        (mlx(8), {"quantization": {"bits": 4, "group_size": GROUP}}),
        (mlx(4), {"quantization": {"bits": 8, "group_size": GROUP}}),
        (mlx(4), {"quantization": {"bits": 4, "group_size": 2 * GROUP}}),
        (mlx(8), {"quantization": {"bits": 8, "group_size": GROUP, "x": {"bits": 4, "group_size": GROUP}}}),
        (
            compressed(8),
            {
                "quantization_config": {
                    "config_groups": {"g": {"weights": {"num_bits": 4, "group_size": GROUP}}}
                }
            },
        ),
    ],
)
def test_bits_that_contradict_the_tensors_are_refused(
    entries: dict[str, Entry], config: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=r"m: x\.weight\w*: \d bits .* do not fit the shape"):
        sort_tensors(headers(entries), config, "m")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("h.0.attn.bias", (1, 1, 16, 16)),
        ("gpt_neox.layers.0.attention.masked_bias", ()),
        ("bert.embeddings.position_ids", (1, 16)),
        ("rope_freqs.weight", (32,)),
        ("model.rotary_emb.inv_freq", (32,)),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (32,)),
        ("model.layers.3.mlp.gate.e_score_correction_bias", (8,)),
        ("blk.3.exp_probs_b.bias", (8,)),
        ("final_logits_bias", (1, 96)),
    ],
)
def test_buffers_are_no_parameters(name: str, shape: tuple[int, ...]) -> None:
    found = sort_tensors(headers({name: ("F32", shape), "x.weight": ("F32", (2, 2))}), {}, "m")
    assert [tensor.name for tensor in found.buffers] == [name]
    assert [tensor.name for tensor in found.parameters] == ["x.weight"]


@pytest.mark.parametrize("name", ["x.scale", "x.attn.bias", "layer_scale", "logit_scale", "x.scales"])
def test_parameters_that_are_called_like_scales_are_counted(name: str) -> None:
    found = sort_tensors(headers({name: ("F32", (4,)), "x.weight": ("BF16", (4, 4))}), {}, "m")
    assert len(found.parameters) == 2
