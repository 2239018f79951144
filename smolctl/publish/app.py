"""The Space's app: a chat, or a box that continues text, with streamed answers of the model next to it.

It runs as `python app.py` in the Space's folder, which contains the model, `space.json`, and a copy of the
required parts of smolctl. Only this module and space_endpoints.py import `gradio`.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from smolctl.cores import compute_threads
from smolctl.generation.load import load_model
from smolctl.publish.space_endpoints import WAITING, SpaceEndpoints, Visit, controls_of

MODEL, FACTS = "model", "space.json"
CHAT = "chat"  # the endpoint for programs
SESSIONS = 256  # visitors whose conversations are kept in memory
REQUEST_BYTES = 1 << 20  # of a request, or more if the context fits more text
DISCARDED_BYTES = 64 << 20  # read from a request that is too large, before the connection is closed
STYLE = """
#facts p { font-size: 0.875rem }
#continuation textarea { font-family: ui-monospace, monospace }
button.example { border: 1px solid var(--border-color-primary) }
"""
FONTS = ("ui-sans-serif", "system-ui", "sans-serif")  # of the visitor's system: nothing is downloaded


@dataclass(frozen=True)
class SpaceFacts:
    """The page's information about the model."""

    title: str
    summary: str  # Markdown
    examples: Sequence[str]

    @staticmethod
    def read(folder: Path) -> SpaceFacts:
        return SpaceFacts(**json.loads((folder / FACTS).read_text(encoding="utf-8")))  # noqa: TID251 - our own


class BodyLimit:
    """An ASGI application that refuses larger requests with status 413.

    Args:
        app: gets all other requests.
        most: maximum bytes of a request's body.
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
            # A browser cannot read a response while it is still sending, so the rest is received and
            # discarded.
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

    Gradio notices immediately that a visitor has left, but ends a generator only after its next value.
    """
    from gradio.context import LocalContext

    blocks, event_id = LocalContext.blocks.get(None), LocalContext.event_id.get(None)
    event = blocks._queue.event_ids_to_events.get(event_id) if blocks and event_id else None
    if event is None:
        return Visit()
    return Visit(lambda: not event.alive, event.fn.api_name == CHAT)


def build_page(facts: SpaceFacts, endpoints: SpaceEndpoints) -> Any:
    """The page of a model."""
    import gradio

    controls: list[Any] = [
        gradio.Slider(low, high, value=value, step=step, label=name, info=info, render=False)
        for name, low, high, step, value, info in controls_of(endpoints.model)
    ]
    fill = _chat if endpoints.model.can_chat else _continuation
    with gradio.Blocks(title=facts.title) as page:
        gradio.Markdown(f"# {facts.title}")
        gradio.Markdown(f"{facts.summary}\n\nEngine: {endpoints.engine()}", elem_id="facts")
        fill(gradio, facts, endpoints, controls)
        gradio.api(endpoints.engine, api_name="engine")  # type: ignore[attr-defined]
    for function in page.fns.values():
        if function.types_generator:  # functions that answer, whatever button triggers them
            function.concurrency_id = "model"
    return page


def _chat(gradio: Any, facts: SpaceFacts, endpoints: SpaceEndpoints, controls: list[Any]) -> None:
    page = gradio.ChatInterface(
        endpoints.chat,
        chatbot=_text_chatbot(gradio),
        additional_inputs=controls,
        additional_inputs_accordion=gradio.Accordion("Sampling", open=False, render=False),
        # Without values for the controls, the examples are shown in the empty chat, otherwise in a table
        # below it.
        examples=[[example] for example in facts.examples] or None,
        cache_examples=False,
        api_name=CHAT,
    )
    # One character too many is refused with the reason.
    page.textbox.max_length = endpoints.most_characters + 1


def _text_chatbot(gradio: Any) -> Any:
    """Gradio's chatbot, but it shows messages as plain text.

    By default it renders HTML and loads pictures from other servers, even without Markdown.
    """

    def each_text(change: Callable[[str], str], messages: Any) -> Any:
        changed = messages.model_copy(deep=True)
        for part in (part for message in changed.root for part in message.content if part.type == "text"):
            part.text = change(part.text)
        return changed

    # Its copy buttons would copy "&lt;" for "<".
    chatbot = gradio.Chatbot(label="Chatbot", scale=1, render_markdown=False, latex_delimiters=[], buttons=[])
    to_page, from_page = chatbot.postprocess, chatbot.preprocess
    # For a custom subclass, Gradio would write a file next to this one.
    chatbot.postprocess = lambda value: each_text(partial(html.escape, quote=False), to_page(value))
    chatbot.preprocess = lambda value: from_page(value and each_text(html.unescape, value))
    return chatbot


def _continuation(gradio: Any, facts: SpaceFacts, endpoints: SpaceEndpoints, controls: list[Any]) -> None:
    prompt = gradio.Textbox(
        label="Prompt",
        lines=2,
        max_lines=8,
        placeholder="The model continues what you write here.",
        max_length=endpoints.most_characters + 1,  # one character too many is refused with the reason
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
        start.click(endpoints.continue_text, [prompt, *controls], answer, api_name="continue"),
        prompt.submit(endpoints.continue_text, [prompt, *controls], answer, api_visibility="private"),
    ]
    stop.click(None, cancels=answering)


def main(folder: Path, on_start: Callable[[str], None] | None = None) -> None:
    """Serve the page until the process is stopped.

    Args:
        folder: of the Space.
        on_start: called with the address when the page is ready; None: Gradio prints it.

    Raises:
        SmolError: the model cannot be loaded.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio
    from starlette.middleware import Middleware

    # A container sees all processors of its host. More threads than its share would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", str(compute_threads()))
    endpoints = SpaceEndpoints(load_model(str(folder / MODEL)), visit=_visit)
    # Gradio chooses the address, or the Hub on a Space.
    page = build_page(SpaceFacts.read(folder), endpoints)
    page.queue(default_concurrency_limit=endpoints.service.slots, max_size=WAITING, api_open=False)
    # A character has at most four bytes in UTF-8.
    request_bytes = max(REQUEST_BYTES, 4 * endpoints.most_characters)
    waits = on_start is None
    _, url, _ = page.launch(
        theme=gradio.themes.Soft(font=FONTS),
        css=STYLE,
        share=False,
        app_kwargs={"middleware": [Middleware(BodyLimit, most=request_bytes)]},
        max_file_size=0,  # the page accepts no files
        state_session_capacity=SESSIONS,
        prevent_thread_lock=not waits,
        quiet=not waits,
    )
    if on_start is not None:
        on_start(url)
        page.block_thread()
