"""Names of models on the Hub, as people type them or paste them from its pages."""

from __future__ import annotations

import re

from smolctl.errors import InputError
from smolctl.sources.huggingface.folder import INDEX, SINGLE

HUB_ADDRESS = re.compile(
    r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://(?:models/)?)(?P<name>[\w.-]+/[\w.-]+?)"
    r"(?:(?:/(?:tree|blob|resolve)/|@)(?P<revision>[\w.-]+)(?:/(?P<file>[^?]*?))?)?(?P<tag>:[\w.-]+)?/?(?:\?.*)?"
)
HUB_PARTS = ("config.json", SINGLE, INDEX)  # files whose URL stands for the model they belong to
HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(@[\w./-]+)?")
WEIGHT_ENDINGS = (".gguf", ".safetensors", ".ckpt")  # of files that smolctl and others write
# `models/x.gguf` that does not exist is a wrong path, not a repository.
FILE_ENDINGS = (*WEIGHT_ENDINGS, ".yaml", ".yml", ".json", ".bin", ".pt", ".pth")


def is_file_name(model: str) -> bool:
    """Whether a MODEL ends like a file name."""
    return model.lower().endswith(FILE_ENDINGS)


def is_hub_id(model: str) -> bool:
    """Whether a MODEL that is not on this machine can be `org/name[@revision]`."""
    return bool(HUB_ID.fullmatch(model)) and not is_file_name(model)


def hub_id_of(model: str) -> str:
    """The `org/name[@revision]` in a URL of the Hub; any other MODEL is returned unchanged.

    Raises:
        InputError: it is the URL of a file that may be another model than its repository's, or of another
            server.
    """
    address = HUB_ADDRESS.fullmatch(model)
    if address is None:
        if "://" in model:
            raise InputError(
                f"{model}: not the address of a model on the Hub", "Download the file, then name it."
            )
        return model
    name, revision, file = address["name"], address["revision"], address["file"]
    if file and file not in HUB_PARTS:
        at = f" --revision {revision}" if revision != "main" else ""
        raise InputError(
            f"{model}: this is only a part of a repository on the Hub",
            f"`hf download {name} {file}{at} --local-dir .`, then name it; or name the model {name}.",
        )
    return (f"{name}@{revision}" if revision else name) + (address["tag"] or "")


def refuse_tag(model: str) -> None:
    """Refuse `org/name:Q4_K_M`, llama.cpp's notation for a file of a repository. Raises InputError."""
    repository, _, tag = model.partition(":")
    if tag and HUB_ID.fullmatch(repository):
        name, at, revision = repository.partition("@")
        revision = f" --revision {revision}" if at else ""
        raise InputError(
            f"{model}: this is one GGUF file of a repository on the Hub",
            f"`hf download {name}{revision} --include '*{tag}*.gguf' --local-dir .`, then give its path.",
        )
