"""`python -m tests.support.self_portrait HOW`: what a process finds, as JSON; then it ends, somehow."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

# The server's address, and what readline sets behind Python's back.
UNLIKE = ("SMOLCTL_FORK_SERVER", "COLUMNS", "LINES")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGPIPE)


def portrait() -> dict[str, Any]:
    return {
        "arguments": sys.argv[1:],
        "main": sys.modules["__main__"].__spec__ is not None,
        "folder": str(Path.cwd()),
        "environment": {key: value for key, value in os.environ.items() if key not in UNLIKE},
        "input": sys.stdin.read(),
        "handlers": [repr(signal.getsignal(number)) for number in SIGNALS],
        "threads": threading.active_count(),
        "random": random.random(),
    }


if __name__ == "__main__":
    print(json.dumps(portrait()), flush=True)
    match sys.argv[1]:
        case "exit":
            sys.exit(7)
        case "raise":
            raise RuntimeError("this is the end")
        case "sleep":
            time.sleep(60)
