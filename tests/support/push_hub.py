"""A loopback server that speaks as much of the Hub's protocol as publishing needs, and fails on demand.

It is driven by the real client: point `HF_ENDPOINT` at `PushHub.url`. Large files go through Git LFS, or, in
`xet` mode, through hf_xet into a folder that stands for its store.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.loopback import Loopback

TOKEN = "hf_" + "a1B2" * 9
LFS_ENDINGS = (".safetensors", ".gguf", ".png", ".so")
USER = {"name": "me", "orgs": [{"name": "lab"}]}


@dataclass(frozen=True)
class Blob:
    """One file: its bytes, or what stands for them in LFS."""

    content: bytes | None  # None: it lies in the store of hf_xet
    size: int
    sha256: str | None = None  # None: a regular file

    @property
    def git_sha1(self) -> str:
        content = self.content
        if self.sha256 is not None:
            content = f"version https://git-lfs\noid sha256:{self.sha256}\nsize {self.size}\n".encode()
        assert content is not None
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    """A repository: commits with all their files, and branches."""

    private: bool
    sdk: str | None = None
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    stages: list[str] = field(default_factory=lambda: ["BUILDING", "RUNNING"])
    logs: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, Blob], message: str) -> str:
        sha = hashlib.sha1(f"{message}{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def files(self, revision: str) -> dict[str, Blob] | None:
        return self.commits.get(self.branches.get(revision, revision))

    @property
    def head(self) -> dict[str, Blob]:
        return self.commits[self.branches["main"]]


@dataclass
class Fault:
    """What goes wrong with the next requests of one kind."""

    path: str  # regular expression
    status: int = 0  # answer with it
    cut: bool = False  # close the connection in the middle of the request's body
    hang_s: float = 0.0
    after: bool = False  # do the work first, and lose the answer
    times: int = 1
    method: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "the Hub is out of order"
    act: Callable[[], None] | None = None  # something that happens just before


@dataclass
class PushHub(Loopback):
    """Serve repositories while in a `with` block."""

    store: Path  # of hf_xet
    xet: bool = False
    knows_xet: bool = True  # else it answers 404 to requests for Xet's token
    role: str = "write"
    fine_grained: dict[str, list[str]] | None = None
    repos: dict[str, Repo] = field(default_factory=dict)  # "models/me/x" or "spaces/me/x"
    faults: list[Fault] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)  # of everything that was sent, tokens among it
    lfs: dict[str, bytes] = field(default_factory=dict)

    def __enter__(self) -> PushHub:
        hub = self

        class Handler(_Handler):
            state = hub

        self.lock = threading.Lock()
        self.serve(Handler)
        return self

    def requests(self, pattern: str) -> list[str]:
        return [line for line in self.log if re.search(pattern, line)]

    def make(self, key: str, private: bool = True, sdk: str | None = None) -> Repo:
        repo = Repo(private, sdk)
        repo.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", 25)}, "initial commit")
        self.repos[key] = repo
        return repo

    def xet_hashes(self) -> dict[str, str]:
        """sha256 to hf_xet's own hash of every file in its store."""
        found: dict[str, str] = {}
        for path in self.store.rglob("*.mdb"):
            found |= _shard_files(path.read_bytes())
        return found


def _shard_files(data: bytes) -> dict[str, str]:
    """The files that a shard of hf_xet describes: sections of 48 bytes behind a header of 48."""
    found: dict[str, str] = {}
    at = 48
    while data[at : at + 32] not in (b"\xff" * 32, b""):
        name = "".join(f"{part:016x}" for part in struct.unpack_from("<4Q", data, at))
        flags, count = struct.unpack_from("<2I", data, at + 32)
        at += 48 + 48 * count * (2 if flags & (1 << 31) else 1)
        if flags & (1 << 30):
            sha = "".join(f"{part:016x}" for part in struct.unpack_from("<4Q", data, at))
            found[sha] = name
            at += 48
    return found


