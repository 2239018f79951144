"""Publishing to the Hub with its real client: one commit, verified, repeatable, whatever breaks."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import snapshot_download

from smolctl.errors import ExitCode, HubError
from smolctl.generation.load import load_model
from smolctl.hub.client import HubClient
from smolctl.hub.errors import ChangedError
from smolctl.hub.identity import read_identity
from smolctl.publish.build import Built
from smolctl.publish.push import PushOptions, choose_destination, plan_built, push, send
from smolctl.sources import open_source
from tests.support.processes import Smolctl, start
from tests.support.publishing import publish, serving
from tests.support.push_hub import TOKEN, Blob, Fault, PushHub


def repository(hub: PushHub) -> dict[str, Blob]:
    return hub.repos["models/me/tiny"].head


def assert_arrived(hub: PushHub, files: dict[str, str] | None = None) -> None:
    """The repository holds one commit of ours, whole."""
    there = repository(hub)
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "loss.png"} <= set(there)
    assert len(hub.repos["models/me/tiny"].commits) == 2  # the Hub's first one and ours


@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_what_was_pushed_is_downloaded_and_gives_the_same_logits(
    xet: bool, with_ggufs: Built, llama_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    with serving(monkeypatch, tmp_path / "hub", xet=xet) as hub:
        pushed = publish(with_ggufs, repo="me/tiny")
        assert_arrived(hub)
        assert bool(hub.requests("objects/batch")) is not xet
        assert bool(hub.requests("xet-write-token")) is xet
        assert pushed.repo.commit.sha in hub.repos["models/me/tiny"].commits
        folder = Path(snapshot_download("me/tiny", local_dir=tmp_path / "fresh", endpoint=hub.url))
    for file in pushed.repo.files:
        assert hashlib.sha256((folder / file.path).read_bytes()).hexdigest() == file.sha256
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load_model(str(llama_run))
    ids = [3, 1, 200, 77, 5]
    with torch.inference_mode():
        expected = torch.from_numpy(ours.engine.forward([ids], ours.engine.allocate(1, 8), every=True))
        torch.testing.assert_close(theirs(torch.tensor([ids])).logits[0], expected, rtol=1e-4, atol=1e-4)


def test_what_was_built_once_goes_anywhere_with_a_card_of_its_own(llama: Built, hub: PushHub) -> None:
    publish(llama, repo="me/one", license="mit")
    publish(llama, repo="lab/two", public=True)
    cards = {
        name: (hub.repos[f"models/{name}"].head["README.md"].content or b"").decode()
        for name in ("me/one", "lab/two")
    }
    assert all(f'from_pretrained("{name}")' in card for name, card in cards.items())
    assert "license: mit" in cards["me/one"]
    assert "license: mit" not in cards["lab/two"]
    weights = {hub.repos[f"models/{name}"].head["model.safetensors"].sha256 for name in cards}
    assert len(weights) == 1


def test_pushing_again_sends_nothing(llama: Built, hub: PushHub) -> None:
    first = publish(llama, repo="me/tiny")
    hub.log.clear()
    second = publish(llama, repo="me/tiny")
    assert second.repo.commit.sent == ()
    assert second.repo.commit.sha == first.repo.commit.sha
    assert not hub.requests("^(POST|PUT)")
    assert_arrived(hub)


def test_a_changed_file_alone_is_sent(llama: Built, hub: PushHub) -> None:
    publish(llama, repo="me/tiny")
    hub.log.clear()
    again = publish(llama, repo="me/tiny", license="mit")
    assert again.repo.commit.sent == ("README.md",)
    assert not hub.requests("store/")


def test_the_plan_tells_what_is_there_already(
    llama: Built, llama_run: Path, hub: PushHub, smolctl: Smolctl
) -> None:
    publish(llama, repo="me/tiny")
    said = smolctl("push", llama_run, "--repo", "me/tiny", "--public", "--license", "mit").err
    lines = {line.split()[0]: line for line in said.splitlines() if line.split()}
    assert "private already" in lines["repository"]
    assert "there already" in lines["model.safetensors"]
    assert "there already" not in lines["README.md"]
    assert " 1 to send" in said


def test_a_license_that_was_stated_once_is_in_every_later_card(llama: Built, hub: PushHub) -> None:
    publish(llama, repo="me/tiny", license="mit")
    again = publish(llama, repo="me/tiny")
    assert again.repo.commit.sent == ()
    card = (repository(hub)["README.md"].content or b"").decode()
    assert "License: mit" in card
    assert "license: mit" in card


def test_private_unless_public(llama: Built, hub: PushHub) -> None:
    publish(llama, repo="me/tiny")
    assert hub.repos["models/me/tiny"].private
    publish(llama, repo="me/open", public=True)
    assert not hub.repos["models/me/open"].private
    notes: list[str] = []
    publish(llama, notes, repo="me/tiny", public=True)
    assert hub.repos["models/me/tiny"].private
    assert any("private already, and does not change" in note for note in notes)


def test_the_repository_is_taken_from_the_user_and_the_run(llama: Built, hub: PushHub) -> None:
    assert publish(llama).repo.id == "me/llama"


BREAKS: dict[str, Callable[[], list[Fault]]] = {
    "connection cut in the middle of the weights": lambda: [Fault("store/", cut=True)],
    "connection cut in the middle of the commit": lambda: [Fault("/commit/", cut=True)],
    "answer to the commit lost": lambda: [Fault("/commit/", cut=True, after=True)],
    "429 with Retry-After on the commit": lambda: [Fault("/commit/", 429, headers={"Retry-After": "7"})],
    "500 on the commit, twice": lambda: [Fault("/commit/", 500, times=2)],
    "500 after the commit was done": lambda: [Fault("/commit/", 500, after=True)],
    "503 on whoami": lambda: [Fault("whoami", 503)],
    "500 on the preupload": lambda: [Fault("preupload", 500, times=2)],
    "502 on LFS": lambda: [Fault("objects/batch", 502), Fault("store/", 502)],
    "no answer on the commit": lambda: [Fault("/commit/", hang_s=3.0, after=True)],
    "no answer on the tree": lambda: [Fault("/tree/", hang_s=3.0)],
    "504 on making the repository": lambda: [Fault("repos/create", 504, after=True)],
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_passing_failure_ends_in_the_same_commit(
    what: str, llama: Built, hub: PushHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOLCTL_HUB_TIMEOUT", "1")
    hub.faults = BREAKS[what]()
    notes: list[str] = []
    publish(llama, notes, repo="me/tiny")
    assert all(fault.times == 0 for fault in hub.faults)
    assert_arrived(hub)
    if "Retry-After" in what:
        assert "waits 7 s" in notes


LASTING: dict[str, Callable[[], list[Fault]]] = {
    "weights": lambda: [Fault("store/", cut=True, times=99)],
    "preupload": lambda: [Fault("preupload", 500, times=99)],
    "commit": lambda: [Fault("/commit/", 500, times=99)],
    "commit cut": lambda: [Fault("/commit/", cut=True, times=99)],
    "verification": lambda: [Fault("/tree/", 500, times=99)],
}


@pytest.mark.parametrize("where", LASTING)
def test_a_push_that_failed_is_repeated_and_ends_in_the_same_state(
    where: str, llama: Built, hub: PushHub
) -> None:
    hub.faults = LASTING[where]()
    with pytest.raises(HubError) as caught:
        publish(llama, repo="me/tiny")
    assert caught.value.exit_code == ExitCode.HUB
    assert caught.value.hint
    hub.faults = []
    publish(llama, repo="me/tiny")
    assert_arrived(hub)


def test_a_killed_push_is_repeated_and_ends_in_the_same_state(llama: Built, hub: PushHub) -> None:
    def killed() -> None:
        raise KeyboardInterrupt

    hub.faults = [Fault("/commit/", 500)]
    with pytest.raises(KeyboardInterrupt):
        publish(llama, wait=lambda _s: killed(), repo="me/tiny")
    publish(llama, repo="me/tiny")
    assert_arrived(hub)


@pytest.mark.parametrize(
    ("where", "after", "xet"),
    [
        ("/commit/", True, True),
        pytest.param("store/", False, False, marks=pytest.mark.slow),
        pytest.param("/commit/", False, False, marks=pytest.mark.slow),
        pytest.param("xet-write-token", False, True, marks=pytest.mark.slow),
    ],
)
def test_a_push_killed_at_once_is_repeated_and_ends_in_the_same_state(
    where: str,
    after: bool,
    xet: bool,
    llama: Built,
    llama_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    with serving(monkeypatch, tmp_path / "hub", xet=xet) as hub:
        reached = threading.Event()
        hub.faults = [Fault(where, act=reached.set, hang_s=60.0, after=after)]
        monkeypatch.setenv("HF_HUB_DISABLE_XET", str(int(not xet)))
        process = start("push", llama_run, "--repo", "me/tiny", "--quiet")
        try:
            while not reached.wait(0.1):
                assert process.poll() is None, "it ended before it came to this request"
        finally:
            process.kill()
            process.communicate()
        hub.faults = []
        publish(llama, repo="me/tiny")
        assert_arrived(hub)
        assert publish(llama, repo="me/tiny").repo.commit.sent == ()


def test_a_commit_of_somebody_else_in_between_is_noticed(llama: Built, hub: PushHub) -> None:
    publish(llama, repo="me/tiny")
    repo = hub.repos["models/me/tiny"]

    def theirs() -> None:
        repo.commit("main", {**repo.head, "notes.txt": Blob(b"theirs", 6)}, "theirs")

    hub.faults = [Fault("/commit/", act=theirs)]
    with pytest.raises(ChangedError) as caught:
        publish(llama, repo="me/tiny", license="mit")
    assert "somebody else" in caught.value.message
    assert repo.messages[-1] == "theirs"  # nothing of ours was put over it
    publish(llama, repo="me/tiny", license="mit")
    assert repo.head["notes.txt"].content == b"theirs"
    assert b"license: mit" in (repo.head["README.md"].content or b"")


def test_a_file_that_the_server_holds_differently_is_named(llama: Built, hub: PushHub) -> None:
    repo = hub.make("models/me/tiny")
    wrong = Blob(b"{}", 2)

    def commit(branch: str, files: dict[str, Blob], message: str) -> str:
        return type(repo).commit(repo, branch, {**files, "config.json": wrong}, message)

    repo.commit = commit  # type: ignore[method-assign]
    with pytest.raises(HubError, match=r"the Hub has different content in config\.json"):
        publish(llama, repo="me/tiny")


def test_a_pull_request_leaves_main_alone_and_is_not_opened_twice(llama: Built, hub: PushHub) -> None:
    repo = hub.make("models/them/base")
    before = repo.branches["main"]
    pushed = publish(llama, repo="them/base", create_pr=True)
    assert repo.branches["main"] == before
    assert pushed.repo.commit.pull_request == f"{hub.url}/them/base/discussions/1"
    again = publish(llama, repo="them/base", create_pr=True)
    assert again.repo.commit.sent == ()
    assert again.repo.commit.pull_request == pushed.repo.commit.pull_request
    assert "refs/pr/2" not in repo.branches


def test_a_branch_is_made_when_it_is_not_there(llama: Built, hub: PushHub) -> None:
    publish(llama, repo="me/tiny", revision="step-15")
    repo = hub.repos["models/me/tiny"]
    assert "model.safetensors" not in repo.head
    assert "model.safetensors" in repo.commits[repo.branches["step-15"]]


def test_a_new_branch_starts_with_the_card_of_main(llama: Built, hub: PushHub) -> None:
    publish(llama, repo="me/tiny")
    repo = hub.repos["models/me/tiny"]
    card = (repo.head["README.md"].content or b"") + b"\nMy own words.\n"
    repo.commit("main", {**repo.head, "README.md": Blob(card, len(card))}, "edit")
    pushed = publish(llama, repo="me/tiny", revision="next")
    assert pushed.repo.commit.sent == ("README.md",)  # its links lead to the branch
    there = repo.commits[repo.branches["next"]]["README.md"].content or b""
    assert b"My own words." in there
    assert b"/tree/next/training" in there


def test_a_pull_request_needs_a_repository(llama: Built, hub: PushHub) -> None:
    with pytest.raises(HubError, match="not on the Hub"):
        publish(llama, repo="them/none", create_pr=True)
    assert not hub.requests("^POST")
    assert hub.repos == {}


REFUSALS = {
    "401": (
        Fault("whoami", 401, message="Invalid user token."),
        "does not accept the token",
        "hf auth login",
    ),
    "402": (Fault("repos/create", 402, message="Payment needed"), "plan does not cover it", "Payment"),
    "403 on making it": (Fault("repos/create", 403, message="no write"), "permission denied", "write access"),
    "403 on sending": (Fault("preupload", 403, message="no write"), "permission denied", "write access"),
    "404": (Fault("preupload", 404, headers={"X-Error-Code": "RepoNotFound"}), "not on the Hub", "name"),
    "409": (Fault("/commit/", 409, message="busy"), "already", "another"),
    "412": (Fault("/commit/", 412), "somebody else", "same command again"),
    "413": (Fault("/commit/", 413), "too large", "Leave out"),
    "429": (Fault("whoami", 429, times=99), "too many requests", "minutes"),
    "500": (Fault("whoami", 500, times=99), "an internal error", "again"),
    "card": (
        Fault("validate-yaml", 400, message="license must be one of"),
        "license must be one of",
        "Correct",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_every_refusal_has_its_own_words(what: str, llama: Built, hub: PushHub) -> None:
    fault, cause, remedy = REFUSALS[what]
    hub.faults = [Fault(**vars(fault))]
    with pytest.raises(HubError) as caught:
        publish(llama, repo="me/tiny")
    assert cause in caught.value.message
    assert remedy in caught.value.hint
    assert caught.value.exit_code == ExitCode.HUB
    assert "\n" not in caught.value.message
    assert TOKEN not in caught.value.message + caught.value.hint


def test_a_hub_that_is_not_there(llama: Built, hub: PushHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="cannot be reached"):
        publish(llama, repo="me/tiny")


def test_a_hub_that_does_not_answer(llama: Built, hub: PushHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOLCTL_HUB_TIMEOUT", "0.2")
    hub.faults = [Fault("whoami", hang_s=1.0, times=99)]
    with pytest.raises(HubError, match="did not answer in time"):
        publish(llama, repo="me/tiny")


def test_a_slow_commit_is_waited_for_whatever_was_read_before(
    llama: Built, hub: PushHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To open a model is a short question, whose time limit was once left behind for the commit."""
    publish(llama, repo="me/tiny")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.3)
    hub.faults = [Fault("/commit/", hang_s=0.8)]
    notes: list[str] = []
    client = HubClient(notes.append, wait=lambda _s: None)
    assert open_source("me/tiny").config is not None
    options = PushOptions(repo="me/tiny", license="mit")
    plan = plan_built(options, choose_destination(options, llama.model, client), llama, client)
    assert send(plan, client).repo.commit.sent == ("README.md",)
    assert not any("again" in note for note in notes)


