"""The Space's app: a chat, or a box that continues text, streamed from the model that lies beside it.

It runs as `python app.py` in the Space's folder, which holds the model, `space.json`, and a copy of the
parts of smolctl that this needs. `gradio` is asked for here only.
"""

from __future__ import annotations

import asyncio
import html
import json
import os
import random
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from smolctl.arithmetic import kv_cache_bytes_per_token
from smolctl.cores import compute_threads
from smolctl.data.tokenizer.prompt import Prompt
from smolctl.errors import SmolError
from smolctl.escaping import whole_characters
from smolctl.generation.complete import CompletionSettings
from smolctl.generation.conversation import MOST_TOKENS, Conversation
from smolctl.generation.load import LoadedModel, load_model
from smolctl.generation.sampling import SamplingSettings
from smolctl.generation.service import Asked, Piece, Service

MODEL, FACTS = "model", "space.json"
CHAT = "chat"  # the endpoint for programs
ANSWER_S = 60.0  # for one answer, its prompt included: others are waiting
CHECK_EVERY_S = 0.25  # whether time is up, or the visitor has left
SLOTS = 8  # visitors at most who are answered at once
CACHE_BYTES = 4 << 30  # of their conversations together: fewer are answered at once where a model needs more
WAITING = 16  # visitors at most who wait for their turn; others are asked to come back
SESSIONS = 256  # visitors whose conversations are kept in memory
REQUEST_BYTES = 1 << 20  # of a request, or more where the context holds more text
DISCARDED_BYTES = 64 << 20  # of a request that is too large, before the connection is closed
# What the page says below an answer in place of the model.
ENDED_AT_ONCE = "(the model ended its answer at once)"
STOPPED = f"[stopped after {ANSWER_S:.0f} seconds]"
REFUSED = "⚠ "  # begins the reason why there is no answer
# Sliders under the box: name, least, most, step, value where the model recommends none, help.
CONTROLS = (
    ("Maximum tokens", 1, 512, 1, 128, "maximum number of tokens in an answer"),
    ("Temperature", 0.0, 2.0, 0.05, 0.7, "0 always takes the likeliest token"),
    ("Top-p", 0.05, 1.0, 0.05, 0.95, "keeps the likeliest tokens up to this total probability"),
    ("Top-k", 0, 200, 1, 0, "keeps this many of the likeliest tokens; 0 keeps all"),
    ("Repetition penalty", 1.0, 2.0, 0.05, 1.1, "above 1, repeated tokens become less likely"),
    ("Seed", 0, 1_000_000, 1, 0, "0 gives a new text every time; any other seed always gives the same text"),
)
STYLE = """
#facts p { font-size: 0.875rem }
#continuation textarea { font-family: ui-monospace, monospace }
button.example { border: 1px solid var(--border-color-primary) }
"""
FONTS = ("ui-sans-serif", "system-ui", "sans-serif")  # of the visitor's system: nothing is fetched


@dataclass(frozen=True)
class SpaceFacts:
    """What the page says about the model."""

    title: str
    summary: str  # Markdown
    examples: Sequence[str]

    @staticmethod
    def read(folder: Path) -> SpaceFacts:
        return SpaceFacts(**json.loads((folder / FACTS).read_text(encoding="utf-8")))  # noqa: TID251 - our own


@dataclass(frozen=True)
class Visit:
    """What is known of a visitor who is being answered."""

    has_left: Callable[[], bool] = lambda: False  # closed the page or the connection
    by_program: bool = True  # asks through the endpoint for programs


