"""The section `data` of a run's YAML file: the sources of its tokens."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from smolctl.config.model import Name, Section


class DataConfig(Section):
    """Where the tokens come from."""

    source: tuple[Name, ...] = Field(
        ("python",),
        description="'python' (embedded), files, folders, or Hub datasets org/name[@revision][:config]",
    )
    weights: tuple[float, ...] | None = Field(
        None, description="relative share of the samples from each source; null: sources are concatenated"
    )
    text_field: Name | tuple[Name, ...] = Field(
        "text",
        description="column that holds the text in JSON, CSV, Parquet and Hub datasets; or one per source",
    )
    split: Name | tuple[Name, ...] = Field(
        "train", description="split of a Hub dataset, such as train_sft; or one per source"
    )
    format: Literal["text", "chat"] = Field("text", description="text: documents; chat: conversations")
    shape: Literal["auto", "messages", "sharegpt", "completion", "instruction"] = Field(
        "auto", description="layout of a conversation's row; auto: detected from its field names"
    )
    loss: Literal["assistant", "completion", "all"] = Field(
        "assistant",
        description="tokens that are trained on. assistant: all answers; completion: the answer to the row's "
        "prompt, or the last answer; all: every token",
    )
    too_long: Literal["start", "end", "drop"] = Field(
        "start", description="part to keep of a conversation that is longer than a sequence; drop: skip it"
    )
    strict: bool = Field(
        False, description="stop at a row that is not a conversation, instead of skipping it"
    )
    special_tokens: Literal["text", "tokens"] = Field(
        "text",
        description="how <|endoftext|> and the like in the text are read: as text, or as control tokens",
    )
    sequence_length: int = Field(1_024, gt=0, description="tokens per sequence")
    document_masking: bool = Field(False, description="each token attends to its own document only")
    validation_fraction: float = Field(
        0.01, ge=0, lt=1, description="share of the documents to hold out for validation"
    )
    validation: Name | None = Field(
        None, description="file, folder or Hub dataset to validate on, instead of a share of the source"
    )
    seed: int = Field(8, ge=0, lt=2**63, description="seed of the order of the sequences")
    workers: int = Field(
        0, ge=0, description="threads that prefetch batches; the batches do not depend on it"
    )

    @property
    def is_chat(self) -> bool:
        """Whether the rows are conversations."""
        return self.format == "chat"

    @property
    def texts(self) -> tuple[str, ...]:
        """All sources, including the held-out file."""
        return (*self.source, *filter(None, (self.validation,)))

    @model_validator(mode="before")
    @classmethod
    def _one_source_is_a_list(cls, values: object) -> object:
        if isinstance(values, dict) and isinstance(values.get("source"), str):
            return {**values, "source": (values["source"],)}
        return values

    @model_validator(mode="after")
    def _one_for_each_source(self) -> DataConfig:
        for name in ("text_field", "split"):
            given = getattr(self, name)
            if isinstance(given, tuple) and len(given) != len(self.source):
                raise ValueError(
                    f"{name} has {len(given)} entries for {len(self.source)} sources; give one for each"
                )
        return self

    @model_validator(mode="after")
    def _weights_fit_the_sources(self) -> DataConfig:
        weights = self.weights
        if weights is None:
            return self
        if len(weights) != len(self.source):
            raise ValueError(f"{len(weights)} weights for {len(self.source)} sources; give one for each")
        if min(weights) <= 0:
            raise ValueError(
                "every weight must be above 0; to leave a source out, remove it from data.source"
            )
        if min(weights) < sum(weights) / 1_000:
            raise ValueError("every weight must be at least a thousandth of their sum")
        return self

    @property
    def text_fields(self) -> tuple[str, ...]:
        """The text field of each source."""
        return self._of_each(self.text_field)

    @property
    def splits(self) -> tuple[str, ...]:
        """The split of each source; files have none."""
        return self._of_each(self.split)

    def _of_each(self, value: str | tuple[str, ...]) -> tuple[str, ...]:
        return (value,) * len(self.source) if isinstance(value, str) else value

    def one_by_one(self) -> tuple[DataConfig, ...]:
        """One config for each source."""
        of_each = zip(self.source, self.text_fields, self.splits, strict=True)
        return tuple(
            self.model_copy(
                update={"source": (name,), "weights": None, "text_field": (field,), "split": (split,)}
            )
            for name, field, split in of_each
        )
