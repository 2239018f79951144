"""The record of a model from which others were made."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Literal

from pydantic import Field, model_validator

from smolctl.config.model import Section

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


class Provenance(Section):
    """The origin of weights, as known when they were used."""

    id: str = Field(description="org/name on the Hub, or an absolute path")
    kind: Literal["hub", "local"] = Field(description="whether the id is on the Hub or a path")
    revision: str | None = Field(None, description="branch or tag on the Hub, if one was named")
    commit: str | None = Field(None, description="commit on the Hub from which the weights were loaded")
    step: int | None = Field(None, description="step of the run, if it is one")
    sha256: str | None = Field(
        None, description="SHA-256 of its weights in float32, if a run began with them"
    )
    license: str | None = Field(None, description="license that its card or its config states")
    assumed: tuple[str, ...] = Field((), description="config values that no file states")
    made_from: Provenance | None = Field(None, description="the model that it was made from")

    @model_validator(mode="after")
    def _is_a_name_on_the_hub(self) -> Provenance:
        if self.kind == "hub" and not HUB_NAME.fullmatch(self.id):
            raise ValueError(f"{self.id} is not an org/name")
        return self

    @property
    def chain(self) -> tuple[Provenance, ...]:
        """This model, its own origin, and so on."""
        return (self, *(self.made_from.chain if self.made_from else ()))

    @property
    def on_hub(self) -> Provenance | None:
        """The nearest model of the chain that is on the Hub."""
        return next((one for one in self.chain if one.kind == "hub"), None)

    def public(self) -> Provenance:
        """A copy for publication: paths of this machine are reduced to their last part."""
        name = self.id if self.kind == "hub" else PurePath(self.id).name
        return self.model_copy(update={"id": name, "made_from": self.made_from and self.made_from.public()})
