"""The repository remembers what smolctl put there: what is stale goes, what is other people's stays."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from smolctl.errors import ExitCode
from smolctl.hub.client import HubClient
from smolctl.ownership import RECORD
from smolctl.publish.build import Built
from smolctl.publish.push import PushOptions, PushPlan, choose_destination, plan_built
from tests.support.processes import Smolctl
from tests.support.publishing import publish
from tests.support.push_hub import Blob, Fault, PushHub, Repo


def plan(built: Built, **options: object) -> PushPlan:
    """What a push would do."""
    asked = PushOptions(repo="me/tiny", **options)  # type: ignore[arg-type]
    client = HubClient(print, wait=lambda _s: None)
    return plan_built(asked, choose_destination(asked, built.model, client), built, client)


def edit(repo: Repo, **files: bytes) -> None:
    """A commit of somebody else; a dot in a name is spelled as two underscores."""
    changed = {name.replace("__", "."): Blob(content, len(content)) for name, content in files.items()}
    repo.commit("main", {**repo.head, **changed}, "theirs")


@pytest.fixture
def pushed(with_ggufs: Built, hub: PushHub) -> Repo:
    """A repository with the GGUF files of an earlier push."""
    publish(with_ggufs, repo="me/tiny")
    return hub.repos["models/me/tiny"]


def test_what_an_earlier_push_put_there_goes_in_the_same_commit(pushed: Repo, llama: Built) -> None:
    ggufs = ("llama-f16.gguf", "llama-q8_0.gguf")
    assert set(ggufs) < set(pushed.head)
    assert plan(llama).model.removed == ggufs
    before = len(pushed.commits)
    commit = publish(llama, repo="me/tiny").repo.commit
    assert commit.removed == ggufs
    assert not set(ggufs) & set(pushed.head)
    assert len(pushed.commits) == before + 1
    assert publish(llama, repo="me/tiny").repo.commit.sent == ()
    assert len(pushed.commits) == before + 1


def test_of_a_renamed_run_there_is_one_file_of_a_scheme(
    pushed: Repo, with_ggufs: Built, tmp_path: Path
) -> None:
    folder = shutil.copytree(with_ggufs.folder, tmp_path / "renamed")
    for path in folder.glob("*.gguf"):
        path.replace(folder / path.name.replace("llama", "other"))
    renamed = dataclasses.replace(with_ggufs, folder=folder)
    publish(renamed, repo="me/tiny")
    ggufs = sorted(name for name in pushed.head if name.endswith(".gguf"))
    assert ggufs == ["other-f16.gguf", "other-q8_0.gguf"]


def test_other_peoples_files_are_never_touched(pushed: Repo, llama: Built) -> None:
    edit(pushed, notes__txt=b"theirs")
    edit(pushed, **{"llama-f16__gguf": b"made anew by somebody"})
    planned = plan(llama).model
    assert planned.removed == ("llama-q8_0.gguf",)
    assert planned.stays == ("llama-f16.gguf", "notes.txt")
    publish(llama, repo="me/tiny")
    assert pushed.head["notes.txt"].content == b"theirs"
    assert pushed.head["llama-f16.gguf"].content == b"made anew by somebody"
    assert "llama-q8_0.gguf" not in pushed.head


def test_a_small_stale_file_is_known_by_its_content(llama: Built, hub: PushHub, tmp_path: Path) -> None:
    folder = shutil.copytree(llama.folder, tmp_path / "more")
    for name in ("NOTICE", "NOTICE.txt"):
        (folder / name).write_text(f"{name} of an earlier push")
    publish(dataclasses.replace(llama, folder=folder), repo="me/tiny")
    repo = hub.repos["models/me/tiny"]
    edit(repo, NOTICE__txt=b"edited since")
    planned = plan(llama).model
    assert (planned.removed, planned.stays) == (("NOTICE",), ("NOTICE.txt",))


def test_without_a_record_nothing_is_removed_and_the_plan_says_what_is_replaced(
    pushed: Repo, llama: Built, learned: Built
) -> None:
    """As after a push with a version that kept no record, or into somebody's repository."""
    files = {name: blob for name, blob in pushed.head.items() if name != RECORD}
    pushed.commit("main", files, "as it was")
    planned = plan(llama).model
    assert planned.removed == planned.replaced == ()
    assert planned.stays == ("llama-f16.gguf", "llama-q8_0.gguf")
    assert "model.safetensors" in plan(learned).model.replaced


OF_A_RUN = b'{"kind": "run", "files": {"notes.txt": null}}'


@pytest.mark.parametrize("content", [b"{", b"[]", b"[" * 9_000, OF_A_RUN])
def test_a_record_that_is_none_of_a_repository_removes_nothing(
    content: bytes, pushed: Repo, llama: Built
) -> None:
    edit(pushed, notes__txt=b"theirs", **{RECORD.replace(".", "__"): content})
    assert plan(llama).model.removed == ()


def test_a_push_whose_answer_is_lost_has_removed_too(pushed: Repo, llama: Built, hub: PushHub) -> None:
    hub.faults = [Fault("/commit/", cut=True, after=True)]
    before = len(pushed.commits)
    assert publish(llama, repo="me/tiny").repo.commit.removed == ("llama-f16.gguf", "llama-q8_0.gguf")
    assert len(pushed.commits) == before + 1


def test_the_plan_lists_what_goes_and_what_stays(pushed: Repo, llama_run: Path, smolctl: Smolctl) -> None:
    edit(pushed, notes__txt=b"theirs")
    called = smolctl("push", llama_run, "--repo", "me/tiny")
    assert called.code == 0, called.err
    removed = [line for line in called.err.splitlines() if "removed: left from an earlier push" in line]
    assert [line.split()[0] for line in removed] == ["llama-f16.gguf", "llama-q8_0.gguf"]
    assert "notes.txt stay there" in called.err
    assert "and 2 of an earlier push removed" in called.out


def test_a_public_repository_asks_unless_public_is_said(
    llama_run: Path, llama: Built, hub: PushHub, smolctl: Smolctl
) -> None:
    publish(llama, repo="me/tiny", public=True)
    hub.log.clear()
    called = smolctl("push", llama_run, "--repo", "me/tiny", "--license", "mit")
    assert called.code == ExitCode.USAGE
    assert called.err.splitlines()[-2:] == [
        "error: me/tiny is public: everybody sees what is pushed, so nothing was sent",
        " hint: Add --public, or name another --repo.",
    ]
    assert not hub.requests("^(POST|PUT)")
    assert plan(llama).open_to_all == ("me/tiny",)
    assert plan(llama, public=True).open_to_all == ()


def test_the_record_says_the_same_for_the_same_files(pushed: Repo) -> None:
    record = json.loads(pushed.head[RECORD].content or b"")
    assert record["kind"] == "repository"
    assert record["files"]["README.md"] is None  # people write in it
    assert {"config.json", "llama-f16.gguf", "model.safetensors"} < set(record["files"])
