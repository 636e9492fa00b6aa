"""A Hub on this machine: the few addresses that its client asks, with users, permissions and branches, in memory."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

#: Tokens and the namespaces that they may write to; reading needs none where a repository is public.
TOKENS = {"hf_OfAliceWhoMayWrite": "alice", "hf_OfBobWhoMayNot": "bob"}


class StandIn:
    """Repositories by name, and what was asked; ``address`` is the client's endpoint."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Any]] = {}
        self.asked: list[tuple[str, str]] = []
        self.broken = False  # answers with what it was sent, as a careless server might
        self.address = ""

    def create(self, name: str, private: bool = False) -> None:
        first = {".gitattributes": b""}
        sha = self._sha(first, "")
        self.repositories[name] = {"private": private, "branches": {"main": sha}, "commits": {sha: first}, "titles": {}}

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        return repository["commits"][repository["branches"].get(revision, revision)]

    def commit(self, name: str, revision: str, title: str, changes: dict[str, bytes | None]) -> str:
        repository = self.repositories[name]
        files = {**self.files(name, revision), **changes}
        files = {path: content for path, content in files.items() if content is not None}
        sha = self._sha(files, repository["branches"][revision])
        repository["commits"][sha], repository["branches"][revision] = files, sha
        repository["titles"][sha] = title
        return sha

    @staticmethod
    def _sha(files: dict[str, bytes], before: str) -> str:
        content = repr(sorted((path, hashlib.sha1(data).hexdigest()) for path, data in files.items()))
        return hashlib.sha1((before + content).encode()).hexdigest()


@contextmanager
def running() -> Iterator[StandIn]:
    hub = StandIn()

    class Handler(_Handler):
        stand_in = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    stand_in: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.stand_in.asked.append((self.command, path))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.stand_in.broken:
            message = f"who sends {self.headers.get('Authorization')} to {path}?"
            self._send(500, {"error": message}, {"X-Error-Message": message})
        elif path == "/api/repos/create":
            self._create(TOKENS.get(token), json.loads(body))
        elif path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/(.+?))?/?", path):
            self._api(TOKENS.get(token), *found.groups(), body)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(TOKENS.get(token), *found.groups())
        else:
            self._send(404, {"error": f"nothing at {path}"})

    def _create(self, user: str | None, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization') or user}/{wanted['name']}"
        if user is None:
            self._send(401, {"error": "Invalid credentials"})
        elif name.partition("/")[0] != user:
            self._send(403, {"error": f"You don't have the rights to create a model under {name}"})
        elif name in self.stand_in.repositories:
            self._send(409, {"error": "You already created this model repo", "url": f"{self.stand_in.address}/{name}"})
        else:
            self.stand_in.create(name, bool(wanted.get("private") or wanted.get("visibility") == "private"))
            self._send(200, {"url": f"{self.stand_in.address}/{name}"})

    def _known(self, user: str | None, name: str, revision: str | None) -> str | None:
        """The commit of a revision that this user may see; otherwise the refusal is sent."""
        repository = self.stand_in.repositories.get(name)
        if repository is None or (repository["private"] and name.partition("/")[0] != user):
            self._send(
                401 if user is None else 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
            )
            return None
        revision = revision or "main"
        sha = repository["branches"].get(revision, revision)
        if sha not in repository["commits"]:
            error = f"Invalid rev id: {revision}"
            self._send(404, {"error": error}, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": error})
            return None
        return sha

    def _api(self, user: str | None, name: str, what: str | None, rest: str | None, body: bytes) -> None:
        hub = self.stand_in
        writes = self.command == "POST" and what in ("branch", "commit", "preupload")
        if writes and name.partition("/")[0] != user:
            self._send(403, {"error": "Forbidden: you may not write here"})
            return
        sha = self._known(user, name, None if what == "branch" else rest)
        if sha is None:
            return
        files = hub.repositories[name]["commits"][sha]
        if what in (None, "revision"):
            siblings = [{"rfilename": path} for path in files]
            self._send(
                200, {"id": name, "modelId": name, "sha": sha, "siblings": siblings, "private": False, "tags": []}
            )
        elif what == "tree":
            self._send(200, [{"type": "file", "path": p, "size": len(c), "oid": _blob(c)} for p, c in files.items()])
        elif what == "branch":
            branches = hub.repositories[name]["branches"]
            if rest in branches:
                self._send(409, {"error": "Reference already exists"})
                return
            branches[rest] = sha
            self._send(200, {})
        elif what == "preupload":
            wanted = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted]
            self._send(200, {"files": modes})
        elif what == "commit":
            lines = [json.loads(line) for line in body.decode().splitlines()]
            title = next(line["value"]["summary"] for line in lines if line["key"] == "header")
            changes: dict[str, bytes | None] = {}
            for line in lines:
                if line["key"] == "file":
                    changes[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    changes[line["value"]["path"]] = None
            new = hub.commit(name, rest or "main", title, changes)
            url = f"{hub.address}/{name}/commit/{new}"
            self._send(200, {"success": True, "commitOid": new, "commitUrl": url, "hookOutput": ""})
        else:
            self._send(404, {"error": f"nothing called {what}"})

    def _file(self, user: str | None, name: str, revision: str, path: str) -> None:
        sha = self._known(user, name, revision)
        if sha is None:
            return
        content = self.stand_in.repositories[name]["commits"][sha].get(path)
        if content is None:
            self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        headers = {"ETag": f'"{_blob(content)}"', "X-Repo-Commit": sha, "Content-Type": "application/octet-stream"}
        self._send(200, content, headers)

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
