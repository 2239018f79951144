"""Arrays stand for tensors of every type, in the same memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from smolctl.errors import InputError
from smolctl.sources.arrays import as_array, as_bfloat16, as_float32, as_tensor, name_of
from smolctl.sources.huggingface.safetensors_file import SafetensorsWeights, mapped_arrays

FLOATS = ("float32", "float16", "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2")
TYPES = (*FLOATS, "int8", "uint8", "int16", "int64", "bool")
ODD = [0.0, -0.0, 1.0, -2.5, 1e-8, 3e38, float("inf"), float("nan"), 1.00390625, 1.01171875]


@pytest.mark.parametrize("name", TYPES)
def test_an_array_and_its_tensor_share_their_memory(name: str) -> None:
    tensor = torch.tensor([[0.0, 1.0, 2.0], [3.0, 1.0, 0.0]]).to(getattr(torch, name))
    array = as_array(tensor)
    assert (name_of(array.dtype), array.shape) == (name, (2, 3))
    back = as_tensor(array)
    assert (back.dtype, back.data_ptr()) == (tensor.dtype, tensor.data_ptr())
    if name in FLOATS:
        assert np.array_equal(as_float32(array), tensor.float().numpy())


def test_bfloat16_is_rounded_and_widened_as_pytorch_does_it() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint32)
    values = np.concatenate([np.array(ODD, np.float32), bits.view(np.float32)])
    expected = torch.from_numpy(values).bfloat16()
    rounded = as_tensor(as_bfloat16(values))
    same = rounded.view(torch.int16) == expected.view(torch.int16)
    assert (same | (rounded.isnan() & expected.isnan())).all()
    widened = as_float32(as_bfloat16(values))
    np.testing.assert_array_equal(widened, expected.float().numpy())


def test_numpy_does_not_compute_with_the_bits_of_bfloat16() -> None:
    with pytest.raises(TypeError):
        as_bfloat16(np.ones(3, np.float32)) * np.float32(2)


def test_a_mapped_file_holds_what_safetensors_reads(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    values = torch.arange(12.0).view(3, 4)
    tensors = {name: values.to(getattr(torch, name)) for name in TYPES}
    save_file({**tensors, "none": torch.empty(0, 4), "one": torch.tensor(7.0)}, path)
    found, expected = dict(SafetensorsWeights({path: None}).tensors()), load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].double(), tensor.double())


def test_a_file_whose_data_is_not_aligned_is_read_and_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    entries = {"b": ("U8", [1], [0, 1]), "a": ("F32", [2], [1, 9])}
    header = (
        json.dumps(
            {
                name: {"dtype": dtype, "shape": shape, "data_offsets": place}
                for name, (dtype, shape, place) in entries.items()
            }
        )
        .encode()
        .ljust(151)
    )
    data = b"\x05" + np.array([1.5, -2.0], np.float32).tobytes()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    before, arrays = path.read_bytes(), dict(mapped_arrays(path))
    assert arrays["a"].tolist() == [1.5, -2.0]
    assert arrays["a"].flags.aligned
    arrays["b"][0] = 9  # PyTorch's tensors can be written too
    assert path.read_bytes() == before


def test_a_type_that_no_array_has_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    header = b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(InputError, match="tensors of type F4 cannot be read"):
        list(mapped_arrays(path))
