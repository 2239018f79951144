"""`python -m tests.support.small_files BYTES COMMAND…`: smolctl where no file can grow beyond some bytes."""

from __future__ import annotations

import resource
import sys

from smolctl.cli.main import main

if __name__ == "__main__":
    limit = int(sys.argv.pop(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    main()
