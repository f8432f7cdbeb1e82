"""A Hub on the loopback: what huggingface_hub asks for to push and load models, and the faults that networks have."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub
import pytest

from mobilenet import hub as hub_client


LFS_SUFFIXES = (".bin", ".safetensors")


@dataclass
class Repository:
    """Files by commit, and commits by the name of a branch or tag."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    refs: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})

    def commit(self, files: Mapping[str, bytes], deleted: tuple[str, ...] = (), branch: str = "main") -> str:
        """Add and remove files on a branch; return the commit's hash."""
        parent = self.refs[branch]
        kept = {path: data for path, data in self.commits[parent].items() if not path.startswith(deleted)}
        tree = kept | dict(files) if deleted else self.commits[parent] | dict(files)
        listing = "".join(f"{path} {git_hash(data)}\n" for path, data in sorted(tree.items()))
        sha = hashlib.sha1(f"{parent}\n{listing}".encode()).hexdigest()
        self.commits[sha] = tree
        self.refs[branch] = sha
        return sha


@dataclass
class Fault:
    """What goes wrong with the next requests whose method and path match.

    `kind` is a status to answer with, "cut" to close the connection in the middle of the file, "stall" to stop sending
    there, or "etag" to send the tag of another file.
    """

    pattern: str  # of "METHOD /path"
    kind: int | str
    times: int = 1 << 30


class NotFoundError(Exception):
    """What was asked for does not exist; the message is the Hub's code for it."""


