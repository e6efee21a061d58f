"""What the benchmarks measure: the cases, their arithmetic, and rivals that compute the same thing."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from radio_fast.models.eradio import optimal_window
from radio_fast.models.registry import find_version
from radio_fast.models.spec import spec_of_version
from tests.numerics import assert_relative, relative_error

pytest.importorskip("transformers", minversion="5.17", reason="pip install radio_fast[parity]")

from bench.memory import measure
from bench.rivals import Rivals, check, eradio_window
from bench.workload import MODELS, VITS, Case, Step, block_floors, grid, plan, scaling, tiny, vit_flop


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    """Also where there is a GPU: a rehearsal is the same everywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module", params=MODELS)
def rivals(request) -> Rivals:
    return Rivals(request.param, "cpu", tiny=True)


# -- the plan -------------------------------------------------------------------------------------------------


def test_grid_is_the_issue():
    """B, L, H at four sides and E-RADIO at two, batch 1, 8, 64; 256 at 224 pixels only."""
    cases = grid()
    assert len(cases) == len(set(cases)) == 3 * 4 * 3 + 3 + 2 * 3
    assert {case for case in cases if case.batch == 256} == {Case(model, 224, 256) for model in VITS}
    assert {case.pixels for case in cases if case.model == "E-RADIO"} == {224, 512}
    assert {case.pixels for case in scaling()} >= {224, 512, 1024, 2048}


@pytest.mark.parametrize("mode", ["default", "quick", "compiled"])
def test_plan_has_each_step_once(mode):
    steps = plan(mode)
    assert len(steps) == len(set(steps))
    if mode == "compiled":
        assert {step.kind for step in steps} == {"compiled"}
        assert {step.case for step in steps} == set(grid())
    else:
        assert {step.case for step in steps if step.kind == "cases"} == set(grid()) | set(scaling())
        kinds = {"cases", "ops", "attention", "memory"} | ({"compiled"} if mode == "default" else set())
        assert {step.kind for step in steps} == kinds
    # ViT-H at 224 pixels with 64 images is what everything else can be explained by.
    assert steps[0].case == Case("ViT-H", 224, 64)


def test_tiny_keeps_the_kinds():
    steps = tiny(plan("default"))
    assert {step.kind for step in steps} == {step.kind for step in plan("default")}
    assert all(step.case.pixels % 32 == 0 and step.case.pixels <= 512 and step.case.batch <= 5 for step in steps)
    assert Step("cases", Case("ViT-L", 512, 1)) in steps


# -- arithmetic -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [224, 432])
@pytest.mark.parametrize("model", VITS)
def test_vit_flop_is_what_torch_counts(model, side):
    from transformers import RadioConfig, RadioModel

    spec = spec_of_version(find_version(MODELS[model]))
    with torch.device("meta"):
        theirs = RadioModel(
            RadioConfig(
                hidden_size=spec.embed_dim,
                num_hidden_layers=spec.depth,
                num_attention_heads=spec.num_heads,
                num_cls_tokens=spec.num_cls_tokens,
                num_registers=spec.num_registers,
            )
        )
        with FlopCounterMode(display=False) as counter:
            theirs(torch.empty(2, 3, side, side))
    assert 2 * sum(vit_flop(spec, side)) == counter.get_total_flops()


def test_eradio_flop_is_what_torch_counts():
    rivals = Rivals("E-RADIO", "cpu", tiny=True)
    x = rivals.image(Case("E-RADIO", 64, 1))
    for model in (rivals.float32, rivals.bf16):
        model.change_window_size(eradio_window(64))
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        rivals.float32(x)
    assert rivals.flop(Case("E-RADIO", 64, 1)) == counter.get_total_flops()
    assert rivals.flop(Case("E-RADIO", 64, 3)) == 3 * counter.get_total_flops()


def test_floors_add_up_to_the_model():
    spec = spec_of_version(find_version(MODELS["ViT-H"]))
    floors = block_floors(spec, Case("ViT-H", 224, 64))
    products, attention = vit_flop(spec, 224)
    patches = 2 * 196 * 768 * 1280
    assert spec.depth * sum(floor.flop for floor in floors.values()) == 64 * (products - patches + attention)
    rows, D = 64 * 206, 1280
    assert floors["attention"].moved == 2 * rows * (3 * D + D)
    assert floors["norm"].moved == 2 * rows * (2 * D + 4 * D)
    assert floors["fc2"].moved == 2 * (rows * (4 * D + D + D) + 4 * D * D)