class Speaker:
    """A model that answers several visitors at once; one who leaves or presses stop ends their own answer.

    The answers are asynchronous generators: Gradio cancels these at once, but others only after their next
    piece of text, which may be a long prompt away.

    Args:
        model: answers.
        answer_s: seconds after which an answer is stopped.
        visit: called when an answer begins.
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
        """The engine that runs here, and why it is not a faster one where that is so."""
        engine = self.model.engine
        note = f" ({engine.note})" if engine.note else ""
        return f"{engine.name}, {compute_threads()} threads{note}"

    async def chat(
        self, message: str, history: Sequence[Mapping[str, Any]], *controls: float
    ) -> AsyncGenerator[str, None]:
        """The answer so far, again and again as it grows. The oldest turns go when there is no room."""
        turns = [{"role": str(turn["role"]), "content": _text(turn["content"])} for turn in history]
        conversation = Conversation(chat=True, turns=turns)

        def prompt() -> Prompt:
            conversation.make_room(self.model, message, self.context, int(controls[0]))
            return conversation.prompt(self.model, message)

        visit = self._visit()
        # Gradio locks the page's box for good when an answer ends with an error.
        answers = self._answers(message, prompt, controls, visit, says_errors=not visit.by_program)
        async with aclosing(answers):
            async for text in answers:
                yield text

    async def continue_text(self, prompt: str, *controls: float) -> AsyncGenerator[str, None]:
        """The prompt and what follows it so far, again and again as it grows."""
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
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def read() -> Asked:
            self.model.tokenizer.require_room(len(text), self.context)
            return Asked(make_prompt().ids, _settings(controls))

        answer, ended, job = "", False, None
        try:
            job = self.service.start([await loop.run_in_executor(None, read)], listen)
            while not ended:
                if visit.has_left() or loop.time() >= deadline:
                    yield f"{answer}\n\n{STOPPED}".strip()
                    return
                before = answer
                # All that has come by now: with each value Gradio sends a change of the page.
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

                # Gradio takes the message for HTML, and a chat template may have written it.
                raise gradio.Error(html.escape(reason), print_exception=False) from None
            yield f"{answer}\n\n{REFUSED}{reason}".strip()
        finally:
            if job is not None:
                self.service.cancel(job)


async def _waiting_in(queue: asyncio.Queue[Piece | SmolError], at_most_s: float) -> list[Piece | SmolError]:
    """All that waits in a queue: where that is nothing, what comes within a time."""
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
    """A turn's text, without what the page has said below it; Gradio's own page sends it in parts."""
    parts = [content] if isinstance(content, str) else content or ()
    text = "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in parts)
    head, _, last = text.rpartition("\n\n")
    return head if last in (ENDED_AT_ONCE, STOPPED) or last.startswith(REFUSED) else text


def controls_of(model: LoadedModel) -> list[tuple[str, float, float, float, float, str]]:
    """`CONTROLS` as a model's page starts with them: within its context, and as its makers recommend."""
    found = []
    for name, low, high, step, value, info in CONTROLS:
        if name == CONTROLS[0][0]:
            high = min(high, model.context - 1, MOST_TOKENS - 1)
        recommended = model.recommended.get(name.lower().replace("-", "_").replace(" ", "_"), value)
        found.append((name, low, high, step, min(max(low, recommended), high), info))
    return found