def git_hash(data: bytes) -> str:
    """The name that git gives to a file's content, which is its ETag unless the file is under LFS."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub(ThreadingHTTPServer):
    """The server: a context manager that runs until its end.

    Args:
        lfs: Whether weights travel by Git LFS, or as the other files do.
    """

    daemon_threads = True

    def __init__(self, lfs: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lfs = lfs
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # of LFS, by SHA-256
        self.faults: list[Fault] = []
        self.log: list[str] = []  # "METHOD /path" of each request
        self.stalled, self.closing = threading.Event(), threading.Event()

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """Clients may go away whenever they like."""

    @property
    def url(self) -> str:
        """Where it listens: a value for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, home: Path, **variables: str) -> dict[str, str]:
        """Environment of a fresh process whose only Hub is this one, and whose caches lie in `home`."""
        mine = ("HF_", "HUGGINGFACE", "TRANSFORMERS_", "PYTHON", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith(mine)}
        return inherited | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_loopback",
            "NO_PROXY": "127.0.0.1,localhost",
            **variables,
        }

    def publish(self, repo_id: str, files: Path | Mapping[str, bytes]) -> str:
        """Commit a folder, or files by name, to a repository, which need not exist; return the commit's hash."""
        if isinstance(files, Path):
            paths = [path for path in sorted(files.rglob("*")) if path.is_file()]
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        return self.repositories.setdefault(repo_id, Repository()).commit(files)

    def tag(self, repo_id: str, name: str) -> None:
        """Give the last commit a name that stays."""
        refs = self.repositories[repo_id].refs
        refs[name] = refs["main"]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Files of a repository at a branch, tag or commit."""
        return self.find(repo_id, revision)[1]

    def find(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]]:
        """Commit and files behind a revision."""
        if repo_id not in self.repositories:
            raise NotFoundError("RepoNotFound")
        repository = self.repositories[repo_id]
        sha = repository.refs.get(revision, revision)
        if sha not in repository.commits:
            raise NotFoundError("RevisionNotFound")
        return sha, repository.commits[sha]

    def is_lfs(self, path: str) -> bool:
        """Whether a file travels by Git LFS."""
        return self.lfs and path.endswith(LFS_SUFFIXES)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def handle_any(self) -> None:
        path = unquote(self.path.partition("?")[0])
        request = f"{self.command} {path}"
        self.server.log.append(request)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.fault = next((f for f in self.server.faults if f.times > 0 and re.search(f.pattern, request)), None)
        if self.fault:
            self.fault.times -= 1
            if isinstance(self.fault.kind, int):
                return self.send_json({"error": "a fault of the loopback Hub"}, self.fault.kind)
        try:
            for pattern, answer in ROUTES.items():
                if match := re.fullmatch(pattern, request):
                    return answer(self, **match.groupdict())
            raise NotFoundError("EntryNotFound")
        except NotFoundError as error:
            return self.send_json({"error": str(error)}, 404, {"X-Error-Code": str(error)})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Keep the terminal clean."""

    def send(self, data: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if not self.fault or self.fault.kind not in ("cut", "stall"):
            self.wfile.write(data)
            return
        self.wfile.write(data[: len(data) // 2])
        self.close_connection = True
        if self.fault.kind == "stall":
            self.server.stalled.set()
            self.server.closing.wait()

    def send_json(self, value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def send_part(self, data: bytes, headers: Mapping[str, str]) -> None:
        """Send a file, or what of it an interrupted download still lacks."""
        span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if span is None:
            return self.send(data, 200, headers)
        start = int(span[1])
        return self.send(data[start:], 206, {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}", **headers})

    def who_am_i(self) -> None:
        self.send_json({"type": "user", "name": "someone", "orgs": []})

    def validate_card(self) -> None:
        self.send_json({"errors": [], "warnings": []})

    def create(self) -> None:
        asked = json.loads(self.body)
        repo_id = f"{asked.get('organization') or 'someone'}/{asked['name']}"
        url = f"{self.server.url}/{repo_id}"
        if repo_id in self.server.repositories:
            return self.send_json({"error": "it exists", "url": url}, 409)
        self.server.repositories[repo_id] = Repository()
        return self.send_json({"url": url, "name": repo_id})

    def preupload(self, repo_id: str, revision: str) -> None:
        self.server.find(repo_id, revision)
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = [{"path": p, "uploadMode": "lfs" if self.server.is_lfs(p) else "regular"} for p in paths]
        self.send_json({"files": [{**mode, "shouldIgnore": False} for mode in modes]})

    def batch(self, repo_id: str) -> None:
        wanted = [
            {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}}}
            for o in json.loads(self.body)["objects"]
        ]
        self.send_json({"transfer": "basic", "objects": wanted})

    def put_object(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.send_json({"error": "the content has another SHA-256"}, 422)
        self.server.objects[oid] = self.body
        return self.send(b"")

    def get_object(self, oid: str) -> None:
        if oid not in self.server.objects:
            raise NotFoundError("EntryNotFound")
        self.send_part(self.server.objects[oid], {})

    def commit(self, repo_id: str, revision: str) -> None:
        self.server.find(repo_id, revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        changes = [(line["key"], line["value"]) for line in lines]
        files = {v["path"]: base64.b64decode(v["content"]) for key, v in changes if key == "file"}
        files |= {v["path"]: self.server.objects[v["oid"]] for key, v in changes if key == "lfsFile"}
        deleted = tuple(v["path"] for key, v in changes if key.startswith("deleted"))
        sha = self.server.repositories[repo_id].commit(files, deleted, revision)
        self.send_json({"commitUrl": f"{self.server.url}/{repo_id}/commit/{sha}", "commitOid": sha, "success": True})

    def tag(self, repo_id: str, revision: str) -> None:
        sha, _ = self.server.find(repo_id, revision)
        self.server.repositories[repo_id].refs[json.loads(self.body)["tag"]] = sha
        self.send_json({})

    def info(self, repo_id: str, revision: str | None) -> None:
        sha, files = self.server.find(repo_id, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(files)]
        self.send_json({"id": repo_id, "modelId": repo_id, "sha": sha, "private": False, "siblings": siblings})

    def tree(self, repo_id: str, revision: str, folder: str | None) -> None:
        _, files = self.server.find(repo_id, revision)
        entries = []
        for path, data in sorted(files.items()):
            if path.startswith(f"{folder}/" if folder else ""):
                entry = {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)}
                if self.server.is_lfs(path):
                    oid = hashlib.sha256(data).hexdigest()
                    entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 134}
                entries.append(entry)
        if folder and not entries:
            raise NotFoundError("EntryNotFound")
        self.send_json(entries)

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        sha, files = self.server.find(repo_id, revision)
        if path not in files:
            raise NotFoundError("EntryNotFound")
        data = files[path]
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if not self.server.is_lfs(path):
            wrong = self.fault and self.fault.kind == "etag"
            return self.send_part(data, {**headers, "ETag": f'"{git_hash(b"" if wrong else data)}"'})
        # As on the Hub, weights lie on another host; clients do not look for commits and tags there.
        oid = hashlib.sha256(data).hexdigest()
        self.server.objects[oid] = data
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
        return self.send(
            b"", 302, {**headers, **linked, "Location": f"http://localhost:{self.server.server_port}/lfs/{oid}"}
        )


_REPO = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
_MODEL = f"/api/models/{_REPO}"
_REVISION = r"(?P<revision>[^/]+)"

ROUTES = {
    r"GET /api/whoami-v2": _Handler.who_am_i,
    r"POST /api/validate-yaml": _Handler.validate_card,
    r"POST /api/repos/create": _Handler.create,
    rf"POST {_MODEL}/preupload/{_REVISION}": _Handler.preupload,
    rf"POST /{_REPO}\.git/info/lfs/objects/batch": _Handler.batch,
    r"PUT /lfs/(?P<oid>\w+)": _Handler.put_object,
    r"(?:GET|HEAD) /lfs/(?P<oid>\w+)": _Handler.get_object,
    rf"POST {_MODEL}/commit/{_REVISION}": _Handler.commit,
    rf"POST {_MODEL}/tag/{_REVISION}": _Handler.tag,
    rf"GET {_MODEL}(?:/revision/{_REVISION})?": _Handler.info,
    rf"GET {_MODEL}/tree/{_REVISION}(?:/(?P<folder>.+))?": _Handler.tree,
    rf"(?:GET|HEAD) /{_REPO}/resolve/{_REVISION}/(?P<path>.+)": _Handler.resolve,
}


def ask(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process ask a server for the files of the Hub, without pauses between attempts."""
    download = partial(huggingface_hub.hf_hub_download, endpoint=url, cache_dir=cache)
    monkeypatch.setattr(hub_client, "hf_hub_download", download)
    monkeypatch.setattr(hub_client, "hf_hub_url", partial(huggingface_hub.hf_hub_url, endpoint=url))
    monkeypatch.setattr(time, "sleep", lambda _: None)
