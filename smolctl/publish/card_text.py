"""The generated part of a model card: its metadata, and the text of card.md.jinja."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from smolctl import __version__
from smolctl.config import ModelConfig, Provenance
from smolctl.data.text import python_library
from smolctl.data.text.hub import DatasetName
from smolctl.escaping import code_span, fenced
from smolctl.hub.connection import endpoint
from smolctl.publish.facts import RECORDS, RunFacts
from smolctl.runs.layout import LOSS_CURVE, PREDICTIONS_PAGE, REPORT
from smolctl.runs.prediction_history import selection
from smolctl.sources.gguf.write import GGUFResult
from smolctl.timing import with_error

TEMPLATE = Path(__file__).parent / "card.md.jinja"
SHOWN_VALIDATIONS = 6
SHAPES = {"llama": "Llama", "smollm3": "SmolLM3", "qwen2": "Qwen2", "qwen3": "Qwen3"}


@dataclass(frozen=True)
class CardFacts:
    """The contents of the card."""

    repo: str  # org/name, for the examples
    name: str
    config: ModelConfig
    parameters: int
    dtype: str
    can_chat: bool
    license: str | None = None
    base: Provenance | None = None  # the origin of the weights
    run: RunFacts | None = None
    ggufs: tuple[GGUFResult, ...] = ()
    quantized: tuple[str, ...] = ()  # names of folders in quantized/
    revision: str = "main"
    code: str | None = None  # URL of the repository of the code that made the model

    @property
    def url(self) -> str:
        """The URL of the model on the Hub; empty while its full name is not known."""
        return f"{endpoint()}/{self.repo}" if "/" in self.repo else ""

    def page(self, kind: str, path: str) -> str:
        """The URL of a file ("blob") or a folder ("tree") of the repository, at the card's revision."""
        return f"{endpoint()}/{self.repo}/{kind}/{quote(self.revision, safe='')}/{path}"

    @property
    def size(self) -> str:
        """The number of parameters in two or three words."""
        count = self.parameters
        return f"{count / 1e6:,.1f} million parameters" if count >= 1e6 else f"{count:,} parameters"

    @property
    def shape(self) -> str:
        """The differences between the network and a Llama."""
        if not self.config.needs_own_code:
            return f"{SHAPES[self.config.model_type]}-shaped"
        parts = ["learned positions"] if self.config.position_embedding == "learned" else []
        if self.config.residual_scale != 1.0:
            parts.append(f"residual branches times {self.config.residual_scale:.4g}")
        return "a Llama with " + " and ".join(parts)

    @property
    def prompt(self) -> str:
        """An example prompt."""
        prompts = self.run.config.predictions.prompts if self.run else ()
        return prompts[0] if prompts else "Once upon a time"

    @property
    def shown_validations(self) -> Sequence[Mapping[str, Any]]:
        """All validations of the run, or an evenly spaced selection."""
        return selection(self.run.validations if self.run else (), SHOWN_VALIDATIONS)


def card_metadata(facts: CardFacts) -> dict[str, Any]:
    """The front matter."""
    tags = ["smolctl", "small-language-model"]
    if facts.config.needs_own_code:
        tags.append("custom_code")
    if facts.can_chat:
        tags.append("conversational")
    if facts.ggufs:
        tags.append("gguf")
    metadata: dict[str, Any] = {"license": facts.license} if facts.license else {}
    metadata |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    if facts.run and facts.run.datasets:
        metadata["datasets"] = list(facts.run.datasets)
    if base := facts.base and facts.base.on_hub:
        metadata["base_model"] = [base.id]
        if facts.run:  # otherwise the Hub classifies a repository with a GGUF as a quantized model
            metadata["base_model_relation"] = "finetune"
    return metadata


def card_text(facts: CardFacts) -> str:
    """The generated Markdown."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "format": format,
        "repr": repr,
        "code_span": code_span,
        "fenced": fenced,
        "selection": selection,
        "cell": lambda text: str(text).replace("|", "\\|"),  # a bar would end a table cell
        "bits": lambda record: with_error(record["bits_per_byte"], record["standard_error"]),
        "with_error": with_error,
        "measured": _measured,
        "origin": _origin,
        "described": _described,
    }
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    names = {
        "version": __version__,
        "hub": endpoint(),
        "records": RECORDS,
        "predictions_page": PREDICTIONS_PAGE,
        "report": REPORT,
        "loss_curve": LOSS_CURVE,
    }
    return template.render(facts=facts, config=facts.config, run=facts.run, **names)


def _measured(value: Any, form: str, unit: float = 1, name: str = "") -> str:
    """A number of a quantized model's record with its unit; a dash if it has none."""
    return format(value / unit, form) + name if isinstance(value, int | float) else "–"


def _origin(base: Provenance) -> str:
    """The model from which another one was made, with its own origin."""
    return ", made from ".join(map(_link, base.chain))


def _link(one: Provenance) -> str:
    """A model with its commit or step, and its license."""
    if one.kind == "hub":
        name = f"[{one.id}]({endpoint()}/{one.id})"
    else:
        name = f"{code_span(one.id)} (not on the Hub)"
    at = [f"at step {one.step:,}"] if one.step is not None else []
    if one.assumed:
        at.append(f"with a config of which not all is certain ({', '.join(one.assumed)})")
    if one.revision and one.revision != one.commit:
        at.append(f"revision {code_span(one.revision)}")
    if one.commit:
        at.append(f"commit {code_span(one.commit[:12])}")
    at.append(f"license {code_span(one.license)}" if one.license else "license not stated")
    return f"{name}, {', '.join(at)}"


def _described(source: str) -> str:
    if source == python_library.NAME:
        return "the source and documentation of Python's standard library (PSF license)"
    name = DatasetName.recorded(source)
    return f"[{source}]({endpoint()}/datasets/{name.repository})" if name else source
