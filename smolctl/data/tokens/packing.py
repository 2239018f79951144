"""Packs conversations into sequences of one length, without cutting any."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from smolctl.data.tokens.marks import CONTEXT, FIRST
from smolctl.data.tokens.shards import TokenStream


def pack(lengths: NDArray[np.int64], size: int) -> list[list[int]]:
    """Pack items of the given lengths (N,), at most `size`, into sequences of `size`: returns the items'
    numbers in each.

    The longest come first, each goes to the sequence with the least sufficient room (best fit decreasing: at
    most 11/9 of the smallest possible number of sequences, plus 4; Johnson, 1974). Equal lengths keep their
    order.
    """
    packed: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # sequences by their free room
    rooms = 0  # bit r is set if some have r free
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
    """Packed conversations of a stream, as if their sequences were stored one after another.

    One more token follows as the target of the last one; it is padding, like the free room of a sequence.

    Args:
        stream: of marked tokens.
        spans: first token and length (N, 2) of every conversation in the stream.
        sequence_length: of the sequences; every conversation fits one.
        filler: id of the padding.
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
        """Tokens that are not padding."""
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
        """Ends of conversations, whatever token ends them, in ascending order: (n,)."""
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
            row[at] |= FIRST | CONTEXT  # even if the beginning of the conversation was cut off
            at += length
        row[at : at + 1] |= FIRST  # the padding is one conversation
        return row
