"""What every kind of MODEL argument becomes: headers now, weights only when asked."""

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

# Of a recipe whose sequences are longer than the context of its model, which is described all the same.
NO_RECIPE = "no recipe for train"
DAMAGED = "Download or copy the file again: it is damaged or not complete."


class SourceKind(StrEnum):
    """The kinds of MODEL, distinguished by content."""

    PRESET = "preset"
    CONFIG = "config"  # our YAML
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

    name: str  # Hugging Face name where the architecture is known, else the file's own
    shape: tuple[int, ...]
    dtype: str  # as the file names it: "F32", "BF16", "Q4_1"
    bytes: int  # size in the file
    shares: str = ""  # the tensor before it whose numbers these are, in files that keep such ties

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as plain data, before any library has read it."""

    tokenizer_json: str  # the text of a tokenizer.json
    chat_template: str | None = None
    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | None = None
    pad_token_id: TokenId | None = None
    end_token_ids: tuple[TokenId, ...] = ()  # every id at which the source says that text ends
    # Special tokens by the names that chat templates know them by, such as bos_token; None: those of the ids.
    named_tokens: Mapping[str, str] | None = None
    # What the model's makers recommend for sampling, by the names of generation_config.json, as it was found.
    recommended: Mapping[str, Any] = field(default_factory=dict)
    # Other files of the tokenizer and of the generation settings by their names, for exports: as they were.
    carried: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class RecordedLoss:
    """What a run recorded of a checkpoint's weights: whoever exports them must find the same loss."""

    tokens: torch.Tensor  # int32 (N, T + 1): sequences that were held out
    loss: float  # mean cross entropy in nats per token, computed in float32
    document_end: int | None = None  # the token that attention does not cross


class Weights(ABC):
    """Access to the tensors behind a header. Nothing is read before it is asked for."""

    @abstractmethod
    def stored(self) -> Iterator[tuple[str, StoredTensor]]:
        """Every tensor under its Hugging Face name as it is stored, one at a time, without PyTorch.

        Raises:
            InputError: the file is truncated or damaged.
        """

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of `stored` for PyTorch: in float32, or in their own types where all are floats."""
        from smolctl.sources.arrays import as_tensor
        from smolctl.sources.quantized.scaled import dense

        for name, item in self.stored():
            yield name, as_tensor(dense(item))


class ArrayWeights(Weights):
    """Tensors of floats, in their own types for PyTorch too."""

    @abstractmethod
    def stored(self) -> Iterator[tuple[str, Array]]: ...

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        from smolctl.sources.arrays import as_tensor

        return ((name, as_tensor(array)) for name, array in self.stored())


class StateWeights(Weights):
    """Tensors that are in memory, or mapped into it, already."""

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
    """A model that somebody named on the command line."""

    kind: SourceKind
    id: str  # as the user named it
    config: ModelConfig | None  # None when this network cannot represent the model
    unsupported: str = ""  # why config is None, naming the feature
    shape: ModelConfig | None = None  # a network with the parameters and costs of one that cannot be run
    revision: str | None = None  # commit on the Hub
    bytes_fetched: int = 0  # over the network
    declared: Mapping[str, Any] = field(default_factory=dict)  # the config as the source spells it
    card: Mapping[str, Any] = field(default_factory=dict)  # metadata of its model card: licence, base model
    recovered_from_shapes: bool = False  # no config was found; it was derived from the tensors
    tensors: tuple[TensorHeader, ...] | None = None  # None when the source has no weights
    missing_parts: str = ""  # which files of the model do not lie beside this one
    run: RunConfig | None = None  # the training recipe, where the source has one
    problems: tuple[str, ...] = ()  # what is odd about it, for a person to read
    assumptions: tuple[str, ...] = ()  # values of the config that no file says; among the problems too
    step: int | None = None  # optimizer steps behind a checkpoint
    weights: Weights | None = None
    quantization: Mapping[str, Any] | None = None  # quantization.json, of a quantized model
    recorded_loss: RecordedLoss | None = None  # of a checkpoint that a run wrote
    # Called by `read_tokenizer`; None when the source carries no tokenizer.
    tokenizer_reader: Callable[[], TokenizerFiles | None] | None = field(default=None, repr=False)

    def read_tokenizer(self) -> TokenizerFiles | None:
        """The tokenizer that travels with the model, read now; None when there is none.

        Raises:
            InputError: its files are damaged or of a kind that cannot be read.
        """
        return self.tokenizer_reader() if self.tokenizer_reader else None

    def require_tokenizer(self, remedy: str = "Put its tokenizer.json there.") -> TokenizerFiles:
        """The tokenizer that travels with the model, read now.

        Args:
            remedy: what to do where there is none.

        Raises:
            InputError: there is none, or its files are damaged or of a kind that cannot be read.
        """
        files = self.read_tokenizer()
        if files is None:
            raise InputError(f"{self.id}: there is no tokenizer beside the weights", remedy)
        return files

    @property
    def run_folder(self) -> RunFolder | None:
        """The folder of the run that the model is. `runs/latest` is found as `latest_run` finds it."""
        if self.kind is not SourceKind.RUN:
            return None
        path, _ = split_step(self.id)
        return RunFolder.open(latest_run() if path == RUNS / LATEST else path)

    def require_config(self) -> ModelConfig:
        """The config, or the reason why this network cannot stand in for the model.

        Raises:
            InputError: the model is not representable.
        """
        if self.config is None:
            raise InputError(
                f"{self.id}: {self.unsupported}",
                "smolctl runs Llama, Mistral, SmolLM3, Qwen2 and Qwen3; count-params counts this one too.",
            )
        return self.config

    def require_certainty(self, accept_guesses: bool) -> None:
        """Check that every value of the config was read, before something lasting is made of the model.

        Raises:
            InputError: some were assumed, and the user has not accepted that.
        """
        if self.assumptions and not accept_guesses:
            raise InputError(
                f"{self.id}: its config is incomplete: {'; '.join(self.assumptions)}",
                "Put the model's config.json beside the file, or accept this with --accept-guesses.",
            )

    def require_weights(self) -> Weights:
        """The weights, or an error that says that this source has none, and why."""
        if self.weights is None:
            is_run = self.kind in (SourceKind.RUN, SourceKind.CHECKPOINT)
            reason = self.missing_parts or (self.problems[0] if is_run and self.problems else "")
            raise InputError(
                f"{self.id}: a {self.kind.value} has no weights{': ' if reason else ''}{reason}",
                "Name a run, a checkpoint, a folder, a GGUF or a Hub id; `smolctl train` makes a run.",
            )
        return self.weights
