"""What smolctl has put into a repository: a record in it, by which the next push knows what is stale.

It is the same `.smolctl.json` that stands in every folder of smolctl's (see `ownership`), with the SHA-256 of
each file. A file that an earlier push put there and this one has no more goes in the same commit. A file that
no record names, or that somebody has changed since, is other people's.
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
class There:
    """What a repository on the Hub holds already."""

    head: Head | None = None  # None: it is not there, or nobody was asked
    card: str | None = None
    record: Record | None = None  # None: nothing of smolctl's, or of a version that kept no record


@dataclass(frozen=True)
class RepoPlan:
    """What a repository is to hold of smolctl's, and what becomes of the rest."""

    files: tuple[PlannedFile, ...]
    there: There = There()
    removed: tuple[str, ...] = ()  # an earlier push put them there
    replaced: tuple[str, ...] = ()  # files of other people's, or of a push without a record
    stays: tuple[str, ...] = ()  # other people's


def look(client: HubClient | None, target: Target) -> There:
    """What a branch holds, or main, from which a new branch is made. Nothing without a client."""
    if client is None:
        return There()
    try:
        head = client.head(target)
    except MissingError:
        main = replace(target, revision="main")
        return There() if target == main else look(client, main)
    card, content = client.read(target, head, README), client.read(target, head, RECORD)
    record = parse_record(content) if content else None
    text = None if card is None else card.decode("utf-8", errors="replace")
    return There(head, text, record if record and record.kind == KIND else None)


def plan_repo(
    client: HubClient | None, target: Target, there: There, folder: Path, files: Sequence[PlannedFile]
) -> RepoPlan:
    """Write the record beside the files that go up, and return what else the repository holds.

    Args:
        client: to look at files whose checksum the Hub does not give.
        target: the repository.
        there: what it holds now.
        folder: of the files.
        files: all that goes up, but for the record.
    """
    names: dict[str, str | None] = {glob.escape(file.path): file.sha256 for file in files}
    if client is not None:
        names[README] = None  # people write in it, on the Hub too: it never goes
    # The same for the same files, so that pushing again changes nothing.
    identity = hashlib.sha256(target.shown.encode()).hexdigest()[:16]
    write_record(folder, Record(KIND, names, identity))
    planned = (*files, planned_file(folder, RECORD))
    if there.head is None or client is None:
        return RepoPlan(planned, there)
    recorded = there.record.files if there.record else {}
    paths = {file.path for file in planned}
    removed: list[str] = []
    stays: list[str] = []
    for path in sorted(there.head.checksums.keys() - paths - {GIT_ATTRIBUTES}):
        digest = recorded.get(glob.escape(path))
        is_ours = digest is not None and digest in _digests(client, target, there.head, path)
        (removed if is_ours else stays).append(path)
    replaced = tuple(
        file.path
        for file in files
        if file.path in there.head.checksums
        and file.path != README
        and not there.head.has(file)
        and glob.escape(file.path) not in recorded
    )
    return RepoPlan(planned, there, tuple(removed), replaced, tuple(stays))


def _digests(client: HubClient, target: Target, head: Head, path: str) -> tuple[str, str]:
    """What may be the SHA-256 of a file on the Hub: its checksum is that in LFS, and SHA-1 otherwise."""
    checksum = head.checksums[path]
    if len(checksum) == 64:
        return checksum, checksum
    return checksum, hashlib.sha256(client.read(target, head, path) or b"").hexdigest()
