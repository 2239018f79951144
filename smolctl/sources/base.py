"""`ModelSource`, to which every MODEL argument is opened: headers immediately, weights on request."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from smolctl.config import ModelConfig, RunConfig
from smolctl.config.model import TokenId
from smolctl.errors import InputError
from smolctl.runs.folder import RunFolder
from smolctl.runs.reference import split_step
from smolctl.runs.root import LATEST, RUNS, latest_run

if TYPE_CHECKING:
    import torch

    from smolctl.sources.arrays import Array
    from smolctl.sources.quantized.scaled import StoredTensor

# For a recipe with sequences longer than its model's context, which can be inspected anyway.
WITH_WEIGHTS = "Name a run, a checkpoint, a folder, a GGUF or a Hub id; `smolctl train` makes a run."
NO_RECIPE = "no recipe for train"
DAMAGED = "Download or copy the file again: it is damaged or not complete."


class SourceKind(StrEnum):
    """The kinds of MODEL, detected by content."""

    PRESET = "preset"
    CONFIG = "config"  # smolctl's YAML
    NANOTRON = "nanotron"  # a nanotron training YAML
    HUB = "hub"
    FOLDER = "folder"  # a Hugging Face folder, or its config.json
    SAFETENSORS = "safetensors"
    GGUF = "gguf"
    CHECKPOINT = "checkpoint"
    RUN = "run"
    QUANTIZED = "quantized"  # a folder that `quantize` wrote, or its `_quantized.ckpt`


@dataclass(frozen=True)
class TensorHeader:
    """One tensor as a header declares it."""

    name: str  # Hugging Face name if the architecture is known, else the file's own name
    shape: tuple[int, ...]
    dtype: str  # as in the file: "F32", "BF16", "Q4_1"
    bytes: int  # size in the file
    shares: str = ""  # an earlier tensor that has the same data, in files that store ties

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as plain data, before a library parses it."""

    tokenizer_json: str  # the text of a tokenizer.json
    chat_template: str | None = None
    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | None = None
    pad_token_id: TokenId | None = None
    end_token_ids: tuple[TokenId, ...] = ()  # all ids at which the source declares that text ends
    # Special tokens under the names that chat templates use, such as bos_token; None: derived from the ids.
    named_tokens: Mapping[str, str] | None = None
    # Sampling settings recommended by the model's authors, under the names of generation_config.json, as
    # found.
    recommended: Mapping[str, Any] = field(default_factory=dict)
    # Other files of the tokenizer and of the generation settings by name, copied unchanged into exports.
    carried: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class RecordedLoss:
    """The loss that a run recorded for a checkpoint's weights; an export must reproduce it."""

    tokens: torch.Tensor  # int32 (N, T + 1): held-out sequences
    loss: float  # mean cross entropy in nats per token, computed in float32
    document_end: int | None = None  # the token that ends a document for attention


