"""Which files are smolctl's, and may be replaced and published: exactly those in a folder's record.

Every folder that smolctl writes contains `.smolctl.json`: the kind of the folder, and its files. A folder
without it is not smolctl's, whatever the names of its files. A name in a folder may also be a link to a file
elsewhere: `require_inside` refuses such files before they are published.
"""

from __future__ import annotations

import glob
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

from smolctl import __version__
from smolctl.durable import file_digest, folder_of, require_writable, sync_folder, write_json, writing_alone
from smolctl.errors import InputError, UsageError
from smolctl.outside import checked, parse_object, read_file

RECORD = ".smolctl.json"
FORMAT = 1
UNFINISHED = "folder that is being written"


@dataclass(frozen=True)
class Record:
    """The record of smolctl's files in a folder.

    Args:
        kind: of the folder: "run", "quantized model", "repository".
        files: patterns of paths inside it. `*` matches a part of one name, `/**` at the end everything below,
            and `/` at the end a folder that has its own record. Each has the SHA-256 of the written file, if
            later edits must be detected.
        id: distinguishes this folder from others of its kind.
        version: of smolctl.
    """

    kind: str
    files: Mapping[str, str | None]
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    version: str = __version__
    format: int = FORMAT

    def names(self, path: str, is_folder: bool = False) -> bool:
        """Whether a path inside the folder is in the record."""
        place = PurePosixPath("/", path)
        for pattern in (RECORD, *self.files):
            if pattern.endswith("/**"):
                if not is_folder and path.startswith(pattern[:-2]):
                    return True
            elif pattern.endswith("/") == is_folder and place.match(f"/{pattern}"):
                return True
        return False

    def leads_to(self, path: str) -> bool:
        """Whether files of the record may be below a path."""
        parts = PurePosixPath(path).parts
        for pattern in self.files:
            above = PurePosixPath(pattern).parts[: len(parts)]
            if len(above) == len(parts) and PurePosixPath("/", path).match(f"/{PurePosixPath(*above)}"):
                return True
        return False


def read_record(folder: Path) -> Record | None:
    """The record in a folder; None if there is none that can be read."""
    try:
        return parse_record(read_file(folder / RECORD))
    except InputError:
        return None


def parse_record(content: bytes) -> Record | None:
    """Parse a record; None if the bytes are not in this format."""
    try:
        record = checked(Record, parse_object(content, RECORD), RECORD)
    except InputError:
        return None
    return record if record.format == FORMAT else None


def write_record(folder: Path, record: Record) -> None:
    """Write the record of smolctl's files in a folder."""
    write_json(folder / RECORD, asdict(record))


def edited_files(folder: Path) -> tuple[str, ...]:
    """Files that were changed after smolctl wrote them, among those with a recorded SHA-256."""
    return tuple(
        name
        for name, _, digest in (_files(folder) if folder.is_dir() else ())
        if digest and file_digest(folder / name) != digest
    )


def require_replaceable(
    target: Path, kind: str, option: str, force: bool, reads: Iterable[str], is_moved: bool = True
) -> None:
    """Refuse to replace anything that is not smolctl's, or that the user did not ask to replace, or that
    cannot be written.

    Args:
        target: the folder to write.
        kind: of the new folder.
        option: of the command line that names the folder.
        force: replace a folder of the same kind that smolctl wrote.
        reads: inputs of the command: files, folders, RUN@STEP. Other names are ignored.
        is_moved: whether the new folder is built next to the target and then moved there, see `building`.

    Raises:
        UsageError: naming what is there.
        DiskError: nothing can be written there.
    """
    another = f"Choose another {option}."
    real = _place(target, another)
    if real.exists() and not real.is_dir():
        raise UsageError(f"{target} is a file, not a folder", another)
    for folder in (real, real.parent) if is_moved else (real,):
        require_writable(folder, another)
    if not real.is_dir() or not any(real.iterdir()):
        return
    _require_not_read(target, option, reads)
    if not force:
        raise UsageError(
            f"{target} is not empty", f"Choose another {option}, or replace what smolctl wrote with --force."
        )
    record = read_record(real)
    if record is None or record.kind != kind:
        found = f"a {record.kind}" if record else f"not a {kind} that smolctl wrote: it has no {RECORD}"
        raise UsageError(f"{target} is not replaced, because it is {found}", another)
    for path in real.rglob("*"):
        name = path.relative_to(real).as_posix()
        if path.is_symlink() and path.is_dir() and record.leads_to(name):
            raise UsageError(f"{target} is not replaced, because {path} in it is a link", another)


def require_replaceable_file(
    target: Path,
    option: str,
    force: bool,
    reads: Iterable[str],
    is_own: Callable[[Path], bool],
    folder_is_made: bool = False,
) -> None:
    """`require_replaceable` for a single file, whose content shows who wrote it.

    Args:
        is_own: whether smolctl wrote the existing file.
        folder_is_made: whether the command creates the file's folder.
    """
    another = f"Choose another {option}."
    _place(target, another)
    if target.is_dir():
        raise UsageError(f"{target} is a folder, not a file", another)
    require_writable(target.parent, another)
    if not target.exists():
        if not folder_is_made:
            require_folder_of(target, another)
        return
    _require_not_read(target, option, reads)
    if not force:
        raise UsageError(
            f"{target} already exists", f"Choose another {option}, or replace the file with --force."
        )
    if not is_own(target):
        raise UsageError(
            f"{target} is not replaced, because smolctl did not write it as this kind of file", another
        )


def require_folder_of(target: Path, remedy: str) -> None:
    """Refuse a file to be written whose folder does not exist. Raises UsageError."""
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent} is not a folder that a file can be written to", remedy)


