"""Cold load of a full-size checkpoint file: time against torch.load alone, and peak memory.

`./dev bench bench/bench_load.py --benchmark-json=bench/results/cpu/load.json`, then
`.venv/bin/python -m bench.load_table bench/results/cpu/load.json`. The file's pages are dropped from the page cache
before each round.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import radio_fast
from radio_fast.models.registry import VERSIONS

MODELS = {"ViT-B/16": "radio_v2.5-b", "ViT-H/16": "c-radio_v4-h"}
STORED = {"float32": torch.float32, "float16": torch.float16}
RSS_BOUND = 1.3

# Runs in a process of its own: peak resident memory over what it had after the imports, in bytes.
MEASURE = """
import json, pathlib, sys
import radio_fast, torch
radio_fast.load("radio_v2.5-b", checkpoint=sys.argv[2])  # imports and allocations of any load, on a small file
status = lambda name: int(next(l for l in open("/proc/self/status") if l.startswith(name)).split()[1]) * 1024
pathlib.Path("/proc/self/clear_refs").write_text("5")  # peak := present
before = status("VmRSS")
model = radio_fast.load(sys.argv[1])
used = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
print(json.dumps({"peak": status("VmHWM") - before, "used": used}))
"""


def write_checkpoint(path: Path, version: str, dtype: torch.dtype) -> None:
    """A checkpoint file of a version's full size, random weights stored as `dtype`."""
    row = VERSIONS[version]
    model = radio_fast.load(version, random_init=True)
    state = {f"base_model.{name}": t.to(dtype) for name, t in model.model.state_dict().items()}
    state |= {f"input_conditioner.{name}": t for name, t in model.input_conditioner.state_dict().items()}
    num_cls, num_registers, summary_idxs = row.prefix
    teachers = [{"name": f"teacher{i}", "use_summary": i in summary_idxs} for i in range(num_cls)]
    args = argparse.Namespace(
        model=row.arch, model_kwargs={}, cls_token_per_teacher=True, teachers=teachers, cpe_num_registers=num_registers
    )
    torch.save({"arch": row.arch, "epoch": 0, "args": args, "state_dict": state}, path)


def evict(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture(scope="module", params=[(m, s) for m in MODELS for s in STORED], ids=lambda p: f"{p[0]}-{p[1]}")
def file(request, tmp_path_factory):
    model, stored = request.param
    path = tmp_path_factory.mktemp("load") / "checkpoint.pth.tar"
    write_checkpoint(path, MODELS[model], STORED[stored])
    yield path
    path.unlink()


def torch_load(path: Path) -> dict:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


@pytest.mark.parametrize("function", [radio_fast.load, torch_load], ids=["radio_fast.load", "torch.load"])
def test_cold_load(benchmark, file, function):
    benchmark.group = f"{file.stat().st_size / 1e6:.0f} MB"
    benchmark.extra_info["file_bytes"] = file.stat().st_size
    benchmark.pedantic(function, setup=lambda: ((evict(file) or file,), {}), rounds=5, warmup_rounds=1)


def test_peak_memory(benchmark, file):
    """Peak resident memory of a load ≤ 1.3 × the model's own bytes: no second copy of the weights at any time."""
    small = Path(__file__).parent.parent / "tests" / "golden" / "vit_h16" / "checkpoint.pth.tar"

    def measure() -> dict:
        done = subprocess.run([sys.executable, "-c", MEASURE, file, small], capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    result = benchmark.pedantic(measure, rounds=1)
    benchmark.group = f"{file.stat().st_size / 1e6:.0f} MB"
    benchmark.extra_info.update(result, ratio=result["peak"] / result["used"], file_bytes=file.stat().st_size)
    assert result["peak"] <= RSS_BOUND * result["used"], result
