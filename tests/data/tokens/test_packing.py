"""Conversations packed into sequences."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolctl.data.tokens.marks import CONTEXT, FIRST, IDS
from smolctl.data.tokens.packing import PackedStream, pack
from smolctl.data.tokens.shards import TokenStream

SIZE = 16


@given(st.lists(st.integers(1, SIZE), min_size=1, max_size=60))
def test_everything_is_packed_once_whole_and_tightly(lengths: list[int]) -> None:
    rows = pack(np.array(lengths), SIZE)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    filled = [sum(lengths[number] for number in row) for row in rows]
    assert max(filled) <= SIZE
    assert sum(count <= SIZE // 2 for count in filled) <= 1  # two such sequences would have been one


@pytest.fixture
def stream(tmp_path: Path) -> PackedStream:
    lengths = np.array([5, 16, 9, 2, 7, 11])
    words = np.arange(lengths.sum(), dtype="<u4")
    words.tofile(tmp_path / "a.bin")
    flat = TokenStream([(tmp_path / "a.bin", len(words))], words.dtype, 0, len(words))
    return PackedStream(flat, np.stack([np.cumsum(lengths) - lengths, lengths], axis=1), SIZE, filler=99)


def test_sequences_hold_whole_conversations_and_filler(stream: PackedStream) -> None:
    whole = stream.read(0, len(stream))
    assert len(whole) == len(stream.sequences) * SIZE + 1
    assert len(stream.sequences) == 4
    filler = (whole & ~FIRST) == (99 | CONTEXT)
    assert sorted((whole[~filler] & IDS).tolist()) == list(range(50))
    rows = whole[:-1].reshape(-1, SIZE)
    filled = filler[:-1].reshape(-1, SIZE).any(1)  # the filler of a sequence is one conversation
    assert (whole & FIRST).astype(bool).sum() == 6 + filled.sum() + 1
    for row in rows:  # what follows a beginning follows it in the stream
        ids = row[(row & IDS) != 99]
        inside = (ids[1:] & FIRST) == 0
        assert (np.diff(ids & IDS)[inside] == 1).all()
        assert row[0] & FIRST
    assert ((whole & FIRST == 0) | (whole & CONTEXT > 0)).all()  # nothing predicts a first token


def test_any_range_is_that_of_the_whole(stream: PackedStream) -> None:
    whole = stream.read(0, len(stream))
    copy = pickle.loads(pickle.dumps(stream))
    for start in range(0, len(stream), 3):
        for length in (0, 1, SIZE, SIZE + 1, len(stream) - start):
            if start + length <= len(stream):
                assert (copy.read(start, length) == whole[start : start + length]).all()
    with pytest.raises(IndexError):
        stream.read(1, len(stream))
