"""Estimates over windows: in double precision, the same wherever they are made."""

from __future__ import annotations

import math

import pytest
import torch

from smolctl.evaluation import Estimate, bits_per_byte, ratio_estimate
from smolctl.timing import with_error
from tests.support.tiny_models import tiny_network


def test_a_ratio_is_computed_in_double_precision() -> None:
    large = 2.0**24 + 1  # float32 holds no odd numbers up there
    assert ratio_estimate([large], [1.0]).mean == large


def test_one_window_has_no_standard_error() -> None:
    assert ratio_estimate([3.0], [2.0]) == Estimate(1.5, None)
    assert with_error(1.5, None) == "1.5000"
    assert with_error(1.5, 0.25, "+.2f") == "+1.50 ± 0.2500"


def test_the_standard_error_is_that_of_a_ratio() -> None:
    estimate = ratio_estimate([1.0, 2.0, 6.0], [1.0, 2.0, 3.0])
    assert estimate.mean == 1.5
    assert estimate.standard_error == pytest.approx(math.sqrt((0.25 + 1 + 2.25) / 2 / 3) / 2)


def test_bits_per_byte_is_the_ratio_of_the_windows_sums() -> None:
    network = tiny_network()
    windows = torch.randint(3, 320, (4, 17), generator=torch.Generator().manual_seed(0))
    sizes = torch.randint(1, 5, (320,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        bits = network.token_losses(windows[:, :-1], windows[:, 1:]).double().sum(1) / math.log(2)
    expected = ratio_estimate(bits.tolist(), sizes[windows[:, 1:]].sum(1).tolist())
    found = bits_per_byte(network, [windows[:3], windows[3:]], sizes)
    assert found.bits_per_byte == pytest.approx(expected.mean, rel=1e-6)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-5)
