"""A stand-in for the Hub: the routes of its API that huggingface_hub uses to create, read and change repositories.

It checks tokens, keeps files by commit, and takes large files by LFS's "basic" transfer, as the Hub does. The client is
the real one, pointed at it by HF_ENDPOINT.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

WRITE, READ = "hf_write_token_of_me", "hf_read_token_of_me"
LARGE = (".safetensors", ".gguf")  # kept by LFS


@dataclass
class Repository:
    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)  # (id, files), oldest first
    messages: list[str] = field(default_factory=list)

    @property
    def head(self) -> tuple[str, dict[str, bytes]]:
        return self.commits[-1]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.head
        return next((commit for commit in self.commits if commit[0] == revision), None)

    def add(self, files: dict[str, bytes], message: str) -> str:
        digest = hashlib.sha1(f"{len(self.commits)}{message}{sorted(files)}".encode()).hexdigest()
        self.commits.append((digest, files))
        self.messages.append(message)
        return digest


@dataclass
class StandIn:
    """The state of the server, which a test can look at and change."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # of LFS, by SHA-256
    requests: list[str] = field(default_factory=list)
    broken: int | None = None  # the status of every answer
    silent: bool = False  # it accepts requests and does not answer
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    hub: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def handle_any(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.hub.silent:
            time.sleep(60)
            return None
        if self.hub.broken is not None:
            return self.answer(self.hub.broken, {"error": "broken"})
        path = unquote(urlsplit(self.path).path)
        for method, pattern, handle in ROUTES:
            if method in (self.command, "ANY") and (found := re.fullmatch(pattern, path)):
                return handle(self, body, *found.groups())
        return self.answer(404, {"error": "no such route"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def answer(self, status: int, value: Any = None, *, code: str = "", raw: bytes | None = None, **more: str) -> None:
        content = json.dumps(value).encode() if raw is None else raw
        self.send_response(status)
        for name, text in {"X-Error-Code": code, **more}.items():
            if text:
                self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Type", "application/json" if raw is None else "application/octet-stream")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    @property
    def token(self) -> str:
        return str(self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def may_write(self, owner: str) -> bool:
        if not self.token:
            self.answer(401, {"error": "no token"})
        elif self.token != WRITE or owner != "me":
            self.answer(403, {"error": "You don't have the rights"})
        else:
            return True
        return False

    def repository(self, name: str) -> Repository | None:
        """The repository, if this token may see it; else the Hub's answer is sent."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and self.token not in (WRITE, READ)):
            self.answer(404 if self.token else 401, {"error": "Repository not found"}, code="RepoNotFound")
            return None
        return found

    # --- routes -------------------------------------------------------------------------------------------------------

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if not self.may_write(asked["organization"]):
            return None
        if name in self.hub.repositories:
            return self.answer(409, {"error": "You already created this model repo"})
        made = self.hub.repositories[name] = Repository(private=asked.get("visibility") == "private")
        made.add({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return self.answer(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def info(self, _: bytes, name: str, revision: str | None = None) -> None:
        if (found := self.repository(name)) is None:
            return None
        if (commit := found.at(revision or "main")) is None:
            return self.answer(404, {"error": "Invalid rev id"}, code="RevisionNotFound")
        card = commit[1].get("README.md", b"").decode()
        tags = re.findall(r"[\w-]+", (re.search(r"^tags: \[(.*)\]$", card, re.MULTILINE) or ["", ""])[1])
        files = [{"rfilename": path} for path in sorted(commit[1])]
        self.answer(
            200,
            {"id": name, "sha": commit[0], "private": found.private, "tags": tags, "siblings": files, "gated": False},
        )
        return None

    def tree(self, _: bytes, name: str, revision: str) -> None:
        if (found := self.repository(name)) is None or (commit := found.at(revision)) is None:
            return
        rows = []
        for path, content in sorted(commit[1].items()):
            row: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
            if path.endswith(LARGE):
                row["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            rows.append(row)
        self.answer(200, rows)

    def resolve(self, _: bytes, name: str, revision: str, path: str) -> None:
        if (found := self.repository(name)) is None or (commit := found.at(revision)) is None:
            return None
        if path not in commit[1]:
            return self.answer(404, {"error": "Entry not found"}, code="EntryNotFound")
        content = commit[1][path]
        etag = hashlib.sha256(content).hexdigest() if path.endswith(LARGE) else git_hash(content)
        self.answer(200, raw=content, ETag=f'"{etag}"', X_Repo_Commit=commit[0])
        return None

    def preupload(self, body: bytes, name: str, _: str) -> None:
        if not self.may_write(name.partition("/")[0]) or (found := self.repository(name)) is None:
            return
        there, files = found.head[1], []
        for each in json.loads(body)["files"]:
            path, large = each["path"], each["path"].endswith(LARGE)
            old = there.get(path)
            digest = None if old is None else hashlib.sha256(old).hexdigest() if large else git_hash(old)
            mode = "lfs" if large else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": digest})
        self.answer(200, {"files": files})

    def batch(self, body: bytes, name: str) -> None:
        if not self.may_write(name.partition("/")[0]):
            return
        objects = []
        for each in json.loads(body)["objects"]:
            row = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.hub.objects:
                row["actions"] = {"upload": {"href": f"{self.hub.url}/upload/{each['oid']}"}}
            objects.append(row)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, digest: str) -> None:
        assert hashlib.sha256(body).hexdigest() == digest
        self.hub.objects[digest] = body
        self.answer(200, raw=b"")

    def commit(self, body: bytes, name: str, _: str) -> None:
        if not self.may_write(name.partition("/")[0]) or (found := self.repository(name)) is None:
            return None
        files, message = dict(found.head[1]), ""
        for line in body.decode().splitlines():
            row = json.loads(line)
            value = row["value"]
            if row["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, found.head[0]):
                    return self.answer(412, {"error": "the branch has moved"})
            elif row["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif row["key"] == "deletedFile":
                del files[value["path"]]
        digest = found.add(files, message)
        self.answer(200, {"success": True, "commitOid": digest, "commitUrl": f"{self.hub.url}/{name}/commit/{digest}"})
        return None

    def validate(self, _: bytes) -> None:
        self.answer(200, {"errors": [], "warnings": []})


NAME, REVISION = r"([\w.-]+/[\w.-]+)", r"([\w.-]+)"
ROUTES: list[tuple[str, str, Any]] = [
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", f"/api/models/{NAME}", Handler.info),
    ("GET", f"/api/models/{NAME}/revision/{REVISION}", Handler.info),
    ("GET", f"/api/models/{NAME}/tree/{REVISION}", Handler.tree),
    ("POST", f"/api/models/{NAME}/preupload/{REVISION}", Handler.preupload),
    ("POST", f"/api/models/{NAME}/commit/{REVISION}", Handler.commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/upload/([0-9a-f]{64})", Handler.upload),
    ("ANY", f"/{NAME}/resolve/{REVISION}/(.+)", Handler.resolve),
]


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def stand_in() -> Iterator[StandIn]:
    """The server on a free port, for the duration of the block."""
    hub = StandIn()
    handler = type("OfThisHub", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
