"""Writes to the Hub: one commit, and the check that it arrived."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import quote

from smolctl.errors import HubError
from smolctl.hub.connection import api, choosing_transfer, endpoint, fetch
from smolctl.hub.errors import (
    STRANGE,
    TABLE,
    WRITING,
    ChangedError,
    MissingError,
    TemporaryError,
    explained,
)
from smolctl.hub.files import PlannedFile
from smolctl.hub.identity import Identity, read_identity

T = TypeVar("T")
WAITS = (1.0, 2.0, 4.0)  # seconds before another attempt, unless the Hub specifies them
LONGEST_WAIT = 300.0
SENDING = "send the files"
MAX_TEXT_BYTES = 10_000_000


@dataclass(frozen=True)
class Target:
    """The repository and revision to write to."""

    repo: str
    kind: str = "model"  # or space
    revision: str = "main"

    @property
    def shown(self) -> str:
        return f"spaces/{self.repo}" if self.kind == "space" else self.repo


@dataclass(frozen=True)
class Head:
    """A repository at a commit."""

    sha: str
    private: bool
    checksums: Mapping[str, str] = field(repr=False)  # path to sha256 (LFS) or git's sha1

    def has(self, file: PlannedFile) -> bool:
        return self.checksums.get(file.path) in (file.sha256, file.git_sha1)

    def is_as_planned(self, files: Iterable[PlannedFile], removed: Iterable[str]) -> bool:
        """Whether the repository already has exactly these files."""
        return all(map(self.has, files)) and not any(path in self.checksums for path in removed)


@dataclass(frozen=True)
class Commit:
    """A verified push."""

    sha: str
    sent: tuple[str, ...]  # paths; empty if everything was already there
    removed: tuple[str, ...] = ()
    pull_request: str | None = None


class HubClient:
    """A client for writing to the Hub, with retries and smolctl's errors.

    Args:
        note: called with a line about slow work or a decision.
        wait: sleeps this many seconds.

    Raises:
        HubError: there is no token.
    """

    def __init__(self, note: Callable[[str], None], wait: Callable[[float], None] = time.sleep) -> None:
        from huggingface_hub import get_token

        token = get_token()
        if token is None:
            kind, cause, remedy = TABLE["LocalTokenNotFoundError"]
            raise kind(cause, remedy.format(right=WRITING.right))
        self.api = api(token)
        self.note, self.wait = note, wait

    def url(self, target: Target) -> str:
        return f"{endpoint()}/{target.shown}"

    def _api_url(self, target: Target) -> str:
        return f"{endpoint()}/api/{target.kind}s/{target.repo}"

    def identity(self) -> Identity:
        """The owner of the token and its permissions.

        Raises:
            HubError: there is no token, or the Hub does not accept it.
        """
        return read_identity(self.patiently("", "ask who this token belongs to", self.api.whoami))

    def head(self, target: Target, revision: str | None = None) -> Head:
        """The newest commit and its files.

        Raises:
            MissingError: there is no such repository or revision.
        """
        at = revision or target.revision
        info = self._ask(target, "look at the repository", self.api.repo_info, revision=at)
        tree = self._list(
            target, "list its files", self.api.list_repo_tree, revision=info.sha, recursive=True
        )
        checksums: dict[str, str] = {}
        for entry in tree:
            lfs, blob = getattr(entry, "lfs", None), getattr(entry, "blob_id", None)
            if blob is not None:
                checksums[entry.path] = lfs.sha256 if lfs is not None else blob
        return Head(str(info.sha), bool(info.private), checksums)

    def ensure(self, target: Target, public: bool, space_sdk: str | None = None) -> Head:
        """The head of a repository and branch, which are created if they do not exist.

        Args:
            target: the repository.
            public: whether a new repository is public.
            space_sdk: for a new Space.

        Raises:
            HubError: the repository cannot be created.
        """
        main = Target(target.repo, target.kind)
        try:
            head = self.head(main)
            if head.private == public:
                shown = "private" if head.private else "public"
                self.note(f"{target.shown} is {shown} already, and does not change.")
        except MissingError:
            of: dict[str, Any] = {"private": not public, "exist_ok": True, "space_sdk": space_sdk}
            self._ask(target, "create the repository", self.api.create_repo, **of)
            head = self.head(main)
        if target.revision == "main":
            return head
        try:
            return self.head(target)
        except MissingError:
            branch = target.revision
            self.note(f"{target.shown}: branch {branch} was created.")
            self._ask(target, f"create the branch {branch}", self.api.create_branch, branch=branch)
            return self.head(target)

    def read(self, target: Target, head: Head, path: str) -> bytes | None:
        """Read a small file at a commit, such as README.md; None if it does not exist."""
        if path not in head.checksums:
            return None
        url = f"{self.url(target)}/resolve/{head.sha}/{quote(path)}"
        token = self.api.token
        found = self.patiently(target.shown, f"read {path}", lambda: fetch(url, MAX_TEXT_BYTES, token=token))
        return found.content

    def push(
        self,
        target: Target,
        head: Head,
        files: Sequence[PlannedFile],
        message: str,
        create_pr: bool = False,
        removed: Sequence[str] = (),
    ) -> Commit:
        """Send changed files in one commit on top of `head`, and check every file on the server.

        Args:
            target: the repository.
            head: its current commit and files.
            files: all files that it must contain.
            message: commit message.
            create_pr: open a pull request instead.
            removed: paths of files to delete in the same commit.

        Raises:
            ChangedError: somebody else has committed since `head` was read.
            HubError: the Hub refuses, does not respond, or has other content than was sent.
        """
        if head.is_as_planned(files, removed):
            return Commit(head.sha, ())
        if create_pr and (proposed := self._proposed(target, files, removed)):
            return proposed
        changed = [file for file in files if not head.has(file)]
        gone = tuple(path for path in removed if path in head.checksums)
        sent = tuple(file.path for file in changed)

        def attempt() -> Commit:
            try:
                sha, page = self._commit(target, head, changed, gone, message, create_pr)
            except TemporaryError:
                # A retry cannot see whether a pull request was opened.
                landed = None if create_pr else self._landed(target, head, files, gone)
                if landed is None:
                    raise
                return Commit(landed.sha, sent, gone)
            return Commit(sha, sent, gone, page)

        commit = attempt() if create_pr else self.patiently(target.shown, SENDING, attempt)
        there = self.head(target, commit.sha)
        wrong = [file.path for file in files if not there.has(file)]
        wrong += [path for path in gone if path in there.checksums]
        if wrong:
            raise HubError(
                f"{target.shown}: after the commit {commit.sha[:8]} the Hub has different content in "
                f"{', '.join(wrong[:5])}",
                "Run the same command again; if that does not help, delete the file on the Hub first.",
            )
        return commit

    def _commit(
        self,
        target: Target,
        head: Head,
        changed: Sequence[PlannedFile],
        gone: Sequence[str],
        message: str,
        create_pr: bool,
    ) -> tuple[str, str | None]:
        """Send one commit. Returns its hash and, for a pull request, its page."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        xet_token = f"{self._api_url(target)}/xet-write-token/{quote(target.revision, safe='')}"
        xet_token += "?create_pr=1" if create_pr else ""
        with (
            explained(target.shown, WRITING, SENDING),
            choosing_transfer(xet_token, self.api.token, self.note),
        ):
            info = self.api.create_commit(
                target.repo,
                [
                    *(CommitOperationAdd(file.path, str(file.local)) for file in changed),
                    *(CommitOperationDelete(path) for path in gone),
                ],
                commit_message=message,
                repo_type=target.kind,
                revision=target.revision,
                parent_commit=head.sha,
                create_pr=create_pr,
            )
        return info.oid, info.pr_url

    def _landed(
        self, target: Target, head: Head, files: Sequence[PlannedFile], removed: Sequence[str]
    ) -> Head | None:
        """The new head if the commit arrived although the response did not; None if the head has not
        changed.
        """
        now = self.head(target)
        if now.sha == head.sha:
            return None
        if now.is_as_planned(files, removed):
            return now
        raise ChangedError(
            f"{target.shown}: somebody else committed {now.sha[:8]} while this was being sent",
            "Look at their commit, then run the same command again: your push is then made on top of it.",
        )

    def _proposed(
        self, target: Target, files: Sequence[PlannedFile], removed: Sequence[str]
    ) -> Commit | None:
        """An open pull request that already contains all of this."""
        wanted = {"discussion_type": "pull_request", "discussion_status": "open"}
        listed = self.api.get_repo_discussions
        for discussion in self._list(target, "look at its pull requests", listed, **wanted):
            there = self.head(target, f"refs/pr/{discussion.num}")
            if there.is_as_planned(files, removed):
                page = f"{self.url(target)}/discussions/{discussion.num}"
                return Commit(there.sha, (), pull_request=page)
        return None

    def _ask(self, target: Target, doing: str, method: Callable[..., T], **options: Any) -> T:
        """Call a method of the Hub's client for a repository, with retries."""
        kind = target.kind
        return self.patiently(target.shown, doing, lambda: method(target.repo, repo_type=kind, **options))

    def _list(
        self, target: Target, doing: str, method: Callable[..., Iterable[T]], **options: Any
    ) -> list[T]:
        """Collect the results of a method that requests every page from the Hub."""
        return self._ask(target, doing, lambda *repo, **of: list(method(*repo, **of)), **options)

    def patiently(self, name: str, doing: str, call: Callable[[], T]) -> T:
        """Make a repeatable call, with retries if the Hub has a temporary problem.

        Args:
            name: the path of the repository's page; "" for the Hub itself.
            doing: the action, as in "cannot {doing}".
            call: makes the call.

        Raises:
            HubError: as `explained`, after the last attempt.
        """
        waits = iter((*WAITS, None))
        while True:
            try:
                with explained(name or "the Hub", WRITING, doing, name, wrappers=STRANGE):
                    return call()
            except TemporaryError as error:
                wait_s = next(waits)
                asked_s = error.wait_s or wait_s
                if wait_s is None or asked_s is None or asked_s > LONGEST_WAIT:
                    raise
                self.note(f"{error.message}; trying again in {asked_s:.0f} s.")
                self.wait(asked_s)
