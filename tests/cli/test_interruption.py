"""Ctrl-C and SIGTERM reach the command wherever they arrive."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import CHECKOUT

# A library that swallows whatever comes while it is imported, and a destructor, in which Python prints it.
LIBRARY = """
import signal, time
try:
    signal.raise_signal({number})
    time.sleep(0.1)
except BaseException:
    raise SystemExit("it came during the import")
"""
DESTRUCTOR = """
import signal
class Lost:
    def __del__(self):
        signal.raise_signal({number})
Lost()
"""
COMMAND = """
import sys, time
from smolctl.cli.interruption import Interruption
Interruption().install()
try:
    {code}
    time.sleep(60)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("place", ["import", "destructor"])
def test_a_signal_is_not_lost_where_its_exception_would_be(
    number: signal.Signals, code: int, place: str, tmp_path: Path
) -> None:
    (tmp_path / "library.py").write_text(LIBRARY.format(number=int(number)))
    (tmp_path / "destructor.txt").write_text(DESTRUCTOR.format(number=int(number)))
    lines = {"import": "import library", "destructor": "exec(open('destructor.txt').read())"}
    done = subprocess.run(
        [sys.executable, "-c", COMMAND.format(code=lines[place])],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{CHECKOUT}:{tmp_path}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (code, "")


# Python raises nothing in the main thread while it is in a library, or waits for a thread that is.
BUSY = {
    "a library": "import tokenizers; backend = tokenizers.Tokenizer(tokenizers.models.BPE()); "
    "learn = lambda: backend.train_from_iterator(['ab' * 10**7], tokenizers.trainers.BpeTrainer()); "
    "print('busy', flush=True); learn()",
    "a thread that is waited for": "import concurrent.futures, time; "
    "pool = concurrent.futures.ThreadPoolExecutor(); busy = pool.submit(time.sleep, 600); "
    "print('busy', flush=True); busy.result()",
}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("place", BUSY)
def test_a_signal_ends_a_command_whatever_it_is_busy_with(
    number: signal.Signals, code: int, place: str
) -> None:
    called = [sys.executable, "-c", COMMAND.format(code=BUSY[place])]
    with subprocess.Popen(called, env={"PYTHONPATH": str(CHECKOUT)}, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"busy\n"
        process.send_signal(number)
        try:
            assert process.wait(timeout=60) == code
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_work_is_done_leaves_its_exit_code(number: signal.Signals) -> None:
    ending = f"import atexit, signal; atexit.register(signal.raise_signal, {int(number)}); "
    called = (
        ending + "import sys; sys.argv = ['smolctl', '--version']; from smolctl.__main__ import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", called], env={"PYTHONPATH": str(CHECKOUT)}, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
