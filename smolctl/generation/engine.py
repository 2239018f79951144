"""The interface of all engines: append tokens to the sequences of a cache and return logits."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smolctl.config import ModelConfig
from smolctl.errors import InputError, SmolError

Logits = NDArray[np.float32]  # (N, V)


class EngineBusyError(SmolError):
    """An engine was called while another call was running in it."""

    def __init__(self) -> None:
        super().__init__("the engine is busy with another call", "Wait until that call has returned.")


class CancelledError(SmolError):
    """Another thread cancelled this work."""

    def __init__(self) -> None:
        super().__init__("the generation was cancelled", "Send the prompt again.")


class Cancellation:
    """Lets any thread cancel work that is running in another one."""

    def __init__(self) -> None:
        self.flag = ctypes.c_int32(0)  # the compiled engine reads it between layers

    def set(self) -> None:
        """Cancel the work; it ends soon, with CancelledError."""
        self.flag.value = 1

    def check(self) -> None:
        """Raise CancelledError if the work was cancelled."""
        if self.flag.value:
            raise CancelledError


class Cache:
    """Keys and values of several sequences that grow independently, each up to `capacity` tokens."""

    def __init__(self, sequences: int, capacity: int) -> None:
        self.capacity = capacity
        self.lengths = [0] * sequences  # tokens stored for each sequence
        self.cancellation = Cancellation()  # of the calls that use this cache

    def truncate(self, sequence: int, length: int) -> None:
        """Drop everything after the first `length` tokens of a sequence."""
        self.lengths[sequence] = min(self.lengths[sequence], length)

    def copy(self, source: int, target: int) -> None:
        """Make one sequence a copy of another; `bench` never calls this for a peer."""
        raise NotImplementedError


class Engine(ABC):
    """A model that is ready to run. Several threads may use it, each with its own cache.

    Args:
        config: its shape.
        name: of the engine and its precision, for people: "native AVX2, int8".
        note: why it is not the fastest engine; empty if it is.
    """

    # Calls of up to this many tokens give the same logits, bit for bit, as calls with one token each.
    exact_tokens = 1
    # Whether a token gets the same bits in every call of more tokens than these, whatever else the call
    # contains.
    is_uniform = False
    precision: str = ""  # of the matrices in matmuls: "float32", "int4 + int8"
    cache_dtype: np.dtype[Any] = np.dtype(np.float32)  # of keys and values
    weight_bytes: int = 0  # of the matrices that are read for every new token; 0: not known

    def __init__(self, config: ModelConfig, name: str, note: str = "") -> None:
        self.config, self.name, self.note = config, name, note

    @abstractmethod
    def allocate(self, sequences: int, capacity: int) -> Cache:
        """Allocate a cache for this many sequences of at most this many tokens.

        Raises:
            InputError: more tokens than the model has positions for.
        """

    @abstractmethod
    def forward(self, tokens: Sequence[Sequence[int]], cache: Cache, every: bool = False) -> Logits:
        """Append tokens to the sequences of a cache and return logits.

        Args:
            tokens: ids for each sequence of the cache; an empty list leaves a sequence as it is.
            cache: from `allocate` of this engine; its lengths grow.
            every: return logits after every token instead of only after the last of each sequence.

        Returns:
            (N, V): one row for each sequence that got tokens, or for each token, in order.

        Raises:
            InputError: a sequence does not fit the cache.
            IndexError: a token is outside the vocabulary.
            EngineBusyError: another thread is in a call of this engine.
            CancelledError: the cache's cancellation was set; its lengths are unchanged.
            SmolError: there is not enough memory.
        """

    def check_room(self, tokens: Sequence[Sequence[int]], cache: Cache) -> None:
        """Refuse tokens that do not fit the cache. Raises InputError."""
        for ids, length in zip(tokens, cache.lengths, strict=True):
            if length + len(ids) > cache.capacity:
                raise InputError(
                    f"{length + len(ids)} tokens do not fit a cache of {cache.capacity}",
                    "Shorten the prompt or lower --max-tokens.",
                )