def test_without_a_token_one_line_says_what_to_do(
    smolctl: Smolctl,
    llama_run: Path,
    hub: PushHub,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    called = smolctl("push", llama_run)
    assert called.code == 4
    assert called.err.splitlines() == [
        "error: no Hugging Face token was found",
        " hint: Run `hf auth login`, or set HF_TOKEN to a token that may write.",
    ]
    assert hub.log == []


@pytest.mark.parametrize(
    ("role", "scopes", "repo", "says"),
    [
        ("read", None, "me/tiny", "has read access only"),
        ("write", None, "them/tiny", "me does not belong to them"),
        ("", {"lab": ["repo.content.read"]}, "me/tiny", "may write to nothing"),
        ("", {"lab": ["repo.write"]}, "me/tiny", "may write to lab"),
    ],
)
def test_a_token_that_cannot_do_it_is_refused_before_anything_is_built(
    role: str, scopes: dict[str, list[str]] | None, repo: str, says: str, llama_run: Path, hub: PushHub
) -> None:
    hub.role, hub.fine_grained = role, scopes
    with pytest.raises(HubError, match=says):
        push(PushOptions(str(llama_run), repo), HubClient(print), print)
    assert hub.log == ["GET /api/whoami-v2"]


def test_a_fine_grained_token_for_the_namespace_is_enough(llama: Built, hub: PushHub) -> None:
    hub.fine_grained = {"lab": ["repo.content.read", "repo.write"]}
    publish(llama, repo="lab/tiny")
    assert "models/lab/tiny" in hub.repos
    assert read_identity({"name": "me"}).writable is None


def test_edits_of_the_card_on_the_hub_survive(llama: Built, with_ggufs: Built, hub: PushHub) -> None:
    publish(llama, repo="me/tiny")
    repo = hub.repos["models/me/tiny"]
    card = (repo.head["README.md"].content or b"").decode()
    edited = (
        card.replace("---\n\n<!--", "language: en\n---\n\nMy own words.\n\n<!--", 1)
        + "\n## Thanks\n\nto all\n"
    )
    repo.commit("main", {**repo.head, "README.md": Blob(edited.encode(), len(edited))}, "edit")
    hub.log.clear()
    assert publish(llama, repo="me/tiny").repo.commit.sent == ()  # nothing is new, so nothing is sent
    publish(with_ggufs, repo="me/tiny")
    now = (repo.head["README.md"].content or b"").decode()
    assert "My own words." in now
    assert now.endswith("\n## Thanks\n\nto all\n")
    assert "language: en\n" in now
    assert "llama-f16.gguf" in now


def test_the_token_is_nowhere_but_in_the_header(llama_run: Path, hub: PushHub, smolctl: Smolctl) -> None:
    called = smolctl("push", llama_run, "--repo", "me/tiny", "-vv")
    assert called.code == 0, called.err
    assert TOKEN not in called.out + called.err
    assert not any(TOKEN.encode() in body for body in hub.bodies)


def test_a_client_that_sends_no_token_by_itself_pushes_with_it(
    llama: Built, hub: PushHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    publish(llama, repo="me/tiny")
    assert publish(llama, repo="me/tiny").repo.commit.sent == ()  # with the card read from the Hub


def test_the_json_says_what_stands_on_the_hub(llama_run: Path, hub: PushHub, smolctl: Smolctl) -> None:
    called = smolctl("push", llama_run, "--repo", "me/tiny", "--json")
    document = json.loads(called.out)
    repo = document["repo"]
    assert repo["id"] == "me/tiny"
    assert repo["url"] == f"{hub.url}/me/tiny"
    assert repo["commit"] == hub.repos["models/me/tiny"].branches["main"]
    assert repo["verified"] is True
    weights = next(file for file in repo["files"] if file["path"] == "model.safetensors")
    assert weights["sha256"] == repository(hub)["model.safetensors"].sha256
    assert document["space"] is None


def test_a_hub_without_xet_gets_large_files_through_git_lfs(
    llama: Built, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with serving(monkeypatch, tmp_path / "hub", xet=True) as hub:
        hub.knows_xet = False
        notes: list[str] = []
        publish(llama, notes, repo="me/tiny")
        assert_arrived(hub)
        assert len(hub.requests("xet-write-token")) == 1  # a 404 is no reason to try again
        assert hub.requests("objects/batch")
        assert any("has no Xet: large files go through Git LFS" in note for note in notes)
        assert not any("again" in note for note in notes)
        assert not huggingface_hub.constants.HF_HUB_DISABLE_XET  # another Hub may have it
