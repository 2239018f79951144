"""Where weights come from is told once, from what each kind of MODEL says of itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from smolctl.config import Provenance, RunConfig
from smolctl.config.dump import to_yaml
from smolctl.config.load import read_yaml, resolve_run_config
from smolctl.errors import InputError
from smolctl.runs.events import Event, Note
from smolctl.runs.folder import RunFolder
from smolctl.sources import ModelSource, SourceKind, open_source
from smolctl.sources.provenance import LONGEST_CHAIN, gguf_metadata, provenance_of, read_provenance
from smolctl.training.prepare import with_origin
from smolctl.training.resume import ResumeOptions, changed_config
from tests.support.hub_server import COMMIT, HubRepository, HubServer
from tests.support.tiny_hub_model import CONFIG_JSON

CARD = b"---\nlicense: apache-2.0\nbase_model: [them/base]\n---\n# words\n"
BASE = Provenance(id="org/tiny", kind="hub", revision="main", commit=COMMIT, license="apache-2.0")


def source(kind: SourceKind, name: str, **facts: Any) -> ModelSource:
    return ModelSource(kind, name, None, **facts)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_goodtoken")
        files = {"config.json": CONFIG_JSON, "README.md": CARD}
        server.repositories["org/tiny"] = HubRepository(files)
        yield server


@pytest.mark.parametrize(("name", "revision"), [("org/tiny", None), ("org/tiny@main", "main")])
def test_a_model_of_the_hub_has_its_commit_and_what_its_card_says(
    name: str, revision: str | None, hub: HubServer
) -> None:
    assert provenance_of(open_source(name)) == Provenance(
        id="org/tiny",
        kind="hub",
        revision=revision,
        commit=COMMIT,
        license="apache-2.0",
        made_from=Provenance(id="them/base", kind="hub"),
    )


@pytest.mark.parametrize(
    ("card", "license", "base"),
    [
        (CARD, "apache-2.0", "them/base"),
        (b"---\nlicense: other\nlicense_name: llama9\nbase_model: them/base\n---\n", "llama9", "them/base"),
        (b"---\nlicense: [mit, bsd]\nbase_model: ../../etc\n---\n", "mit, bsd", None),
        (b"---\nbase_model: {a: 1}\nlicense: [\n---\n", None, None),
        (b"no card", None, None),
        (b"---\n" + b"[" * 400 + b"\n---\n", None, None),
    ],
)
def test_a_folder_says_what_its_card_says(
    card: bytes, license: str | None, base: str | None, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes(CONFIG_JSON)
    (tmp_path / "README.md").write_bytes(card)
    found = provenance_of(open_source(str(tmp_path)))
    assert (found.id, found.kind, found.license) == (str(tmp_path), "local", license)
    assert (found.made_from.id if found.made_from else None) == base


def test_a_run_a_quantized_model_and_a_gguf_pass_on_what_they_know(tmp_path: Path) -> None:
    run = RunConfig(init_from=BASE, publish={"license": "mit"})
    RunFolder(tmp_path).write_config(run)
    of_run = provenance_of(source(SourceKind.RUN, f"{tmp_path}@300", run=run, step=300))
    assert of_run.id == str(tmp_path)
    assert (of_run.step, of_run.license, of_run.on_hub) == (300, "mit", BASE)
    description = {"source": {"provenance": of_run.model_dump(mode="json", exclude_none=True)}}
    quantized = provenance_of(source(SourceKind.QUANTIZED, "q", quantization=description))
    assert quantized.chain[1:] == of_run.chain
    assert quantized.license == "mit"
    metadata = gguf_metadata(of_run)
    gguf = provenance_of(source(SourceKind.GGUF, "x.gguf", declared=metadata))
    assert gguf.license == "mit"
    assert gguf.made_from == Provenance(id="org/tiny", kind="hub")


def endless(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {"id": "a/b", "kind": "hub"}
    for _ in range(depth):
        found = {"id": "a/b", "kind": "hub", "made_from": found}
    return found


@pytest.mark.parametrize(
    "record",
    [None, "x", {"id": "a/b"}, {"id": "nothing", "kind": "hub"}, endless(LONGEST_CHAIN), endless(3_000)],
)
def test_a_record_that_cannot_be_is_no_record(record: object) -> None:
    assert read_provenance(record) is None


def test_a_config_keeps_the_record_and_nothing_names_this_machine_in_public(tmp_path: Path) -> None:
    local = Provenance(id="/home/me/runs/a", kind="local", step=3, made_from=BASE)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(RunConfig(init_from=local)))
    again = resolve_run_config(read_yaml(path), "test")
    assert again.init_from == local
    assert local.public() == local.model_copy(update={"id": "a"})


def test_the_record_is_written_by_training_and_by_nothing_else() -> None:
    heard: list[Event] = []
    old = RunConfig(init_from=BASE)
    assert with_origin(None, old, {}, heard.append).init_from is None
    assert "org/tiny" in "".join(event.text for event in heard if isinstance(event, Note))
    with pytest.raises(InputError, match="a record, not a setting"):
        with_origin(None, old, {"init_from": {"id": "x"}}, heard.append)


def test_a_resumed_run_cannot_get_another_origin() -> None:
    options = ResumeOptions(extra=1, settings={"init_from": {"id": "them/other", "kind": "hub"}})
    for before in (RunConfig(), RunConfig(init_from=BASE)):
        with pytest.raises(InputError, match="a resumed run cannot change init_from"):
            changed_config(before, 5, options)
