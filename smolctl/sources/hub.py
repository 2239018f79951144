"""A model on the Hub: config and tensor headers over the network immediately, weights on request.

Headers cost one request per file: the first 100 kB, with Range. Every request is made once and waits at most
a few seconds, while the client's own downloads retry for half a minute. A snapshot in the client's cache is
used without the network: always if it is the newest commit, and otherwise if the Hub cannot be reached.
"""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from smolctl.errors import HubError
from smolctl.hub.connection import Fetched, api, endpoint, fetch
from smolctl.hub.errors import READING, STRANGE, TemporaryError, answered, explained
from smolctl.outside import MAX_BYTES, checked, parse_object
from smolctl.sources.base import ArrayWeights, ModelSource, SourceKind, TensorHeader, TokenizerFiles
from smolctl.sources.huggingface.folder import (
    BOTH,
    INDEX,
    SINGLE,
    describe,
    is_huggingface_folder,
    open_folder,
)
from smolctl.sources.huggingface.safetensors_file import (
    SafetensorsWeights,
    check_header_length,
    parse_header,
    promised_tensors,
    read_weight_map,
)
from smolctl.sources.huggingface.tokenizer import (
    TOKENIZER_FILES,
    TOKENIZERS,
    has_tokenizer,
    read_tokenizer_folder,
)

if TYPE_CHECKING:
    from smolctl.sources.arrays import Array

HEADER_GUESS = 100_000  # bytes of the first Range request; longer headers need a second one
PARALLEL_REQUESTS = 8
OTHER_WEIGHTS = re.compile(r".+\.(bin|gguf|pth|pt|h5|msgpack|onnx)")
COMMIT = r"^[0-9A-Za-z_-]+$"  # the client names folders like this
# Safetensors files of a repository, with the names of the tensors to read from each (None: all).
Shards = dict[str, list[str] | None]


def open_hub(model: str) -> ModelSource:
    """Open `org/name[@revision]`.

    Raises:
        HubError: not found, private, gated, refused, unreachable, or without a readable model.
        InputError: the repository's files are damaged.
    """
    from huggingface_hub import is_offline_mode

    name, _, revision = model.partition("@")
    repository = Repository(name, revision or None)
    if is_offline_mode():
        return _open_cached(repository, model, f"{model}: HF_HUB_OFFLINE is set")
    try:
        with explained(name, READING):
            return _open_online(repository, model)
    except TemporaryError as error:
        try:
            return _open_cached(repository, model, error.message)
        except HubError:
            raise error from None


class _File(TypedDict):
    rfilename: str


class _Info(TypedDict):
    """The relevant part of the Hub's response about a repository."""

    sha: NotRequired[Annotated[str, Field(pattern=COMMIT)] | None]
    siblings: NotRequired[list[_File] | None]
    cardData: NotRequired[object]


@dataclass
class Repository:
    """Requests to one repository, with their cost in bytes."""

    name: str
    revision: str | None
    bytes_fetched: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()  # headers of shards are read concurrently

    @property
    def url(self) -> str:
        return f"{endpoint()}/{self.name}"

    def info(self) -> _Info:
        """The Hub's description of the repository: its commit and its files."""
        revision = f"/revision/{self.revision.replace('/', '%2F')}" if self.revision else ""
        answer = self._fetch(f"{endpoint()}/api/models/{self.name}{revision}", MAX_BYTES)
        with answered():
            return checked(_Info, parse_object(answer.content, self.url), self.url)

    def file(
        self, commit: str, path: str, limit: int = MAX_BYTES, start: int | None = None
    ) -> tuple[bytes, int]:
        """Bytes of a file, with Range from `start` on, and the size of the whole file (0: not known)."""
        answer = self._fetch(f"{self.url}/resolve/{commit}/{path}", limit, start)
        return answer.content, answer.size

    def _fetch(self, url: str, limit: int, start: int | None = None) -> Fetched:
        with explained(self.name, READING, wrappers=STRANGE):
            answer = fetch(url, limit, start)
        with self._lock:
            self.bytes_fetched += answer.downloaded
        return answer

    def download(self, patterns: list[str]) -> Path:
        """Download files of the repository into the client's cache; returns the folder of the snapshot.

        Raises:
            HubError: they cannot be downloaded.
        """
        with explained(self.name, READING, wrappers=STRANGE):
            return Path(api().snapshot_download(self.name, revision=self.revision, allow_patterns=patterns))


