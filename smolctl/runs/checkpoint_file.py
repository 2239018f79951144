"""Checkpoint files: whether one is sound, what is in it, and how it goes.

This is the one place that decides whether a checkpoint may be used. `CheckpointIO` in `training/` writes
them; every command reads them through `read_checkpoint`.
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
from smolctl.errors import InputError

CHECKSUM_SUFFIX = ".sha256"  # of the file beside a checkpoint, in sha256sum's format
DAMAGED, KEPT = ".damaged", ".kept"  # what `set_aside` adds to a checkpoint's name
CHECKPOINT_ENDINGS = ("", CHECKSUM_SUFFIX, DAMAGED, KEPT)
FORMAT = 2  # of what smolctl adds to Lightning's checkpoint; 1 had no tokenizer and no recorded loss
ANOTHER = "Use another checkpoint of the run: this one is damaged or not complete."
NO_PICKLE, UNPACK = (
    "a zip archive, but not a PyTorch checkpoint (no data.pkl)",
    "Unpack it and name the model in it.",
)

# `torch.save` never compresses. A few kilobytes could stand for more than the memory holds.
COMPRESSED, SAVE_AGAIN = (
    "its records are compressed, which those of torch.save are not",
    "Save it again with torch.save.",
)
REMEDIES = {NO_PICKLE: UNPACK, COMPRESSED: SAVE_AGAIN}


@dataclass(frozen=True)
class CheckpointFile:
    """A checkpoint by its name; its content may be damaged."""

    step: int
    path: Path

    @property
    def damage(self) -> str:
        """Why it must not be used; "" when it is sound."""
        return find_damage(self.path)


def find_damage(path: Path) -> str:
    """Why a checkpoint must not be used; "" when its bytes are those that were written.

    They are compared with the SHA-256 beside the file. A file that was moved without it is checked by the
    CRC-32 that torch.save gives every record of its zip archive. Either is read once for each identity of
    the file (`durable.holds_once`).
    """
    try:
        with zipfile.ZipFile(path) as archive:  # the directory stands at the end: a file cut off has none
            if not any(name.endswith("/data.pkl") for name in archive.namelist()):
                return NO_PICKLE
            packed = (one for one in archive.infolist() if one.compress_type != zipfile.ZIP_STORED)
            if any("/code/" not in one.filename for one in packed):  # that of a TorchScript archive is
                return COMPRESSED
            expected = _recorded_digest(path)
            if expected is None:
                sound = holds_once(path, "zip", lambda: archive.testzip() is None)
            else:
                sound = has_digest(path, expected)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        size = path.stat().st_size if path.exists() else 0
        return f"damaged or cut off after {size:,} bytes ({error})"
    return "" if sound else "its bytes are not the ones that were written (checksum differs)"


def _recorded_digest(path: Path) -> str | None:
    """The SHA-256 beside a checkpoint; None where there is none."""
    checksum = Path(f"{path}{CHECKSUM_SUFFIX}")
    if not checksum.is_file():
        return None
    return checksum.read_text(encoding="ascii", errors="replace").split(" ")[0]


def read_checkpoint(path: Path, mmap: bool = True) -> dict[str, Any]:
    """The dictionary in a sound checkpoint.

    Args:
        path: the file.
        mmap: whether tensors stay on the disk until they are used.

    Raises:
        InputError: the file is damaged, no checkpoint, or holds code, which is never executed.
    """
    import torch

    damage = find_damage(path)
    if damage:
        raise InputError(f"{path}: {damage}", REMEDIES.get(damage, ANOTHER))
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's guesses about a damaged pickle
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
    """Whether a run's checkpoint has weights of its own: at step 0 they may be those that it began with."""
    return bool(content.get("state_dict"))


def _require_known_format(content: Mapping[str, Any], path: Path) -> None:
    """Refuse what a later smolctl has added to a checkpoint; other tools' have nothing of ours in them."""
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
        unsafe = sorted(get_unsafe_globals_in_checkpoint(str(path)))  # reads the pickle, does not run it
    except Exception:
        unsafe = []
    if unsafe and isinstance(error, pickle.UnpicklingError):
        return InputError(
            f"{path}: refused, because it holds code: {', '.join(unsafe[:3])}; nothing was executed",
            "Ask its author for safetensors, or for a checkpoint that holds tensors and plain values only.",
        )
    if "TorchScript" in str(error):
        return InputError(
            f"{path}: a TorchScript archive, which is a program", "Save its state_dict instead."
        )
    if isinstance(error, pickle.UnpicklingError):  # PyTorch's text is long, and about its own options
        return InputError(f"{path}: damaged checkpoint: its data.pkl cannot be unpickled", ANOTHER)
    reason = (str(error) or type(error).__name__).strip().splitlines()[0][:120]
    return InputError(f"{path}: damaged checkpoint ({reason})", ANOTHER)


def recorded_config(content: Mapping[str, Any], path: Path) -> RunConfig | None:
    """The resolved config that smolctl keeps in a checkpoint; None in checkpoints of other tools."""
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
    """Record the SHA-256 of a checkpoint beside it."""
    write_text(Path(f"{path}{CHECKSUM_SUFFIX}"), f"{digest}  {path.name}\n")


def remove_checksum(path: Path) -> None:
    """Delete the record of a checkpoint's SHA-256, where there is one."""
    Path(f"{path}{CHECKSUM_SUFFIX}").unlink(missing_ok=True)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint and its checksum."""
    path.unlink(missing_ok=True)
    remove_checksum(path)


def link_checkpoint(path: Path, link: Path) -> None:
    """Give a checkpoint a second name in the same folder: a hard link, or a symbolic one where the file
    system has no hard links. What had the name before loses it.
    """
    remove_checkpoint(link)
    try:
        link.hardlink_to(path)
    except OSError:
        link.symlink_to(path.name)
    if (digest := _recorded_digest(path)) is not None:
        write_checksum(link, digest)


def is_recorded_alike(one: Path, other: Path) -> bool:
    """Whether two checkpoints are one file, or were written with the same bytes as their checksums say."""
    digest = _recorded_digest(one)
    return one.samefile(other) or (digest is not None and digest == _recorded_digest(other))


def rename_checkpoint(path: Path, target: Path) -> None:
    """Give a checkpoint another name in place of the one that it has; its checksum goes along."""
    digest = _recorded_digest(path)
    path.replace(target)
    remove_checksum(path)
    if digest is not None:
        write_checksum(target, digest)


def set_aside(path: Path) -> None:
    """Rename a checkpoint, so that no command uses it and it can still be looked at."""
    path.replace(f"{path}{DAMAGED if find_damage(path) else KEPT}")
    remove_checksum(path)