class BodyLimit:
    """An ASGI application that reads no larger requests; its answer to them is 413.

    Args:
        app: gets the others.
        most: bytes of a request's body.
    """

    def __init__(self, app: Any, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        messages: list[Any] = []
        size, more = 0, True
        while more:
            message = await receive()
            size += len(message.get("body", b""))
            messages = [*messages, message] if size <= self.most else []
            # A browser sees no answer while it is still sending: the rest is received, and forgotten.
            more = message.get("more_body", False) and size < DISCARDED_BYTES
        if size > self.most:
            await self._refuse(scope, receive, send)
            return

        async def replayed() -> Any:
            return messages.pop(0) if messages else await receive()

        await self.app(scope, replayed, send)

    async def _refuse(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import JSONResponse

        reason = f"This is more than {self.most / 1e6:.1f} MB. Shorten the text, or begin a new chat."
        await JSONResponse({"detail": reason}, 413)(scope, receive, send)


def _visit() -> Visit:
    """The visitor whose answer begins.

    Gradio knows at once who has left, but ends a generator only after its next value.
    """
    from gradio.context import LocalContext

    blocks, event_id = LocalContext.blocks.get(None), LocalContext.event_id.get(None)
    event = blocks._queue.event_ids_to_events.get(event_id) if blocks and event_id else None
    if event is None:
        return Visit()
    return Visit(lambda: not event.alive, event.fn.api_name == CHAT)


def build_page(facts: SpaceFacts, speaker: Speaker) -> Any:
    """The page of a model."""
    import gradio

    controls: list[Any] = [
        gradio.Slider(low, high, value=value, step=step, label=name, info=info, render=False)
        for name, low, high, step, value, info in controls_of(speaker.model)
    ]
    fill = _chat if speaker.model.can_chat else _continuation
    with gradio.Blocks(title=facts.title) as page:
        gradio.Markdown(f"# {facts.title}")
        gradio.Markdown(f"{facts.summary}\n\nEngine: {speaker.engine()}", elem_id="facts")
        fill(gradio, facts, speaker, controls)
        gradio.api(speaker.engine, api_name="engine")  # type: ignore[attr-defined]
    for function in page.fns.values():
        if function.types_generator:  # what answers, by whatever button it was asked
            function.concurrency_id = "model"
    return page


def _chat(gradio: Any, facts: SpaceFacts, speaker: Speaker, controls: list[Any]) -> None:
    page = gradio.ChatInterface(
        speaker.chat,
        chatbot=_text_chatbot(gradio),
        additional_inputs=controls,
        additional_inputs_accordion=gradio.Accordion("Sampling", open=False, render=False),
        # Without values for the controls the examples stand in the empty chat, else in a table under it.
        examples=[[example] for example in facts.examples] or None,
        cache_examples=False,
        api_name=CHAT,
    )
    page.textbox.max_length = speaker.most_characters + 1  # this one is refused with its reason


def _text_chatbot(gradio: Any) -> Any:
    """Gradio's chatbot, which shows messages as the text that they are.

    By itself it takes HTML and pictures from other servers in them for what they are, without Markdown too.
    """

    def each_text(change: Callable[[str], str], messages: Any) -> Any:
        changed = messages.model_copy(deep=True)
        for part in (part for message in changed.root for part in message.content if part.type == "text"):
            part.text = change(part.text)
        return changed

    # Its buttons for copying would give the text with "&lt;" for "<".
    chatbot = gradio.Chatbot(label="Chatbot", scale=1, render_markdown=False, latex_delimiters=[], buttons=[])
    to_page, from_page = chatbot.postprocess, chatbot.preprocess
    # A class of our own would have Gradio write a file beside this one.
    chatbot.postprocess = lambda value: each_text(partial(html.escape, quote=False), to_page(value))
    chatbot.preprocess = lambda value: from_page(value and each_text(html.unescape, value))
    return chatbot


def _continuation(gradio: Any, facts: SpaceFacts, speaker: Speaker, controls: list[Any]) -> None:
    prompt = gradio.Textbox(
        label="Prompt",
        lines=2,
        max_lines=8,
        placeholder="The model continues what you write here.",
        max_length=speaker.most_characters + 1,  # this one is refused with its reason
    )
    with gradio.Row():
        start = gradio.Button("Continue", variant="primary")
        stop = gradio.Button("Stop")
    answer = gradio.Textbox(
        label="Continuation", elem_id="continuation", lines=8, max_lines=24, buttons=["copy"]
    )
    with gradio.Accordion("Sampling", open=False):
        for left, right in zip(controls[::2], controls[1::2], strict=True):
            with gradio.Row():
                left.render()
                right.render()
    if facts.examples:
        gradio.Examples([[example] for example in facts.examples], [prompt], label="Examples")
    answering = [
        start.click(speaker.continue_text, [prompt, *controls], answer, api_name="continue"),
        prompt.submit(speaker.continue_text, [prompt, *controls], answer, api_visibility="private"),
    ]
    stop.click(None, cancels=answering)


def main(folder: Path, on_start: Callable[[str], None] | None = None) -> None:
    """Serve the page until the process is stopped.

    Args:
        folder: of the Space.
        on_start: called with the address once the page is there; None leaves that to Gradio.

    Raises:
        SmolError: the model cannot be loaded.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio
    from starlette.middleware import Middleware

    # A container sees all processors of its host. More threads than its share would wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", str(compute_threads()))
    speaker = Speaker(load_model(str(folder / MODEL)), visit=_visit)
    # The address is Gradio's choice, on a Space the Hub's.
    page = build_page(SpaceFacts.read(folder), speaker)
    page.queue(default_concurrency_limit=speaker.service.slots, max_size=WAITING, api_open=False)
    # UTF-8 takes four bytes at most for a character.
    request_bytes = max(REQUEST_BYTES, 4 * speaker.most_characters)
    waits = on_start is None
    _, url, _ = page.launch(
        theme=gradio.themes.Soft(font=FONTS),
        css=STYLE,
        share=False,
        app_kwargs={"middleware": [Middleware(BodyLimit, most=request_bytes)]},
        max_file_size=0,  # the page takes no files
        state_session_capacity=SESSIONS,
        prevent_thread_lock=not waits,
        quiet=not waits,
    )
    if on_start is not None:
        on_start(url)
        page.block_thread()
