"""Targets and per-op tables, from made-up results: met, missed, failed, not measured."""

from __future__ import annotations

import copy
import re

import pytest

from bench.launches import Kernel, op_of, op_table, vit_ops
from bench.report import markdown, ops_table, targets_table
from bench.targets import TARGETS, evaluate
from bench.workload import SIDES, VITS, Case, Floor, grid, plan

LAUNCHES = "launches in a ViT block"


def timed(model: str, pixels: int, batch: int, run: int = 0, **ms: float) -> dict:
    contenders = {
        name: {"ms": value, "q1": value, "q3": value, "images_per_s": batch / value * 1e3, "tflops": 600 / value,
               "first_s": 1.0} | ({"latency": {"ms": value, "p99": value}} if batch == 1 else {})
        for name, value in ms.items()
    }  # fmt: skip
    return {"model": model, "pixels": pixels, "batch": batch, "flop": 1, "contenders": contenders, "run": run}


def made_up() -> dict:
    """Every case measured, every target met, the limits of time by a hundredth."""
    cases, compiled = {}, {}
    for case in grid():
        slow = 3.03 if case.model == "E-RADIO" or case.batch == 1 else 1.515
        cases[case.id] = timed(*case, radio_fast=1, eager=slow, official=4)
        compiled[case.id] = timed(*case, radio_fast=1, compiled=1.22 if case.model == "E-RADIO" else 1.162)
    sdpa = {"radio_fast": 1, "sdpa flash": 9, "sdpa cudnn": 1.22}
    attention = [timed("ViT-H", side, 32, **sdpa) | {"tokens": 7, "heads": 16, "head_dim": 80} for side in SIDES[:3]]
    peaks = {"radio_fast": {"peak": 59, "weights": 1}, "eager": {"peak": 70, "weights": 1},
             "official": {"peak": 100, "weights": 2}}  # fmt: skip
    memory = [timed(model, 224, 64) | {"contenders": copy.deepcopy(peaks)} for model in ("ViT-H", "ViT-L", "E-RADIO")]
    found = {"ops": {}, "launches": 70, "kernel_us": 1.0, "span_us": 1.0, "depth": 10, "launches_per_block": 7.0}
    ops = [timed(*step.case) | found for step in plan("default") if step.kind == "ops" and step.case.model in VITS]
    run = {"gpu": "NVIDIA X1", "memory_gib": 5, "driver": "1.2", "cpu": "c", "torch": "2", "cuda": "13", "triton": "3",
           "transformers": "5", "commit": None, "dirty": None, "sources": "abc", "mode": "default", "tiny": False,
           "ceilings": {"matmul_tflops": 900.0, "copy_tbps": 4.0, "matmul_side": 8192}}  # fmt: skip

    def named(results: list[dict]) -> dict:
        return {Case(r["model"], r["pixels"], r["batch"]).id: r for r in results}

    results = {"attention": named(attention), "memory": named(memory), "ops": named(ops)}
    return {"runs": [run], "results": {"cases": cases, "compiled": compiled} | results, "not_measured": {}}


def status(data: dict) -> dict[str, str]:
    return {outcome.target.text: outcome.status for outcome in evaluate(data)}


@pytest.mark.parametrize("kind", ["cases", "compiled", "attention", "memory", "ops"])
def test_met_is_said_only_of_all_cases(kind):
    data = made_up()
    data["results"][kind].popitem()
    found = list(status(data).values())
    assert found.count("met so far") == 1 and found.count("met") == len(TARGETS) - 1
    row = next(row for row in targets_table(data) if "met so far" in row)
    measured, asked = map(int, re.search(r"(\d+) of \1 \((\d+) are asked for\)", row).groups())
    assert measured == asked - 1


def test_every_target_met():
    assert status(made_up()) == {target.text: "met" for target in TARGETS}
    assert len(TARGETS) == 9


