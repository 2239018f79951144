"""A scan for secrets in what is about to be published. It reports where, and never what."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

# Shapes that their issuers document, long enough that ordinary text does not have them by chance.
SHAPES: Mapping[str, re.Pattern[str]] = {
    "Hugging Face token": re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{30,}\b"),
    "GitHub token": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,})\b"),
    "GitLab token": re.compile(r"\bglpat-[A-Za-z0-9_-]{20,}"),
    "OpenAI or Anthropic key": re.compile(r"\bsk-(?:ant-|proj-|svcacct-)?[A-Za-z0-9_-]{32,}"),
    "AWS access key": re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    "Google API key": re.compile(r"\bAIza[A-Za-z0-9_-]{35}\b"),
    "Slack token": re.compile(r"\bxox[abeoprs]-[A-Za-z0-9-]{20,}"),
    "Stripe key": re.compile(r"\b[rs]k_live_[A-Za-z0-9]{20,}"),
    "PyPI token": re.compile(r"\bpypi-[A-Za-z0-9_-]{50,}"),
    "npm token": re.compile(r"\bnpm_[A-Za-z0-9]{36}\b"),
    "private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "Weights & Biases key": re.compile(
        r"\bwandb_v1_[A-Za-z0-9_]{40,}|(?i:wandb|weights.?(?:and|&).?biases)[^\n]{0,60}\b[0-9a-f]{40}\b"
    ),
    "password in an address": re.compile(r"\b[a-z][a-z0-9+.-]*://[^/\s:@]+:[^/\s:@]{6,}@[^\s/]"),
    "key that is assigned": re.compile(
        r"""(?i)\b[A-Z0-9_]*(?:API_KEY|SECRET|ACCESS_TOKEN|AUTH_TOKEN|PASSWORD)["']?\s*[=:]\s*"""
        r"""["']?[A-Za-z0-9_/+-]{20,}"""
    ),
}
FORBIDDEN_NAMES = re.compile(
    r"\.env(\..+)?|.+\.env|\.?netrc|_netrc|id_(rsa|dsa|ecdsa|ed25519)|.+\.(pem|p12|pfx|kdbx)"
)
SECRET_VARIABLE = re.compile(r"(TOKEN|API_KEY|SECRET|PASSWORD)$")
SHORTEST_VALUE = 16  # of a variable: shorter ones occur in ordinary text
SAMPLE = 8_192  # bytes that tell text from data


@dataclass(frozen=True)
class Finding:
    """Where something looks like a secret."""

    path: str
    line: int  # from 1; 0: the file itself
    kind: str
    hash: str = ""  # of what was found

    def __str__(self) -> str:
        place = f"{self.path}:{self.line}" if self.line else self.path
        return f"{place}: {self.kind} [{self.hash}]"


def scan(folder: Path, paths: Iterable[str]) -> tuple[Finding, ...]:
    """Everything in files of a folder that looks like a secret.

    Files that are not text are not read: weights and pictures hold no lines.
    """
    values = _secret_values()
    findings: list[Finding] = []
    for path in paths:
        if FORBIDDEN_NAMES.fullmatch(Path(path).name):
            findings.append(Finding(path, 0, "a file of secrets by its name"))
        file = folder / path
        if not _is_text(file):
            continue
        with file.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                kinds = [kind for kind, shape in SHAPES.items() if shape.search(line)]
                kinds += [f"the value of {name}" for name, value in values.items() if value in line]
                findings += [Finding(path, number, kind) for kind in kinds]
    return tuple(findings)


def _secret_values() -> dict[str, str]:
    """Secrets of this process's environment, and the saved Hub token."""
    from huggingface_hub import get_token

    values = {
        name: value
        for name, value in os.environ.items()
        if SECRET_VARIABLE.search(name) and len(value) >= SHORTEST_VALUE
    }
    token = get_token()
    if token and len(token) >= SHORTEST_VALUE and token not in values.values():
        values["the Hub token"] = token
    return values


def _is_text(file: Path) -> bool:
    with file.open("rb") as opened:
        start = opened.read(SAMPLE)
    return b"\0" not in start