# -- rivals ---------------------------------------------------------------------------------------------------


def test_rivals_have_our_weights(rivals):
    """In float32 the two implementations agree to its rounding: names, shapes and structure all fit."""
    case = Case("", 64, 2)
    summary, features = rivals.truth(case)
    ours = copy.deepcopy(rivals.ours).float()
    if not rivals.is_vit:
        ours.model.change_window_size(eradio_window(64))
    with torch.inference_mode():
        out = ours(rivals.image(case))
    # E-RADIO's BatchNorms are folded before the weights are rounded to bfloat16: its rival's were never rounded.
    rtol = 1e-5 if rivals.is_vit else 5e-2
    assert_relative(out.features, features, rtol)
    assert_relative(out.summary, summary, rtol)


def test_every_contender_is_right(rivals):
    case = Case("", 96, 5)
    calls = rivals.calls(case, compiled=True)
    assert list(calls) == ["radio_fast", "eager", "official", "compiled"]
    with torch.inference_mode():
        for call in calls.values():
            output = call()
            assert len(output[1]) == 5
            check(output, rivals.truth(case))
            assert relative_error(output[1][:4], rivals.truth(case)[1]) > 0  # it is not the truth itself
    torch._dynamo.reset()


def test_images_repeat_but_not_at_once(rivals):
    few = rivals.image(Case("", 32, 9))
    assert few.shape == (9, 3, 32, 32)
    assert len({image.sum().item() for image in few}) == 4
    assert torch.equal(few[:4], few[4:8]) and torch.equal(few[8], few[0])


@pytest.mark.parametrize("place", [0, 4, 8])
@pytest.mark.parametrize("what", ["turned", "nan"])
def test_one_wrong_token_is_refused(place, what):
    truth = (torch.randn(4, 8), torch.randn(4, 6, 8))
    output = tuple(t.repeat(3, *[1] * (t.ndim - 1))[:9].clone() for t in truth)
    check(output, truth)
    output[1][place, 5] = -output[1][place, 5] if what == "turned" else float("nan")
    with pytest.raises(AssertionError, match=r"cosine|finite"):
        check(output, truth)


def test_wrong_number_of_tokens_is_refused():
    truth = (torch.randn(1, 8), torch.randn(1, 6, 8))
    with pytest.raises(AssertionError, match="shape"):
        check((truth[0], truth[1][:, :5]), truth)


def test_windows_are_the_ones_that_ours_takes():
    assert [eradio_window(side) for side in range(32, 2049, 32)] == [
        optimal_window(side, side) for side in range(32, 2049, 32)
    ]


def test_memory_of_each_contender():
    """Weights in float32 are twice those in bfloat16; the peak has them and the activations in it."""
    found = {name: measure(Case("ViT-H", 32, 2), name, tiny=True) for name in ("radio_fast", "eager", "official")}
    assert found["official"]["weights"] == 2 * found["eager"]["weights"] > 0
    # Some biases of ours are in float32; Transformers has a LayerScale in every model.
    assert found["radio_fast"]["weights"] == pytest.approx(found["eager"]["weights"], rel=0.02)


def test_bench_model(tmp_path):
    """The pytest-benchmark entry points, and that what they save can be compared."""
    # pytest-benchmark measures nothing in what it takes for a worker of pytest-xdist.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    env |= {"RADIO_FAST_BENCH": "tiny", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable, "-m", "pytest", "-q", "bench/bench_model.py", "-o", "python_files=bench_*.py", "-k", "ViT-B",
        "-p", "no:cacheprovider", "--benchmark-max-time=0.05", "--benchmark-min-rounds=2", f"--benchmark-storage=file://{tmp_path}",
    ]  # fmt: skip
    done = subprocess.run([*command, "--benchmark-autosave"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    compare = [sys.executable, "-m", "pytest_benchmark", "--storage", f"file://{tmp_path}", "compare"]
    done = subprocess.run([*compare, "--group-by=param:contender"], capture_output=True, text=True)
    for contender in ("radio_fast", "eager", "official"):
        assert f"contender={contender}" in done.stdout, done.stdout + done.stderr
        assert f"test_forward[ViT-B-32-2-{contender}]" in done.stdout