class Weights(ABC):
    """Access to the tensors behind a header. Nothing is read before it is requested."""

    @abstractmethod
    def stored(self) -> Iterator[tuple[str, StoredTensor]]:
        """Yield every tensor under its Hugging Face name in its stored form, without PyTorch.

        Raises:
            InputError: the file is truncated or damaged.
        """

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of `stored` for PyTorch: in float32, or in their own types if all are floats."""
        from smolctl.sources.arrays import as_tensor
        from smolctl.sources.quantized.scaled import dense

        for name, item in self.stored():
            yield name, as_tensor(dense(item))


class ArrayWeights(Weights):
    """Tensors of floats, which PyTorch gets in their own types too."""

    @abstractmethod
    def stored(self) -> Iterator[tuple[str, Array]]: ...

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        from smolctl.sources.arrays import as_tensor

        return ((name, as_tensor(array)) for name, array in self.stored())


class StateWeights(Weights):
    """Tensors that are already in memory or memory-mapped."""

    def __init__(self, state: Mapping[str, torch.Tensor | StoredTensor]) -> None:
        self.state = state

    def stored(self) -> Iterator[tuple[str, StoredTensor]]:
        import torch

        from smolctl.sources.arrays import as_array

        for name, item in self.state.items():
            yield name, as_array(item) if isinstance(item, torch.Tensor) else item

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        import torch

        from smolctl.sources.arrays import as_tensor
        from smolctl.sources.quantized.scaled import dense

        for name, item in self.state.items():
            yield name, item if isinstance(item, torch.Tensor) else as_tensor(dense(item))


@dataclass(frozen=True)
class ModelSource:
    """A model named by the user."""

    kind: SourceKind
    id: str  # as the user named it
    config: ModelConfig | None  # None if smolctl's network cannot represent the model
    unsupported: str = ""  # why config is None; names the feature
    shape: ModelConfig | None = None  # of equal size and cost, for a model that cannot be run
    revision: str | None = None  # commit on the Hub
    bytes_fetched: int = 0  # over the network
    declared: Mapping[str, Any] = field(default_factory=dict)  # the config in the source's own keys
    card: Mapping[str, Any] = field(default_factory=dict)  # metadata of its model card: license, base model
    recovered_from_shapes: bool = False  # there was no config; it was derived from the tensors
    tensors: tuple[TensorHeader, ...] | None = None  # None if the source has no weights
    missing_parts: str = ""  # missing files of a model that is split into several
    run: RunConfig | None = None  # the training recipe, if the source has one
    problems: tuple[str, ...] = ()  # anything unusual about it, for people
    assumptions: tuple[str, ...] = ()  # values of the config that are in no file; also among the problems
    step: int | None = None  # optimizer steps of a checkpoint
    weights: Weights | None = None
    quantization: Mapping[str, Any] | None = None  # quantization.json of a quantized model
    recorded_loss: RecordedLoss | None = None  # for a checkpoint written by a run
    # Called by `read_tokenizer`; None if the source has no tokenizer.
    tokenizer_reader: Callable[[], TokenizerFiles | None] | None = field(default=None, repr=False)

    def read_tokenizer(self) -> TokenizerFiles | None:
        """Read the model's tokenizer; None if there is none.

        Raises:
            InputError: its files are damaged, or of a kind that cannot be read.
        """
        return self.tokenizer_reader() if self.tokenizer_reader else None

    def require_tokenizer(self, remedy: str = "Put its tokenizer.json there.") -> TokenizerFiles:
        """Read the model's tokenizer, which must exist.

        Args:
            remedy: what to do if there is none.

        Raises:
            InputError: there is none, or its files are damaged or of a kind that cannot be read.
        """
        files = self.read_tokenizer()
        if files is None:
            raise InputError(f"{self.id}: there is no tokenizer beside the weights", remedy)
        return files

    @property
    def run_folder(self) -> RunFolder | None:
        """The folder of the run that the model is. `runs/latest` is resolved like `latest_run`."""
        if self.kind is not SourceKind.RUN:
            return None
        path, _ = split_step(self.id)
        return RunFolder.open(latest_run() if path == RUNS / LATEST else path)

    def require_config(self) -> ModelConfig:
        """The config, or an error with the reason why smolctl's network cannot represent the model.

        Raises:
            InputError: the model cannot be represented.
        """
        if self.config is None:
            raise InputError(
                f"{self.id}: {self.unsupported}",
                "smolctl runs Llama, Mistral, SmolLM3, Qwen2 and Qwen3; count-params counts this one too.",
            )
        return self.config

    def require_certainty(self, accept_guesses: bool) -> None:
        """Check that every value of the config was read from a file, before something permanent is made of
        the model.

        Raises:
            InputError: some values were assumed, and the user has not accepted that.
        """
        if self.assumptions and not accept_guesses:
            raise InputError(
                f"{self.id}: its config is incomplete: {'; '.join(self.assumptions)}",
                "Put the model's config.json beside the file, or accept this with --accept-guesses.",
            )

    def require_weights(self) -> Weights:
        """The weights, or an error that explains why this source has none."""
        if self.weights is None:
            is_run = self.kind in (SourceKind.RUN, SourceKind.CHECKPOINT)
            reason = self.missing_parts or (self.problems[0] if is_run and self.problems else "")
            raise InputError(
                f"{self.id}: a {self.kind.value} has no weights{': ' if reason else ''}{reason}",
                WITH_WEIGHTS,
            )
        return self.weights
