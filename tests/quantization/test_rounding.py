"""Small integers: exact round trips, bounded errors, scales that are searched for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given
from hypothesis import strategies as st

from smolctl.quantization.rounding import quantize_matrix
from smolctl.sources.quantized.packed import BLOCK, PackedMatrix, pack_integers, unpack_integers

shapes = st.tuples(st.integers(1, 9), st.integers(1, 200))
groups = st.sampled_from([32, 64, 96, 128])
bits = st.sampled_from([4, 8])


def random_matrix(shape: tuple[int, int], seed: int, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * spread


def dequantized(packed: PackedMatrix) -> torch.Tensor:
    return torch.from_numpy(packed.dequantize())


@given(shapes, st.sampled_from([4, 5, 8]), st.integers(0, 1000))
def test_packing_integers_loses_nothing(shape: tuple[int, int], bits: int, seed: int) -> None:
    low, high = (-127, 128) if bits == 8 else (0, 2**bits)
    values = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))
    scales = np.ones((shape[0], 1), np.float16)
    packed = PackedMatrix(bits, shape[1], BLOCK, pack_integers(values.numpy(), bits), scales)
    integers = unpack_integers(packed.values, packed.bits)
    assert np.array_equal(integers[:, : shape[1]], values)
    assert not integers[:, shape[1] :].any()


@given(shapes, groups, bits, st.integers(0, 1000), st.sampled_from([1e-4, 0.05, 3.0]))
def test_no_value_moves_further_than_half_a_step(
    shape: tuple[int, int], group: int, bits: int, seed: int, spread: float
) -> None:
    weight = random_matrix(shape, seed, spread)
    packed = quantize_matrix(weight, bits, group)
    found = dequantized(packed)
    assert packed.shape == shape == found.shape
    step = torch.from_numpy(packed.scales).float().repeat_interleave(group, dim=1)[:, : shape[1]]
    # A float16 scale may end the range early: by a thousandth of it, and of tiny ones by 127 × 2⁻²⁵.
    slack = weight.abs().max() * 2e-3 + 130 * 2**-25
    assert ((found - weight).abs() <= step / 2 + slack).all()


@given(shapes, groups, bits, st.integers(0, 1000))
def test_rounding_what_was_rounded_changes_nothing_but_the_last_bits(
    shape: tuple[int, int], group: int, bits: int, seed: int
) -> None:
    once = dequantized(quantize_matrix(random_matrix(shape, seed), bits, group))
    again = dequantized(quantize_matrix(once, bits, group))
    assert torch.allclose(once, again, atol=once.abs().max().item() * 2e-3)


@pytest.mark.parametrize(("bits", "kind"), [(8, "Q8_0"), (4, "Q4_1")])
def test_groups_of_32_hold_what_ggufs_blocks_hold(bits: int, kind: str) -> None:
    weight = random_matrix((64, 256), 3)
    theirs = quants.dequantize(
        quants.quantize(weight.numpy(), GGMLQuantizationType[kind]), GGMLQuantizationType[kind]
    )
    ours = quantize_matrix(weight, bits, 32)
    assert ours.bytes == weight.numel() * (8.5 if bits == 8 else 5) / 8
    errors = [np.square(found - weight.numpy()).mean() for found in (theirs, ours.dequantize())]
    assert errors[1] <= errors[0] * 1.02


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-7])
@pytest.mark.parametrize("bits", [4, 8])
def test_matrices_of_one_value(bits: int, value: float) -> None:
    found = dequantized(quantize_matrix(torch.full((3, 50), value), bits, 32))
    assert torch.allclose(found, torch.full((3, 50), value), rtol=5e-3, atol=1e-7)


@given(shapes, bits, st.integers(0, 1000))
def test_searched_scales_never_have_a_larger_weighted_error(
    shape: tuple[int, int], bits: int, seed: int
) -> None:
    weight = random_matrix(shape, seed)
    importance = random_matrix((1, shape[1]), seed + 1).square()[0] + 0.01

    def error(packed: PackedMatrix) -> float:
        # A thousandth of the mean is added to every column's importance, so that none is given up.
        weights = importance + importance.mean() * 1e-3
        return float(((dequantized(packed) - weight).square() @ weights).sum())

    plain, searched = quantize_matrix(weight, bits, 32), quantize_matrix(weight, bits, 32, importance)
    assert error(searched) <= error(plain) * 1.001 + 1e-9
    assert searched.bytes == plain.bytes


def test_searched_scales_spend_their_steps_where_the_activations_are() -> None:
    weight = random_matrix((256, 512), 5)
    importance = torch.ones(512)
    importance[::7] = 50.0

    def error(packed: PackedMatrix) -> float:
        return float(((dequantized(packed) - weight).square() @ importance).sum())

    assert error(quantize_matrix(weight, 4, 32, importance)) < 0.75 * error(quantize_matrix(weight, 4, 32))