class _CutError(Exception):
    """The connection is to break now."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    state: PushHub

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.where, self.query = unquote(url.path).strip("/"), parse_qs(url.query)
        self.raw = url.path.strip("/").split("/")
        with self.state.lock:
            fault = next(
                (
                    one
                    for one in self.state.faults
                    if one.times > 0 and re.search(one.path, self.where) and one.method in ("", self.command)
                ),
                None,
            )
            if fault:
                fault.times -= 1
            self.state.log.append(f"{self.command} /{self.where}")
        try:
            if fault and fault.act:
                fault.act()
            if fault and not fault.after and self._fail(fault):
                return
            self.body = self._read(int(self.headers.get("Content-Length") or 0))
            self.state.bodies.append(self.body)
            with self.state.lock:
                status, answer, headers = self._route()
            if fault and fault.after and self._fail(fault):
                return
            self._send(status, answer, headers)
        except (_CutError, OSError):
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_HEAD = _serve  # noqa: N815 (http.server's names)

    def _fail(self, fault: Fault) -> bool:
        if fault.hang_s:
            time.sleep(fault.hang_s)
        if fault.cut:
            self._read(int(self.headers.get("Content-Length") or 0) // 2 if not fault.after else 0)
            raise _CutError
        if fault.status:
            if not fault.after:
                self._read(int(self.headers.get("Content-Length") or 0))
            self._send(*self._error(fault.status, fault.message, **fault.headers))
            return True
        return False

    def _read(self, length: int) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(length)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def _ok(self, value: Any) -> tuple[int, bytes, dict[str, str]]:
        return 200, json.dumps(value).encode(), {"Content-Type": "application/json"}

    def _error(self, status: int, message: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
        return status, json.dumps({"error": message}).encode(), {"X-Error-Message": message, **headers}

    def _missing(self, code: str) -> tuple[int, bytes, dict[str, str]]:
        return self._error(404, code, **{"X-Error-Code": code})

    def _route(self) -> tuple[int, bytes, dict[str, str]]:
        parts = self.where.split("/")
        if parts[0] == "store":
            return self._lfs_put(parts[1])
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._error(401, "Invalid user token.")
        if self.where == "api/whoami-v2":
            return self._whoami()
        if self.where == "api/repos/create":
            return self._create()
        if self.where == "api/validate-yaml":
            return self._validate_yaml()
        if parts[0] == "api":
            kind, name = parts[1], "/".join(parts[2:4])
            repo = self.state.repos.get(f"{kind}/{name}")
            if repo is None:
                return self._missing("RepoNotFound")
            return self._api(kind, name, repo, [unquote(part) for part in self.raw[4:]])
        kind = parts.pop(0) if parts[0] == "spaces" else "models"
        repo = self.state.repos.get(f"{kind}/{'/'.join(parts[:2]).removesuffix('.git')}")
        if repo is None:
            return self._missing("RepoNotFound")
        if self.where.endswith("info/lfs/objects/batch"):
            return self._lfs_batch()
        return self._file(repo, parts[2:], f"{kind}/{parts[0]}/{parts[1]}")

    def _whoami(self) -> tuple[int, bytes, dict[str, str]]:
        token: dict[str, Any] = {"displayName": "laptop", "role": self.state.role}
        if self.state.fine_grained is not None:
            token |= {
                "role": "fineGrained",
                "fineGrained": {
                    "scoped": [
                        {"entity": {"type": "user", "name": name}, "permissions": rights}
                        for name, rights in self.state.fine_grained.items()
                    ]
                },
            }
        return self._ok({**USER, "type": "user", "auth": {"type": "access_token", "accessToken": token}})

    def _create(self) -> tuple[int, bytes, dict[str, str]]:
        asked = self.json
        kind = f"{asked.get('type') or 'model'}s"
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        prefix = "" if kind == "models" else f"{kind}/"
        url = {"url": f"{self.state.url}/{prefix}{name}", "name": name}
        if f"{kind}/{name}" in self.state.repos:
            return 409, json.dumps({"error": "You already created this repo", **url}).encode(), {}
        self.state.make(f"{kind}/{name}", asked.get("visibility") == "private", asked.get("sdk"))
        return self._ok(url)

    def _validate_yaml(self) -> tuple[int, bytes, dict[str, str]]:
        import yaml

        content = self.json["content"]
        front = re.match(r"---\n(.*?)---\n", content, re.DOTALL)
        values = yaml.safe_load(front[1]) if front else {}
        wrong = [key for key in ("license", "sdk") if not isinstance(values.get(key, ""), str)]
        if wrong:
            return 400, json.dumps({"errors": [{"message": f'"{wrong[0]}" must be a string'}]}).encode(), {}
        return self._ok({"errors": [], "warnings": []})

    def _api(self, kind: str, name: str, repo: Repo, rest: list[str]) -> tuple[int, bytes, dict[str, str]]:
        verb, revision = (rest[0] if rest else ""), "/".join(rest[1:]) or "main"
        if verb in ("xet-write-token", "xet-read-token") and not self.state.knows_xet:
            return 404, b"Cannot GET this", {"Content-Type": "text/html"}
        if verb in ("xet-write-token", "xet-read-token"):
            expiry = int(time.time()) + 3600
            where = f"local://{self.state.store}"
            status, body, headers = self._ok({"accessToken": "t", "casUrl": where, "exp": expiry})
            told = {"X-Xet-Cas-Url": where, "X-Xet-Access-Token": "t", "X-Xet-Token-Expiration": str(expiry)}
            return status, body, headers | told
        if verb == "preupload":
            return self._preupload(repo, revision)
        if verb == "commit":
            return self._commit(kind, name, repo, revision)
        if verb == "branch":
            repo.branches[revision] = repo.branches["main"]
            return self._ok({})
        if verb == "discussions":
            numbers = [int(branch[8:]) for branch in repo.branches if branch.startswith("refs/pr/")]
            found = [
                {
                    "title": "t",
                    "num": number,
                    "author": {"name": "me"},
                    "createdAt": "2026-01-01T00:00:00.000Z",
                    "status": "open",
                    "isPullRequest": True,
                    "repo": {"name": name, "type": kind[:-1]},
                }
                for number in numbers
            ]
            return self._ok({"discussions": found, "count": len(found), "start": 0})
        if verb == "runtime":
            stage = repo.stages.pop(0) if len(repo.stages) > 1 else repo.stages[0]
            return self._ok({"stage": stage, "hardware": {"current": None, "requested": "cpu-basic"}})
        if verb == "logs":
            events = "".join(f"data: {json.dumps({'data': line, 'timestamp': ''})}\n\n" for line in repo.logs)
            return 200, events.encode(), {"Content-Type": "text/event-stream"}
        files = repo.files(rest[1] if verb == "tree" else revision)
        if files is None:
            return self._missing("RevisionNotFound")
        if verb == "tree":
            return self._ok([_entry(path, blob) for path, blob in files.items()])
        sha = repo.branches.get(revision, revision)
        siblings = [{"rfilename": path} for path in files]
        return self._ok(
            {"id": name, "sha": sha, "private": repo.private, "siblings": siblings, "sdk": repo.sdk}
        )

    def _preupload(self, repo: Repo, revision: str) -> tuple[int, bytes, dict[str, str]]:
        there = repo.files(revision) or {}
        answers = []
        for file in self.json["files"]:
            blob = there.get(file["path"])
            oid = (blob.sha256 or blob.git_sha1) if blob else None
            mode = "lfs" if file["path"].endswith(LFS_ENDINGS) else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self._ok({"files": answers})

    def _lfs_batch(self) -> tuple[int, bytes, dict[str, str]]:
        objects = []
        for one in self.json["objects"]:
            upload = {"href": f"{self.state.url}/store/{one['oid']}", "header": {}}
            there = one["oid"] in self.state.lfs
            objects.append({**one, **({} if there else {"actions": {"upload": upload}})})
        return self._ok({"transfer": "basic", "objects": objects})

    def _lfs_put(self, oid: str) -> tuple[int, bytes, dict[str, str]]:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._error(400, "wrong checksum")
        self.state.lfs[oid] = self.body
        return 200, b"", {}

    def _commit(self, kind: str, name: str, repo: Repo, branch: str) -> tuple[int, bytes, dict[str, str]]:
        lines = [json.loads(line) for line in self.body.decode().splitlines() if line]
        header = lines[0]["value"]
        parent = header.get("parentCommit")
        if parent and parent != repo.branches[branch]:
            return self._error(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[repo.branches[branch]])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = Blob(content, len(content))
            elif line["key"] == "lfsFile":
                stored = self.state.lfs.get(value["oid"])
                if stored is None and value["oid"] not in self.state.xet_hashes():
                    return self._error(400, f"LFS object {value['oid']} was never uploaded")
                files[value["path"]] = Blob(stored, value["size"], value["oid"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        extra = {}
        if self.query.get("create_pr") == ["1"]:
            number = 1 + sum(one.startswith("refs/pr/") for one in repo.branches)
            branch = f"refs/pr/{number}"
            extra = {"pullRequestUrl": f"{self.state.url}/{name}/discussions/{number}"}
        sha = repo.commit(branch, files, header["summary"])
        prefix = "" if kind == "models" else f"{kind}/"
        url = f"{self.state.url}/{prefix}{name}/commit/{sha}"
        return self._ok({"commitUrl": url, "commitOid": sha, **extra})

    def _file(self, repo: Repo, rest: list[str], key: str) -> tuple[int, bytes, dict[str, str]]:
        if rest[:1] != ["resolve"]:
            return self._missing("EntryNotFound")
        revision, path = rest[1], "/".join(rest[2:])
        files = repo.files(revision)
        if files is None:
            return self._missing("RevisionNotFound")
        if path not in files:
            return self._missing("EntryNotFound")
        blob = files[path]
        etag = blob.sha256 or blob.git_sha1
        headers = {"X-Repo-Commit": repo.branches.get(revision, revision), "ETag": f'"{etag}"'}
        if blob.content is None:
            assert blob.sha256 is not None
            headers |= {
                "X-Xet-Hash": self.state.xet_hashes()[blob.sha256],
                "X-Xet-Refresh-Route": f"{self.state.url}/api/{key}/xet-read-token/{revision}",
                "X-Linked-Size": str(blob.size),
                "X-Linked-Etag": f'"{etag}"',
            }
            return 200, b"", headers
        return 200, blob.content, headers


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": blob.size, "oid": blob.git_sha1}
    if blob.sha256:
        entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}
    return entry
