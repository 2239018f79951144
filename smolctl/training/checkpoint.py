"""Checkpoints that survive: written beside the target, synced, read back, then renamed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch

from smolctl.durable import HashingFile, file_digest, lack_of_room, sync_folder
from smolctl.errors import InputError, SmolError
from smolctl.runs.folder import damage_of
from smolctl.training.lightning import CheckpointIO

CHECKSUM_SUFFIX = ".sha256"  # of the file beside a checkpoint, in sha256sum's format


class SaveError(SmolError):
    """A checkpoint could not be written; the ones before it are as they were."""


class DurableCheckpointIO(CheckpointIO):
    """Lightning's checkpoint files, written so that a crash or a full disk costs nothing good."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write, sync, read back, rename.

        Raises:
            SaveError: no room, no permission, or the disk returned other bytes than were written.
        """
        target = Path(path)
        partial = target.with_name(f".{target.name}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _check_room(checkpoint, target)
            with partial.open("wb") as file:
                hashing = HashingFile(file)
                torch.save(checkpoint, cast(IO[bytes], hashing))
                file.flush()
                os.fsync(file.fileno())
            digest = hashing.digest.hexdigest()
            if file_digest(partial) != digest:
                raise SaveError(
                    f"{target}: the disk returned other bytes than were written", "Check the disk."
                )
            # A checksum never stands beside other bytes than its own, whenever the process dies.
            Path(f"{target}{CHECKSUM_SUFFIX}").unlink(missing_ok=True)
            partial.replace(target)
            _write_checksum(target, digest)
            sync_folder(target.parent)
        except OSError as error:
            raise SaveError(
                f"{target}: the checkpoint cannot be written ({error.strerror or error})",
                "Free some space or choose another --out; earlier checkpoints are untouched.",
            ) from error
        finally:
            partial.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint as plain data; no code in it is executed."""
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint and its checksum."""
        Path(path).unlink(missing_ok=True)
        Path(f"{path}{CHECKSUM_SUFFIX}").unlink(missing_ok=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint on the CPU.

    Raises:
        InputError: it is missing, damaged, or holds more than plain data.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            f"{path}: not a readable checkpoint ({type(error).__name__})", "Choose another one."
        ) from None
    if not isinstance(content, dict) or "state_dict" not in content:
        raise InputError(
            f"{path}: no checkpoint of a training run", "Name a run folder or one of its checkpoints."
        )
    return content


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint, so that it is no longer taken for one and can still be looked at."""
    path.replace(f"{path}.damaged")
    Path(f"{path}{CHECKSUM_SUFFIX}").unlink(missing_ok=True)


def find_damage(path: Path) -> str:
    """Why a checkpoint must not be trusted; empty when its bytes are those that were written."""
    damage = damage_of(path)
    checksum = Path(f"{path}{CHECKSUM_SUFFIX}")
    if damage or not checksum.is_file():
        return damage
    expected = checksum.read_text(encoding="ascii", errors="replace").split(" ")[0]
    return (
        ""
        if file_digest(path) == expected
        else "its bytes are not the ones that were written (checksum differs)"
    )


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors inside nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(tensor_bytes(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(tensor_bytes(item) for item in value)
    return 0


def _check_room(checkpoint: Mapping[str, Any], target: Path) -> None:
    needed = tensor_bytes(checkpoint) + (1 << 20)  # the rest is small: names, config, random states
    if lack := lack_of_room(target.parent, needed):
        raise SaveError(
            f"{target}: the checkpoint {lack}",
            "Free some space or choose another --out; earlier checkpoints are untouched.",
        )


def _write_checksum(target: Path, digest: str) -> None:
    checksum = Path(f"{target}{CHECKSUM_SUFFIX}")
    partial = checksum.with_name(f".{checksum.name}.partial")
    with partial.open("w", encoding="ascii") as file:
        file.write(f"{digest}  {target.name}\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(checksum)
