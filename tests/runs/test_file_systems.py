"""File systems that can do less: training continues, and what cannot be had is a note."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.disks import small_disk
from tests.support.processes import Smolctl
from tests.support.tiny_runs import assert_same_run, write_project


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """As exFAT, many network shares and cloud folders: no links of either kind, no sync of folders."""

    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real_fsync(descriptor)

    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.usefixtures("no_links")
def test_a_run_needs_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smolctl: Smolctl, whole: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path)
    called = smolctl("train", "tiny.yaml", "--set", "train.steps=10")
    assert called.code == 0
    assert called.err.count("runs/latest") == 1
    assert called.err.count("final.ckpt") == 1
    called = smolctl("resume", "--until", "15")  # the newest run, though no link names it
    assert called.code == 0
    assert_same_run(whole, Path("runs/tiny-001"))
    assert smolctl("sample", "--prompt", "the cat", "--max-tokens", "2").code == 0
    assert smolctl("quantize", "--to", "int8", "--no-measure").code in (0, 3)
    assert smolctl("resume", "--extra", "1", "--out", "branch").code == 0


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_a_run_needs_no_sync(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smolctl: Smolctl
) -> None:
    def refuse(_descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.chdir(tmp_path)
    write_project(tmp_path)
    monkeypatch.setattr(os, "fsync", refuse)
    assert smolctl("train", "tiny.yaml", "--steps", "1").code == 0


def test_a_disk_that_fails_to_sync_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smolctl: Smolctl
) -> None:
    def fail(_descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.chdir(tmp_path)
    write_project(tmp_path)
    assert smolctl("train", "tiny.yaml", "--steps", "1").code == 0  # its tokens are cached from here on
    monkeypatch.setattr(os, "fsync", fail)
    called = smolctl("train", "tiny.yaml", "--steps", "1")
    assert called.code == 1
    assert "Input/output error" in called.err


def test_a_run_needs_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smolctl: Smolctl) -> None:
    import filelock

    acquire = filelock.FileLock.acquire

    def refuse(lock: filelock.FileLock, *arguments: Any, **options: Any) -> Any:
        if Path(lock.lock_file).parent.name == "out":
            raise NotImplementedError("FileSystem does not appear to support flock")
        return acquire(lock, *arguments, **options)

    monkeypatch.chdir(tmp_path)
    write_project(tmp_path)
    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    called = smolctl("train", "tiny.yaml", "--steps", "1", "--out", "out")
    assert called.code == 0
    assert called.err.count("no file locks") == 1


def test_a_working_folder_that_cannot_be_written_needs_only_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smolctl: Smolctl
) -> None:
    with small_disk(tmp_path / "project", "2m") as project:
        write_project(project)
        subprocess.run(["mount", "-o", "remount,ro", str(project)], check=True)
        monkeypatch.chdir(project)
        called = smolctl("train", "tiny.yaml", "--steps", "2", "--out", tmp_path / "out")
        assert called.code == 0
        assert called.err.count("runs/latest") == 1
        assert smolctl("resume", tmp_path / "out", "--extra", "1").code == 0
        assert smolctl("sample", tmp_path / "out", "--prompt", "the cat", "--max-tokens", "2").code == 0
        called = smolctl("train", "tiny.yaml", "--steps", "2")
        assert called.code == 1
        assert "Read-only file system" in called.err
        monkeypatch.chdir(tmp_path)
