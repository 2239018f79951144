"""Optional packages: their installed versions, and the commands that install missing ones."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from smolctl.errors import InputError, MissingPackageError


def installed_version(package: str) -> str | None:
    """The installed version of a package; None if it is not installed."""
    from importlib.metadata import PackageNotFoundError, version  # takes milliseconds, often not needed

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def install_command(extra: str) -> str:
    """The command that adds an extra of pyproject.toml to this installation.

    If smolctl was installed from a folder or a URL, an index may not have `smolctl[extra]`, so the command
    uses the source recorded in PEP 610's direct_url.json.
    """
    from importlib.metadata import PackageNotFoundError, distribution

    from smolctl.outside import parse_object  # imports yaml, which `--help` does not need

    try:
        installed = distribution("smolctl")
        record = parse_object((installed.read_text("direct_url.json") or "{}").encode(), "direct_url.json")
        installer = (installed.read_text("INSTALLER") or "pip").strip()
    except (PackageNotFoundError, InputError):
        record, installer = {}, "pip"
    if (Path(sys.prefix) / "uv-receipt.toml").exists():
        installer = "uv tool"
    command = {"uv": "uv pip", "uv tool": "uv tool"}.get(installer, "pip")
    url, details = str(record.get("url", "")), record.get("dir_info")
    editable = "-e " if isinstance(details, dict) and details.get("editable") else ""
    source = url2pathname(urlsplit(url).path) if url.startswith("file:") else ""
    if source and Path(source).exists():
        return f"{command} install {editable}{shlex.quote(f'{source}[{extra}]')}"
    vcs = record.get("vcs_info")
    origin = f" @ {vcs['vcs']}+{url}" if isinstance(vcs, dict) and "vcs" in vcs else ""
    return f"{command} install {shlex.quote(f'smolctl[{extra}]{origin}')}"


def missing_package(package: str, extra: str, needed_by: str = "", instead: str = "") -> MissingPackageError:
    """The error where an optional package is not installed.

    Args:
        package: its name.
        extra: the extra of pyproject.toml that contains it.
        needed_by: the option or the purpose that needs it.
        instead: another remedy.
    """
    cause = f"the package {package} is not installed"
    hint = f"Install it: {install_command(extra)}"
    return MissingPackageError(
        f"{needed_by}: {cause}" if needed_by else cause, f"{hint}. {instead}" if instead else hint
    )
