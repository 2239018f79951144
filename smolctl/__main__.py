"""The entry point: installs signal handlers before any library is imported."""

import signal
import sys

from smolctl.cli.interruption import Interruption
from smolctl.errors import ExitCode


def main() -> None:
    """Run the command line and exit with its code."""
    Interruption().install()
    try:
        from smolctl.cli.main import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # the work is done or given up, and Python is ending


if __name__ == "__main__":
    main()
