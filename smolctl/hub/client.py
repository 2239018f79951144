"""Writing to the Hub: who we are, one commit, and the proof that it arrived."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from smolctl.errors import HubError
from smolctl.hub.errors import ChangedError, MissingError, PassingError, explained, no_token
from smolctl.hub.files import PlannedFile

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub import HfApi

T = TypeVar("T")
CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 120.0  # without a byte; $SMOLCTL_HUB_TIMEOUT is another
WAITS = (1.0, 2.0, 4.0)  # seconds before another attempt, unless the Hub says how long
LONGEST_WAIT = 300.0
README = "README.md"


@dataclass(frozen=True)
class Identity:
    """Who a token speaks for."""

    user: str
    organizations: tuple[str, ...]
    token_name: str
    role: str  # read, write or fineGrained
    writable: tuple[str, ...] | None = None  # names that a fine-grained token may write to; None: all

    def require_write(self, repo: str) -> None:
        """Check that this token can write to a repository, as far as it tells.

        Raises:
            HubError: a read-only token, somebody else's namespace, or one outside the token's scope.
        """
        namespace = repo.split("/")[0]
        token = f"token {self.token_name!r}" if self.token_name else "this token"
        if self.role == "read":
            raise HubError(
                f"{token} of {self.user} may only read", "Make one of role write at hf.co/settings/tokens."
            )
        known = (self.user, *self.organizations)
        if namespace.lower() not in {name.lower() for name in known}:
            raise HubError(
                f"{repo}: {self.user} does not belong to {namespace}",
                f"Namespaces of this token: {', '.join(known)}. --create-pr proposes a change instead.",
            )
        if self.writable is not None and not {namespace.lower(), repo.lower()} & {
            name.lower() for name in self.writable
        }:
            scope = ", ".join(self.writable) or "nothing"
            raise HubError(
                f"{repo}: the fine-grained {token} may write to {scope}",
                f"Give it write access to repositories of {namespace} at hf.co/settings/tokens.",
            )


@dataclass(frozen=True)
class Target:
    """Where files go."""

    repo: str
    kind: str = "model"  # or space
    revision: str = "main"

    @property
    def shown(self) -> str:
        return f"spaces/{self.repo}" if self.kind == "space" else self.repo


@dataclass(frozen=True)
class Head:
    """A repository as it stands at a commit."""

    sha: str
    private: bool
    checksums: Mapping[str, str] = field(repr=False)  # path to sha256 (LFS) or git's sha1

    def has(self, file: PlannedFile) -> bool:
        return self.checksums.get(file.path) in (file.sha256, file.git_sha1)


@dataclass(frozen=True)
class Commit:
    """A push that was verified."""

    sha: str
    sent: tuple[str, ...]  # paths; empty when everything was there already
    pull_request: str | None = None


class HubClient:
    """The real client with time limits, patience, and errors in our words.

    Args:
        note: told what takes time or was decided.
        wait: sleeps so many seconds.
    """

    def __init__(self, note: Callable[[str], None], wait: Callable[[float], None] = time.sleep) -> None:
        from huggingface_hub import HfApi, constants, get_token, set_client_factory

        set_client_factory(client_with_limits)
        self._token = get_token()
        if self._token is None:
            raise no_token()
        self.endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        self.api: HfApi = HfApi(endpoint=self.endpoint, token=self._token)
        self.note, self.wait = note, wait

    def __repr__(self) -> str:
        return f"HubClient({self.endpoint!r})"

    def url(self, target: Target) -> str:
        return f"{self.endpoint}/{target.shown}"

    def identity(self) -> Identity:
        """Whose token this is, and what it may do.

        Raises:
            HubError: there is none, or the Hub does not accept it.
        """
        answer = self.patiently("the Hub", "ask who this token belongs to", self.api.whoami)
        return read_identity(answer)

    def head(self, target: Target, revision: str | None = None) -> Head:
        """The newest commit and its files.

        Raises:
            MissingError: no such repository or revision.
        """

        def look() -> Head:
            at = revision or target.revision
            info = self.api.repo_info(target.repo, repo_type=target.kind, revision=at)
            tree = self.api.list_repo_tree(
                target.repo, repo_type=target.kind, revision=str(info.sha), recursive=True
            )
            checksums: dict[str, str] = {}
            for entry in tree:
                lfs, blob = getattr(entry, "lfs", None), getattr(entry, "blob_id", None)
                if blob is not None:
                    checksums[entry.path] = lfs.sha256 if lfs is not None else blob
            return Head(str(info.sha), bool(info.private), checksums)

        return self.patiently(target.shown, "look at the repository", look)

    def ensure(self, target: Target, public: bool) -> Head:
        """The head of a repository that is made when it is not there, and of a branch likewise.

        Raises:
            HubError: it cannot be made.
        """
        main = Target(target.repo, target.kind)
        try:
            head = self.head(main)
        except MissingError:
            self._create(target, public)
            head = self.head(main)
        else:
            if head.private == public:
                self.note(
                    f"{target.shown} is {'private' if head.private else 'public'} already and stays so."
                )
        if target.revision == "main":
            return head
        try:
            return self.head(target)
        except MissingError:
            self.note(f"{target.shown}: branch {target.revision} is made.")
            self.patiently(
                target.shown,
                f"make the branch {target.revision}",
                lambda: self.api.create_branch(target.repo, repo_type=target.kind, branch=target.revision),
            )
            return self.head(target)

    def _create(self, target: Target, public: bool) -> None:
        is_space = target.kind == "space"
        self.patiently(
            target.shown,
            "make the Space" if is_space else "make the repository",
            lambda: self.api.create_repo(
                target.repo,
                repo_type=target.kind,
                private=not public,
                exist_ok=True,
                space_sdk="gradio" if is_space else None,
            ),
        )

    def card(self, target: Target, head: Head) -> str | None:
        """README.md at a commit; None when there is none."""
        if README not in head.checksums:
            return None

        def fetch() -> str:
            with tempfile.TemporaryDirectory() as cache:
                path = self.api.hf_hub_download(
                    target.repo, README, repo_type=target.kind, revision=head.sha, cache_dir=cache
                )
                with Path(path).open(encoding="utf-8", newline="") as file:  # its line ends as they are
                    return file.read()

        return self.patiently(target.shown, "read its card", fetch)

    def push(
        self, target: Target, head: Head, files: Sequence[PlannedFile], message: str, create_pr: bool = False
    ) -> Commit:
        """Send what differs in one commit on top of `head`, and check every file on the server.

        Raises:
            ChangedError: somebody else has committed since `head` was read.
            HubError: the Hub refuses, does not answer, or holds something else than what was sent.
        """
        changed = [file for file in files if not head.has(file)]
        if not changed:
            return Commit(head.sha, ())
        if create_pr and (proposed := self._proposed(target, files)):
            return proposed
        for wait_s in (*WAITS, None):
            try:
                commit = self._commit(target, head, changed, message, create_pr)
                break
            except PassingError as error:
                if create_pr:  # whether it was opened cannot be told from here
                    raise
                landed = self._landed(target, head, files)
                if landed is not None:
                    commit = Commit(landed.sha, tuple(file.path for file in changed))
                    break
                if wait_s is None:
                    raise
                self._pause(error, wait_s)
        self._verify(target, commit, files)
        return commit

    def _commit(
        self, target: Target, head: Head, files: Sequence[PlannedFile], message: str, create_pr: bool
    ) -> Commit:
        from huggingface_hub import CommitOperationAdd

        operations = [CommitOperationAdd(file.path, str(file.local)) for file in files]
        with explained(target.shown, "send the files"):
            info = self.api.create_commit(
                target.repo,
                operations,
                commit_message=message,
                repo_type=target.kind,
                revision=target.revision,
                parent_commit=head.sha,
                create_pr=create_pr,
            )
        return Commit(info.oid, tuple(file.path for file in files), info.pr_url)

    def _landed(self, target: Target, head: Head, files: Sequence[PlannedFile]) -> Head | None:
        """The new head when our commit arrived although its answer did not; None when nothing moved."""
        now = self.head(target)
        if now.sha == head.sha:
            return None
        if all(now.has(file) for file in files):
            return now
        raise ChangedError(
            f"{target.shown}: somebody else committed {now.sha[:8]} while this was being sent",
            "Look at their commit, then run the same command again: it goes on top of it.",
        )

    def _proposed(self, target: Target, files: Sequence[PlannedFile]) -> Commit | None:
        """An open pull request that has all of this already."""

        def look() -> Commit | None:
            open_ones = self.api.get_repo_discussions(
                target.repo,
                repo_type=target.kind,
                discussion_type="pull_request",
                discussion_status="open",
            )
            for discussion in open_ones:
                revision = f"refs/pr/{discussion.num}"
                there = self.head(target, revision)
                if all(there.has(file) for file in files):
                    return Commit(there.sha, (), f"{self.url(target)}/discussions/{discussion.num}")
            return None

        return self.patiently(target.shown, "look at its pull requests", look)

    def _verify(self, target: Target, commit: Commit, files: Sequence[PlannedFile]) -> None:
        there = self.head(target, commit.sha)
        wrong = [file.path for file in files if not there.has(file)]
        if wrong:
            raise HubError(
                f"{target.shown}: after the commit {commit.sha[:8]} the Hub holds another "
                f"{', '.join(wrong[:5])}",
                "Run the same command again; if it stays so, delete the file on the Hub first.",
            )

    def patiently(self, name: str, doing: str, call: Callable[[], T]) -> T:
        """A call that may be repeated, several times where the Hub is out of order for a moment.

        Raises:
            HubError: as `explained`, after the last attempt.
        """
        for wait_s in WAITS:
            try:
                with explained(name, doing):
                    return call()
            except PassingError as error:
                self._pause(error, wait_s)
        with explained(name, doing):
            return call()

    def _pause(self, error: PassingError, wait_s: float) -> None:
        asked = wait_s if error.wait_s is None else error.wait_s
        if asked > LONGEST_WAIT:
            raise error
        self.note(f"{error.message}; trying again in {asked:.0f} s.")
        self.wait(asked)


def client_with_limits() -> httpx2.Client:
    """The Hub client's session, which by itself waits for ever."""
    import httpx2
    from huggingface_hub.utils._http import default_client_factory

    client = default_client_factory()
    answer = float(os.environ.get("SMOLCTL_HUB_TIMEOUT") or ANSWER_SECONDS)
    client.timeout = httpx2.Timeout(answer, connect=min(answer, CONNECT_SECONDS))
    return client


def read_identity(answer: Mapping[str, Any]) -> Identity:
    """What whoami answers, as far as it matters here."""
    token = (answer.get("auth") or {}).get("accessToken") or {}
    scopes = (token.get("fineGrained") or {}).get("scoped") or ()
    writable = None
    if token.get("role") == "fineGrained":
        writable = tuple(
            str((scope.get("entity") or {}).get("name", ""))
            for scope in scopes
            if any(str(right).startswith("repo.write") for right in scope.get("permissions") or ())
        )
    return Identity(
        user=str(answer.get("name", "")),
        organizations=tuple(str(org.get("name", "")) for org in answer.get("orgs") or ()),
        token_name=str(token.get("displayName") or ""),
        role=str(token.get("role") or "unknown"),
        writable=writable,
    )
