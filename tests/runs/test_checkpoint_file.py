"""Whether a checkpoint is sound is one question with one answer, whoever asks."""

from __future__ import annotations

import os
import random
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from smolctl import durable
from smolctl.errors import ExitCode, InputError
from smolctl.runs.checkpoint_file import FORMAT, find_damage, read_checkpoint, recorded_config
from smolctl.runs.folder import RunFolder
from smolctl.sources import open_source
from tests.support.processes import Called
from tests.support.tiny_runs import prepare_tiny, run, tiny_config, with_steps, write_corpus

Damage = Callable[[Path], None]


def flip_bits(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for at in range(len(content) // 2, len(content) // 2 + 64):
        content[at] ^= 0xFF
    path.write_bytes(content)


def test_a_setting_of_a_later_version_leads_to_an_update() -> None:
    values = tiny_config(Path("corpus")).model_dump(mode="json")
    values["train"]["wings"] = 2
    with pytest.raises(InputError, match=r"unknown key train\.wings") as error:
        recorded_config({"hyper_parameters": {"config": values}}, Path("x.ckpt"))
    assert "If a newer smolctl has written it, update this one." in error.value.hint


def flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(0).randrange(len(content) // 4, len(content) // 2)] ^= 1
    path.write_bytes(content)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def write_zeros(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
    path.write_bytes(content)


DAMAGES: tuple[Damage, ...] = (flip_bits, flip_one_bit, cut_off, empty, write_zeros)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 0 and 2."""
    folder = tmp_path_factory.mktemp("sound")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SMOLCTL_CACHE", str(folder / "cache"))
        return folder / run(prepare_tiny(write_corpus(folder / "corpus"), **with_steps(2)), "whole")


@pytest.fixture
def copy(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_reader_refuses_every_damage_and_names_the_newest_sound_step(
    copy: Path, damage: Damage
) -> None:
    newest = RunFolder(copy).checkpoint_path(2)
    damage(newest)
    for reference in (copy, f"{copy}@2"):
        with pytest.raises(InputError) as error:
            open_source(str(reference))
        assert f"{copy}@0" in error.value.hint
    with pytest.raises(InputError, match=r"step-000002\.ckpt"):
        open_source(str(newest))
    assert open_source(f"{copy}@0").step == 0


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_without_its_checksum_file_is_checked_too(copy: Path, damage: Damage) -> None:
    moved = Path(shutil.move(RunFolder(copy).checkpoint_path(2), copy.parent / "moved.ckpt"))
    assert not find_damage(moved)
    damage(moved)
    assert find_damage(moved)
    with pytest.raises(InputError):
        open_source(str(moved))


@pytest.mark.parametrize(
    "arguments",
    [
        ("sample", "RUN", "--prompt", "the cat", "--max-tokens", "3"),
        ("inspect-config", "RUN"),
        ("count-params", "RUN"),
        ("quantize", "RUN", "--to", "int8", "--out", "q"),
        ("bench", "RUN", "--suite", "decode"),
        ("push", "RUN", "--local-dir", "d"),
        ("train", "tiny", "--init-from", "RUN", "--out", "new"),
        ("resume", "RUN", "--extra", "1"),
    ],
    ids=lambda arguments: str(arguments[0]),
)
def test_every_command_refuses_a_damaged_checkpoint(
    copy: Path, smolctl: Callable[..., Called], arguments: tuple[str, ...]
) -> None:
    flip_bits(RunFolder(copy).checkpoint_path(2))
    Path("tiny").write_bytes((copy / "config.yaml").read_bytes())
    before = {path for path in Path().rglob("*") if path.is_file()}
    called = smolctl(*(str(copy) if word == "RUN" else word for word in arguments))
    assert called.code == ExitCode.BAD_INPUT, called.err
    assert "step-000002.ckpt: its bytes are not the ones that were written" in called.err
    assert f"{copy}@0" in called.err
    assert {path for path in Path().rglob("*") if path.is_file() and path.name != ".lock"} <= before


def test_a_file_is_read_once_for_each_identity_of_it(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []

    def digest(path: Path, real: Callable[[Path], str] = durable.file_digest) -> str:
        hashed.append(path)
        return real(path)

    monkeypatch.setattr(durable, "file_digest", digest)
    path = RunFolder(copy).checkpoint_path(2)
    old = time.time_ns() - 5_000_000_000
    os.utime(path, ns=(old, old))
    for _ in range(3):
        assert not find_damage(path)
    assert hashed == [path]
    flip_one_bit(path)  # changes its time
    assert find_damage(path)
    assert find_damage(path)
    assert hashed == [path] * 3  # damage is never remembered


def test_a_change_within_the_clocks_resolution_is_seen(copy: Path) -> None:
    path = RunFolder(copy).checkpoint_path(2)
    path.touch()
    stat = path.stat()
    assert not find_damage(path)
    flip_one_bit(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert find_damage(path)


def test_a_checkpoint_records_the_loss_that_its_weights_give(copy: Path) -> None:
    from smolctl.evaluation import require_recorded_loss
    from smolctl.model.weights import load_network

    source = open_source(str(copy))
    assert source.recorded_loss is not None
    assert source.recorded_loss.tokens.shape[0] == 8
    network = load_network(source)
    require_recorded_loss(network, source.recorded_loss, "run")
    with torch.no_grad():
        next(network.parameters()).mul_(-1)
    with pytest.raises(InputError, match="the run recorded"):
        require_recorded_loss(network, source.recorded_loss, "run")


def test_a_moved_checkpoint_speaks_with_its_own_tokenizer(copy: Path) -> None:
    inside = open_source(str(copy)).read_tokenizer()
    moved = Path(shutil.copy(RunFolder(copy).checkpoint_path(2), copy.parent / "elsewhere.ckpt"))
    alone = open_source(str(moved)).read_tokenizer()
    assert inside is not None
    assert alone is not None
    assert alone.bos_token_id == inside.bos_token_id
    from smolctl.data.tokenizer.tokenizer import Tokenizer

    assert Tokenizer.from_files(alone).sha256 == Tokenizer.from_files(inside).sha256


def test_checkpoints_say_in_which_format_they_are(copy: Path) -> None:
    assert read_checkpoint(RunFolder(copy).checkpoint_path(2))["smolctl"]["format"] == 2


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what a checkpoint says, as somebody else's program might have written it."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    Path(f"{path}.sha256").unlink()


@pytest.mark.parametrize("number", [FORMAT + 1, 0, "2", None, 1.5])
@pytest.mark.parametrize(
    "arguments",
    [
        ("sample", "RUN", "--prompt", "the cat", "--max-tokens", "3"),
        ("train", "tiny", "--init-from", "RUN", "--out", "new"),
        ("resume", "RUN", "--extra", "1"),
        ("resume", "RUN", "--verify"),
    ],
    ids=lambda arguments: " ".join(arguments[::2]) if isinstance(arguments, tuple) else str(arguments),
)
def test_a_format_that_this_version_does_not_know_is_one_line(
    copy: Path, smolctl: Callable[..., Called], arguments: tuple[str, ...], number: object
) -> None:
    rewrite(RunFolder(copy).checkpoint_path(2), lambda content: content["smolctl"].update(format=number))
    Path("tiny").write_bytes((copy / "config.yaml").read_bytes())
    called = smolctl(*(str(copy) if word == "RUN" else word for word in arguments))
    assert called.code == ExitCode.BAD_INPUT, called.err
    cause, _hint = called.err.splitlines()
    assert "step-000002.ckpt: " in cause
    assert ("newer smolctl" if number == FORMAT + 1 else "format number") in cause


def test_the_quantized_checkpoint_has_the_format_number_too(
    copy: Path, smolctl: Callable[..., Called]
) -> None:
    assert smolctl("quantize", copy, "--to", "int8-dynamic", "--out", "q", "--no-measure").code == 0
    (path,) = Path("q").rglob("*.ckpt")
    content = torch.load(path, weights_only=True)
    assert content["smolctl"] == {"format": FORMAT}
    content["smolctl"]["format"] += 1
    torch.save(content, path)
    with pytest.raises(InputError, match="newer smolctl"):
        open_source(str(path))


SOME_KEYS = ("state_dict", "tokenizer", "hyper_parameters config", "smolctl rng", "smolctl held_out")
KEYS = (
    *("state_dict", "optimizer_states", "loops", "global_step", "epoch", "callbacks", "lr_schedulers"),
    *("pytorch-lightning_version", "hyper_parameters", "tokenizer", "smolctl"),
    *(f"smolctl {key}" for key in ("format", "rng", "data", "tokenizer", "samples", "decisions", "held_out")),
    *(
        "smolctl held_out loss",
        "smolctl held_out tokens",
        "hyper_parameters config",
        "tokenizer tokenizer_json",
    ),
)


@pytest.mark.parametrize(
    "key", [pytest.param(key, marks=() if key in SOME_KEYS else pytest.mark.slow) for key in KEYS]
)
def test_a_missing_key_is_one_line_or_is_not_missed(
    copy: Path, smolctl: Callable[..., Called], key: str
) -> None:
    *parents, last = key.split()

    def remove(content: dict[str, Any]) -> None:
        for parent in parents:
            content = content[parent]
        del content[last]

    rewrite(RunFolder(copy).checkpoint_path(2), remove)
    alone = Path(shutil.copy(RunFolder(copy).checkpoint_path(2), "alone.ckpt"))
    for arguments in (
        ("resume", copy, "--extra", "1"),
        ("resume", alone, "--extra", "1"),
        ("sample", alone, "--prompt", "the cat", "--max-tokens", "3"),
        ("inspect-config", alone),
    ):
        called = smolctl(*arguments)
        assert called.code in (ExitCode.DONE, ExitCode.BAD_INPUT), (arguments, called.err)
        assert "unexpected" not in called.err


def write_zip(path: Path, compression: int, pickled: bytes) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("model/data.pkl", pickled)
        archive.writestr("model/version", "3\n")


@pytest.mark.parametrize(
    ("compression", "pickled", "cause"),
    [
        (zipfile.ZIP_DEFLATED, bytes(1_000_000), "its records are compressed"),
        (zipfile.ZIP_STORED, bytes(100), "its data.pkl cannot be unpickled$"),
    ],
)
def test_an_archive_that_pytorch_did_not_write_is_refused_in_our_words(
    compression: int, pickled: bytes, cause: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.pt"
    write_zip(path, compression, pickled)
    with pytest.raises(InputError, match=cause):
        read_checkpoint(path)


@pytest.mark.skipif(not hasattr(os, "setresuid"), reason="no rights of this kind on this system")
def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(somebody: Path) -> None:
    path = somebody / "step-000001.ckpt"
    path.write_bytes(b"PK")
    path.chmod(0)
    with pytest.raises(InputError, match=r"ckpt: cannot be read \(Permission denied\)") as refused:
        read_checkpoint(path)
    assert refused.value.hint == "Correct its permissions."