def _place(target: Path, another: str) -> Path:
    """The real path of what is to be written. Raises UsageError: there can be nothing at this path."""
    try:
        real = target.resolve()
    except (OSError, RuntimeError):  # RuntimeError before Python 3.13
        raise UsageError(f"{target}: its links form a loop", another) from None
    above = next(path for path in real.parents if path.exists())
    if not above.is_dir():
        raise UsageError(f"{target}: {above} is a file, not a folder", another)
    return real


def _require_not_read(target: Path, option: str, reads: Iterable[str]) -> None:
    for name in filter(None, reads):
        path = Path(name if Path(name).exists() else name.rpartition("@")[0] or name)
        if path.exists() and path.resolve().is_relative_to(target.resolve()):
            raise UsageError(
                f"{target} is not replaced, because this command reads {name}", f"Choose another {option}."
            )


def own_files(folder: Path) -> tuple[str, ...]:
    """Paths of smolctl's files in a folder, including links."""
    return tuple(name for name, is_ours, _ in _files(folder) if is_ours) if folder.is_dir() else ()


def strange_files(folder: Path) -> tuple[str, ...]:
    """Paths of the files in a folder that are not smolctl's."""
    return tuple(name for name, is_ours, _ in _files(folder) if not is_ours) if folder.is_dir() else ()


def require_inside(folder: Path, names: Iterable[str]) -> None:
    """Refuse files that are only apparently in a folder, so that no file from elsewhere is published.

    Args:
        folder: to be published or copied; it may itself be named through a link. A snapshot in the Hub
            client's cache includes the folder of its repository, where the files really are.
        names: paths inside it; missing ones are ignored.

    Raises:
        InputError: a link leads out of the folder, or a file has another name (a hard link) outside of it.
    """
    root = folder.resolve()
    if root.parent.name == "snapshots" and (root.parent.parent / "blobs").is_dir():
        root = root.parent.parent
    for name in names:
        path = folder / name
        if path.is_symlink() and not path.exists():
            continue
        real = path.resolve()
        if not real.is_relative_to(root):
            raise InputError(
                f"{path} is refused, because it is a link to {real}, outside of the folder",
                "Put a copy in the place of the link, or remove it.",
            )
        if real.is_file() and (links := real.stat().st_nlink) > 1:
            names_of = (other for other in root.rglob("*") if not other.is_symlink() and other.is_file())
            inside = sum(other.samefile(real) for other in names_of)
            if inside < links:
                raise InputError(
                    f"{path} is refused, because it is a hard link to a file outside of the folder",
                    f"Make it a file of its own: cp {path} COPY && mv COPY {path}",
                )


def remove_own_files(folder: Path) -> tuple[str, ...]:
    """Delete smolctl's files in a folder, and subfolders that become empty; never the folder itself.

    Returns:
        The files that are kept because they are not smolctl's.
    """
    files = list(_files(folder))  # listed first, because the record is deleted too
    for name, is_ours, _ in files:
        if is_ours:
            path = folder / name
            path.unlink()
            while (path := path.parent) != folder and not any(path.iterdir()):
                path.rmdir()
    return tuple(name for name, is_ours, _ in files if not is_ours)


def kept_files(folder: Path, names: Sequence[str]) -> str:
    """A sentence for the user on files in a folder that were not replaced."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{folder}: kept, because smolctl did not write them: {', '.join(names[:5])}{more}"


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """A temporary folder next to `target` for new content, which `put_in_place` then moves.

    The next call deletes the leftovers of a process that died.

    Raises:
        DiskError: another process is writing the target.
    """
    real = target.resolve()
    work = real.with_name(f".{real.name}.partial")
    folder = work / real.name
    with folder_of(work):
        record = read_record(work)
        work.mkdir(exist_ok=record is not None and record.kind == UNFINISHED)
        with writing_alone(work, target):
            try:
                shutil.rmtree(folder, ignore_errors=True)
                write_record(work, Record(UNFINISHED, {}))
                folder.mkdir()
                yield folder
            finally:
                shutil.rmtree(work, ignore_errors=True)


def put_in_place(built: Path, target: Path) -> tuple[str, ...]:
    """Move a built folder to `target`, replacing smolctl's files there.

    Old and new files are never mixed, whenever the process dies, because the old ones are deleted first.

    Args:
        built: from `building`.
        target: where smolctl's own files may be replaced, see `require_replaceable`.

    Returns:
        The files that are kept because they are not smolctl's.
    """
    real = target.resolve()
    stays: tuple[str, ...] = ()
    if real.is_dir():
        stays = remove_own_files(real)
        for path in sorted(path for path in built.rglob("*") if path.is_file()):  # its record is moved first
            place = real / path.relative_to(built)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)
        sync_folder(real)
    else:
        built.rename(real)
    sync_folder(real.parent)
    return stays


def _files(
    folder: Path, record: Record | None = None, inside: str = ""
) -> Iterable[tuple[str, bool, str | None]]:
    """Every file below a folder, including links to folders; whether it is smolctl's; its recorded SHA-256.

    Args:
        folder: whose record applies, except in subfolders that have their own.
        record: of `folder`, if it was already read.
        inside: path of a part of it.
    """
    record = record or read_record(folder)
    for path in sorted((folder / inside).iterdir()):
        name = f"{inside}{path.name}"
        if path.is_symlink() or not path.is_dir():
            digest = record.files.get(glob.escape(name)) if record else None
            yield name, record is not None and record.names(name), digest
        elif (path / RECORD).is_file():
            is_ours = record is not None and record.names(name, is_folder=True)
            for below, ours, digest in _files(path):
                yield f"{name}/{below}", is_ours and ours, digest
        else:
            yield from _files(folder, record, f"{name}/")
