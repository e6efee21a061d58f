"""A server on 127.0.0.1 with as much of the Hugging Face hub's interface as huggingface_hub asks for."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        hub.log.append((self.command, path, self.headers.get("Authorization"), self.headers.get("Range")))
        api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models" if api else "").strip("/").split("/")
        if len(parts) < 4:  # huggingface_hub's own questions, such as how fast it may ask
            return self.answer(404)
        repo, kind, revision = "/".join(parts[:2]), parts[2], parts[3]
        if repo not in hub.repos:
            return self.answer(404, headers={"X-Error-Code": "RepoNotFound"})
        branches = hub.repos[repo]
        commit = revision if revision in branches.values() else branches.get(revision)
        if commit is None:
            return self.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        files = hub.commits[commit]
        if kind == "revision":
            return self.answer(200, json.dumps({"id": repo, "sha": commit, "siblings": []}).encode())
        if kind == "tree":
            return self.answer(200, json.dumps([self.entry(name, data) for name, data in files.items()]).encode())
        if repo in hub.gated and self.headers.get("Authorization") != f"Bearer {hub.gated[repo]}":
            return self.answer(403, headers={"X-Error-Code": "GatedRepo"})
        name = "/".join(parts[4:])
        if name not in files:
            return self.answer(404, headers={"X-Error-Code": "EntryNotFound"})
        data = files[name]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hub.etags.get(name) or hashlib.sha256(data).hexdigest()}"'}
        start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        if start and name in hub.cut:
            return self.answer(503)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = hub.cut.get(name)
        if self.command == "GET" and name in hub.hiccup:
            cut = hub.hiccup.pop(name)
        self.answer(206 if start else 200, data[start:], headers, cut)

    @staticmethod
    def entry(name, data):
        digest = hashlib.sha256(data).hexdigest()
        return {"type": "file", "path": name, "size": len(data), "oid": digest[:40],
                "lfs": {"oid": digest, "size": len(data), "pointerSize": 130}}  # fmt: skip

    def answer(self, status, body=b"", headers=None, cut=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            if cut is not None and cut < len(body):
                body, self.close_connection = body[:cut], True
            self.wfile.write(body)


class Hub(ThreadingHTTPServer):
    """`put` adds a repository's commit. `log`: (method, path, authorization, range) of every request.

    `gated`: repository: the token it takes. `cut`: file: after how many bytes it breaks off for good. `hiccup`: the
    same, but once. `etags`: in place of a file's sha256.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repos, self.commits = {}, {}
        self.log, self.gated, self.cut, self.hiccup, self.etags = [], {}, {}, {}, {}

    def put(self, repo: str, folder: Path | dict[str, bytes], branch: str = "main") -> str:
        if not isinstance(folder, dict):
            names = [path for path in folder.rglob("*") if path.is_file()]
            folder = {path.relative_to(folder).as_posix(): path.read_bytes() for path in names}
        commit = hashlib.sha1(repr((repo, branch, sorted(folder), len(self.commits))).encode()).hexdigest()
        self.repos.setdefault(repo, {})[branch] = commit
        self.commits[commit] = folder
        return commit

    def fetched(self) -> list[str]:
        """The names of the files that were sent, sorted."""
        return sorted({path.split("/")[-1] for method, path, *_ in self.log if method == "GET" and "/resolve/" in path})


@contextmanager
def serving():
    hub = Hub()
    threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
