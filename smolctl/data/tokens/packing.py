"""Conversations in sequences of one length, none cut in two."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from smolctl.data.tokens.marks import CONTEXT, FIRST
from smolctl.data.tokens.shards import TokenStream


def pack(lengths: NDArray[np.int64], size: int) -> list[list[int]]:
    """Items of the given lengths (N,), none above `size`, in sequences of `size`: the numbers in each.

    The longest come first, each to where the least room is left that holds it (best fit decreasing: at most
    11/9 of the fewest sequences possible and 4 more; Johnson, 1974). Equal lengths keep their order.
    """
    packed: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # sequences by what is left in them
    rooms = 0  # bit r is set where some have r left
    for number in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[number])
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, chosen = size, len(packed)
            packed.append([])
        packed[chosen].append(number)
        if left := room - length:
            with_room.setdefault(left, []).append(chosen)
            rooms |= 1 << left
    return packed


class PackedStream(TokenStream):
    """Conversations of a stream, packed, as if their sequences lay one after another.

    One token more follows, as the target of the last one; it is filler, as is what is left of a sequence.

    Args:
        stream: of marked tokens.
        spans: first token and length (N, 2) of every conversation in it.
        sequence_length: of the sequences; no conversation is longer.
        filler: id of the filler.
    """

    def __init__(
        self, stream: TokenStream, spans: NDArray[np.int64], sequence_length: int, filler: int
    ) -> None:
        self.sequences = pack(spans[:, 1], sequence_length)
        self._stream, self._spans, self._size = stream, spans, sequence_length
        self._filler = filler | CONTEXT

    def __len__(self) -> int:
        return len(self.sequences) * self._size + 1

    def __getstate__(self) -> dict[str, object]:
        return dict(self.__dict__)

    @property
    def filled(self) -> int:
        """Tokens that are not filler."""
        return int(self._spans[:, 1].sum())

    def read(self, start: int, length: int) -> NDArray[np.int64]:
        if start < 0 or length < 0 or start + length > len(self):
            raise IndexError(f"tokens {start} to {start + length} of {len(self)}")
        first, last = start // self._size, (start + length) // self._size
        rows = [
            self._sequence(self.sequences[row]) for row in range(first, min(last + 1, len(self.sequences)))
        ]
        whole = np.concatenate([*rows, np.array([self._filler | FIRST])])
        return whole[start - first * self._size :][:length]

    def places_of(self, token: int) -> NDArray[np.int64]:
        """Where conversations end, whatever the token that ends them, in ascending order: (n,)."""
        starts = range(0, len(self), self._size)
        begins = [
            start + np.flatnonzero(self.read(start, min(self._size, len(self) - start)) & FIRST)
            for start in starts
        ]
        return np.concatenate(begins)[1:] - 1

    def _sequence(self, numbers: Sequence[int]) -> NDArray[np.int64]:
        row = np.full(self._size, self._filler, dtype=np.int64)
        at = 0
        for begin, length in self._spans[numbers].tolist():
            row[at : at + length] = self._stream.read(begin, length)
            row[at] |= FIRST | CONTEXT  # also where the beginning of the conversation was cut off
            at += length
        row[at : at + 1] |= FIRST  # the filler is one conversation
        return row
