"""Downloads against a server on 127.0.0.1 that answers as the Hugging Face hub does."""

import hashlib
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import pytest
from huggingface_hub import constants

from radio_fast import DownloadError
from radio_fast.download import fetch

ROOT = Path(__file__).resolve().parents[1]
DATA = random.Random(0).randbytes(1 << 20)
OTHER = random.Random(1).randbytes(1 << 20)
CHUNK = 1 << 16


class Request(NamedTuple):
    command: str
    path: str
    headers: dict[str, str]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        hub = self.server
        hub.log.append(Request(self.command, self.path, {name.lower(): value for name, value in self.headers.items()}))
        hub.hold_head.wait(30)
        elsewhere = hub.redirect == "HEAD" and self.path != "/blob"
        self.answer(hub.head_status or (302 if elsewhere else 200), len(hub.data))

    def do_GET(self):
        hub = self.server
        hub.log.append(Request(self.command, self.path, {name.lower(): value for name, value in self.headers.items()}))
        status = hub.get_statuses.pop(0) if hub.get_statuses else 200
        if hub.redirect == "GET" and self.path != "/blob":
            status = 302
        if status != 200:
            return self.answer(status, 0)
        start = int((self.headers.get("Range") or "bytes=0-")[6:].rstrip("-")) if hub.ranges else 0
        body = hub.data[start:]
        self.answer(206 if self.headers.get("Range") and hub.ranges else 200, len(body), start)
        if hub.cut is not None:
            body, hub.cut = body[: hub.cut - start], None
            self.close_connection = True
        for n in range(0, len(body), CHUNK):
            if hub.stall_at is not None and start + n >= hub.stall_at:
                hub.released.wait(60)
            try:
                self.wfile.write(body[n : n + CHUNK])
            except OSError:  # the client was killed
                self.close_connection = True
                return

    def answer(self, status, length, start=0):
        hub = self.server
        self.send_response(status)
        self.send_header("Content-Length", str(length if status in (200, 206) else 0))
        self.send_header("X-Repo-Commit", "0" * 40)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(hub.data) - 1}/{len(hub.data)}")
        if status == 302:
            self.send_header("Location", f"http://localhost:{hub.server_port}/blob")
            self.send_header("X-Linked-Size", str(len(hub.data)))
        if hub.etag is not None and status < 400:
            self.send_header("X-Linked-Etag" if status == 302 else "ETag", f'"{hub.etag}"')
        self.end_headers()


