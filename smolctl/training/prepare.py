"""From a config to weights, tokenizer and tokens: everything that a run needs before its first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from smolctl.config import RunConfig, resolve_run_config
from smolctl.config.data import DataConfig
from smolctl.config.run import MOST_STEPS
from smolctl.data.batches import StepDataset, validation_batches
from smolctl.data.order import ORDER
from smolctl.data.text.corpus import MissingSourceError, iter_texts, open_sources, pin_sources
from smolctl.data.tokenizer.chatml import TURN_END, with_chatml
from smolctl.data.tokenizer.tokenizer import Tokenizer, choose_tokenizer, load_tokenizer
from smolctl.data.tokens.corpus import TokenizedCorpus, TokenizeProgress, tokenize_corpus
from smolctl.durable import named_path
from smolctl.errors import InputError
from smolctl.model.network import Transformer
from smolctl.model.weights import initialize, load_network, require_finite, weights_sha256
from smolctl.runs.events import Listener, Note
from smolctl.sources.base import ModelSource, SourceKind
from smolctl.sources.open import open_source
from smolctl.sources.provenance import provenance_of, reference_of
from smolctl.training.clock import steps_in
from smolctl.training.device import Decisions, decide, require_trainer
from smolctl.training.distributed import with_process_counts
from smolctl.training.loggers import require_packages
from smolctl.training.optim.schedule import require_sense

# Text on which every checkpoint records its loss: takes seconds with a 135M model on a CPU.
RECORDED_SEQUENCES, RECORDED_TOKENS = 8, 256


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start."""

    config: RunConfig  # with steps as whole numbers, and with the model of --init-from, if there is one
    network: Transformer
    tokenizer: Tokenizer
    corpus: TokenizedCorpus
    decisions: Decisions  # for settings that were "auto" in the config
    first_step: int = 0  # number of finished steps
    first_sample: int = 0  # samples used by these steps
    begins_with_origin: bool = False  # at step 0, with the weights of the config's init_from
    reads: tuple[str, ...] = ()  # files, folders and runs that were read

    @property
    def fingerprints(self) -> dict[str, Any]:
        """Identifies the data, its order and the tokenizer; stored in every checkpoint."""
        return {"data": self.corpus.fingerprint, "order": ORDER, "tokenizer": self.tokenizer.sha256}

    @property
    def identity(self) -> dict[str, str | int]:
        """What must be the same in every process of the run."""
        return {**self.fingerprints, "step": self.first_step}

    def dataset(self, rank: int = 0, world_size: int = 1) -> StepDataset:
        """The batches of the steps for one device."""
        config = self.config
        return StepDataset(
            self.corpus.train,
            config.data.sequence_length,
            config.train.batch_size,
            config.data.seed,
            rank,
            world_size,
            self.first_step,
            self.first_sample,
            self.document_end,
        )

    @cached_property
    def held_out(self) -> Tensor:
        """Sequences (at most 8, at most 257 tokens) whose loss every checkpoint records; int32.

        They are held out, or training sequences if nothing is held out.
        """
        length = min(RECORDED_TOKENS, self.config.data.sequence_length)
        source = self.corpus.validation or self.corpus.train
        return next(validation_batches(source, length, RECORDED_SEQUENCES, RECORDED_SEQUENCES)).int()

    @property
    def document_end(self) -> int | None:
        """The token that ends a document for attention, or None if attention crosses documents."""
        return self.tokenizer.end_of_text_id if self.config.data.document_masking else None


