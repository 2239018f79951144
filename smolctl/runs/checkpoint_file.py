"""Checkpoint files: whether one is intact, its content, and how it is deleted.

This is the only place that decides whether a checkpoint may be used. `CheckpointIO` in `training/` writes
them; every command reads them with `read_checkpoint`.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolctl.config import RunConfig
from smolctl.config.load import resolve_run_config
from smolctl.durable import has_digest, holds_once, write_text
from smolctl.errors import RENAME, InputError
from smolctl.mapped import watch

CHECKSUM_SUFFIX = ".sha256"  # of the file next to a checkpoint, in sha256sum's format
DAMAGED, KEPT = ".damaged", ".kept"  # suffixes that `set_aside` adds to a checkpoint's name
CHECKPOINT_ENDINGS = ("", CHECKSUM_SUFFIX, DAMAGED, KEPT)
FORMAT = 2  # of smolctl's data in a checkpoint; 1 had no tokenizer and no recorded loss
ANOTHER = "Use another checkpoint of the run: this one is damaged or not complete."
NO_PICKLE, UNPACK = (
    "a zip archive, but not a PyTorch checkpoint (no data.pkl)",
    "Unpack it and name the model in it.",
)

# `torch.save` never compresses. A few compressed kilobytes could expand to more than fits in memory.
COMPRESSED, SAVE_AGAIN = (
    "its records are compressed, which those of torch.save are not",
    "Save it again with torch.save.",
)
UNREADABLE = "cannot be read (Permission denied)"
REMEDIES = {NO_PICKLE: UNPACK, COMPRESSED: SAVE_AGAIN, UNREADABLE: "Correct its permissions."}


@dataclass(frozen=True)
class CheckpointFile:
    """A checkpoint by its name; its content may be damaged."""

    step: int
    path: Path

    @property
    def damage(self) -> str:
        """Why it must not be used; "" if it is intact."""
        return find_damage(self.path)


def find_damage(path: Path) -> str:
    """Why a checkpoint must not be used; "" if its bytes are those that were written.

    They are compared with the SHA-256 next to the file. A file that was moved without it is checked with the
    CRC-32 of every record in its zip archive, which torch.save writes. The file is read once for each
    identity (`durable.holds_once`).
    """
    try:
        with zipfile.ZipFile(path) as archive:  # the directory is at the end, so a truncated file has none
            if not any(name.endswith("/data.pkl") for name in archive.namelist()):
                return NO_PICKLE
            packed = (one for one in archive.infolist() if one.compress_type != zipfile.ZIP_STORED)
            if any("/code/" not in one.filename for one in packed):  # TorchScript compresses its code
                return COMPRESSED
            expected = _recorded_digest(path)
            if expected is None:
                sound = holds_once(path, "zip", lambda: archive.testzip() is None)
            else:
                sound = has_digest(path, expected)
    except PermissionError:
        return UNREADABLE
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        size = path.stat().st_size if path.exists() else 0
        return f"damaged or cut off after {size:,} bytes ({error})"
    return "" if sound else "its bytes are not the ones that were written (checksum differs)"


def _recorded_digest(path: Path) -> str | None:
    """The SHA-256 next to a checkpoint; None if there is none."""
    checksum = Path(f"{path}{CHECKSUM_SUFFIX}")
    if not checksum.is_file():
        return None
    return checksum.read_text(encoding="ascii", errors="replace").split(" ")[0]


def read_checkpoint(path: Path, mmap: bool = True) -> dict[str, Any]:
    """The dictionary in an intact checkpoint.

    Args:
        path: the file.
        mmap: whether tensors stay on the disk until they are used.

    Raises:
        InputError: the file is damaged, is not a checkpoint, or contains code, which is never executed.
    """
    import torch

    damage = find_damage(path)
    if damage:
        raise InputError(f"{path}: {damage}", REMEDIES.get(damage, ANOTHER))
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's guesses about a damaged pickle
            if mmap:
                watch(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged pickle can fail in any way
        raise _load_error(path, error) from None
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: not a checkpoint of a training run", "Name a run folder or one of its checkpoints."
        )
    _require_known_format(content, path)
    return content


def holds_weights(content: Mapping[str, Any]) -> bool:
    """Whether a run's checkpoint has its own weights: at step 0 they may be those from which the run
    started.
    """
    return bool(content.get("state_dict"))


def _require_known_format(content: Mapping[str, Any], path: Path) -> None:
    """Refuse a checkpoint format of a later smolctl; other tools' checkpoints have none."""
    ours = content.get("smolctl")
    written = ours.get("format", 1) if isinstance(ours, Mapping) else 1
    if type(written) is not int or written < 1:
        raise InputError(f"{path}: its format number is {written!r}, which is not valid", ANOTHER)
    if written > FORMAT:
        raise InputError(
            f"{path}: written by a newer smolctl: format {written}, this one reads up to {FORMAT}",
            "Update smolctl, or use a checkpoint that this version has written.",
        )


