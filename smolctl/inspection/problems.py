"""Problems of a model or its recipe, and notes on it."""

from __future__ import annotations

from collections.abc import Iterator

from smolctl.config import ModelConfig, RunConfig
from smolctl.errors import InputError
from smolctl.inspection.stored import INTEGERS
from smolctl.sources.base import ModelSource, SourceKind
from smolctl.sources.gguf.header import K_BLOCK
from smolctl.sources.huggingface.tokenizer import token_ids
from smolctl.sources.shapes import check_tensors

# Number types that are not weights unless a format defines them.
NO_WEIGHTS = {*INTEGERS, "C64", "complex64", "complex128"}


def find_problems(source: ModelSource) -> tuple[str, ...]:
    """Everything that needs a correction or will fail; empty for a model without problems."""
    if source.config is None:
        return (*source.problems, source.unsupported)
    # Sources report problems found while reading; only the others are added here.
    tensors = check_tensors(source.config, source.tensors) if source.tensors is not None else ()
    recipe = () if source.run is None else _recipe_problems(source.run)
    of_model = (*_weight_problems(source), *_model_problems(source.config), *_tokenizer_problems(source))
    return tuple(dict.fromkeys((*source.problems, *tensors, *of_model, *recipe)))


def find_notes(source: ModelSource) -> tuple[str, ...]:
    """Facts that are not problems but may be surprising."""
    config = source.config
    if config is None:
        return ()
    notes = []
    if source.kind in (SourceKind.PRESET, SourceKind.CONFIG) and not source.declared:
        notes.append("no model section: `train` uses the model of --init-from; the default model is shown")
    if config.pad_token_id is None:
        notes.append("no pad token: none is needed, smolctl trains on full sequences")
    if not config.eos_token_ids:
        notes.append("no eos token: generation ends at --max-tokens only")
    if config.needs_own_code:
        notes.append(
            "learned positions or scaled residual branches: transformers has no class for them, "
            "so other tools need the code that `push` adds"
        )
    if source.run is not None:
        notes += _recipe_notes(source.run)
    return tuple(notes)


def _weight_problems(source: ModelSource) -> Iterator[str]:
    if source.quantization is not None:
        return
    no_weights = [one.name for one in source.tensors or () if one.dtype in NO_WEIGHTS]
    if no_weights:
        yield (
            f"{no_weights[0]} is the first of {len(no_weights):,} tensors that contain integers or complex "
            "numbers, and nothing says how to convert them to weights"
        )


def _model_problems(config: ModelConfig) -> Iterator[str]:
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, key)
        for token in value if isinstance(value, tuple) else (value,):
            if token is not None and not 0 <= token < config.vocab_size:
                yield f"{key} {token} is outside the vocabulary of {config.vocab_size:,}"
    for key in ("hidden_size", "intermediate_size"):
        size = getattr(config, key)
        if size % K_BLOCK and not config.needs_own_code:  # which llama.cpp does not run at all
            yield (
                f"{key} {size:,} is not a multiple of {K_BLOCK}: no K-quants (Q4_K and the like) in "
                "llama.cpp for rows of this length; Q8_0, Q5_0, Q4_0 and similar types work"
            )


def _tokenizer_problems(source: ModelSource) -> Iterator[str]:
    if source.config is None or source.kind is SourceKind.HUB:  # on the Hub this would need a download
        return
    try:
        files = source.read_tokenizer()
        ids = token_ids(files.tokenizer_json, source.id).values() if files else ()
    except InputError as error:
        yield f"tokenizer: {error.message}"
        return
    if files is None:
        return
    vocab, size = source.config.vocab_size, max(ids, default=-1) + 1
    if size > vocab:
        yield f"the tokenizer's ids reach {size - 1:,}, the model's vocabulary ends at {vocab - 1:,}"
    for key in ("bos_token_id", "eos_token_id"):
        theirs, ours = getattr(files, key), getattr(source.config, key)
        known = ours if isinstance(ours, tuple) else (ours,)
        if theirs is not None and ours is not None and theirs not in known:
            yield f"{key}: the config says {ours}, the tokenizer {theirs}"


def _recipe_problems(run: RunConfig) -> Iterator[str]:
    whole = run.with_whole_steps()
    steps, warmup = whole.train.steps, whole.schedule.warmup_steps
    if warmup >= steps:
        yield (
            f"schedule.warmup_steps {warmup:,} is not below train.steps {steps:,}: the learning rate never "
            f"stays at its peak"
        )
    yield from whole.schedule_contradictions()


def _recipe_notes(run: RunConfig) -> Iterator[str]:
    whole = run.with_whole_steps()
    steps, schedule = whole.train.steps, whole.schedule
    if schedule.name == "constant" or schedule.decay_start is None:
        return
    if schedule.decay_start >= steps:
        yield (
            f"the learning rate does not fall within {steps:,} steps: "
            f"the decay starts after step {schedule.decay_start:,}"
        )
    elif schedule.decay_start + int(schedule.decay_steps) > steps:
        end = schedule.decay_start + int(schedule.decay_steps)
        yield f"the learning rate does not reach its end in {steps:,} steps: the decay ends at step {end:,}"
