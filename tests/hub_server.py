"""A stand-in for the Hugging Face hub at the HTTP boundary: one process, repositories in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Repositories = dict[str, dict[str, bytes]]


class Hub(BaseHTTPRequestHandler):
    """The few routes that downloads and commits take."""

    repositories: Repositories

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._resolve(body=False)

    def do_GET(self) -> None:
        self._resolve(body=True)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            data = json.loads(body)
            name = "/".join(part for part in (data.get("organization"), data["name"]) if part)
            self.repositories.setdefault(name, {})
            self._json({"url": f"https://huggingface.co/{name}", "name": name})
        elif self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/(.+)/preupload/\w+(\?create_pr=1)?", self.path):
            files = json.loads(body)["files"]
            self._json(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for f in files
                    ]
                }
            )
        elif found := re.fullmatch(r"/api/models/(.+)/commit/\w+(\?create_pr=1)?", self.path):
            files = self.repositories.get(found[1])
            if files is None:
                self._json({"error": "Repository not found"}, 404)
                return
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self._json(
                {"commitUrl": f"https://huggingface.co/{found[1]}/commit/1", "commitOid": "1" * 40}
                | (
                    {"pullRequestUrl": f"https://huggingface.co/{found[1]}/discussions/1"}
                    if found[2]
                    else {}
                )
            )
        else:
            self._json({"error": self.path}, 404)

    def _resolve(self, body: bool) -> None:
        found = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/(\w+)/(.+)", self.path)
        if not found or found[1] not in self.repositories:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif found[2] not in ("main", "1" * 40):
            self._json({"error": "No such revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
        elif (data := self.repositories[found[1]].get(found[3])) is None:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "1" * 40}
            self._json({"error": "Entry not found"}, 404, headers)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", "1" * 40)
            self.end_headers()
            if body:
                self.wfile.write(data)

    def _json(self, data: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        text = json.dumps(data).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)


@contextmanager
def running() -> Iterator[tuple[str, Repositories]]:
    """Its address, and what it holds."""
    repositories: Repositories = {}
    handler = type("Hub", (Hub,), {"repositories": repositories})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", repositories
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