def _load_error(path: Path, error: Exception) -> InputError:
    from torch.serialization import get_unsafe_globals_in_checkpoint

    try:
        unsafe = sorted(get_unsafe_globals_in_checkpoint(str(path)))  # reads the pickle without executing it
    except Exception:
        unsafe = []
    if unsafe and isinstance(error, pickle.UnpicklingError):
        return InputError(
            f"{path}: refused, because it holds code: {', '.join(unsafe[:3])}; nothing was executed",
            "Ask its author for safetensors, or for a checkpoint that holds tensors and plain values only.",
        )
    if isinstance(error, UnicodeEncodeError):
        return InputError(f"{path}: its name is not UTF-8", RENAME)
    if "TorchScript" in str(error):
        return InputError(
            f"{path}: a TorchScript archive, which is a program", "Save its state_dict instead."
        )
    if isinstance(error, pickle.UnpicklingError):  # PyTorch's text is long, and about its own options
        return InputError(f"{path}: damaged checkpoint: its data.pkl cannot be unpickled", ANOTHER)
    reason = (str(error) or type(error).__name__).strip().splitlines()[0][:120]
    return InputError(f"{path}: damaged checkpoint ({reason})", ANOTHER)


def recorded_config(content: Mapping[str, Any], path: Path) -> RunConfig | None:
    """The resolved config that smolctl stores in a checkpoint; None in checkpoints of other tools."""
    parameters = content.get("hyper_parameters")
    values = parameters.get("config") if isinstance(parameters, Mapping) else None
    if not isinstance(values, Mapping) or "model" not in values:
        return None
    try:
        return resolve_run_config(values, str(path))
    except InputError as error:
        raise InputError(
            error.message, f"{error.hint} If a newer smolctl has written it, update this one."
        ) from None


def write_checksum(path: Path, digest: str) -> None:
    """Write the SHA-256 of a checkpoint to a file next to it."""
    write_text(Path(f"{path}{CHECKSUM_SUFFIX}"), f"{digest}  {path.name}\n")


def remove_checksum(path: Path) -> None:
    """Delete the file with a checkpoint's SHA-256, if there is one."""
    Path(f"{path}{CHECKSUM_SUFFIX}").unlink(missing_ok=True)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint and its checksum."""
    path.unlink(missing_ok=True)
    remove_checksum(path)


def link_checkpoint(path: Path, link: Path) -> None:
    """Give a checkpoint a second name in the same folder, which replaces an existing file: a hard link, or a
    symbolic one if the file system has no hard links.
    """
    remove_checkpoint(link)
    try:
        link.hardlink_to(path)
    except OSError:
        link.symlink_to(path.name)
    if (digest := _recorded_digest(path)) is not None:
        write_checksum(link, digest)


def is_recorded_alike(one: Path, other: Path) -> bool:
    """Whether two checkpoints are the same file, or have equal recorded checksums."""
    digest = _recorded_digest(one)
    return one.samefile(other) or (digest is not None and digest == _recorded_digest(other))


def rename_checkpoint(path: Path, target: Path) -> None:
    """Rename a checkpoint together with its checksum file."""
    digest = _recorded_digest(path)
    path.replace(target)
    remove_checksum(path)
    if digest is not None:
        write_checksum(target, digest)


def set_aside(path: Path) -> None:
    """Rename a checkpoint such that commands ignore it but it is kept."""
    path.replace(f"{path}{DAMAGED if find_damage(path) else KEPT}")
    remove_checksum(path)