# (kind, case, what changes, the target that this alone misses)
SLOWER = [
    ("compiled", "ViT-H-224px-b64", ("compiled", {"ms": 1.14}),
     "ViT, batch ≥ 64: speed over torch.compile max-autotune"),
    ("cases", "ViT-B-224px-b64", ("eager", {"ms": 1.49}), "ViT, batch ≥ 64: speed over eager"),
    ("cases", "ViT-L-512px-b1", ("eager", {"latency": {"ms": 2.9, "p99": 3}}),
     "ViT, batch 1: latency of eager over ours"),
    ("cases", "ViT-L-224px-b64", ("radio_fast", {"tflops": 580.0}),
     "ViT-L and ViT-H, batch ≥ 64: share of the measured matmul rate"),
    ("attention", "ViT-H-432px-b32", ("sdpa flash", {"ms": 1.1}),
     "attention at head dim 80: speed over the best SDPA backend"),
    ("cases", "E-RADIO-224px-b8", ("eager", {"ms": 2.9}), "E-RADIO: speed over eager"),
    ("compiled", "E-RADIO-224px-b1", ("compiled", {"ms": 1.1}), "E-RADIO: speed over torch.compile max-autotune"),
    ("memory", "ViT-H-224px-b64", ("radio_fast", {"peak": 61}), "peak memory over the official recipe's"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "case", "change", "target"), SLOWER, ids=[row[3] for row in SLOWER])
def test_one_target_missed(kind, case, change, target):
    data = made_up()
    contender, values = change
    data["results"][kind][case]["contenders"][contender] |= values
    assert [text for text, found in status(data).items() if found == "missed"] == [target]


@pytest.mark.parametrize(("kind", "case", "change", "target"), SLOWER, ids=[row[3] for row in SLOWER])
def test_our_failure_misses_and_a_rivals_is_left_out(kind, case, change, target):
    data = made_up()
    data["results"][kind][case]["contenders"]["radio_fast"] = {"error": "AssertionError: worst token", "wrong": True}
    assert status(data)[target] == "missed"
    row = next(line for line in targets_table(data) if target in line)
    assert f"failed ({case})" in row
    assert "AssertionError: worst token" in markdown(data)
    data = made_up()
    for name in ("eager", "compiled", "official", "sdpa flash", "sdpa cudnn"):
        if name in data["results"][kind][case]["contenders"]:
            data["results"][kind][case]["contenders"][name] = {"error": "OutOfMemoryError: no", "wrong": False}
    assert status(data)[target] == ("met" if "share" in target else "met so far")  # that one has no rival


def test_too_many_launches():
    data = made_up()
    data["results"]["ops"]["ViT-H-224px-b64"]["launches_per_block"] = 7.5
    assert [text for text, found in status(data).items() if found == "missed"] == [LAUNCHES]


def test_a_case_that_failed_altogether_is_not_measured():
    data = made_up()
    for cases in data["results"].values():
        for case in cases:
            cases[case] = {"error": "RuntimeError: no", "run": 0}
    assert set(status(data).values()) == {"not measured"}
    assert markdown(data).count("RuntimeError: no") == sum(len(cases) for cases in data["results"].values())


def test_nothing_measured():
    data = made_up() | {"results": {}}
    assert set(status(data).values()) == {"not measured"}
    assert all("not measured" in line for line in targets_table(data)[2:])


def test_only_the_issues_cases_count():
    """Small batches and the sides between do not: the targets say which."""
    data = made_up()
    for batch, side in ((8, 224), (1, 320), (1, 2048)):
        slow = timed("ViT-L", side, batch, radio_fast=1, eager=1, official=1)
        data["results"]["cases"][f"slow-{batch}-{side}"] = slow
    assert set(status(data).values()) == {"met"}


def test_share_is_of_its_own_runs_rate():
    data = made_up()
    data["runs"].append(data["runs"][0] | {"ceilings": {"matmul_tflops": 1000.0, "copy_tbps": 4.0}})
    assert status(data)["ViT-L and ViT-H, batch ≥ 64: share of the measured matmul rate"] == "met"
    data["results"]["cases"]["ViT-H-224px-b64"]["run"] = 1
    assert status(data)["ViT-L and ViT-H, batch ≥ 64: share of the measured matmul rate"] == "missed"


def test_table_says_by_how_much():
    data = made_up()
    data["results"]["cases"]["ViT-B-224px-b64"]["contenders"]["eager"]["ms"] = 1.2
    data["results"]["memory"]["ViT-H-224px-b64"]["contenders"]["radio_fast"]["peak"] = 75
    rows = "\n".join(targets_table(data))
    assert "| ≥ 1.5 × | **missed** | 14 of 15 | 1.20 × (ViT-B-224px-b64), 20% short |" in rows
    assert "| ≤ 0.6 × | **missed** | 2 of 3 | 0.75 × (ViT-H-224px-b64), 25% over |" in rows
    assert "| ≥ 3 × | **met** | 6 of 6 | 3.03 × (E-RADIO-224px-b1) |" in rows


