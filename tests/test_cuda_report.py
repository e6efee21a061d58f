"""Every source of the CUDA extension, compiled for every architecture: no spill, no stack, tensor cores in use."""

from __future__ import annotations

import importlib.util
import shutil

import pytest

from bench.cuda_report import BUILD, TARGETS, kernels_of, problems, report, shared_memory

pytest.importorskip("triton")  # has the disassembler
SOURCES = {"sm70": 70, "sm75": 75, "sm80": 80, "plain": 70}


def have_nvrtc() -> bool:
    try:
        return importlib.util.find_spec("nvidia.cuda_nvrtc") is not None
    except ModuleNotFoundError:
        return False


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed: the CUDA extension was not built")
    return report()


def test_no_spills_no_stack_and_tensor_cores(rows):
    bad = [f"{row['kernel']} sm_{row['sm']}: {', '.join(found)}" for row in rows if (found := problems(row))]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("sm", TARGETS)
def test_every_architecture_has_every_kernel(rows, sm):
    if sm == 70 and not have_nvrtc():
        pytest.skip("nvcc 13 has no sm_70, and NVRTC of CUDA 12 is not installed")
    kernels = {row["kernel"] for row in rows if row["sm"] == sm}
    dims, expected = (16, 32, 64, 80, 96), {"rf_plain_f32"}
    for path in (70, 75, 80):
        if path <= sm:
            dtypes = ("f16", "bf16") if path == 80 else ("f16",)
            expected |= {f"rf_sm{path}_{dtype}_{dim}" for dtype in dtypes for dim in dims}
    assert kernels == expected, f"in {BUILD / str(sm)}"


@pytest.mark.parametrize("path", (75, 80))
def test_products_are_there_once(rows, path):
    """Of m16n8k16 (or twice as many of m16n8k8) as many as a step of 64 keys needs, in no loop and no copy."""
    for row in rows:
        if row["source"] == f"sm{path}" and row["tensor_core"] is not None:
            dim = int(row["kernel"].rsplit("_", 1)[1])
            needed = 2 * 16 * 64 * dim // (16 * 8 * (16 if path == 80 else 8))
            assert row["tensor_core"] == needed, row


def test_shared_memory_leaves_room():
    """The largest head dimension and window fit the smallest GPU: 64 KiB on sm_75, 96 on sm_70."""
    for source in SOURCES:
        assert shared_memory(source, 96) + 8 * (32**2 - 16**2) <= 64 << 10


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"spills": 8}, ["8 bytes of spills, 0 of stack"]),
        ({"stack": 16}, ["0 bytes of spills, 16 of stack"]),
        ({"shared": 2000}, ["2000 bytes of shared memory, limit 1000"]),
        ({"tensor_core": 0}, ["no tensor-core instruction"]),
        ({"tensor_core": 0, "sm": 120, "source": "sm70"}, []),
        ({"tensor_core": 0, "source": "plain"}, []),
        ({"tensor_core": None}, []),
    ],
)
def test_problems_are_seen(row, problem):
    good = {"spills": 0, "stack": 0, "shared": 10, "shared_limit": 1000, "tensor_core": 5, "sm": 80, "source": "sm80"}
    assert problems(good) == []
    assert problems(good | row) == problem


def test_ptxas_is_understood():
    log = """
ptxas info    : Compiling entry function 'rf_a_96' for 'sm_90'
ptxas info    : Function properties for rf_a_96
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 166 registers, used 1 barriers
ptxas info    : Compiling entry function 'rf_b_16' for 'sm_90'
ptxas info    : Function properties for rf_b_16
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
"""
    assert kernels_of(log) == {
        "rf_a_96": {"registers": 166, "stack": 8, "spills": 16},
        "rf_b_16": {"registers": 40, "stack": 0, "spills": 0},
    }
