"""Every kernel, compiled ahead of time in every shipped configuration for every architecture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.compile_report import MODULES, OLD_TARGETS, ROW_WISE, TARGETS, problems, tensor_core_work

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    file = tmp_path_factory.mktemp("report") / "rows.json"
    command = [sys.executable, "-m", "bench.compile_report", "--json", file, "--markdown", file.with_suffix(".md")]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1800)
    assert file.exists(), done.stderr
    return json.loads(file.read_text())


def test_no_spills_no_overflow_and_tensor_cores(rows):
    bad = [f"{row['op']} {row['case']} sm_{row['sm']}: {', '.join(found)}" for row in rows if (found := problems(row))]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("sm", TARGETS + OLD_TARGETS)
def test_every_module_is_compiled(rows, sm):
    per_op = {row["op"] for row in rows if row["sm"] == sm}
    row_wise = {"blend", "layer_norm", "add_layer_norm", "norm_stats", "add_norm_stats", "pos_embed"}
    expected = (
        row_wise
        if sm in OLD_TARGETS
        else row_wise | {"attention", "linear", "ln_linear", "patch_embed", "window_attention"}
    )
    assert expected <= per_op, f"sm_{sm} lacks {expected - per_op}"
    assert set(ROW_WISE) < set(MODULES)


@pytest.mark.parametrize("sm", TARGETS)
def test_products_use_the_hardware_of_their_generation(rows, sm):
    """wgmma on Hopper for the large tiles, mma.sync elsewhere; and no instruction for nothing."""
    dots = [row for row in rows if row["sm"] == sm and row["dot"]]
    assert dots
    for row in dots:
        # Twice the work is allowed: one peeled iteration; more means padding.
        assert row["share"] is None or row["share"] > 0.45, row
        assert row["blocks_per_sm"] >= 1, row


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"spills": 3}, ["3 spills"]),
        ({"shared": 101}, ["101 bytes of shared memory, limit 100"]),
        ({"tensor_core": 0}, ["no tensor-core instruction"]),
        ({"dot": False, "tensor_core": 0}, []),
    ],
)
def test_problems_are_seen(row, problem):
    good = {"spills": 0, "shared": 100, "shared_limit": 100, "dot": True, "tensor_core": 1}
    assert problems(good) == []
    assert problems(good | row) == problem


def test_instructions_are_counted():
    sass = """
        HMMA.16816.F32 R4, R8, R12, R4 ;
        HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        HMMA.1688.F32.TF32 R4, R8, R12, R4 ;
        HGMMA.64x128x16.F32 R24, gdesc[UR8], R24 ;
        UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], UPT ;
        FFMA R1, R2, R3, R4 ;
    """
    assert tensor_core_work(sass) == (5, 2 * 16 * 8 * 16 + 16 * 8 * 8, 64 * 128 * 16)
