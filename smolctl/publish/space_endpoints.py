"""The model of a Gradio Space: answers several visitors at once, each until they leave or press stop."""

from __future__ import annotations

import asyncio
import html
import random
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

from smolctl.arithmetic import kv_cache_bytes_per_token
from smolctl.cores import compute_threads
from smolctl.data.tokenizer.prompt import Prompt
from smolctl.errors import SmolError
from smolctl.escaping import whole_characters
from smolctl.generation.complete import CompletionSettings
from smolctl.generation.conversation import MOST_TOKENS, Conversation
from smolctl.generation.load import LoadedModel
from smolctl.generation.sampling import SamplingSettings
from smolctl.generation.service import Piece, Service, ServicePrompt

ANSWER_S = 60.0  # per answer, including its prompt, because others are waiting
CHECK_EVERY_S = 0.25  # for the end of the time, or of the visit
SLOTS = 8  # maximum number of visitors who are answered at once
CACHE_BYTES = 4 << 30  # of their conversations; a model that needs more answers fewer visitors
WAITING = 16  # maximum number of waiting visitors; others are asked to come back
# Texts of the page, not of the model, below an answer.
ENDED_AT_ONCE = "(the model ended its answer at once)"
STOPPED = f"[stopped after {ANSWER_S:.0f} seconds]"
REFUSED = "⚠ "  # starts the reason why there is no answer
# Sliders below the box: name, minimum, maximum, step, value if the model recommends none, help.
CONTROLS = (
    ("Maximum tokens", 1, 512, 1, 128, "maximum number of tokens in an answer"),
    ("Temperature", 0.0, 2.0, 0.05, 0.7, "0 always takes the likeliest token"),
    ("Top-p", 0.05, 1.0, 0.05, 0.95, "keeps the likeliest tokens up to this total probability"),
    ("Top-k", 0, 200, 1, 0, "keeps this many of the likeliest tokens; 0 keeps all"),
    ("Repetition penalty", 1.0, 2.0, 0.05, 1.1, "above 1, repeated tokens become less likely"),
    ("Seed", 0, 1_000_000, 1, 0, "0 gives a new text every time; any other seed always gives the same text"),
)


@dataclass(frozen=True)
class Visit:
    """A visitor who is being answered."""

    has_left: Callable[[], bool] = lambda: False  # closed the page or the connection
    by_program: bool = True  # uses the endpoint for programs


