"""Crash-safe checkpoints: written to a temporary file, synced, read back, then renamed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch

from smolctl.durable import HashingFile, file_digest, lack_of_room, replacing, sync_file
from smolctl.errors import SmolError
from smolctl.runs.checkpoint_file import read_checkpoint, remove_checkpoint, remove_checksum, write_checksum
from smolctl.training.guards import NonFiniteError
from smolctl.training.lightning import CheckpointIO

FREE_SOME = "Free some space or choose another --out; earlier checkpoints are untouched."
LEAVE = "Leave the folder of a run alone while it trains. A checkpoint that is left can be resumed."


class SaveError(SmolError):
    """A checkpoint could not be written; earlier ones are unchanged."""


class DurableCheckpointIO(CheckpointIO):
    """Writes Lightning's checkpoint files such that a crash or a full disk never damages an earlier one."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write, sync, read back and rename.

        Raises:
            NonFiniteError: a weight or a value of the optimizer's state is NaN or infinite.
            SaveError: no room, no permission, or the disk returned different bytes than were written.
        """
        target = Path(path)
        _require_finite(checkpoint)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _check_room(checkpoint, target)
            with replacing(target) as partial:
                with partial.open("wb") as file:
                    hashing = HashingFile(file)
                    _save(checkpoint, hashing)
                sync_file(partial)
                digest = hashing.digest.hexdigest()
                if file_digest(partial) != digest:
                    raise SaveError(
                        f"{target}: the disk returned different bytes than were written", "Check the disk."
                    )
                # A checksum must never belong to other bytes, whenever the process dies.
                remove_checksum(target)
            write_checksum(target, digest)
        except FileNotFoundError:
            raise SaveError(f"{target}: its folder was removed while it was being saved", LEAVE) from None
        except OSError as error:
            raise SaveError(
                f"{target}: the checkpoint cannot be written ({error.strerror or error})", FREE_SOME
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read an intact checkpoint as plain data; code in it is not executed."""
        return read_checkpoint(Path(path), mmap=False)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint and its checksum."""
        remove_checkpoint(Path(path))


def _save(checkpoint: Mapping[str, Any], file: HashingFile) -> None:
    """`torch.save`, but raising the OSError of the failed write instead of a later error."""
    try:
        torch.save(checkpoint, cast(IO[bytes], file))
    except RuntimeError as error:
        # After a failed write PyTorch closes its archive, which contains less than expected.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def drop_weights(path: Path) -> None:
    """Remove the weights from a checkpoint, because they are stored elsewhere.

    Raises:
        SaveError: it cannot be rewritten.
    """
    content = {**read_checkpoint(path), "state_dict": {}}
    DurableCheckpointIO().save_checkpoint(content, path)


def tensors_in(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors inside nested dicts and lists, each with its path."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from tensors_in(item, f"{name} {key}".strip())


def _require_finite(checkpoint: Mapping[str, Any]) -> None:
    """Checks without a copy: minimum and maximum of a tensor are NaN if one of its values is."""
    # A trainer's weights-only checkpoint has no optimizer states.
    kept = {"weights": checkpoint.get("state_dict"), "optimizer": checkpoint.get("optimizer_states")}
    for name, tensor in tensors_in(kept):
        is_float = tensor.is_floating_point() and tensor.numel()
        if is_float and not all(math.isfinite(bound) for bound in torch.aminmax(tensor)):
            raise NonFiniteError(
                f"step {checkpoint.get('global_step', 0):,}: {name} holds NaN or infinity; it was not saved",
                "Lower optimizer.learning_rate and resume; the earlier checkpoints are untouched.",
            )


def _check_room(checkpoint: Mapping[str, Any], target: Path) -> None:
    held = sum(tensor.nbytes for _, tensor in tensors_in(checkpoint))
    needed = held + (1 << 20)  # the rest is small: names, config, random states
    if lack := lack_of_room(target.parent, needed):
        raise SaveError(f"{target}: the checkpoint {lack}", FREE_SOME)
