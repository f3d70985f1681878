"""Serve the part of the Hugging Face hub's protocol that uploading and downloading a model takes."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_owner"  # writes need it; reads of a repository in `gated` too


class Hub(ThreadingHTTPServer):
    """Repositories by name, each a mapping of files, all on one branch; what to do wrong is set by the tests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.cut_short: set[str] = set()  # files of which the last bytes are lost on the way
        self.requests: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit_of(self, repo: str) -> str:
        """Return the hash of what a repository holds."""
        digest = hashlib.sha1()
        for name, content in sorted(self.files[repo].items()):
            digest.update(name.encode() + b"\0" + content)
        return digest.hexdigest()


@contextmanager
def running() -> Iterator[Hub]:
    """Serve from a thread for as long as the block runs."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def json(self, value: Any) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def refuse(self, status: int, code: str, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        self.answer(status, body, X_Error_Code=code, X_Error_Message=message, Content_Type="application/json")

    def do_HEAD(self) -> None:
        self.handle_any(b"")

    def do_GET(self) -> None:
        self.handle_any(b"")

    def do_POST(self) -> None:
        self.handle_any(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def handle_any(self, body: bytes) -> None:
        path = unquote(urlsplit(self.path).path)
        hub = self.server
        hub.requests.append(f"{self.command} {path}")
        owner = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        parts = path.strip("/").split("/")
        if path == "/api/validate-yaml":
            self.json({"errors": [], "warnings": []})
        elif self.command == "POST" and not owner:
            self.refuse(403, "", "You have no permission to write here")
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            status = 409 if repo in hub.files else 200
            hub.files.setdefault(repo, {})
            self.answer(status, json.dumps({"url": f"{hub.endpoint}/{repo}"}).encode())
        elif parts[:2] == ["api", "models"]:
            self.models("/".join(parts[2:4]), parts[4:], body, owner)
        elif "resolve" in parts and "/".join(parts[:2]) in hub.files:
            self.resolve("/".join(parts[:2]), "/".join(parts[4:]), owner)
        else:
            self.refuse(404, "RepoNotFound", "Repository not found")

    def models(self, repo: str, rest: list[str], body: bytes, owner: bool) -> None:
        files = self.server.files.get(repo)
        if files is None:
            self.refuse(404, "RepoNotFound", "Repository not found")
        elif repo in self.server.gated and not owner:
            self.refuse(403, "GatedRepo", "Access to this model is restricted")
        elif rest[:1] == ["preupload"]:
            names = [each["path"] for each in json.loads(body)["files"]]
            self.json({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif rest[:1] == ["commit"]:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = self.server.commit_of(repo)
            self.json(
                {"success": True, "commitOid": commit, "commitUrl": f"{self.server.endpoint}/{repo}/commit/{commit}"}
            )
        elif rest[:1] == ["tree"]:
            self.json([{"type": "file", "path": n, "size": len(c), "oid": oid(c)} for n, c in files.items()])
        elif rest[:1] == ["revision"] and rest[1] not in ("main", self.server.commit_of(repo)):
            self.refuse(404, "RevisionNotFound", "Invalid rev id")
        else:
            siblings = [{"rfilename": name} for name in files]
            self.json(
                {"id": repo, "sha": self.server.commit_of(repo), "siblings": siblings, "private": False, "tags": []}
            )

    def resolve(self, repo: str, name: str, owner: bool) -> None:
        if repo in self.server.gated and not owner:
            self.refuse(403, "GatedRepo", "Access to this model is restricted")
            return
        content = self.server.files[repo].get(name)
        if content is None:
            self.refuse(404, "EntryNotFound", "Entry not found")
            return
        headers = {"ETag": f'"{oid(content)}"', "X_Repo_Commit": self.server.commit_of(repo)}
        if self.command == "GET" and name in self.server.cut_short:
            content = content[:-10]
        self.answer(200, content, **headers)


def oid(content: bytes) -> str:
    """Return git's name for a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
