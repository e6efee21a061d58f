"""`bash bench/gpu.sh` from end to end, with small models on the CPU: what it writes, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5.17", reason="pip install radio_fast[bench]")
pytest.importorskip("matplotlib", reason="pip install radio_fast[bench]")

ROOT = Path(__file__).parent.parent
FILES = {"results.json", "README.md", "throughput.png", "latency.png", "scaling.png", "tuning.json", "log.txt"}


def start(out: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    env = os.environ | {"OUT": str(out), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        ["bash", "bench/gpu.sh", *arguments], cwd=ROOT, env=env | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_rehearsal(tmp_path):
    """All stages; of the files few and small enough to be carried off a lent machine: 8 of 16 MiB, plain names."""
    cache = tmp_path / "cache"
    (cache / "tuning").mkdir(parents=True)
    (cache / "tuning" / "gpu.json").write_text('{"chosen": 1}')
    only = r"cases/(ViT-H-32px-b4|ViT-L-(32|64)px-b1)$|memory/E-RADIO"
    process = start(tmp_path / "out", "--tiny", "--only", only, RADIO_FAST_CACHE=str(cache))
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    written = list((tmp_path / "out").rglob("*"))
    assert {path.name for path in written} == FILES and len(written) <= 8
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", path.name) and path.stat().st_size < 16 << 20 for path in written)
    assert json.loads((tmp_path / "out" / "tuning.json").read_text()) == {"chosen": 1}
    data = json.loads((tmp_path / "out" / "results.json").read_text())
    assert data["not_measured"] == {} and len(data["results"]["cases"]) == 3
    for found in data["results"]["memory"]["E-RADIO-32px-b4"]["contenders"].values():
        assert 0 < found["weights"] < found["peak"]
    assert "## Peak memory" in (tmp_path / "out" / "README.md").read_text()
    # The log has every stage and no place; a short table comes last.
    log = (tmp_path / "out" / "log.txt").read_text()
    stages = re.findall(r"^== (.*)$", log, re.MULTILINE)
    assert stages[:4] == ["doctor", "tests marked gpu", "kernels and models", "engine, default"]
    assert stages[4:6] == ["charts", "report"]
    assert " passed" in log
    for place in (str(ROOT), str(tmp_path), sys.prefix):
        assert place not in log
    assert re.search(r"^missed .*launches|^not measured .*launches in a ViT block", text, re.MULTILINE)
    assert text.rstrip().endswith("gpu.sh: all is well")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
def test_rehearsal_on_the_device(tmp_path):
    """Device events, the profiler's kernels and the allocator's peaks, before minutes are spent on large models."""
    only = "cases/ViT-H-32px-b1|(ops|memory)/ViT-H-32px-b4|attention/ViT-H-32px"
    command = [sys.executable, "-m", "bench.engine", "--tiny", "--out", tmp_path, "--only", only]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "results.json").read_text())
    assert data["runs"][0]["gpu"] and data["not_measured"] == {}
    assert data["results"]["ops"]["ViT-H-32px-b4"]["ops"].keys() >= {"qkv", "attention", "proj", "fc1", "fc2"}


def test_a_failing_test_fails_it(tmp_path):
    process = start(tmp_path, "tests", "--tiny", PYTEST_ADDOPTS="--no-such-option")
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and "gpu.sh: FAILED" in text


def test_ended_from_outside_it_leaves_what_it_had(tmp_path):
    process = start(tmp_path, "bench", "--tiny", "--only", "cases/")
    file, deadline = tmp_path / "results.json", time.monotonic() + 120
    while not (file.exists() and json.loads(file.read_text())["results"]):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 1, text
    assert set(json.loads(file.read_text())["not_measured"].values()) == {"ended from outside"}
    assert "ended from outside" in (tmp_path / "README.md").read_text()
    assert "steps not measured" in text


def test_time_that_is_up_leaves_nothing_hanging(tmp_path):
    started = time.monotonic()
    process = start(tmp_path, "bench", "--tiny", TOTAL="1")
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "no time left" in text
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("arguments", [["--no-such"], []])
def test_usage(tmp_path, arguments):
    """An unknown argument prints what there is; without a GPU it says what can be done."""
    process = start(tmp_path / "out", *arguments)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and "--tiny" in text
    assert not (tmp_path / "out").exists()
