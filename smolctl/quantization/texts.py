"""Chooses sequences of text to measure on, and others for calibration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from smolctl.config import ModelConfig
from smolctl.config.data import DataConfig
from smolctl.data.batches import validation_batches, validation_documents
from smolctl.data.text.corpus import SequenceLengthError, shown_name
from smolctl.data.tokenizer.tokenizer import Tokenizer
from smolctl.data.tokens.corpus import tokenize_corpus
from smolctl.data.tokens.marks import CONTEXT, FIRST, IDS
from smolctl.data.tokens.mixture import Mixture
from smolctl.errors import InputError
from smolctl.sources.base import ModelSource
from smolctl.sources.huggingface.tokenizer import ids_around_text

WINDOW = 256  # predicted tokens per sequence, fewer if the context is shorter
CALIBRATION_WINDOWS = 24


@dataclass(frozen=True)
class Windows:
    """The tokens for measuring and calibrating a model."""

    name: str  # of the text, for people
    measured: tuple[Tensor, ...]  # (T + 1,) each; of conversations, each is one sequence
    counted: tuple[Tensor, ...]  # for each sequence, (T,): whether a predicted token counts
    documents: tuple[Tensor, ...]  # for each sequence, (T,): the document number of each predicted token
    calibration: tuple[Tensor, ...]  # (T + 1,) each; not used for measuring
    token_bytes: Tensor  # (V,) bytes of text of every id

    @property
    def tokens(self) -> int:
        return sum(int(counted.sum()) for counted in self.counted)


def choose_windows(
    source: ModelSource,
    config: ModelConfig,
    tokenizer: Tokenizer,
    data: Sequence[str],
    count: int,
    calibrate: bool,
) -> Windows:
    """Choose sequences spread evenly over held-out text.

    Without `data`, this is the text that the source's run held out, or the held-out documents of the built-in
    corpus. Of conversations, the tokens count that the run was trained on, such as the answers. Text named by
    `data` is used as a whole; for calibration, one half of it is used for the scales and the other half for
    measuring.

    Args:
        source: its recipe says what it was trained on.
        config: its context limits the sequences.
        tokenizer: of the source.
        data: what `--data` names.
        count: maximum number of sequences.
        calibrate: also choose sequences for calibration.

    Raises:
        InputError: the text is missing, empty, or shorter than a sequence.
    """
    length = min(WINDOW, config.max_position_embeddings)
    if data:
        fraction = 0.5 if calibrate else 0.0
        settings = DataConfig(source=tuple(data), validation_fraction=fraction, sequence_length=length)
    elif source.run is not None:
        settings = source.run.data.model_copy(update={"sequence_length": length, "workers": 0})
    else:
        settings = DataConfig(sequence_length=length)
    samples = None
    if source.run is not None and not data:
        samples = source.run.samples
    try:
        corpus = tokenize_corpus(settings, tokenizer, samples=samples)
    except SequenceLengthError as error:
        raise InputError(
            error.message, f"Name another text with --data: sequences of {length} tokens are measured."
        ) from None
    named = ", ".join(map(shown_name, [settings.validation] if settings.validation else settings.source))
    name = f"held-out part of {named}" if corpus.validation is not None else named
    begin, _ = ids_around_text(tokenizer.backend)
    held_out = corpus.validation or corpus.train
    lengths = torch.from_numpy(tokenizer.token_byte_lengths()).long()
    if settings.is_chat:
        name = f"trained tokens in the {name}" if settings.loss == "all" else f"answers in the {name}"
        conversations = list(_conversations(held_out, length, count))
        if not conversations:
            raise InputError(f"{name}: nothing to measure", "Measure on more with --windows or --data.")
        measured, counted = zip(*conversations, strict=True)
        documents = [torch.full_like(one, number, dtype=torch.long) for number, one in enumerate(counted)]
    else:
        measured = _windows(held_out, length, count, begin)
        counted = tuple(torch.ones(len(window) - 1, dtype=torch.bool) for window in measured)
        numbers = validation_documents(held_out, length, 1, count, tokenizer.end_of_text_id)
        documents = [batch[0] for batch in numbers]
    return Windows(
        name=name,
        measured=measured,
        counted=counted,
        documents=tuple(documents),
        calibration=_windows(corpus.train, length, CALIBRATION_WINDOWS, begin) if calibrate else (),
        token_bytes=F.pad(lengths, (0, config.vocab_size - len(lengths))),
    )


def _conversations(tokens: Mixture, length: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The conversations (T + 1,) in some sequences, and which of their predicted tokens (T,) count."""
    for batch in validation_batches(tokens, length, 1, count):
        window = batch[0].long()
        starts = (window & FIRST).nonzero()[:, 0].tolist()
        for start, end in pairwise([*starts, len(window)]):
            counted = (window[start + 1 : end] & CONTEXT) == 0
            if counted.any():
                yield window[start:end] & IDS, counted


def _windows(tokens: Mixture, length: int, count: int, begin: Sequence[int]) -> tuple[Tensor, ...]:
    """Sequences (T + 1,). The first token of each, which is not predicted, is BOS if the tokenizer has
    one: without BOS such models predict badly, and llama.cpp measures with BOS too.
    """
    batches = validation_batches(tokens, length, 1, count)
    windows = [batch[0].long() & IDS for batch in batches]
    return tuple(torch.cat([window.new_tensor(begin[:1]), window[len(begin[:1]) :]]) for window in windows)
