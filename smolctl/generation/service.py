"""One thread that answers all requests: it steps the scheduler and passes on the results."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from smolctl.arithmetic import kv_cache_bytes_per_token
from smolctl.errors import InputError, SmolError
from smolctl.generation.answer import Answer
from smolctl.generation.complete import CompletionSettings
from smolctl.generation.load import LoadedModel
from smolctl.generation.sampling import DEFAULT_SAMPLING
from smolctl.generation.scheduler import Scheduler
from smolctl.generation.slots import Outcome, Request, Token

LOG = logging.getLogger(__name__)


class BusyError(SmolError):
    """No further request can wait."""


@dataclass(frozen=True)
class Piece:
    """A token of one of the answers of a job, or of its prompt."""

    choice: int
    text: str  # text that became final, possibly empty
    token: Token
    finish_reason: str | None  # "stop" or "length" in the last piece of an answer


# Called in the service's thread: with every piece, or with the error that ends the whole job.
OnPiece = Callable[[Piece | SmolError], None]


@dataclass(frozen=True)
class ServicePrompt:
    """A prompt and how to continue it."""

    ids: Sequence[int]
    settings: CompletionSettings
    score: bool = False  # also report the prompt's own tokens


@dataclass(eq=False)
class Job:
    """Prompts with their answers, numbered consecutively: `samples` of the first prompt, then of the next."""

    listener: OnPiece
    answers: list[Answer] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)


class Service:
    """Answers many requests at once with one model.

    Args:
        model: answers.
        slots: answers that are generated at the same time.
        capacity: tokens of a prompt and its answer.
        waiting: maximum number of answers that wait for a slot.
    """

    def __init__(self, model: LoadedModel, slots: int, capacity: int, waiting: int) -> None:
        self.model, self.slots, self.capacity, self.most_waiting = model, slots, capacity, waiting
        self.scheduler = Scheduler(model.engine, slots, capacity, DEFAULT_SAMPLING)
        self.cache_bytes = (
            slots * capacity * kv_cache_bytes_per_token(model.engine.config, model.engine.cache_dtype.name)
        )
        self._ends = model.tokenizer.stop_token_ids(model.engine.config)
        self._jobs: dict[Request, tuple[Job, int]] = {}  # with the answer's number; only for the thread
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open = 0  # answers that were requested and have not ended
        self._thread = threading.Thread(target=self._work, name="scheduler", daemon=True)
        self._thread.start()

    def start(self, prompts: Sequence[ServicePrompt], listener: OnPiece) -> Job:
        """Answer prompts; `listener` gets the pieces as they come.

        Raises:
            InputError: a prompt is empty or leaves no room for an answer, or there are more answers than can
                ever run.
            BusyError: too many are waiting already.
        """
        job = Job(listener)
        for prompt in prompts:
            self._add(job, prompt)
        count, most = len(job.requests), self.slots + self.most_waiting
        if count > most:
            raise InputError(
                f"{count} answers were requested, but only {most} are possible", "Ask for fewer."
            )
        with self._lock:
            if self._open + count > most:
                raise BusyError(
                    f"the server gives {self.slots} answers at once, and {self.most_waiting} more may wait",
                    "Try again in a moment.",
                )
            self._open += count
        self._inbox.put(lambda: self._submit(job))
        return job

    def cancel(self, job: Job) -> None:
        """End a job before the next call of the engine; one that has ended does not change."""
        self._inbox.put(lambda: self._drop(job))

    def close(self) -> None:
        """End the thread, and with it all jobs."""
        self._inbox.put(None)
        self._thread.join()

    def _add(self, job: Job, prompt: ServicePrompt) -> None:
        settings, room = prompt.settings, self.capacity - len(prompt.ids)
        for sample in range(settings.samples):
            request = settings.request(prompt.ids, room, sample, score=prompt.score)
            self.scheduler.check(request)
            job.requests.append(request)
            job.answers.append(Answer(self.model.tokenizer, prompt.ids, settings.stop, self._ends))

    def _work(self) -> None:
        while True:
            idle = not self.scheduler.active and not self.scheduler.waiting
            try:
                while idle or not self._inbox.empty():
                    if (action := self._inbox.get()) is None:
                        return
                    action()
                    idle = False
                self._deliver(self.scheduler.step())
            except Exception as error:
                # The other answers of this call are lost too; later requests are served normally.
                LOG.exception("unexpected, in the scheduler's thread")
                for job in {job for job, _ in self._jobs.values()}:
                    self._fail(job, SmolError(f"unexpected: {type(error).__name__}: {error}"))

    def _submit(self, job: Job) -> None:
        for number, request in enumerate(job.requests):
            self._jobs[request] = job, number
            self.scheduler.submit(request)

    def _deliver(self, outcomes: Sequence[Outcome]) -> None:
        for request, outcome in outcomes:
            if request not in self._jobs:
                continue  # an accepted draft token after the end
            job, number = self._jobs[request]
            if isinstance(outcome, SmolError):
                self._fail(job, outcome)
                continue
            answer, text = job.answers[number], ""
            if not outcome.of_prompt:
                text = answer.add(outcome)
                if len(answer.tokens) == request.max_tokens:
                    text += answer.finish()
            if answer.finish_reason:
                self._end(request)
            self._send(job, Piece(number, text, outcome, answer.finish_reason or None))

    def _fail(self, job: Job, error: SmolError) -> None:
        self._drop(job)
        self._send(job, error)

    def _send(self, job: Job, result: Piece | SmolError) -> None:
        """Call the listener of a job; if it fails, nobody reads the job's answers any more."""
        try:
            job.listener(result)
        except Exception:
            LOG.exception("unexpected, in the listener of a request")
            self._drop(job)

    def _drop(self, job: Job) -> None:
        for request in job.requests:
            self._end(request)

    def _end(self, request: Request) -> None:
        if self._jobs.pop(request, None) is not None:
            self.scheduler.end(request)
            with self._lock:
                self._open -= 1