class Hub(ThreadingHTTPServer):
    """`data` under every path. `log`: the requests, in order."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.url = f"{self.endpoint}/nvidia/RADIO/resolve/main/model.pth.tar"
        self.log, self.redirect, self.ranges = [], None, True
        self.cut = None  # the next GET breaks off after this many bytes of the file
        self.stall_at = None  # GETs wait for `released` once they have sent this many bytes of the file
        self.released, self.hold_head = threading.Event(), threading.Event()
        self.hold_head.set()
        self.head_status, self.get_statuses = None, []
        self.serve(DATA)

    def serve(self, data, etag="sha256"):
        self.data = data
        self.etag = hashlib.sha256(data).hexdigest() if etag == "sha256" else etag

    @property
    def gets(self):
        return [request for request in self.log if request.command == "GET"]


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)  # huggingface_hub writes in steps of this size
    huggingface_hub.close_session()
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.released.set()
    server.hold_head.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "model.pth.tar"


def start_of(request):
    """Where a GET asked to go on; None: at no place."""
    asked = request.headers.get("range")
    return asked and int(re.fullmatch(r"bytes=(\d+)-", asked)[1])


def names(path):
    return sorted(file.name for file in path.parent.iterdir() if file.suffix != ".lock")


def break_off(hub, path, at=500_000):
    """A download cut short whose retry fails too; the bytes it has kept."""
    hub.cut, hub.get_statuses = at, [200, 503]
    with pytest.raises(
        DownloadError, match=r"broke off after \d+ of \d+ bytes.*call again to go on; or give checkpoint="
    ):
        fetch(hub.url, path, progress=False)
    hub.get_statuses.clear()
    assert not path.exists()
    (part,) = path.parent.glob("*.part")
    assert at - CHUNK <= part.stat().st_size <= at
    return part.stat().st_size


@pytest.mark.parametrize("etag", ["sha256", "0" * 40, None])
def test_download(hub, path, etag):
    """What the server calls its ETag is only held against the file when it is a sha256."""
    hub.serve(DATA, etag)
    assert fetch(hub.url, path, progress=False) == path
    assert path.read_bytes() == DATA
    record = json.loads(Path(f"{path}.json").read_text())
    digest = hashlib.sha256(DATA).hexdigest()
    assert record == {"url": hub.url, "size": len(DATA), "sha256": digest, "verified": etag == "sha256"}
    assert names(path) == ["model.pth.tar", "model.pth.tar.json"]
    before = len(hub.log)
    assert fetch(hub.url, path, progress=False) == path and len(hub.log) == before


def test_cut_connection_is_taken_up_within_the_call(hub, path):
    hub.cut = 300_000
    fetch(hub.url, path, progress=False)
    assert path.read_bytes() == DATA
    assert [start_of(request) for request in hub.gets] == [None, 300_000 // CHUNK * CHUNK]


@pytest.mark.parametrize("ranges", [True, False])
def test_later_call_goes_on(hub, path, ranges):
    """Also with a server that answers with the whole file again."""
    kept = break_off(hub, path)
    hub.ranges = ranges
    fetch(hub.url, path, progress=False)
    assert path.read_bytes() == DATA
    assert start_of(hub.gets[-1]) == kept > 0
    assert names(path) == ["model.pth.tar", "model.pth.tar.json"]


@pytest.mark.parametrize("etag", ["sha256", None])
def test_other_content_is_not_appended(hub, path, etag):
    """A changed ETag, or none at all: the bytes kept may be another file's."""
    hub.serve(DATA, etag)
    break_off(hub, path)
    hub.serve(OTHER, etag)
    fetch(hub.url, path, progress=False)
    assert path.read_bytes() == OTHER
    assert start_of(hub.gets[-1]) is None


def test_part_longer_than_the_file_is_dropped(hub, path):
    break_off(hub, path)
    (part,) = path.parent.glob("*.part")
    part.write_bytes(OTHER + OTHER)
    fetch(hub.url, path, progress=False)
    assert path.read_bytes() == DATA


def test_killed_process_leaves_what_the_next_one_goes_on_from(hub, path):
    hub.stall_at = 600_000
    code = (
        "import sys; from pathlib import Path; from huggingface_hub import constants; from radio_fast import download; "
        f"constants.DOWNLOAD_CHUNK_SIZE = {CHUNK}; download.fetch(sys.argv[1], Path(sys.argv[2]), progress=False)"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, "-c", code, hub.url, str(path)], env=env)
    try:
        deadline = time.monotonic() + 60
        while sum(part.stat().st_size for part in path.parent.glob("*.part")) < 500_000:
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not path.exists()
    (part,) = path.parent.glob("*.part")
    kept = part.stat().st_size
    hub.stall_at = None
    hub.released.set()
    fetch(hub.url, path, progress=False)
    assert path.read_bytes() == DATA
    assert start_of(hub.gets[-1]) == kept >= 500_000


