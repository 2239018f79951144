"""Continues many prompts together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from smolctl.errors import InputError
from smolctl.generation.answer import Completion
from smolctl.generation.complete import Continuation, Generation
from smolctl.generation.conversation import Conversation
from smolctl.generation.load import LoadedModel
from smolctl.generation.prompts import PromptFile, PromptLine
from smolctl.generation.slots import check_prompt

Answers = tuple[Completion, ...]


class Batch:
    """The prompts of a file and their answers, which are computed during iteration.

    Each text is the same as if it were generated alone. A line with an error has that error instead of
    answers.

    Args:
        model: continues them.
        file: the prompts.
        conversation: turns prompts and messages into the model's input.
        size: sequences that decode at the same time, however many samples a prompt has.
        done: number of lines at the start of the file that are already answered.
    """

    def __init__(
        self, model: LoadedModel, file: PromptFile, conversation: Conversation, size: int, done: int = 0
    ) -> None:
        self.file, self.done, self._size = file, done, size
        self.faults: dict[int, InputError] = {}  # by line index; those of answered lines too
        self._indexes: list[int] = []  # of the lines to generate
        context, prompts = model.engine.config.max_position_embeddings, []
        for index, line in enumerate(file.lines):
            try:
                ids = _tokenize(model, line, conversation)
                check_prompt(len(ids), context)
            except InputError as fault:
                self.faults[index] = fault
                continue
            if index >= done:
                self._indexes.append(index)
                # A line with its own seed gives the same answer as alone.
                number = index if line.source.get("seed") is None else 0
                prompts.append(Continuation(ids, line.settings, number))
        self._generation = Generation(model.engine, model.tokenizer, prompts, context) if prompts else None

    def answers(self) -> Iterator[tuple[int, Answers | InputError]]:
        """Yield indexes of lines with their answers or their error, as soon as they are known."""
        yield from ((index, fault) for index, fault in self.faults.items() if index >= self.done)
        if self._generation is None:
            return
        for step in self._generation.run(self._generation.scheduler(self._size)):
            for number in step:
                yield self._indexes[number], self._generation.completions(number)

    def interrupt(self) -> Iterator[tuple[int, Answers]]:
        """End all answers, and yield those of the lines up to the last one that was started."""
        if self._generation is None:
            return
        self._generation.interrupt()
        found = [self._generation.completions(number) for number in range(len(self._indexes))]
        begun = [number for number, answers in enumerate(found) if any(one.tokens for one in answers)]
        yield from zip(self._indexes[: max(begun, default=-1) + 1], found, strict=False)


def _tokenize(model: LoadedModel, line: PromptLine, conversation: Conversation) -> Sequence[int]:
    if line.fault:
        raise line.fault
    if line.messages:
        return conversation.render(model, line.messages).ids
    return conversation.prompt(model, line.source["prompt"]).ids