# -- kernels by op --------------------------------------------------------------------------------------------

BLOCK = (
    ("_layer_norm_kernel", "norm"),
    ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_bias_TNT", "qkv"),
    ("_attention_short", "attention"),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas", "proj"),
    ("_layer_norm_kernel", "norm"),
    ("_linear_kernel", "fc1"),
    ("_linear_kernel", "fc2"),
)


def kernels(*names: str, us: float = 2.0, gap: float = 1.0) -> list[Kernel]:
    return [Kernel(name, i * (us + gap), us) for i, name in enumerate(names)]


def test_matrix_products_are_told_apart_by_their_place():
    names = ["_patch_embed_kernel", *(name for name, _ in BLOCK) , *(name for name, _ in BLOCK)]  # fmt: skip
    assert vit_ops(kernels(*names)) == ["patch embed", *[op for _, op in BLOCK] * 2]


def test_launches_of_a_block():
    names = ["_patch_embed_kernel", *[name for name, _ in BLOCK] * 4, "Memcpy DtoD (Device -> Device)"]
    found = op_table(kernels(*names), 4, {"qkv": Floor(10, 20)})
    assert found["launches_per_block"] == 7.0
    assert found["launches"] == 30 and found["kernel_us"] == 60.0 and found["span_us"] == 89.0
    assert found["ops"]["qkv"] == {"launches": 4, "us": 8.0, "flop": 40, "bytes": 80}
    assert found["ops"]["norm"] == {"launches": 8, "us": 16.0}
    assert found["ops"]["copy"]["launches"] == 1


def test_split_products_and_attentions_of_two_kernels():
    """A product split along K is two kernels; so is an attention that combines its parts: both count as launches."""
    names = [name for name, _ in BLOCK]
    names[3:4] = [names[3], "void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16>"]
    names[2:3] = ["flash_fwd_splitkv_kernel", "flash_fwd_splitkv_combine_kernel"]
    found = op_table(kernels(*names * 3), 3, {})
    assert found["launches_per_block"] == 9.0
    assert {op: row["launches"] for op, row in found["ops"].items()} == {
        "norm": 6, "qkv": 3, "attention": 6, "proj": 6, "fc1": 3, "fc2": 3,
    }  # fmt: skip


def test_unexpected_products_keep_a_common_name():
    names = [name for name, _ in BLOCK]
    extra = [*names, "ampere_bf16_s16816gemm_bf16_128x64", *names]
    assert vit_ops(kernels(*extra)).count("gemm") == 5
    assert "launches_per_block" not in op_table(kernels(*names), 2, {})  # an attention is missing
    assert vit_ops(kernels("some_kernel")) == ["other"]


def test_no_kernel_is_an_error():
    with pytest.raises(RuntimeError, match="saw no kernel"):
        op_table([], 2, {})


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "attention"),
        ("rf_sm80_bf16_96", "attention"),
        ("_window_attention", "window attention"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>", "norm"),
        ("_pos_embed_kernel", "position"),
        ("void at::native::upsample_bilinear2d_out_frame<float>", "position"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "convolution"),
        ("void at::native::conv_depthwise2d_forward_kernel<3>", "convolution"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_256x128>", "gemm"),
        ("_blend_kernel", "blend"),
        ("Memset (Device)", "copy"),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "copy"),
        ("void at::native::vectorized_elementwise_kernel<8, GeluCUDAKernelImpl>", "other"),
    ],
)
def test_names_of_kernels(name, op):
    assert op_of(name) == op


def test_floor_is_the_slower_of_rate_and_bandwidth():
    result = {
        "ops": {"fc1": {"launches": 2, "us": 8.0, "flop": 1_800_000_000, "bytes": 100},
                "norm": {"launches": 4, "us": 3.0, "flop": 0, "bytes": 8_000_000}, "other": {"launches": 1, "us": 1.0}},
        "kernel_us": 12.0, "depth": 2, "run": 0,
    }  # fmt: skip
    rows = ops_table({"runs": [{"ceilings": {"matmul_tflops": 900.0, "copy_tbps": 4.0}}]}, result)[2:]
    assert rows[0] == "| fc1 | 1.00 | 4.00 | 67% | 1.00 | 4.00 |"
    assert rows[1] == "| norm | 2.00 | 1.50 | 25% | 1.00 | 1.50 |"
    assert rows[2] == "| other | 0.500 | 0.500 | 8% | – | – |"