@pytest.mark.parametrize("by", ["etag", "argument"])
def test_wrong_hash_is_kept_aside(hub, path, by):
    digest, other = (hashlib.sha256(data).hexdigest() for data in (DATA, OTHER))
    hub.serve(OTHER, digest if by == "etag" else "0" * 40)
    expected = None if by == "etag" else digest.upper()
    with pytest.raises(
        DownloadError, match=rf"has sha256 {other}, expected {digest}: refused and kept aside as .*\.bad-"
    ):
        fetch(hub.url, path, progress=False, sha256=expected)
    aside = path.with_name(f"model.pth.tar.bad-{other[:8]}")
    assert names(path) == [aside.name] and aside.read_bytes() == OTHER
    hub.serve(DATA, hub.etag)
    fetch(hub.url, path, progress=False, sha256=expected)
    assert path.read_bytes() == DATA and json.loads(Path(f"{path}.json").read_text())["verified"]


def test_cached_file_is_held_against_the_hash_asked_for(hub, path):
    path.parent.mkdir()
    path.write_bytes(DATA)
    assert fetch(hub.url, path, sha256=hashlib.sha256(DATA).hexdigest()) == path
    with pytest.raises(DownloadError, match=r"expected .*: remove it to download it again"):
        fetch(hub.url, path, sha256="0" * 64)
    assert hub.log == [] and path.read_bytes() == DATA


@pytest.mark.parametrize("how", ["HEAD", "GET"])
def test_token_does_not_travel_to_the_storage_host(hub, path, how):
    hub.redirect = how
    fetch(hub.url, path, progress=False)
    assert path.read_bytes() == DATA
    tokens = {(request.headers["host"].split(":")[0], request.headers.get("authorization")) for request in hub.log}
    assert tokens == {("127.0.0.1", "Bearer hf_secret"), ("localhost", None)}


@pytest.mark.parametrize("trouble", ["refused", "404", "503", "silent", "offline"])
def test_unreachable_server_says_what_else_to_do(hub, path, trouble, monkeypatch):
    url = hub.url
    if trouble == "refused":
        with socket.create_server(("127.0.0.1", 0)) as free:
            url = f"http://127.0.0.1:{free.getsockname()[1]}/model.pth.tar"
    elif trouble == "silent":
        hub.hold_head.clear()
    elif trouble == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        hub.head_status = int(trouble)
    start = time.monotonic()
    with pytest.raises(
        DownloadError, match=r"can't be reached \(.+\); give checkpoint=PATH.*random_init=True"
    ) as caught:
        fetch(url, path, progress=False, timeout=1.0)
    assert time.monotonic() - start < 20
    assert url in str(caught.value) and (not trouble.isdigit() or trouble in str(caught.value))
    assert names(path) == []


@pytest.mark.parametrize("progress", [True, False])
def test_progress_bar(hub, path, progress, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    fetch(hub.url, path, progress=progress)
    assert (
        ("model.pth.tar" in terminal.getvalue() and "100%" in terminal.getvalue())
        if progress
        else not terminal.getvalue()
    )


def test_two_at_once_download_once(hub, path):
    hub.stall_at = 0
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(fetch, hub.url, path, progress=False) for _ in range(2)]
        time.sleep(0.5)
        hub.released.set()
        assert [future.result(timeout=60) for future in futures] == [path, path]
    assert len(hub.gets) == 1 and path.read_bytes() == DATA


def test_load_fetches_a_version_from_the_endpoint(hub, tmp_path):
    hub.serve((ROOT / "tests" / "golden" / "vit_b16_vitdet" / "checkpoint.pth.tar").read_bytes())
    code = (
        "import sys, radio_fast; model = radio_fast.load('radio_v2.5-b', cache_dir=sys.argv[1]); "
        "print(*model.preferred_resolution, model.max_resolution, model.embed_dim)"
    )
    env = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path / "cache")]
    for _ in range(2):
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout) == (0, "768 768 2048 64\n"), done.stderr
    files = [request for request in hub.log if not request.path.startswith("/api/")]  # the hub's own questions
    assert {request.path for request in files} == {"/nvidia/RADIO/resolve/main/radio-v2.5-b_half.pth.tar"}
    assert [request.command for request in files] == ["HEAD", "GET"]
    assert (tmp_path / "cache" / "radio-v2.5-b_half.pth.tar").read_bytes() == hub.data