class SpaceEndpoints:
    """A model that answers several visitors at once; one who leaves or presses stop ends only their own
    answer.

    The answers are asynchronous generators: Gradio cancels these immediately, but others only after their
    next piece of text, which may be a long prompt away.

    Args:
        model: the model that answers.
        answer_s: maximum seconds per answer.
        visit: returns the current visitor; called when an answer begins.
    """

    def __init__(
        self,
        model: LoadedModel,
        answer_s: float = ANSWER_S,
        visit: Callable[[], Visit] = Visit,
    ) -> None:
        self.model, self.answer_s, self._visit = model, answer_s, visit
        self.context = min(model.context, MOST_TOKENS)
        self.most_characters = model.tokenizer.most_characters(self.context)
        cached = self.context * kv_cache_bytes_per_token(model.engine.config, model.engine.cache_dtype.name)
        self.service = Service(model, min(max(CACHE_BYTES // cached, 1), SLOTS), self.context, WAITING)

    def engine(self) -> str:
        """The engine, and the reason if a faster one is not used."""
        engine = self.model.engine
        note = f" ({engine.note})" if engine.note else ""
        return f"{engine.name}, {compute_threads()} threads{note}"

    async def chat(
        self, message: str, history: Sequence[Mapping[str, Any]], *controls: float
    ) -> AsyncGenerator[str, None]:
        """Yield the answer so far, repeatedly as it grows. The oldest turns are dropped if there is no
        room.
        """
        turns = [{"role": str(turn["role"]), "content": _text(turn["content"])} for turn in history]
        conversation = Conversation(chat=True, turns=turns)

        def prompt() -> Prompt:
            conversation.make_room(self.model, message, self.context, int(controls[0]))
            return conversation.prompt(self.model, message)

        visit = self._visit()
        # Gradio locks the page's input box permanently if an answer ends with an error.
        answers = self._answers(message, prompt, controls, visit, says_errors=not visit.by_program)
        async with aclosing(answers):
            async for text in answers:
                yield text

    async def continue_text(self, prompt: str, *controls: float) -> AsyncGenerator[str, None]:
        """Yield the prompt and its continuation so far, repeatedly as it grows."""
        given = whole_characters(prompt)
        answers = self._answers(given, lambda: self.model.prompt(given), controls, self._visit())
        async with aclosing(answers):
            async for text in answers:
                yield given + text

    async def _answers(
        self,
        text: str,
        make_prompt: Callable[[], Prompt],
        controls: Sequence[float],
        visit: Visit,
        says_errors: bool = False,
    ) -> AsyncGenerator[str, None]:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.answer_s
        pieces: asyncio.Queue[Piece | SmolError] = asyncio.Queue()

        def listen(piece: Piece | SmolError) -> None:
            with suppress(RuntimeError):  # the loop is closed, so there is no receiver
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def read() -> ServicePrompt:
            self.model.tokenizer.require_room(len(text), self.context)
            return ServicePrompt(make_prompt().ids, _settings(controls))

        answer, ended, job = "", False, None
        try:
            job = self.service.start([await loop.run_in_executor(None, read)], listen)
            while not ended:
                if visit.has_left() or loop.time() >= deadline:
                    yield f"{answer}\n\n{STOPPED}".strip()
                    return
                before = answer
                # All pieces that have arrived: for each value, Gradio sends an update of the page.
                for piece in await _waiting_in(pieces, CHECK_EVERY_S):
                    if isinstance(piece, SmolError):
                        raise piece
                    answer, ended = answer + piece.text, piece.finish_reason is not None
                if answer != before:
                    yield answer
            if not answer:
                yield ENDED_AT_ONCE
        except SmolError as error:
            reason = f"{error.message}. {error.hint}".strip()
            if not says_errors:
                import gradio

                # Gradio renders the message as HTML, and a chat template may have written it.
                raise gradio.Error(html.escape(reason), print_exception=False) from None
            yield f"{answer}\n\n{REFUSED}{reason}".strip()
        finally:
            if job is not None:
                self.service.cancel(job)


async def _waiting_in(queue: asyncio.Queue[Piece | SmolError], at_most_s: float) -> list[Piece | SmolError]:
    """All items in a queue; if it is empty, the items that arrive within a timeout."""
    found = []
    with suppress(TimeoutError):
        async with asyncio.timeout(at_most_s):
            found.append(await queue.get())
    return found + [queue.get_nowait() for _ in range(queue.qsize())]


def _settings(controls: Sequence[float]) -> CompletionSettings:
    tokens, temperature, top_p, top_k, penalty, seed = controls
    sampling = SamplingSettings(
        temperature=temperature, top_k=int(top_k), top_p=top_p, repetition_penalty=penalty
    )
    return CompletionSettings(
        max_tokens=int(tokens), seed=int(seed) or random.randrange(1 << 31), sampling=sampling
    )


def _text(content: Any) -> str:
    """A turn's text, without the page's remarks below it; Gradio's own page sends it in parts."""
    parts = [content] if isinstance(content, str) else content or ()
    text = "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in parts)
    head, _, last = text.rpartition("\n\n")
    return head if last in (ENDED_AT_ONCE, STOPPED) or last.startswith(REFUSED) else text


def controls_of(model: LoadedModel) -> list[tuple[str, float, float, float, float, str]]:
    """`CONTROLS` for a model's page: limited by its context, and with its recommended values."""
    found = []
    for name, low, high, step, value, info in CONTROLS:
        if name == CONTROLS[0][0]:
            high = min(high, model.context - 1, MOST_TOKENS - 1)
        recommended = model.recommended.get(name.lower().replace("-", "_").replace(" ", "_"), value)
        found.append((name, low, high, step, min(max(low, recommended), high), info))
    return found