def prepare(
    config: RunConfig,
    source: ModelSource | None,
    emit: Listener,
    on_tokenize: Callable[[TokenizeProgress], None] | None = None,
    asked: Mapping[str, Any] | None = None,
) -> Prepared:
    """Read or initialize the weights, choose the tokenizer, tokenize the corpus.

    Args:
        config: of the run.
        source: of the weights, shape and tokenizer from which the run starts; None initializes weights from
            `train.seed`.
        emit: called with a note on every decision.
        on_tokenize: called with the progress of tokenization.
        asked: nested settings that the user gave in addition to the config. A config describes a model from
            scratch, so with a source its model section and its tokenizer to be trained are ignored; explicit
            settings that contradict the weights are refused.

    Raises:
        SmolError: the model, the tokenizer, the trainer or the corpus cannot be used; with the remedy.
    """
    require_packages(config.trainer.loggers)
    config = with_pinned_sources(with_origin(source, config, asked or {}, emit))
    held_out = () if config.data.validation is None else (DataConfig(source=(config.data.validation,)),)
    for data in (config.data, *held_out):
        open_sources(data)  # refuses a missing one before anything takes time
    if config.train.epochs is config.train.minutes is None:  # otherwise the number of steps is not known yet
        config, decisions = _decided(config, emit)
    if source is None:
        tokenizer = _chosen_tokenizer(config, emit)
    else:
        tokenizer = _tokenizer_of(source, config.tokenizer, "tokenizer" in (asked or {}), emit)
    tokenizer.require_fit(config.model.vocab_size)
    config = _with_pinned_tokenizer(config)
    if config.data.is_chat:
        tokenizer = _for_chat(tokenizer, emit)
    if source is None:
        network = initialize(config.model, config.train.seed)
    else:
        emit(Note(f"Weights and architecture from {source.id}; a new optimizer starts at step 0."))
        network = load_network(replace(source, config=config.model), dtype=torch.float32)
        require_finite(network, source)
        assert config.init_from is not None
        origin = config.init_from.model_copy(update={"sha256": weights_sha256(network)})
        config = config.model_copy(update={"init_from": origin})
    if config.train.minutes is not None:
        end = tokenizer.end_of_text_id if config.data.document_masking else None
        config = _with_steps(config, steps_in(config.train.minutes, network, config, end))
        config, decisions = _decided(config, emit)
    samples = config.samples if config.train.epochs is None else None
    corpus = _tokenized(config, tokenizer, samples, emit, on_tokenize)
    if config.train.patience and corpus.validation is None:
        raise InputError(
            f"train.patience {config.train.patience}: no text is held out to validate on",
            "Name one with data.validation, or set a data.validation_fraction.",
        )
    for note in corpus.notes:
        emit(Note(note))
    if config.train.epochs is not None:
        steps = max(1, round(config.train.epochs * len(corpus.train) / config.tokens_per_step))
        if steps > MOST_STEPS:
            raise InputError(
                f"train.epochs {config.train.epochs:g} are {steps:,} steps, more than {MOST_STEPS:,}",
                "Choose fewer epochs.",
            )
        config, decisions = _decided(_with_steps(config, steps), emit)
    reads = tuple(filter(None, (source.id if source else None, config.tokenizer, *config.data.texts)))
    return Prepared(config, _as_trained(network, config), tokenizer, corpus, decisions, reads=reads)


def prepare_again(
    config: RunConfig,
    tokenizer: Tokenizer,
    decisions: Decisions,
    done: int,
    state: Mapping[str, Any],
    emit: Listener,
    on_tokenize: Callable[[TokenizeProgress], None] | None = None,
    has_weights: bool = True,
) -> Prepared:
    """Prepare the run after step `done`; its weights are then read from the checkpoint.

    Args:
        config: of the next steps.
        tokenizer: of the run.
        decisions: for settings that were "auto" in its config.
        done: number of finished steps.
        state: the run's data in the checkpoint: how many samples were used, and where the tokens are.
        emit: called with notes on the cached tokens.
        on_tokenize: called with the progress of tokenization if the cached tokens are missing.
        has_weights: whether the checkpoint has weights; otherwise they are those from which the run started.
    """
    require_packages(config.trainer.loggers)
    require_trainer(config)
    samples = state["samples"] + (config.train.steps - done) * config.train.batch_size
    try:
        corpus = _tokenized(config, tokenizer, samples, emit, on_tokenize, state.get("tokens", ()))
    except MissingSourceError as error:
        raise MissingSourceError(
            error.message, "Put it back, or say where it is now: --set 'data.source=[PATH]'."
        ) from None
    network = initialize(config.model, config.train.seed) if has_weights else _network_of_origin(config)
    network = _as_trained(network, config)
    return Prepared(config, network, tokenizer, corpus, decisions, done, state["samples"], not has_weights)


def _network_of_origin(config: RunConfig) -> Transformer:
    """Read the weights from which a run started again.

    Raises:
        InputError: the model is missing, or its weights have changed.
        HubError: the Hub did not provide it.
    """
    assert config.init_from is not None
    reference = reference_of(config.init_from)
    remedy = "Put it back, or start a new run with train --init-from."
    try:
        source = open_source(reference)
        network = load_network(replace(source, config=config.model), dtype=torch.float32)
    except InputError as error:
        raise InputError(f"the run began with the weights of {reference}: {error.message}", remedy) from None
    if weights_sha256(network) != config.init_from.sha256:
        raise InputError(f"{reference} has other weights now than the run began with", remedy)
    return network


def _decided(config: RunConfig, emit: Listener) -> tuple[RunConfig, Decisions]:
    """The config with steps as whole numbers and without "auto", after a check."""
    config = config.with_whole_steps()
    require_sense(config)
    config, decisions = decide(config, emit)
    config = with_process_counts(config)
    require_trainer(config)
    return config, decisions


def _with_steps(config: RunConfig, steps: int) -> RunConfig:
    """The config with a different number of steps."""
    return config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})


def _for_chat(tokenizer: Tokenizer, emit: Listener) -> Tokenizer:
    """The tokenizer with a chat template: its own, or ChatML."""
    if tokenizer.chat_template is not None:
        return tokenizer
    emit(Note(f"The tokenizer has no chat template: conversations are written in ChatML, with {TURN_END}."))
    return with_chatml(tokenizer)


def _tokenized(
    config: RunConfig,
    tokenizer: Tokenizer,
    samples: int | None,
    emit: Listener,
    on_tokenize: Callable[[TokenizeProgress], None] | None,
    folders: Sequence[str] = (),
) -> TokenizedCorpus:
    return tokenize_corpus(
        config.data, tokenizer, None, on_tokenize, samples, lambda text: emit(Note(text)), folders
    )


