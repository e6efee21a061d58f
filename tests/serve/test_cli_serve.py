"""radio-fast serve as a user types it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
import torch
import typer
from typer.testing import CliRunner

import radio_fast
from radio_fast.cli import app
from radio_fast.serve.embedder import Embedder
from radio_fast.serve.service import Service
from tests.conftest import golden_source
from tests.numerics import assert_relative
from tests.serve.live import picture

ROOT = Path(__file__).parents[2]
CHECKPOINT = str(golden_source("vit_h16"))


@pytest.fixture
def process():
    command = [sys.executable, "-m", "radio_fast.cli", "serve", CHECKPOINT, "--port", "0", "--resolution", "64x96"]
    env = os.environ | {"RADIO_FAST_API_KEY": "secret", "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        [*command, "--adaptors", "clip", "--model-name", "tiny", "--log-level", "warning"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env,
    )  # fmt: skip
    yield started
    started.kill()
    started.communicate()


def test_sigterm_under_load(process):
    """It is live before it is ready; then each request has its own result, or is refused; the exit code is 0."""
    line = process.stdout.readline()
    url = re.fullmatch(r"tiny on (http://127\.0\.0\.1:\d+) \(Ctrl-C stops it\)\n", line)[1]
    key = {"Authorization": "Bearer secret"}
    with httpx.Client(base_url=url, timeout=60) as client:
        assert client.get("/health/live").status_code == 200
        # The model's threads must not spin on the cores that decode and answer.
        assert b"OMP_WAIT_POLICY=passive" in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
        waiting = threading.Event()
        while client.get("/health/ready").status_code == 503:
            waiting.wait(0.02)
        assert client.get("/v1/models").status_code == 401
        assert [m["id"] for m in client.get("/v1/models", headers=key).json()["data"]] == ["tiny", "tiny:clip"]
    images = [picture(seed) for seed in range(4)]
    with Embedder(radio_fast.load(CHECKPOINT), resolution=(64, 96)) as embedder:
        wanted = [embedder.submit(image).result().summary for image in images]
    right, refused, unexpected, enough = [], [], [], threading.Event()

    def ask(number: int) -> None:
        while not refused:
            try:
                answer = httpx.post(f"{url}/embed", files={"images": images[number % 4]}, headers=key, timeout=60)
                if answer.status_code == 200:
                    got = torch.tensor(answer.json()["images"][0]["summary"]["backbone"])
                    assert_relative(got, wanted[number % 4])
                    right.append(number)
                else:
                    assert answer.status_code == 503 and answer.json()["error"]["code"] == "shutting_down"
                    refused.append(answer.status_code)
            except (httpx.ConnectError, httpx.RemoteProtocolError, httpx.ReadError) as error:
                # Not accepted any more: refused, or closed without a byte of an answer.
                refused.append(error)
            except BaseException as error:
                unexpected.append(error)
                break
            if len(right) >= 24 or refused or unexpected:
                enough.set()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    assert enough.wait(60) and not refused and not unexpected, (refused, unexpected)
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert not unexpected and out == "" and err == ""


def run(*arguments: str) -> str:
    """The error that `main` shows in one line."""
    done = CliRunner().invoke(app, ["serve", *arguments])
    assert isinstance(done.exception, (ValueError, FileNotFoundError)), (done.output, done.exception)
    return str(done.exception)


def test_what_is_wrong_is_told_in_one_line(tmp_path):
    assert "--log-level must be one of debug, info, warning, error" in run("--log-level", "loud")
    assert "deadline must be a positive number" in run(CHECKPOINT, "--deadline", "0")
    assert "max_body_bytes must be a positive number" in run(CHECKPOINT, "--max-body-mb", "-1")
    assert "api_key must be printable ASCII, and not empty" in run(CHECKPOINT, "--api-key", " ")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"can't listen on 127.0.0.1 port {port}: Address already in use" in run(CHECKPOINT, "--port", port)
    assert "can't listen on 203.0.113.1 port 0" in run(CHECKPOINT, "--host", "203.0.113.1", "--port", "0")
    (tmp_path / "broken.pth").write_bytes(b"nothing")
    assert "broken.pth" in run(str(tmp_path / "broken.pth"), "--port", "0")
    assert "sides must be multiples of" in run(CHECKPOINT, "--port", "0", "--resolution", "50")


def test_an_empty_key_is_no_open_server(monkeypatch):
    monkeypatch.setenv("RADIO_FAST_API_KEY", "")
    assert "RADIO_FAST_API_KEY must not be empty" in run(CHECKPOINT, "--log-level", "loud")
    assert "--log-level" in run(CHECKPOINT, "--log-level", "loud", "--api-key", "secret")


def test_a_signal_right_after_the_line(monkeypatch):
    """It is the server's from the moment that others know of the server."""

    def echo(line: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(typer, "echo", echo)
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Service, "start", lambda self: None)  # nothing to load
    done = CliRunner().invoke(app, ["serve", CHECKPOINT, "--port", "0"])
    assert done.exit_code == 0, done.output
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "python_multipart", "prometheus_client"])
def test_a_missing_extra(package, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("radio_fast.serve.", f"{package}."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    said = run("missing.pth", "--port", "0")
    assert "pip install 'radio_fast[serve]'" in said and package in said
