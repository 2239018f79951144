"""The Space's app: a chat, or a box that continues text, streamed from the model that lies beside it.

It runs as `python app.py` in the Space's folder, which holds the model, `space.json`, and a copy of the
parts of smolctl that this needs. `gradio` is asked for here only.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolctl.cores import compute_threads
from smolctl.data.tokenizer.prompt import Prompt
from smolctl.errors import SmolError
from smolctl.generation.complete import CompletionSettings, complete
from smolctl.generation.conversation import Conversation
from smolctl.generation.engine import Cancellation
from smolctl.generation.load import LoadedModel, load_model
from smolctl.generation.sampling import SamplingSettings

MODEL, FACTS = "model", "space.json"
# Sliders under the box: name, least, most, step, value where the model recommends none, help.
CONTROLS = (
    ("Tokens at most", 1, 512, 1, 128, "where an answer is cut"),
    ("Temperature", 0.0, 2.0, 0.05, 0.7, "0 always takes the likeliest token"),
    ("Top-p", 0.05, 1.0, 0.05, 0.95, "likeliest tokens up to this sum of probability"),
    ("Top-k", 0, 200, 1, 0, "this many likeliest tokens; 0 keeps all"),
    ("Repetition penalty", 1.0, 2.0, 0.05, 1.1, "above 1, tokens already there become less likely"),
    ("Seed", 0, 1_000_000, 1, 0, "0: another text every time; others repeat themselves"),
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


class Speaker:
    """A model that answers visitors; one who leaves or presses stop ends the work on their answer.

    The answers are asynchronous generators: Gradio cancels these at once, but others only after their next
    piece of text, which may be a long prompt away.
    """

    def __init__(self, model: LoadedModel) -> None:
        self.model = model

    @property
    def context(self) -> int:
        return self.model.engine.config.max_position_embeddings

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
        conversation.make_room(self.model, message, self.context, int(controls[0]))
        prompt = conversation.prompt(self.model, message)
        async with aclosing(self._answers(prompt, controls)) as answers:
            async for text in answers:
                yield text

    async def continue_text(self, prompt: str, *controls: float) -> AsyncGenerator[str, None]:
        """The prompt and what follows it so far, again and again as it grows."""
        given = self.model.tokenizer.prompt(prompt)
        async with aclosing(self._answers(given, controls)) as answers:
            async for text in answers:
                yield prompt + text

    async def _answers(self, prompt: Prompt, controls: Sequence[float]) -> AsyncGenerator[str, None]:
        loop, cancellation = asyncio.get_running_loop(), Cancellation()
        pieces: asyncio.Queue[str | BaseException | None] = asyncio.Queue()

        def listen(_sample: int, text: str) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, text)

        def work() -> None:
            engine, tokenizer = self.model.engine, self.model.tokenizer
            complete(engine, tokenizer, prompt, _settings(controls), listen, cancellation=cancellation)

        worker = loop.run_in_executor(None, work)
        worker.add_done_callback(lambda done: pieces.put_nowait(done.exception()))
        text = ""
        try:
            while isinstance(piece := await pieces.get(), str):
                text += piece
                yield text
            if isinstance(piece, SmolError):
                import gradio

                raise gradio.Error(f"{piece.message}. {piece.hint}".strip(), print_exception=False)
            if piece is not None:
                raise piece
            if not text:
                yield "*(the model ended its answer at once)*"
        finally:
            cancellation.set()


def _settings(controls: Sequence[float]) -> CompletionSettings:
    tokens, temperature, top_p, top_k, penalty, seed = controls
    sampling = SamplingSettings(
        temperature=temperature, top_k=int(top_k), top_p=top_p, repetition_penalty=penalty
    )
    return CompletionSettings(
        max_tokens=int(tokens), seed=int(seed) or random.randrange(1 << 31), sampling=sampling
    )


def _text(content: Any) -> str:
    """A turn's text; Gradio's own page sends it in parts."""
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in content or ())


def controls_of(model: LoadedModel) -> list[tuple[str, float, float, float, float, str]]:
    """`CONTROLS` as a model's page starts with them: within its context, and as its makers recommend."""
    found = []
    for name, low, high, step, value, info in CONTROLS:
        if name == CONTROLS[0][0]:
            high = min(high, model.engine.config.max_position_embeddings - 1)
        recommended = model.recommended.get(name.lower().replace("-", "_").replace(" ", "_"), value)
        found.append((name, low, high, step, min(max(low, recommended), high), info))
    return found


def build_page(folder: Path) -> Any:
    """The page of a Space's folder.

    Raises:
        SmolError: the model cannot be loaded.
    """
    import gradio

    facts = SpaceFacts.read(folder)
    speaker = Speaker(load_model(str(folder / MODEL)))
    controls = [
        gradio.Slider(low, high, value=value, step=step, label=name, info=info, render=False)
        for name, low, high, step, value, info in controls_of(speaker.model)
    ]
    fill = _chat if speaker.model.can_chat else _continuation
    with gradio.Blocks(title=facts.title) as page:
        gradio.Markdown(f"# {facts.title}")
        gradio.Markdown(f"{facts.summary}\n\nEngine: {speaker.engine()}", elem_id="facts")
        fill(gradio, facts, speaker, controls)
        gradio.api(speaker.engine, api_name="engine")  # type: ignore[attr-defined]
    return page


def _chat(gradio: Any, facts: SpaceFacts, speaker: Speaker, controls: list[Any]) -> None:
    gradio.ChatInterface(
        speaker.chat,
        additional_inputs=controls,
        additional_inputs_accordion=gradio.Accordion("Sampling", open=False, render=False),
        # Without values for the controls the examples stand in the empty chat, else in a table under it.
        examples=[[example] for example in facts.examples] or None,
        cache_examples=False,
        api_name="chat",
    )


def _continuation(gradio: Any, facts: SpaceFacts, speaker: Speaker, controls: list[Any]) -> None:
    prompt = gradio.Textbox(
        label="Prompt", lines=2, max_lines=8, placeholder="The model continues what you write here."
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
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio

    # A container sees all processors of its host. More threads than its share would wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", str(compute_threads()))
    # One visitor at a time: the model takes all cores. The address is Gradio's choice, on a Space the Hub's.
    page = build_page(folder).queue(default_concurrency_limit=1, max_size=16)
    waits = on_start is None
    _, url, _ = page.launch(
        theme=gradio.themes.Soft(font=FONTS),
        css=STYLE,
        share=False,
        prevent_thread_lock=not waits,
        quiet=not waits,
    )
    if on_start is not None:
        on_start(url)
        page.block_thread()
