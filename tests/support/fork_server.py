"""A process that has imported PyTorch and Lightning once and is forked for each child that a test starts.

    python -m tests.support.fork_server SOCKET

A command of smolctl needs three CPU seconds of imports before its own work begins, and the tests start some
two hundred of them. Here a child costs ten milliseconds. What it finds is what a new process finds:
arguments, environment, working directory, standard streams, signal handlers and random state of its own.
Only the hash seed and what is already imported differ; tests marked `cold` start real processes.

The imports wait for the first child. The server ends, and all its children with it, when its standard input
is closed. See `processes.py` for the other side.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import sys
import types
from dataclasses import dataclass
from pathlib import Path

# What commands import sooner or later.
PRELOADED = (
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "numpy.ctypeslib", "safetensors.torch"),
    *("smolctl.training.train", "smolctl.training.resume", "smolctl.training.verify", "smolctl.cli.main"),
    *("smolctl.quantization.quantize", "smolctl.quantization.footprint", "smolctl.benchmark.bench"),
)


def _named_folders() -> list[str]:
    return [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]


INHERITED = _named_folders()
NUMBER = struct.Struct("i")


@dataclass(frozen=True)
class Request:
    """What `python [-P] -m MODULE ARGUMENTS` or `python [-P] -c CODE ARGUMENTS` is to be.

    Attributes:
        arguments: all behind `python`.
        streams: descriptors of the child's stdin, stdout and stderr; not part of the JSON.
    """

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    streams: tuple[int, ...] = ()

    def send(self, connection: socket.socket) -> None:
        content = json.dumps([self.arguments, self.environment, self.folder]).encode()
        socket.send_fds(connection, [NUMBER.pack(len(content))], self.streams)
        connection.sendall(content)

    @classmethod
    def receive(cls, connection: socket.socket) -> Request:
        length, streams, _, _ = socket.recv_fds(connection, NUMBER.size, 3)
        with connection.makefile("rb") as file:
            arguments, environment, folder = json.loads(file.read(*NUMBER.unpack(length)))
        return cls(arguments, environment, folder, tuple(streams))


def serve(address: str) -> Request | None:
    """Fork until standard input closes: None then, and in each child the request that it is to do."""
    asking: dict[int, socket.socket] = {}  # who waits for the end of which child
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)  # only to be woken
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector, woken, wake:
        listener.bind(address)
        listener.listen()
        for source in (listener, woken, sys.stdin):
            selector.register(source, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj for key, _ in selector.select()}
            if sys.stdin in ready:
                signal.set_wakeup_fd(-1)  # children that end from now on wake nobody
                _kill(asking)
                return None
            if woken in ready:
                woken.recv(4096)
                _report_ended(asking)
            if listener in ready:
                connection, _ = listener.accept()
                request = Request.receive(connection)
                _import_once()
                child = os.fork()
                if child == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for other in (connection, *asking.values()):
                        other.close()
                    return request
                for stream in request.streams:
                    os.close(stream)
                asking[child] = connection
                connection.sendall(NUMBER.pack(child))


def _import_once() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    # PyTorch imports it at Python's end where it is installed; then Python forgets that Ctrl-C ended it.
    with contextlib.suppress(ImportError):
        importlib.import_module("tabulate")
    assert "huggingface_hub" not in sys.modules, "it reads the environment when it is imported"
    tasks = Path("/proc/self/task")
    threads = len(list(tasks.iterdir())) if tasks.exists() else 1
    assert threads == 1, f"a process of {threads} threads cannot be forked"
    gc.freeze()  # or each fork would copy the pages of all that was imported


def _report_ended(asking: dict[int, socket.socket]) -> None:
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            with asking.pop(ended[0]) as connection, contextlib.suppress(OSError):
                connection.sendall(NUMBER.pack(ended[1]))


def _kill(children: dict[int, socket.socket]) -> None:
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def become(request: Request) -> None:
    """Make this fork the process that was asked for, and run it to the end of its main module."""
    import numpy as np
    from lightning.fabric.utilities.rank_zero import _get_rank, rank_zero_only

    os.setpgid(0, 0)
    for number, stream in enumerate(request.streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    np.random.seed()
    setattr(rank_zero_only, "rank", _get_rank() or 0)  # noqa: B010 - read from the environment when it is imported
    option, what, *arguments = (word for word in request.arguments if word != "-P")
    own = [] if "-P" in request.arguments else [request.folder if option == "-m" else ""]
    sys.path[:] = [*own, *_named_folders(), *(path for path in sys.path[1:] if path not in INHERITED)]
    sys.argv = [option, *arguments]
    try:
        if option == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.modules["__main__"] = types.ModuleType("__main__")
            exec(what, vars(sys.modules["__main__"]))
    except SystemExit as exit:
        if not isinstance(exit.code, str):
            _codes.append(int(exit.code or 0))
        raise
    _codes.append(0)


_codes: list[int] = []  # the exit code, when there is nothing more to print


@atexit.register  # before all others, so that it is called after them
def _leave() -> None:
    """Spare an ordinary end a second of taking down what was imported."""
    if _codes:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(_codes[0])


if __name__ == "__main__":
    from tests.support import processes

    processes.install()  # children of children are forked too
    asked = serve(sys.argv[1])
    if asked is not None:
        become(asked)
