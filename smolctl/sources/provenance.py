"""The origin of a MODEL's weights, recorded when a run or a quantized model is made from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from smolctl.config import Provenance
from smolctl.durable import named_path
from smolctl.runs.layout import is_run
from smolctl.sources.base import ModelSource, SourceKind
from smolctl.sources.huggingface.card import license_of

HUB_PAGE = "https://huggingface.co/"
# Of a GGUF's metadata, as written by llama.cpp's converter.
LICENSE, BASES, BASE_PAGE = "general.license", "general.base_model.count", "general.base_model.0.repo_url"
LONGEST_CHAIN = 16  # of models made from one another; a longer record is not valid


def provenance_of(source: ModelSource) -> Provenance:
    """A model with weights as the origin of others: its identity, and the origin that it declares itself."""
    if source.kind is SourceKind.HUB:
        name, _, revision = source.id.partition("@")
        return Provenance(
            id=name,
            kind="hub",
            revision=revision or None,
            commit=source.revision,
            license=license_of(source.card),
            assumed=source.assumptions,
            made_from=_base_on_hub(source.card.get("base_model")),
        )
    run, recorded = source.run, (source.quantization or {}).get("source")
    path = named_path(source.id).absolute()
    if from_run := source.run_folder:
        path = from_run.path.resolve()  # runs/latest will later be a different run
    license, base = license_of(source.card), _base_on_hub(source.card.get("base_model"))
    if source.kind is SourceKind.GGUF:
        license = _text(source.declared.get(LICENSE))
        base = _base_on_hub((_text(source.declared.get(BASE_PAGE)) or "").removeprefix(HUB_PAGE))
    elif run is not None:
        license, base = run.publish.license, run.init_from
    elif isinstance(recorded, Mapping):
        base = read_provenance(recorded.get("provenance"))
        license = license or (base.license if base else None)
    return Provenance(
        id=str(path),
        kind="local",
        step=source.step,
        license=license,
        assumed=source.assumptions,
        made_from=base,
    )


def reference_of(provenance: Provenance) -> str:
    """The MODEL that a record names, as it was when the record was made."""
    if provenance.kind == "hub":
        version = provenance.commit or provenance.revision
        return f"{provenance.id}@{version}" if version else provenance.id
    is_step = provenance.step is not None and is_run(Path(provenance.id))
    return f"{provenance.id}@{provenance.step}" if is_step else provenance.id


def read_provenance(values: Any) -> Provenance | None:
    """Read a record of an origin; None if there is none that can be read."""
    try:
        found = Provenance.model_validate(values)
    except (ValidationError, RecursionError):
        return None
    return found if len(found.chain) <= LONGEST_CHAIN else None


def gguf_metadata(provenance: Provenance | None) -> dict[str, str | int]:
    """The origin of weights that a GGUF declares, in llama.cpp's keys."""
    base = provenance.on_hub if provenance else None
    found: dict[str, str | int] = {}
    if provenance and (license := next((one.license for one in provenance.chain if one.license), None)):
        found[LICENSE] = license
    if base:
        organization, _, name = base.id.partition("/")
        found |= {BASES: 1, BASE_PAGE: f"{HUB_PAGE}{base.id}"}
        found |= {"general.base_model.0.organization": organization, "general.base_model.0.name": name}
    return found


def _base_on_hub(name: Any) -> Provenance | None:
    """The base model that a card names; the first of several."""
    return read_provenance({"id": name[0] if isinstance(name, list) and name else name, "kind": "hub"})


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
