"""Where the first weights came from stands in the card, whatever was made of them since."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from smolctl.config import Provenance, RunConfig
from smolctl.publish.build import Built, build, open_model
from smolctl.publish.facts import public_source
from smolctl.publish.gradio_space import write_card
from smolctl.sources.huggingface.card import split_card
from smolctl.sources.provenance import read_provenance
from tests.support.hub_server import COMMIT, HubRepository, HubServer
from tests.support.processes import Smolctl

CARD = b"---\nlicense: apache-2.0\n---\n# The base\n"
HUB = Provenance(id="org/base", kind="hub", commit=COMMIT, license="apache-2.0")
LOCAL = Provenance(id="/home/me/runs/first", kind="local", step=300, made_from=HUB)


def with_origin(built: Built, origin: Provenance | None) -> Built:
    """The same repository, of a run that began with other weights."""
    run = built.model.source.run
    assert run is not None
    source = dataclasses.replace(built.model.source, run=run.model_copy(update={"init_from": origin}))
    return dataclasses.replace(built, model=dataclasses.replace(built.model, source=source))


def card_of(built: Built, existing: str | None = None) -> tuple[dict[str, object], str]:
    text = built.write_card("me/tiny", None, existing)
    front, body = split_card(text)
    return yaml.safe_load(front.strip().strip("-")), body


def test_the_card_names_the_base_its_commit_and_its_license(llama: Built) -> None:
    metadata, text = card_of(with_origin(llama, HUB))
    assert metadata["base_model"] == ["org/base"]
    assert metadata["base_model_relation"] == "finetune"
    assert "license" not in metadata  # which the user has to state
    assert "Fine-tuned from [org/base](https://huggingface.co/org/base)." in text
    assert f"commit `{COMMIT[:12]}`, license `apache-2.0`" in text


def test_links_lead_to_the_hub_in_use(llama: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example.org")
    _, text = card_of(with_origin(llama, HUB))
    assert "https://hub.example.org/org/base" in text
    assert "huggingface.co/org/base" not in text


def test_a_base_on_this_machine_is_named_without_its_folder_and_with_its_own_base(llama: Built) -> None:
    metadata, text = card_of(with_origin(llama, LOCAL))
    assert metadata["base_model"] == ["org/base"]
    assert "`first` (not on the Hub), at step 300, license not stated, made from [org/base]" in text
    assert "/home/me" not in text


def test_new_weights_have_no_base(llama: Built) -> None:
    metadata, text = card_of(llama)
    assert "base_model" not in metadata
    assert "| initial weights | random |" in text


def test_people_may_add_a_base(llama: Built) -> None:
    built = with_origin(llama, HUB)
    metadata, _ = card_of(built, "---\nbase_model: [them/other]\n---\nwords\n")
    assert metadata["base_model"] == ["them/other", "org/base"]


def test_the_page_of_the_space_names_the_base(with_space: Built, tmp_path: Path) -> None:
    built = with_origin(with_space, HUB)
    write_card(tmp_path, built.card_facts("me/tiny", None), None)
    assert "made from [org/base]" in (tmp_path / "space.json").read_text()
    assert "0.0 million" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("source", "shown", "dataset"),
    [
        ("data/notes", "notes", False),
        ("/home/me/data/notes", "notes", False),
        ("org/data@main:en", "data@main:en", False),
        (f"org/data@{COMMIT}:en", f"org/data@{COMMIT}:en", True),
        ("python", "python", False),
    ],
)
@pytest.mark.parametrize("is_there", [False, True])
def test_what_a_source_is_does_not_depend_on_where_push_runs(
    source: str,
    shown: str,
    dataset: bool,
    is_there: bool,
    llama: Built,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if is_there and not source.startswith("/"):
        (tmp_path / source).mkdir(parents=True)
    assert public_source(source) == shown
    assert llama.facts is not None
    config = RunConfig(data={"source": source})
    facts = dataclasses.replace(llama.facts, config=config)
    assert facts.datasets == (("org/data",) if dataset else ())


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, llama: Built) -> Iterator[HubServer]:
    from huggingface_hub import constants

    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_goodtoken")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
        files = {name: (llama.folder / name).read_bytes() for name in names}
        server.repositories["org/base"] = HubRepository({**files, "README.md": CARD})
        yield server


@pytest.mark.slow
def test_the_base_is_known_after_training_resuming_quantizing_and_training_again(
    hub: HubServer, here: Path, smolctl: Smolctl
) -> None:
    short = ("--data", "corpus", "--steps", "1", "--batch-size", "1", "--set", "data.sequence_length=32")
    base = Provenance(id="org/base", kind="hub", commit=COMMIT, license="apache-2.0")
    for arguments in (
        ("train", "--init-from", "org/base", "--out", "first", *short),
        ("resume", "first", "--extra", "1"),
        ("quantize", "first", "--to", "int8", "--no-measure"),
        ("train", "--init-from", "first", "--out", "second", *short),
        ("quantize", "second", "--to", "gguf-q8_0", "--no-measure"),
        ("train", "--init-from", "second/quantized/second-q8_0.gguf", "--out", "third", *short),
    ):
        called = smolctl(*arguments)
        assert called.code == 0, called.err
    run = open_model("first").source.run
    assert run is not None
    assert run.init_from is not None
    assert run.init_from.sha256
    base = base.model_copy(update={"sha256": run.init_from.sha256})
    assert run.init_from == base
    chain = open_model("second").source.run.init_from.chain  # type: ignore[union-attr]
    assert [one.kind for one in chain] == ["local", "hub"]
    assert chain[0].step == 2
    assert chain[-1] == base
    quantized = smolctl("inspect-config", "first/quantized/int8", "--json").json
    assert read_provenance(quantized["provenance"]).chain[-1] == base  # type: ignore[union-attr]
    third = open_model("third").source.run.init_from  # type: ignore[union-attr]
    assert third is not None
    assert third.license == "apache-2.0"
    assert third.on_hub == Provenance(id="org/base", kind="hub")  # a GGUF names no commit
    shown = smolctl("inspect-config", "second")
    assert "where the weights come from" in shown.out
    assert "org/base" in shown.out
    document = smolctl("inspect-config", "second", "--json").json
    assert read_provenance(document["provenance"]).chain[-1] == base  # type: ignore[union-attr]
    out = here / "out"
    out.mkdir()
    built = build(open_model("second"), out, ())
    metadata, _ = card_of(built)
    assert metadata["base_model"] == ["org/base"]
    assert all(str(here).encode() not in path.read_bytes() for path in out.rglob("*") if path.is_file())
