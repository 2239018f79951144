"""The contents of the cache, as a table."""

from __future__ import annotations

import time

from smolctl.data.cached import DAY, CacheEntry, CacheReport
from smolctl.views.numbers import counted, size
from smolctl.views.output import Output
from smolctl.views.tables import headed


def show_cache(out: Output, report: CacheReport) -> None:
    """Every entry with its size and when it was last used, or JSON."""
    out.document(
        {
            "path": str(report.folder),
            "bytes": report.bytes,
            "entries": [_entry(entry) for entry in report.entries],
            "removed": [_entry(entry) for entry in report.removed],
        }
    )
    if report.entries:
        from rich.text import Text

        table = headed(("last used", "size", "content"), ("last used", "content"))
        for entry in report.entries:
            table.add_row(_ago(entry.used), size(entry.bytes), Text(entry.content))
        out.show(table)
    if report.removed:
        out.line(f"Deleted {len(report.removed):,}: {size(sum(entry.bytes for entry in report.removed))}.")
    out.line(f"{report.folder}: {size(report.bytes)}")


def _ago(used: float) -> str:
    days = int((time.time() - used) / DAY)
    return "today" if days < 1 else f"{counted(days, 'day')} ago"


def _entry(entry: CacheEntry) -> dict[str, object]:
    return {
        "path": str(entry.path),
        "content": entry.content,
        "bytes": entry.bytes,
        "used": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(entry.used)),
    }
