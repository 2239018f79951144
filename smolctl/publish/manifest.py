"""smolctl's files in a repository: a record in it by which the next push finds stale files.

It is the `.smolctl.json` of every folder that smolctl writes (see `ownership`), with the SHA-256 of each
file. A file of an earlier push that the new one does not contain is deleted in the same commit. A file that
is not in the record, or that somebody has changed since, belongs to other people.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from smolctl.hub.client import Head, HubClient, Target
from smolctl.hub.errors import MissingError
from smolctl.hub.files import README, PlannedFile, planned_file
from smolctl.ownership import RECORD, Record, parse_record, write_record

KIND = "repository"
GIT_ATTRIBUTES = ".gitattributes"  # the Hub's own


@dataclass(frozen=True)
class RemoteRepo:
    """The current content of a repository on the Hub."""

    head: Head | None = None  # None: it does not exist, or the Hub was not asked
    card: str | None = None
    record: Record | None = None  # None: there is no file of smolctl's, or only of a version without records


@dataclass(frozen=True)
class RepoPlan:
    """The planned files of smolctl in a repository, and the plan for the others."""

    files: tuple[PlannedFile, ...]
    remote: RemoteRepo = RemoteRepo()
    removed: tuple[str, ...] = ()  # from an earlier push
    replaced: tuple[str, ...] = ()  # files of other people, or of a push without a record
    stays: tuple[str, ...] = ()  # files of other people


def read_remote(client: HubClient | None, target: Target) -> RemoteRepo:
    """Read a branch, or main, from which a new branch is created. Empty without a client."""
    if client is None:
        return RemoteRepo()
    try:
        head = client.head(target)
    except MissingError:
        main = replace(target, revision="main")
        return RemoteRepo() if target == main else read_remote(client, main)
    card, content = client.read(target, head, README), client.read(target, head, RECORD)
    record = parse_record(content) if content else None
    text = None if card is None else card.decode("utf-8", errors="replace")
    return RemoteRepo(head, text, record if record and record.kind == KIND else None)


def plan_repo(
    client: HubClient | None, target: Target, remote: RemoteRepo, folder: Path, files: Sequence[PlannedFile]
) -> RepoPlan:
    """Write the record next to the files to upload, and return the plan for the repository's other files.

    Args:
        client: for reading files whose checksum the Hub does not provide.
        target: the repository.
        remote: its current content.
        folder: of the files.
        files: all files to upload, except the record.
    """
    names: dict[str, str | None] = {glob.escape(file.path): file.sha256 for file in files}
    if client is not None:
        names[README] = None  # people edit it, also on the Hub: it is never deleted
    # The same record for the same files, so that pushing again changes nothing.
    identity = hashlib.sha256(target.shown.encode()).hexdigest()[:16]
    write_record(folder, Record(KIND, names, identity))
    planned = (*files, planned_file(folder, RECORD))
    if remote.head is None or client is None:
        return RepoPlan(planned, remote)
    recorded = remote.record.files if remote.record else {}
    paths = {file.path for file in planned}
    removed: list[str] = []
    stays: list[str] = []
    for path in sorted(remote.head.checksums.keys() - paths - {GIT_ATTRIBUTES}):
        digest = recorded.get(glob.escape(path))
        is_ours = digest is not None and digest in _digests(client, target, remote.head, path)
        (removed if is_ours else stays).append(path)
    replaced = tuple(
        file.path
        for file in files
        if file.path in remote.head.checksums
        and file.path != README
        and not remote.head.has(file)
        and glob.escape(file.path) not in recorded
    )
    return RepoPlan(planned, remote, tuple(removed), replaced, tuple(stays))


def _digests(client: HubClient, target: Target, head: Head, path: str) -> tuple[str, str]:
    """Possible SHA-256 of a file on the Hub: its checksum is a SHA-256 in LFS, and a SHA-1 otherwise."""
    checksum = head.checksums[path]
    if len(checksum) == 64:
        return checksum, checksum
    return checksum, hashlib.sha256(client.read(target, head, path) or b"").hexdigest()
