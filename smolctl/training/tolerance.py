"""Lets observers of a run fail without ending it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from smolctl.errors import SmolError
from smolctl.runs.events import Listener, Note
from smolctl.training.guards import NonFiniteError
from smolctl.training.rng import keeping_rng

LATEST_LINK = "making runs/latest a link to this run"


class Tolerance:
    """Turns failures of observers into notes, one for each kind."""

    def __init__(self, emit: Listener) -> None:
        self._emit = emit
        self._reported: set[str] = set()

    @contextmanager
    def __call__(self, observer: str, step: int) -> Iterator[None]:
        """A failure in the block becomes a note and does not stop training; the random generators are
        restored.

        Args:
            observer: name of the part that may fail, as the subject of a sentence.
            step: the current step.

        Raises:
            NonFiniteError: a failure of the training itself. Signals and interrupts are raised too.
        """
        try:
            with keeping_rng():
                yield
        except NonFiniteError:
            raise
        except Exception as error:
            if observer not in self._reported:
                self._reported.add(observer)
                self._emit(Note(f"step {step:,}: {observer} failed ({reason(error)}); training continues"))


def reason(error: Exception) -> str:
    """An exception in one line."""
    name = "" if isinstance(error, SmolError) else f"{type(error).__name__}: "
    return " ".join(f"{name}{error}".split())


def shortened(text: str, most: int = 30) -> str:
    """The beginning of a text, with an ellipsis if it was cut."""
    return text if len(text) <= most else f"{text[: most - 1]}…"