def _as_trained(network: Transformer, config: RunConfig) -> Transformer:
    """The network with the config's settings for how it is computed."""
    network.model.checkpoint_activations = config.train.checkpoint_activations
    return network


def with_origin(
    source: ModelSource | None, config: RunConfig, asked: Mapping[str, Any], emit: Listener
) -> RunConfig:
    """The config with the shape of the source's weights, and with the record of their origin.

    Raises:
        InputError: the user set the record or another shape, or the weights are quantized.
    """
    if "init_from" in asked:
        raise InputError("--set init_from: that is a record, not a setting", "Name the model: --init-from.")
    if source is not None:
        _require_unquantized(source)
        model_of = _with_model_of(source, config, asked.get("model") or {})
        return model_of.model_copy(update={"init_from": provenance_of(source)})
    if config.init_from is not None:
        emit(
            Note(
                f"The config belongs to a run that began with the weights of {config.init_from.id}, but this "
                "run begins with new weights. Use --init-from to start from those."
            )
        )
    return config.model_copy(update={"init_from": None})


def _require_unquantized(source: ModelSource) -> None:
    """Refuse quantized weights: the model from which they were made has what rounding lost.

    Raises:
        InputError: naming that model if it is known.
    """
    if source.kind is not SourceKind.QUANTIZED:
        return
    made = source.quantization or {}
    origin = made.get("source") or {}
    step = "" if origin.get("step") is None or "@" in origin["id"] else f"@{origin['step']}"
    raise InputError(
        f"--init-from {source.id}: these weights are quantized ({made.get('scheme')}), and training would "
        "start from their rounding errors",
        f"Start from the model that was quantized: --init-from {origin.get('id', 'MODEL')}{step}.",
    )


def _with_model_of(source: ModelSource, config: RunConfig, asked: Mapping[str, Any]) -> RunConfig:
    """The config with the source's shape; only dropout comes from the config.

    Raises:
        InputError: the user set another shape.
    """
    source.require_weights()
    model = source.require_config().model_copy(update={"attention_dropout": config.model.attention_dropout})
    for key in asked:
        theirs, wanted = getattr(model, key), getattr(config.model, key)
        if theirs != wanted:
            raise InputError(
                f"--set model.{key}={wanted} contradicts the weights of {source.id}: they have {theirs}",
                "Leave it out, or train from scratch without --init-from.",
            )
    values = {**config.model_dump(), "model": model.model_dump()}
    return resolve_run_config(values, origin=f"--init-from {source.id}")


def with_pinned_sources(config: RunConfig) -> RunConfig:
    """The config with sources that mean the same after a resume, also from another folder."""
    data = config.data
    held_out = None if data.validation is None else pin_sources([data.validation])[0]
    pinned = data.model_copy(update={"source": pin_sources(data.source), "validation": held_out})
    return config.model_copy(update={"data": pinned})


def _with_pinned_tokenizer(config: RunConfig) -> RunConfig:
    """The config with a tokenizer that is an absolute path, a Hub id or train:N."""
    path = named_path(config.tokenizer or "")
    is_path = config.tokenizer is not None and path.exists()
    return config.model_copy(update={"tokenizer": str(path.absolute())}) if is_path else config


def _chosen_tokenizer(config: RunConfig, emit: Listener) -> Tokenizer:
    return choose_tokenizer(
        config.tokenizer,
        lambda: iter_texts(config.data),
        config.model.vocab_size,
        lambda text: emit(Note(text)),
    )


def _tokenizer_of(source: ModelSource, name: str | None, is_asked: bool, emit: Listener) -> Tokenizer:
    """The tokenizer of the weights, or a named one in which the ids mean the same.

    Args:
        source: of the weights.
        name: the config's tokenizer.
        is_asked: whether the user named it in addition to the config.
        emit: called with a note if the config's tokenizer is not used.

    Raises:
        InputError: the weights have no tokenizer and none is named, or a different one was requested.
    """
    files = source.read_tokenizer()
    own = None if files is None else Tokenizer.from_files(files, source.id)
    is_new = (name or "").startswith("train:")
    if own is not None and is_new and not is_asked:
        emit(Note(f"The tokenizer is that of {source.id}; the config's own, {name}, is for new models."))
        return own
    if own is not None and name is None:
        return own
    if name is None or (own is None and is_new):
        raise InputError(
            f"--init-from {source.id}: these weights come without a tokenizer",
            "Name the one that they were trained with: --tokenizer with a Hub id, folder or file.",
        )
    other = None if is_new else load_tokenizer(name)
    if other is None or (own is not None and not _agree(own, other)):
        raise InputError(
            f"tokenizer {name}: its ids mean other tokens than those {source.id} was trained with",
            "Leave the tokenizer out: the weights have their own. Or train from scratch without --init-from.",
        )
    return other


def _agree(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether every id that two tokenizers share has the same token in both."""
    pairs = zip(one.token_bytes, other.token_bytes, strict=False)
    return all(a == b or not a or not b for a, b in pairs)
