"""A small Hub: as much of its HTTP interface as the real `huggingface_hub` client needs for data set repositories.

It stores commits whole, in memory. Large and binary files go through the LFS batch interface, others into the commit.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "hf_token-of-the-tests"
SIGNATURE = "signature-of-the-tests"
_SIGNATURE = f"X-Amz-Signature={SIGNATURE}"
_LARGE = 3_000
_PAGE = 25


@dataclass
class Repository:
    """Commits, and names for them."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit("main", {".gitattributes": b""}, "initial commit")

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        number = f"{len(self.commits)} {message} {sorted(files)}"
        oid = hashlib.sha1(number.encode()).hexdigest()
        self.commits[oid] = files
        self.messages.append(message)
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        if revision in self.commits:
            return revision
        return self.branches.get(revision) or self.tags.get(revision)

    def head(self, branch: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[branch]]


class Hub:
    """The server and what it holds."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        # Set by tests: what the server does wrong, or is told to leave out.
        self.ignored: Callable[[str], bool] = lambda path: False
        self.damaged: Callable[[str, bytes], bytes] = lambda path, data: data
        self.before_commit: Callable[[list[dict[str, Any]]], None] = lambda lines: None
        self.status: Callable[[str, str], int | None] = lambda method, path: None
        self.lock = threading.RLock()
        self.url = self.storage = ""

    @contextmanager
    def serving(self) -> Iterator["Hub"]:
        """Serve on the loopback."""
        handler = type("Handler", (_Handler,), {"hub": self})
        # As the real one, it has large files sent to and fetched from another machine, which is to see no token.
        servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        self.url, self.storage = (f"http://127.0.0.1:{server.server_port}" for server in servers)
        threads = [threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True) for server in servers]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            for server, thread in zip(servers, threads, strict=True):
                server.shutdown()
                server.server_close()
                thread.join()

    def into(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make this the Hub of this process, whose client read the environment when it was imported."""
        from huggingface_hub import constants

        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + template)
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)

    @property
    def environment(self) -> dict[str, str]:
        """The same for another process."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": TOKEN,
        }


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _is_large(path: str, data: bytes) -> bool:
    return len(data) > _LARGE or path.endswith(".parquet")


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    # One packet an answer: the second of two would wait for the client to acknowledge the first.
    wbufsize = 1 << 16

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_HEAD = do_GET

    def _answer(self) -> None:
        self._body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                self._body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        self.hub.requests.append(f"{self.command} {self.path}")
        if parts[0] == "lfs" and "Authorization" in self.headers:
            self._send(400, {"error": "a token has left the Hub"})
            return
        status = self.hub.status(self.command, self.path)
        if status is not None:
            self._send(status, {"error": f"no, and the token was {TOKEN}"})
            return
        with self.hub.lock:
            self._route(parts)

    def _route(self, parts: list[str]) -> None:
        match (self.command, *parts):
            case ("PUT", "lfs", oid):
                if _sha256(self._body) != oid:
                    self._send(400, {"error": "other bytes than announced"})
                    return
                self.hub.large[oid] = self._body
                self._send(200, {})
            case ("GET" | "HEAD", "lfs", path, oid):
                self._raw(self.hub.damaged(path.replace("+", "/"), self.hub.large[oid]))
            case ("POST", "api", "validate-yaml"):
                self._send(200, {"errors": [], "warnings": []})
            case ("POST", "api", "repos", "create"):
                self._create_repository(json.loads(self._body))
            case (_, "api", "datasets", user, name, *rest):
                self._api(f"{user}/{name}", rest)
            case ("POST", "datasets", user, name, "info", "lfs", "objects", "batch"):
                self._batch(f"{user}/{name.removesuffix('.git')}", json.loads(self._body))
            case ("GET" | "HEAD", "datasets", user, name, "resolve", revision, *path):
                self._resolve(f"{user}/{name}", revision, "/".join(path))
            case _:
                self._send(404, {"error": "no such address"})

    @property
    def _allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, name: str, *, write: bool = False) -> Repository | None:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self._allowed):
            self._send(401, {"error": "Repository not found"}, **{"X-Error-Code": "RepoNotFound"})
            return None
        if write and not self._allowed:
            self._send(403, {"error": "forbidden"})
            return None
        return found

    def _create_repository(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization', 'user')}/{wanted['name']}"
        if not self._allowed:
            self._send(403, {"error": "forbidden"})
        elif name in self.hub.repositories:
            self._send(409, {"error": "You already created this", "url": f"{self.hub.url}/datasets/{name}"})
        else:
            private = wanted.get("private", wanted.get("visibility") == "private")
            self.hub.repositories[name] = Repository(private=bool(private))
            self._send(200, {"url": f"{self.hub.url}/datasets/{name}"})

    def _api(self, name: str, rest: list[str]) -> None:
        kind, revision = (rest[0], "/".join(rest[1:])) if rest else ("revision", "main")
        repository = self._repository(name, write=self.command == "POST")
        if repository is None:
            return
        if kind == "branch":
            self._name(repository.branches, revision, repository.branches["main"])
            return
        commit = repository.resolve(revision)
        if commit is None:
            self._send(404, {"error": "Invalid rev id"}, **{"X-Error-Code": "RevisionNotFound"})
        elif kind == "tag":
            self._name(repository.tags, json.loads(self._body)["tag"], commit)
        elif kind == "revision":
            self._send(200, {"id": name, "sha": commit, "private": repository.private, "tags": []})
        elif kind == "tree":
            self._tree(name, commit, repository.commits[commit])
        elif kind == "preupload":
            self._preupload(repository.commits[commit], json.loads(self._body)["files"])
        elif kind == "commit":
            self._commit(repository, name, revision)
        else:
            self._send(404, {"error": "no such address"})

    def _name(self, names: dict[str, str], name: str, commit: str) -> None:
        if name in names:
            self._send(409, {"error": "exists"})
        else:
            names[name] = commit
            self._send(200, {})

    def _tree(self, name: str, commit: str, files: dict[str, bytes]) -> None:
        start = int(parse_qs(urlsplit(self.path).query).get("cursor", ["0"])[0])
        folders = {path.rpartition("/")[0] for path in files} - {""}
        entries: list[dict[str, Any]] = [
            {"type": "directory", "path": path, "size": 0, "oid": _sha256(path.encode())[:40]}
            for path in sorted(folders)
        ]
        for path, data in sorted(files.items()):
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _git_hash(data)}
            if _is_large(path, data):
                entry["oid"] = _git_hash(b"pointer" + data)
                entry["lfs"] = {"oid": _sha256(data), "size": len(data), "pointerSize": 130}
            entries.append(entry)
        more = {}
        if start + _PAGE < len(entries):
            address = f"{self.hub.url}/api/datasets/{name}/tree/{commit}?recursive=True&cursor={start + _PAGE}"
            more = {"Link": f'<{address}>; rel="next"'}
        self._send(200, entries[start : start + _PAGE], **more)

    def _preupload(self, there: dict[str, bytes], files: list[dict[str, Any]]) -> None:
        answer = []
        for file in files:
            path, large = file["path"], file["size"] > _LARGE or file["path"].endswith(".parquet")
            found: dict[str, Any] = {
                "path": path,
                "uploadMode": "lfs" if large else "regular",
                "shouldIgnore": self.hub.ignored(path),
            }
            if path in there:
                found["oid"] = _sha256(there[path]) if _is_large(path, there[path]) else _git_hash(there[path])
            answer.append(found)
        self._send(200, {"files": answer})

    def _batch(self, name: str, wanted: dict[str, Any]) -> None:
        if self._repository(name, write=True) is None:
            return
        objects = []
        for entry in wanted["objects"]:
            if entry["oid"] not in self.hub.large:
                href = f"{self.hub.storage}/lfs/{entry['oid']}?{_SIGNATURE}"
                entry = entry | {"actions": {"upload": {"href": href, "header": {}}}}
            objects.append(entry)
        self._send(200, {"transfer": "basic", "objects": objects})

    def _commit(self, repository: Repository, name: str, branch: str) -> None:
        lines = [json.loads(line) for line in self._body.splitlines()]
        self.hub.before_commit(lines)
        header = lines[0]["value"]
        if "parentCommit" in header and header["parentCommit"] != repository.branches[branch]:
            self._send(412, {"error": "A commit has happened since. Please refresh and try again."})
            return
        files = dict(repository.head(branch))
        for line in lines[1:]:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.large[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        oid = repository.commit(branch, files, header["summary"])
        self._send(200, {"commitUrl": f"{self.hub.url}/datasets/{name}/commit/{oid}", "commitOid": oid})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        commit = repository.resolve(revision) or ""
        data = repository.commits.get(commit, {}).get(path)
        if data is None:
            self._send(404, {"error": "Entry not found"}, **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        elif _is_large(path, data):
            self._raw(
                b"",
                302,
                **{
                    "Location": f"{self.hub.storage}/lfs/{path.replace('/', '+')}/{_sha256(data)}?{_SIGNATURE}",
                    "X-Linked-Size": str(len(data)),
                    "X-Linked-Etag": f'"{_sha256(data)}"',
                    "X-Repo-Commit": commit,
                },
            )
        else:
            self._raw(self.hub.damaged(path, data), 200, **{"X-Repo-Commit": commit, "ETag": f'"{_git_hash(data)}"'})

    def _send(self, status: int, plain: Any, **headers: str) -> None:
        self._raw(json.dumps(plain).encode(), status, **{"Content-Type": "application/json"}, **headers)

    def _raw(self, data: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
