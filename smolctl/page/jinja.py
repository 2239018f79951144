"""The Jinja library for pages whose chat template is more than texts between messages.

It is downloaded when such a page is first written, and cached; nothing else of the page is downloaded.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

from smolctl.durable import cache_folder, replacing
from smolctl.errors import SmolError

# @huggingface/jinja: MIT license, contains no third-party code.
PACKAGE, VERSION = "@huggingface/jinja", "0.5.11"
SHA256 = "c92401a23cdef23be5a2773eafc22db6723e113380aa02fedd0ca40ceb123f29"  # of the archive, 83 kB
MEMBERS = {"jinja.js": "package/dist/index.js", "jinja-LICENSE.txt": "package/LICENSE"}
REGISTRY = "https://registry.npmjs.org"  # unless $NPM_CONFIG_REGISTRY, which npm reads too, names another one
TIMEOUT_S = 30.0
_MOST_BYTES = 10_000_000


def jinja_files() -> Mapping[str, bytes]:
    """The library and its license, by file name in the page.

    Raises:
        SmolError: the library is not in the cache and cannot be downloaded, or its hash differs.
    """
    kept = cache_folder() / "page" / f"jinja-{VERSION}.tgz"
    content = kept.read_bytes() if kept.is_file() else b""
    if hashlib.sha256(content).hexdigest() != SHA256:
        content = _fetched(kept)
        with suppress(OSError):  # without a writable cache, the next page downloads it again
            kept.parent.mkdir(parents=True, exist_ok=True)
            with replacing(kept, concurrent=True) as partial:
                partial.write_bytes(content)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = {name: archive.extractfile(member) for name, member in MEMBERS.items()}
        return {name: file.read() for name, file in members.items() if file}


def _fetched(kept: Path) -> bytes:
    registry = os.environ.get("NPM_CONFIG_REGISTRY") or REGISTRY
    address = f"{registry.rstrip('/')}/{PACKAGE}/-/jinja-{VERSION}.tgz"
    reason = "its SHA-256 differs"
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT_S) as answer:
            content: bytes = answer.read(_MOST_BYTES)
        if hashlib.sha256(content).hexdigest() == SHA256:
            return content
    except (OSError, ValueError, HTTPException) as error:
        reason = str(getattr(error, "reason", error))
    raise SmolError(
        f"the page needs {PACKAGE} {VERSION} for this chat template, and it cannot be fetched ({reason})",
        f"Connect to the Internet, or put {REGISTRY}/{PACKAGE}/-/jinja-{VERSION}.tgz into {kept.parent}.",
    )
