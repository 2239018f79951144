"""A report on one model, without its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from smolctl.arithmetic import (
    BYTES_PER_VALUE,
    DTYPE_OF_PRECISION,
    TRAINING_DTYPES,
    ParameterCount,
    TrainingMemory,
    count_parameters,
    forward_flops_per_token,
    kv_cache_bytes_per_token,
    run_memory,
    training_flops_per_token,
)
from smolctl.config import ModelConfig, Provenance, RunConfig
from smolctl.errors import InputError, UsageError
from smolctl.inspection.parameters import NothingToCountError, ParameterReport, count_source, parameters_in
from smolctl.inspection.problems import find_notes, find_problems
from smolctl.sources.base import NO_RECIPE, ModelSource, SourceKind
from smolctl.sources.huggingface.tokenizer import added_token_ids, token_ids
from smolctl.sources.provenance import provenance_of
from smolctl.sources.stops import stop_token_ids

# Default without a command-line value or a recipe: one sequence of at most this many tokens.
DEFAULT_SEQUENCE_LENGTH = 2_048


@dataclass(frozen=True)
class MemoryPlan:
    """Training memory, and the sizes for which it was computed."""

    batch_size: int  # sequences in memory at once
    sequence_length: int
    dtype: str
    bytes: TrainingMemory
    optimizer: str  # whose state is included


@dataclass(frozen=True)
class Derived:
    """Figures derived from a config."""

    parameters: ParameterCount
    head_dim: int
    gqa_ratio: int  # query heads per key/value head
    kv_cache_bytes_per_token: Mapping[str, int]  # by dtype
    forward_flops_per_token: int  # at the plan's sequence length
    training_flops_per_token: int
    memory: MemoryPlan


@dataclass(frozen=True)
class RecipeFacts:
    """Figures derived from a training recipe."""

    run: RunConfig
    tokens_per_step: int
    total_tokens: int
    tokens_per_parameter: float
    training_flops: int  # of the whole run


@dataclass(frozen=True)
class CheckpointFacts:
    """Figures from a header."""

    tensors: int
    parameters: int | None  # of the network; None if some are packed in an unknown way
    bytes: int
    dtypes: Mapping[str, int]  # number of tensors of each
    matches: bool | None  # the config; None if smolctl cannot represent the model


@dataclass(frozen=True)
class ModelReport:
    """The contents of `inspect-config`."""

    source: ModelSource
    derived: Derived | None  # None if smolctl cannot compute its costs
    parameters: ParameterReport | None  # None if there is nothing to count
    recipe: RecipeFacts | None
    checkpoint: CheckpointFacts | None
    provenance: Provenance | None  # of the weights; None if there are none
    stops: Mapping[int, str | None]  # tokens at which an answer ends, with their text
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def inspect(
    source: ModelSource,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    dtype: str | None = None,
) -> ModelReport:
    """Inspect a model.

    Args:
        source: any MODEL.
        batch_size: sequences in memory at once, for the memory table; None: the recipe's, else 1.
        sequence_length: tokens per sequence; None: the recipe's, else the context up to 2,048.
        dtype: a key of `TRAINING_DTYPES`; None: the recipe's precision, else float32.

    Raises:
        UsageError: a size or dtype that is not valid.
    """
    count = _count(source)
    return ModelReport(
        source=source,
        derived=_derive(source, batch_size, sequence_length, dtype),
        parameters=count,
        recipe=_recipe(source.run) if source.run is not None else None,
        checkpoint=_checkpoint(source, count),
        provenance=provenance_of(source) if source.weights is not None else None,
        stops=_stops(source),
        problems=find_problems(source),
        notes=find_notes(source),
    )


def _count(source: ModelSource) -> ParameterReport | None:
    with suppress(NothingToCountError):
        return count_source(source)
    return None


def _stops(source: ModelSource) -> dict[int, str | None]:
    """Tokens at which an answer ends; only from the config if the tokenizer would have to be downloaded or
    cannot be read.
    """
    if source.config is None:
        return {}
    files = None
    with suppress(InputError):  # reported by `find_problems`
        files = source.read_tokenizer() if source.kind is not SourceKind.HUB else None
    if files is None:
        return dict.fromkeys(source.config.eos_token_ids)
    added = added_token_ids(files.tokenizer_json, source.id)
    named = {*files.end_token_ids, *(() if files.eos_token_id is None else (files.eos_token_id,))}
    stops = stop_token_ids(source.config, named, {token_id: token for token, token_id in added.items()})
    spelled = {token_id: token for token, token_id in token_ids(files.tokenizer_json, source.id).items()}
    return {token_id: spelled.get(token_id) for token_id in sorted(stops)}


def _derive(
    source: ModelSource, batch_size: int | None, sequence_length: int | None, dtype: str | None
) -> Derived | None:
    config, run = source.config or source.shape, source.run
    if config is None:
        return None
    context = config.max_position_embeddings
    if run is not None:
        batch_size = batch_size or run.micro_batch_size
        sequence_length = sequence_length or run.data.sequence_length
        dtype = dtype or DTYPE_OF_PRECISION[run.train.precision]
    batch_size = batch_size or 1
    sequence_length = sequence_length or min(context, DEFAULT_SEQUENCE_LENGTH)
    dtype = dtype or "float32"
    if dtype not in TRAINING_DTYPES:
        raise UsageError(f"--dtype {dtype} is not known", f"One of {', '.join(TRAINING_DTYPES)}.")
    if sequence_length > context:
        raise UsageError(
            f"--sequence-length {sequence_length} does not fit the model's context of {context}",
            f"At most {context}.",
        )
    sizes = (batch_size, sequence_length, dtype)
    recipe = _recipe_of(source, config)
    return Derived(
        parameters=count_parameters(config),
        head_dim=config.head_dim,
        gqa_ratio=config.num_attention_heads // config.num_key_value_heads,
        kv_cache_bytes_per_token={name: kv_cache_bytes_per_token(config, name) for name in BYTES_PER_VALUE},
        forward_flops_per_token=forward_flops_per_token(config, sequence_length),
        training_flops_per_token=training_flops_per_token(config, sequence_length),
        memory=MemoryPlan(*sizes, run_memory(recipe, *sizes), recipe.optimizer.name),
    )


def _recipe(run: RunConfig) -> RecipeFacts:
    tokens = run.train.steps * run.tokens_per_step
    return RecipeFacts(
        run=run,
        tokens_per_step=run.tokens_per_step,
        total_tokens=tokens,
        tokens_per_parameter=tokens / count_parameters(run.model).unique,
        training_flops=tokens * training_flops_per_token(run.model, run.data.sequence_length),
    )


def _checkpoint(source: ModelSource, count: ParameterReport | None) -> CheckpointFacts | None:
    if source.tensors is None or count is None:
        return None
    return CheckpointFacts(
        tensors=len(source.tensors),
        parameters=parameters_in(source),
        bytes=sum(tensor.bytes for tensor in source.tensors),
        dtypes=dict(Counter(tensor.dtype for tensor in source.tensors).most_common()),
        matches=count.agrees,
    )


def training_config(source: ModelSource) -> RunConfig:
    """A complete recipe for a source: its own, or the defaults with its model.

    Raises:
        InputError: smolctl cannot represent the model, or cannot run its recipe.
    """
    config = source.require_config()
    refused = next((problem for problem in source.problems if problem.endswith(NO_RECIPE)), "")
    if refused:
        raise InputError(
            f"{source.id}: {refused}", "Shorten the sequences, or lengthen the context, in the file."
        )
    return _recipe_of(source, config)


def _lasting(model: str) -> str:
    """A MODEL in a form that is valid in a file in another folder."""
    path = Path(model)
    return str(path.absolute()) if path.exists() else model


def _recipe_of(source: ModelSource, model: ModelConfig) -> RunConfig:
    if source.run is not None:
        return source.run
    defaults = RunConfig()
    length = min(defaults.data.sequence_length, model.max_position_embeddings)
    return defaults.model_copy(
        update={
            "model": model,
            "data": defaults.data.model_copy(update={"sequence_length": length}),
            "tokenizer": _lasting(source.id) if source.tokenizer_reader is not None else None,
        }
    )
