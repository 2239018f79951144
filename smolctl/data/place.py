"""Where tokens and tokenizers are kept for the next run."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$SMOLCTL_CACHE`, or `~/.cache/smolctl`."""
    named = os.environ.get("SMOLCTL_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "smolctl"
