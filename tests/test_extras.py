"""The command that installs a missing optional package works for every way to install smolctl."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from smolctl.errors import ExitCode
from smolctl.extras import install_command
from tests.support.processes import Smolctl


@pytest.mark.parametrize(
    ("record", "installer", "command"),
    [
        (None, "pip", "pip install 'smolctl[data]'"),
        ({"url": "file://HERE", "dir_info": {}}, "pip", "pip install 'HERE[data]'"),
        ({"url": "file://HERE", "dir_info": {"editable": True}}, "pip", "pip install -e 'HERE[data]'"),
        ({"url": "file://HERE", "dir_info": {}}, "uv", "uv pip install 'HERE[data]'"),
        ({"url": "file:///gone", "dir_info": {}}, "pip", "pip install 'smolctl[data]'"),
        (
            {"url": "https://host/smolctl.git", "vcs_info": {"vcs": "git", "commit_id": "1"}},
            "pip",
            "pip install 'smolctl[data] @ git+https://host/smolctl.git'",
        ),
        ([], "pip", "pip install 'smolctl[data]'"),
    ],
)
def test_an_extra_is_installed_from_where_smolctl_came(
    record: Any, installer: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "a checkout"
    info = tmp_path / "smolctl-0.1.0.dist-info"
    here.mkdir()
    info.mkdir()
    (info / "METADATA").write_text("Name: smolctl\nVersion: 0.1.0\n")
    (info / "INSTALLER").write_text(f"{installer}\n")
    if record is not None:
        (info / "direct_url.json").write_text(json.dumps(record).replace("HERE", here.as_uri()[7:]))
    found = importlib.metadata.Distribution.at(info)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda _name: found)
    assert install_command("data") == command.replace("HERE", str(here))


def test_a_tool_of_uv_is_extended_by_uv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "uv-receipt.toml").touch()
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    assert install_command("data").startswith("uv tool install ")


def test_without_metadata_the_name_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert install_command("data") == "pip install 'smolctl[data]'"


@pytest.mark.parametrize(
    ("arguments", "package", "extra"),
    [
        (("serve", "model"), "starlette", "serve"),
        (("eval", "model", "--tasks", "arc_easy"), "lm_eval", "eval"),
        (("train", "nano", "--logger", "wandb"), "wandb", "wandb"),
        (("train", "nano", "--data", "rows.parquet", "--dry-run"), "pyarrow", "data"),
    ],
)
def test_a_missing_package_is_one_kind_of_error(
    arguments: tuple[str, ...],
    package: str,
    extra: str,
    smolctl: Smolctl,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    for name in [name for name in sys.modules if name.startswith(("smolctl.serving", f"{package}."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    if package in ("lm_eval", "wandb"):  # looked for without an import
        monkeypatch.setattr("smolctl.evaluation.tasks.find_spec", lambda _name: None)
        monkeypatch.setattr("smolctl.training.loggers.find_spec", lambda _name: None)
    called = smolctl(*arguments)
    cause, hint = called.err.splitlines()[-2:]
    assert called.code == ExitCode.FAILED
    assert f"the package {package.replace('_', '-')} is not installed" in cause
    assert install_command(extra) in hint
