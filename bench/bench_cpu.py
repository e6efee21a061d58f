"""Whole models on a CPU, against what one would run there instead; and peak memory of ours.

`./dev bench bench/bench_cpu.py --benchmark-json=bench/results/cpu/cpu.json`, then
`.venv/bin/python -m bench.cpu_table bench/results/cpu/cpu.json`: the table with the targets, and the chart. What it is
at is shown. A cell is a test: `-k "ViT-B and 224px"` selects, what is finished when it is interrupted is kept, and
`.venv/bin/python -m bench.table --merge ALL.json FILE.json…` makes one file of several. OpenVINO is not one of the
project's requirements (`.venv/bin/pip install openvino`); without it the table says so.

A cell is a process of its own (`bench.cpu_cell`), in which all contenders are built, checked against official float32
and timed in turn. RADIO_FAST_BENCH=tiny: small models, a rehearsal.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import rivals
from bench.cpu_table import BYTES, CELLS, MORE_CELLS
from bench.record import brief
from bench.shapes import FULL
from bench.workload import Case

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--tiny"] * (os.environ.get("RADIO_FAST_BENCH") == "tiny")
SELECTED = (*CELLS, *MORE_CELLS) if FULL else CELLS
SECONDS = 15.0  # of a cell's rounds; as few as there must be may take longer


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A folder for what torch.compile keeps: neither the user's, which may have it all already, nor the repository."""
    return os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("compiled"))}


@pytest.fixture
def child(environment, capfd):
    """A function: runs a module in a process of its own, lets its stderr be seen, gives what it printed as JSON."""

    def run(*command: str) -> dict:
        with capfd.disabled():
            print(f"\n{' '.join(command)}", file=sys.stderr, flush=True)
            started = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-m", *command, *TINY], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
            )
            print(f"    {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        assert done.returncode == 0, f"{' '.join(command)} ended with exit code {done.returncode}"
        return json.loads(done.stdout)

    return run


def record(benchmark, info: dict) -> None:
    """pytest-benchmark saves nothing at all if it is interrupted in what it times: so that is nothing."""
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info |= info


@pytest.mark.parametrize("case", SELECTED, ids=lambda case: case.id)
def test_forward(benchmark, child, case: Case):
    record(benchmark, child("bench.cpu_cell", *map(str, case), str(SECONDS)))


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("case", SELECTED, ids=lambda case: case.id)
def test_memory(benchmark, child, case: Case, dtype: str):
    try:
        rivals.load_ours(case.model, "cpu", True, dtype)
    except ValueError as error:
        record(benchmark, {"no_rss": brief(error)})
        return
    found = child("bench.memory", *map(str, case), "radio_fast", "--dtype", dtype)
    record(benchmark, case._asdict() | {"dtype": dtype, "rss": found})
