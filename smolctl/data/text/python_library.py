"""The built-in corpus `python`: the running interpreter's standard library and its documentation."""

from __future__ import annotations

import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from smolctl.data.text.documents import Document, OnRead

NAME = "python"
# Tests are repetitive, third-party packages are not the library, and pydoc_data is read as documents.
_LEFT_OUT = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "_bundled",
    "pydoc_data",
    "turtledemo",
}


def library_files() -> list[Path]:
    """Source files of the standard library, in the same order everywhere."""
    found = []
    for folder, folders, files in os.walk(library_root()):
        folders[:] = sorted(set(folders) - _LEFT_OUT)
        found += [Path(folder, name) for name in sorted(files) if name.endswith(".py")]
    return found


def library_identity() -> list[object]:
    """Changes when the corpus changes."""
    return [platform.python_version(), [path.stat().st_size for path in library_files()]]


def library_size() -> int:
    """Bytes of the corpus."""
    return sum(path.stat().st_size for path in library_files()) + sum(
        len(text.encode()) for text in _topics().values()
    )


def library_documents(on_read: OnRead) -> Iterator[Document]:
    """Every module, then every topic of the language reference of `help()`."""
    root = library_root()
    for path in library_files():
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # a module in another encoding is left out
        on_read(path.stat().st_size)
        if text:  # an empty __init__.py is not a document
            yield Document(f"{NAME}:{path.relative_to(root).as_posix()}", iter([text]))
    for topic, text in sorted(_topics().items()):
        on_read(len(text.encode()))
        yield Document(f"{NAME}:help/{topic}", iter([text]))


def library_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package the documentation separately
        return {}
    return topics
