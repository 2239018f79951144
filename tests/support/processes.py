"""Processes that tests start: forked from one that has its imports done, see `fork_server.py`."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.fork_server import NUMBER, Request

ADDRESS = "SMOLCTL_FORK_SERVER"  # without it every process is a new one
CHECKOUT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Called:
    """What a command line did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Smolctl = Callable[..., Called]  # the fixture of that name: the command line, called in this process


def start(*arguments: object, module: str = "smolctl", **options: Any) -> subprocess.Popen[str]:
    """`python -m smolctl ARGUMENTS` with its output and errors piped as text."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Without one, a new process would also get what C code has set here, such as llama.cpp's KMP_BLOCKTIME.
    environment = {"env": dict(os.environ)}
    return subprocess.Popen(command, **pipes | environment | options)


def call(*arguments: object, input: str | None = None, timeout: float | None = 300, **options: Any) -> Called:
    """The same, and wait for its end; at most five minutes where nothing else is said."""
    if input is not None:
        options["stdin"] = subprocess.PIPE
    with start(*arguments, **options) as process:
        try:
            out, err = process.communicate(input, timeout)
        except BaseException:
            process.kill()
            raise
    return Called(process.returncode, out, err)


class Popen(subprocess.Popen[Any]):
    """`subprocess.Popen` that has main modules of smolctl and of these tests forked by the server."""

    def _execute_child(
        self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, cwd: Any, env: Any,
        startupinfo: Any, creationflags: Any, shell: Any, p2cread: int, p2cwrite: int, c2pread: int,
        c2pwrite: int, errread: int, errwrite: int, *others: Any,
    ) -> None:  # fmt: skip
        pipes = (p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
        self._server: socket.socket | None = None
        forked = _is_forked(args) and preexec_fn is None and not pass_fds
        if ADDRESS not in os.environ or not forked:
            parts = (args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags)
            return super()._execute_child(*parts, shell, *pipes, *others)  # type: ignore[misc]
        streams = [given if given != -1 else own for own, given in enumerate((p2cread, c2pwrite, errwrite))]
        try:
            self._server = socket.socket(socket.AF_UNIX)
            self._server.connect(os.environ[ADDRESS])
            folder = os.path.abspath(os.fspath(cwd)) if cwd else os.getcwd()  # noqa: PTH100, PTH109
            environment = dict(os.environ if env is None else env)
            Request(list(map(os.fspath, args[1:])), environment, folder, tuple(streams)).send(self._server)
            (self.pid,) = NUMBER.unpack(self._server.recv(NUMBER.size, socket.MSG_WAITALL))
            self._child_created = True
        finally:
            self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if self._server is None:
            return super()._try_wait(wait_flags)  # type: ignore[misc]
        try:
            status = self._server.recv(NUMBER.size, socket.MSG_DONTWAIT if wait_flags else socket.MSG_WAITALL)
        except BlockingIOError:
            return 0, 0
        self._server.close()
        return self.pid, NUMBER.unpack(status)[0] if status else 9  # without a server nothing lives

    def _internal_poll(self, *arguments: Any, **options: Any) -> int | None:
        if self._server is None:
            return super()._internal_poll(*arguments, **options)  # type: ignore[misc]
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid:
                self._handle_exitstatus(status)  # type: ignore[attr-defined]
        return self.returncode


def _is_forked(args: Any) -> bool:
    """Whether it is a main module of ours, and no code that a test makes up."""
    command = " ".join(map(str, args)) if isinstance(args, list | tuple) else ""
    ours = r"(-P )?(-m (smolctl|tests)\b|-c from smolctl\.[\w.]+ import main; main\(\))"
    return re.match(re.escape(sys.executable) + " " + ours, command) is not None


def install() -> None:
    """Let every process that this one starts be forked: smolctl's own workers and Lightning's ranks too."""
    subprocess.Popen = Popen  # type: ignore[misc]


@contextmanager
def serving() -> Iterator[None]:
    """A fork server for this process and for those that inherit its environment."""
    with tempfile.TemporaryDirectory() as folder:
        address = str(Path(folder) / "fork")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.support.fork_server", address]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, env=environment, cwd=CHECKOUT, start_new_session=True
        ) as server:
            while not Path(address).exists() and server.poll() is None:
                time.sleep(0.01)
            os.environ[ADDRESS] = address
            yield
            del os.environ[ADDRESS]
            assert server.stdin is not None
            server.stdin.close()
