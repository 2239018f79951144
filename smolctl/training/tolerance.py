"""What only looks at a run may fail without ending it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from smolctl.errors import SmolError
from smolctl.runs.events import Listener, Note
from smolctl.training.guards import NonFiniteError
from smolctl.training.rng import keeping_rng

LATEST_LINK = "making runs/latest a link to this run"


class Tolerance:
    """Turns the failure of an observer into a note, once for each kind."""

    def __init__(self, emit: Listener) -> None:
        self._emit = emit
        self._told: set[str] = set()

    @contextmanager
    def __call__(self, observer: str, step: int) -> Iterator[None]:
        """A failure inside becomes a note and does not stop training; the random generators are set back.

        Args:
            observer: what may fail, as the subject of a sentence.
            step: at which.

        Raises:
            NonFiniteError: a fault of the training itself. Signals and interrupts are raised too.
        """
        try:
            with keeping_rng():
                yield
        except NonFiniteError:
            raise
        except Exception as error:
            if observer not in self._told:
                self._told.add(observer)
                self._emit(Note(f"step {step:,}: {observer} failed ({reason(error)}); training continues"))


def reason(error: Exception) -> str:
    """An exception in one line."""
    name = "" if isinstance(error, SmolError) else f"{type(error).__name__}: "
    return " ".join(f"{name}{error}".split())


def shortened(text: str, most: int = 30) -> str:
    """The beginning of a text, with an ellipsis where more follows."""
    return text if len(text) <= most else f"{text[: most - 1]}…"