def _open_online(repository: Repository, model: str) -> ModelSource:
    info = repository.info()
    card = found if isinstance(found := info.get("cardData"), dict) else {}
    commit = info.get("sha") or repository.revision or "main"
    files = {file["rfilename"] for file in info.get("siblings") or ()}
    shards = _weight_files(repository, commit, files)
    cached = _cached_snapshot(repository, commit, files.intersection((*shards, *TOKENIZER_FILES)))
    if cached is not None:
        source = open_folder(cached, model, SourceKind.HUB)
        return dataclasses.replace(source, revision=commit, card=card, bytes_fetched=repository.bytes_fetched)
    if not shards and not files.intersection(("config.json", *TOKENIZERS)):
        raise HubError(f"{repository.name}: contains no model{_others(files)}", _other_hint(files))
    declared = None
    if "config.json" in files:
        declared = parse_object(repository.file(commit, "config.json")[0], f"{model}/config.json")
    tensors = _read_headers(repository, commit, shards) if shards else None
    missing: tuple[str, ...] = () if shards else (f"no safetensors in the repository{_others(files)}",)
    missing += (BOTH,) if {INDEX, SINGLE} <= files else ()
    weights = HubWeights(repository, shards, files)

    def reader() -> TokenizerFiles | None:
        return read_tokenizer_folder(repository.download(list(TOKENIZER_FILES)))

    source = describe(SourceKind.HUB, model, declared, tensors, missing, weights, reader)
    return dataclasses.replace(source, revision=commit, card=card, bytes_fetched=repository.bytes_fetched)


def _open_cached(repository: Repository, model: str, why: str) -> ModelSource:
    """The snapshot in the client's cache, without using the network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    folder = None
    try:
        folder = Path(snapshot_download(repository.name, revision=repository.revision, local_files_only=True))
    except IncompleteSnapshotError as error:  # it contains only the files that were requested before
        folder = Path(str(error.snapshot_path))
    except LocalEntryNotFoundError:
        pass
    if folder is None or not (is_huggingface_folder(folder) or has_tokenizer(folder)):
        raise HubError(
            f"{why}, and the model is not in the cache",
            "Connect once and unset HF_HUB_OFFLINE, or name a local file or folder.",
        )
    source = open_folder(folder, model, SourceKind.HUB)
    note = f"{why}: the cached revision {folder.name[:8]} is used"
    return dataclasses.replace(source, revision=folder.name, problems=(note, *source.problems))


def _cached_snapshot(repository: Repository, commit: str, needed: set[str]) -> Path | None:
    """The cache's folder of a commit, if it has all files that may be needed."""
    from huggingface_hub import try_to_load_from_cache

    if "config.json" not in needed or not any(path.endswith(".safetensors") for path in needed):
        return None
    found = [try_to_load_from_cache(repository.name, path, revision=commit) for path in sorted(needed)]
    folders = [Path(path).parent for path in found if isinstance(path, str)]
    return folders[0] if len(folders) == len(needed) else None


def _weight_files(repository: Repository, commit: str, files: set[str]) -> Shards:
    """The safetensors files of a model: the shards, the usual file, or the only file."""
    if INDEX in files and SINGLE not in files:
        index, _ = repository.file(commit, INDEX)
        return dict(read_weight_map(index, f"{repository.name}/{INDEX}"))
    if SINGLE in files:
        return {SINGLE: None}
    others = [path for path in files if path.endswith(".safetensors") and "/" not in path]
    return {others[0]: None} if len(others) == 1 else {}


def _read_headers(repository: Repository, commit: str, shards: Shards) -> tuple[TensorHeader, ...]:
    with ThreadPoolExecutor(min(PARALLEL_REQUESTS, len(shards))) as pool:
        headers = dict(
            zip(shards, pool.map(lambda path: _read_header(repository, commit, path), shards), strict=True)
        )
    of_all = {path: [tensor.name for tensor in header] for path, header in headers.items()}
    promised = {path: of_all[path] if names is None else names for path, names in shards.items()}
    return promised_tensors(promised, headers)


def _read_header(repository: Repository, commit: str, path: str) -> tuple[TensorHeader, ...]:
    origin = f"{repository.name}/{path}"
    start, size = repository.file(commit, path, HEADER_GUESS, 0)
    length = int.from_bytes(start[:8], "little")
    check_header_length(length, size or None, origin)
    header = start[8 : 8 + length]
    if len(header) < length:
        rest, _ = repository.file(commit, path, length - len(header), len(start))
        header += rest
    return parse_header(header, size - 8 - length if size else None, origin)


class HubWeights(ArrayWeights):
    """Weights that are downloaded into the client's cache when they are first read."""

    def __init__(self, repository: Repository, shards: Shards, files: set[str]) -> None:
        self.repository, self.shards, self.files = repository, shards, files

    def stored(self) -> Iterator[tuple[str, Array]]:
        if not self.shards:
            raise HubError(
                f"{self.repository.name}: no safetensors in the repository{_others(self.files)}",
                _other_hint(self.files),
            )
        folder = self.repository.download([*self.shards, INDEX, *TOKENIZER_FILES])
        yield from SafetensorsWeights({folder / path: names for path, names in self.shards.items()}).stored()


def _others(files: set[str]) -> str:
    others = sorted(path for path in files if OTHER_WEIGHTS.fullmatch(path))
    return f"; it has {', '.join(others[:3])}" if others else ""


def _other_hint(files: set[str]) -> str:
    gguf = sorted(path for path in files if path.endswith(".gguf"))
    if gguf:
        return f"Download {gguf[0]} with `hf download` and name the file."
    return "Name a repository with safetensors; the Hub can convert old weights (safetensors/convert)."
