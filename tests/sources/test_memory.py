"""Weights lie side by side: arrays of their own memory, whatever their sizes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from smolctl.sources.memory import CHUNK_BYTES, LINE_BYTES, weight_array, weight_copy


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 300)), min_size=2, max_size=6),
    st.sampled_from([np.float16, np.int8]),
)
def test_no_array_reaches_into_another(shapes: list[tuple[int, int]], dtype: type[np.generic]) -> None:
    arrays = [weight_array(shape, dtype) for shape in shapes]
    for number, array in enumerate(arrays):
        array[...] = number
    assert [array.shape for array in arrays] == shapes
    for number, array in enumerate(arrays):
        assert array.dtype == dtype
        assert (array == number).all()
        assert array.ctypes.data % LINE_BYTES == 0 or not array.size


def test_arrays_of_more_than_a_chunk_and_across_its_end() -> None:
    arrays = [weight_array((size,), np.uint8) for size in (CHUNK_BYTES + 1, *[CHUNK_BYTES // 2 - 7] * 3)]
    for number, array in enumerate(arrays):
        array[[0, -1]] = number
    assert [list(array[[0, -1]]) for array in arrays] == [[number] * 2 for number in range(4)]


def test_a_copy_has_the_values_of_any_strides() -> None:
    array = np.arange(60, dtype=np.float16).reshape(3, 4, 5)[:, ::2, 1]
    copied = weight_copy(array)
    assert copied.flags.c_contiguous
    assert np.array_equal(copied, array)
