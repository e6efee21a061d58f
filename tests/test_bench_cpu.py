"""The CPU benchmark: its arithmetic, targets and table from made-up results, and a rehearsal with a small model."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", minversion="5.17", reason="pip install radio_fast[bench]")
pytest.importorskip("matplotlib", reason="pip install radio_fast[bench]")

from bench import cpu_cell, rivals
from bench.cpu_chart import draw
from bench.cpu_table import (
    BYTES,
    CELLS,
    CONTENDERS,
    MORE_CELLS,
    OURS,
    TARGETS,
    alone_table,
    best_peer,
    floors_table,
    leads_table,
    markdown,
    rss_bound,
    times_table,
    where,
)
from bench.readme import cpu_section
from bench.table import merge
from bench.targets import evaluate
from bench.workload import Case, activations, eradio_activations, vit_activations
from radio_fast.models.registry import find_version
from radio_fast.models.spec import spec_of_version

TIMES = dict(zip(CONTENDERS, (100.0, 20.0, 12.0, 50.0, 25.0, 30.0, 120.0, 115.0, 111.0, 130.0), strict=True))


def made_up() -> dict:
    """Every cell measured, every target met, the limits of time and memory by little."""
    results = []
    for case in CELLS:
        info = case._asdict() | {
            "flop": 10**10, "times_ms": dict(TIMES), "calls": dict.fromkeys(CONTENDERS, 3), "alone_ms": dict(TIMES),
            "left_out": {},
            "cosine": dict.fromkeys(CONTENDERS, 0.9995), 
            "matmul_tflops": {"float32": 0.2, "bfloat16": 1.0, "int8": 2.0},
        }  # fmt: skip
        results.append({"name": f"test_forward[{case.id}]", "extra_info": info})
        for dtype in BYTES:
            rss = {"values": 10**6, "weights": 1, "activations": 10**6, "peak": BYTES[dtype] * 10**6 + 1_290_000}
            info = case._asdict() | {"dtype": dtype, "rss": rss}
            results.append({"name": f"test_memory[{case.id}-{dtype}]", "extra_info": info})
    for result in results[:: len(BYTES) + 1]:
        result["extra_info"]["times_ms"]["official float32"] = 91.0
        result["extra_info"]["times_ms"]["radio_fast float32"] = 82.0
    machine = {"cpu": {"name": "A CPU", "cores": 2}, "torch": "2", "gpu": None}
    return {"machine_info": machine, "commit_info": {"id": "abcdef0123456789"}, "benchmarks": results}


def cell(report: dict, place: int = 0) -> dict:
    return report["benchmarks"][place * (len(BYTES) + 1)]["extra_info"]


def status(report: dict) -> dict[str, str]:
    return {outcome.target.text: outcome.status for outcome in evaluate(report, TARGETS)}


# -- targets --------------------------------------------------------------------------------------------------


def test_cells_are_the_issues():
    wanted = {
        (model, side, batch) for model in ("ViT-B", "ViT-L", "E-RADIO") for side in (224, 512) for batch in (1, 8)
    }
    assert {*CELLS, *MORE_CELLS} == wanted and len(CELLS) + len(MORE_CELLS) == len(wanted)
    assert {case for case in wanted if case[0] != "E-RADIO" or case[2] == 1} == set(CELLS)


def test_every_target_met():
    assert status(made_up()) == {target.text: "met" for target in TARGETS}
    assert [target.needed for target in TARGETS] == [1.2, 4.5, 1.1, 1.5, 0.995, 1.0]


# (contender, ms, the targets that this alone misses)
SLOWER = [
    ("torch.compile autocast", 23.9, ["bfloat16: speed over the best peer"]),
    ("OpenVINO f32", 23.9, ["bfloat16: speed over the best peer", "float32: speed over the best float32 peer"]),
    ("official float32", 89.0, ["bfloat16: speed over official float32", "float32: speed over the best float32 peer"]),
    ("radio_fast float32", 83.0, ["float32: speed over the best float32 peer"]),
    ("radio_fast int8", 13.4, ["int8: speed over our bfloat16"]),
]


@pytest.mark.parametrize(("contender", "ms", "missed"), SLOWER, ids=[row[0] for row in SLOWER])
def test_targets_missed(contender, ms, missed):
    report = made_up()
    cell(report)["times_ms"][contender] = ms
    assert [text for text, found in status(report).items() if found == "missed"] == missed


def test_too_much_memory():
    report = made_up()
    report["benchmarks"][2]["extra_info"]["rss"]["peak"] += 20_000
    assert [text for text, found in status(report).items() if found == "missed"] == [TARGETS[-1].text]


def test_a_wrong_peer_is_no_peer():
    report = made_up()
    info = cell(report)
    info["times_ms"]["OpenVINO bf16"] = 1.0
    assert best_peer(info) == ("OpenVINO bf16", 1.0)
    info["cosine"]["OpenVINO bf16"] = 0.9989
    assert best_peer(info) == ("torch.compile autocast", 25.0)
    assert status(report)["bfloat16: speed over the best peer"] == "met"
    text = markdown(report)
    assert "1.00 †" in text and "0.9989; it counts as no peer" in text


@pytest.mark.parametrize(("dtype", "cosine"), [("bfloat16", 0.9989), ("float32", 0.9989), ("int8", 0.9949)])
def test_ours_wrong_misses(dtype, cosine):
    report = made_up()
    cell(report)["cosine"][OURS[dtype]] = cosine
    missed = [text for text, found in status(report).items() if found == "missed"]
    assert missed and all(text.startswith(dtype) for text in missed)
    assert "failed (ViT-B-224px-b1)" in markdown(report)


def test_ours_that_fails_misses():
    report = made_up()
    info = cell(report)
    for part in ("times_ms", "cosine", "alone_ms"):
        del info[part][OURS["bfloat16"]]
    info["left_out"][OURS["bfloat16"]] = "RuntimeError: out of luck"
    missed = [text for text, found in status(report).items() if found == "missed"]
    assert missed == [target.text for target in TARGETS[:2]]
    assert "- radio_fast bfloat16 (ViT-B-224px-b1): RuntimeError: out of luck" in markdown(report)


def test_int8_left_out_is_told():
    report = made_up()
    for place in range(len(CELLS)):
        info = cell(report, place)
        del info["times_ms"]["radio_fast int8"], info["cosine"]["radio_fast int8"], info["alone_ms"]["radio_fast int8"]
        info["left_out"]["radio_fast int8"] = "ValueError: dtype must be"
    report["benchmarks"] = [r for r in report["benchmarks"] if r["extra_info"].get("dtype") != "int8"]
    report["benchmarks"].append({"name": "test_memory[a-int8]", "extra_info": {"no_rss": "ValueError: dtype"}})
    found = status(report)
    assert [text for text, outcome in found.items() if outcome == "not measured"] == [
        "int8: speed over our bfloat16", "int8: cosine of the worst token",
    ]  # fmt: skip
    assert found[TARGETS[-1].text] == "met so far"
    text = markdown(report)
    assert "- radio_fast int8 (ViT-B-224px-b1, " in text and "E-RADIO-512px-b1): ValueError: dtype must be" in text
    assert "- peak memory (a-int8): ValueError: dtype" in text


def test_cells_not_measured_are_told():
    report = made_up()
    report["benchmarks"] = report["benchmarks"][: 2 * (len(BYTES) + 1)]
    assert set(status(report).values()) == {"met so far"}
    rest = ", ".join(case.id for case in CELLS[2:])
    assert f"- Not measured: {rest}" in markdown(report)
    assert "Not measured" not in markdown(made_up())
    assert set(status(report | {"benchmarks": []}).values()) == {"not measured"}


# -- table and chart ------------------------------------------------------------------------------------------


def test_rows():
    cells = {"a": cell(made_up())}
    cells["a"]["alone_ms"] = {"radio_fast bfloat16": 16.0}
    assert times_table(cells)[2] == "| a | 82.0 | 20.0 | 12.0 | 50.0 | 25.0 | 30.0 | 91.0 | 115 | 111 | 130 | 3 |"
    best = "| a | torch.compile autocast | 1.25 | 4.55 | official float32 | 1.11 | 1.67 |"
    assert leads_table(cells)[2] == best
    assert floors_table(cells)[2] == "| a | 10.0 | 0.20 | 50.0 | 1.64 | 1.00 | 10.0 | 2.00 | 2.00 | 5.00 | 2.40 |"
    assert alone_table(cells)[2] == "| a | – | 1.25 |" + " – |" * 8
    assert alone_table({"a": cells["a"] | {"alone_ms": {}}}) == []


def test_bound_of_memory():
    info = {"dtype": "bfloat16", "rss": {"values": 100, "activations": 10, "peak": 0}}
    assert rss_bound(info) == 200 + 13
    assert rss_bound(info | {"dtype": "int8"}) == 100 + 13


def test_chart(tmp_path):
    report = made_up()
    cell(report)["cosine"]["OpenVINO bf16"] = 0.5
    assert draw(report, tmp_path / "cpu.png")
    assert (tmp_path / "cpu.png").stat().st_size > 10_000
    assert not draw(report | {"benchmarks": []}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_parts_are_merged(tmp_path):
    """Of a run in two parts one file, and the table of that."""
    whole, files = made_up(), [tmp_path / "a.json", tmp_path / "b.json", tmp_path / "cpu.json"]
    for file, part in zip(files, (whole["benchmarks"][:9], whole["benchmarks"][9:]), strict=False):
        file.write_text(json.dumps(whole | {"benchmarks": part}))
    for command in (["bench.table", "--merge", files[2], *files[:2]], ["bench.cpu_table", files[2]]):
        subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True)
    assert json.loads(files[2].read_text()) == whole
    assert files[2].with_suffix(".md").read_text() == markdown(whole, "cpu.png")
    assert files[2].with_suffix(".png").exists()


def test_a_part_that_was_measured_again_says_of_which_commit():
    """It takes the place of the first, and the others keep theirs."""
    old = made_up()
    again = [result for result in made_up()["benchmarks"] if result["name"].startswith("test_memory")]
    again[0]["extra_info"]["rss"] = again[0]["extra_info"]["rss"] | {"peak": 7}
    both = merge([old, old | {"commit_info": {"id": "fedcba9876543210"}, "benchmarks": again}])
    assert [result["name"] for result in both["benchmarks"]] == [result["name"] for result in old["benchmarks"]]
    assert "commit" not in cell(both) and where(both) == where(old) + ", memory fedcba987654"
    [new] = [result for result in both["benchmarks"] if result["name"] == again[0]["name"]]
    assert new["extra_info"]["rss"]["peak"] == 7


def test_readme_takes_the_file(tmp_path):
    (tmp_path / "cpu.json").write_text(json.dumps(made_up()))
    text = "\n".join(cpu_section(tmp_path))
    assert "ViT-L-512px-b8" in text and "bfloat16 1.25 × torch.compile autocast's speed" in text
    assert "radio_fast float32" in text and ".png" not in text
    (tmp_path / "cpu.png").touch()
    assert "![cpu](cpu.png)" in "\n".join(cpu_section(tmp_path))


# -- activations ----------------------------------------------------------------------------------------------


def test_vit_activations():
    """N = 8 + 196 tokens; the stream, the hidden values, and what they are made of: 6·D each."""
    spec = spec_of_version(find_version("c-radio_v3-b"))
    assert vit_activations(spec, 224) == 204 * 6 * 768
    assert activations(spec, Case("ViT-B", 224, 3), "bfloat16") == 3 * (4 * 3 * 224 * 224 + 2 * 204 * 6 * 768)
    assert activations(spec, Case("ViT-B", 224, 1), "float32") == 4 * 3 * 224 * 224 + 4 * 204 * 6 * 768


def test_eradio_activations():
    """A made-up model at 64 pixels, by hand: levels of 16 × 16 and 8 × 8 positions, the neck takes both."""

    def spec(stem: int = 1, c2f: int = 1, dim: int = 1, hidden: int = 1, features: int = 1) -> SimpleNamespace:
        convs = SimpleNamespace(dim=3, chains=(), c2f=((), (), ()), c2f_width=c2f)
        attention = SimpleNamespace(dim=dim, chains=((SimpleNamespace(dim=dim, mlp_hidden=hidden),),), c2f_width=0)
        stems = (SimpleNamespace(out_channels=stem), SimpleNamespace(out_channels=2))
        fields = {"stem": stems, "levels": (convs, attention), "neck_dims": (3, dim)}
        return SimpleNamespace(**fields, embed_dim=features, patch_size=4)

    assert eradio_activations(spec(stem=50), 64) == 32 * 32 * 50 + 16 * 16 * 2
    assert eradio_activations(spec(c2f=50), 64) == 16 * 16 * 2 * 5 * 50
    assert eradio_activations(spec(hidden=900), 64) == 16 * 16 * 3 + 8 * 8 * (3 + 900)
    assert eradio_activations(spec(features=50), 64) == 16 * 16 * 3 + 8 * 8 + 16 * 16 * (2 * 3 + 50)


def test_eradio_activations_of_a_model():
    spec = rivals.load_ours("E-RADIO", "cpu", tiny=True).model.spec
    values = eradio_activations(spec, 64)
    assert values >= 64 * 64 / 16 * spec.levels[0].dim
    assert activations(spec, Case("E-RADIO", 64, 2), "bfloat16") == 2 * (4 * 3 * 64 * 64 + 2 * values)


# -- measuring ------------------------------------------------------------------------------------------------


def test_rounds_go_by_the_time_of_a_call():
    seen = []
    calls = {name: lambda name=name: seen.append(name) for name in "ab"}
    found = cpu_cell.in_turn(calls, {"a": 0.5, "b": 2.0}, 17.5)
    assert (
        seen == ["a", "a", "a", "b"] * 5
    )  # of the short one each round has a call that is not timed, and two that are
    assert (found["a"]["rounds"], found["b"]["rounds"]) == (10, 6)  # of the long one the call before counts
    assert found["b"]["q3"] < 2000 and found["a"]["q3"] < 100
    long = cpu_cell.in_turn(calls, {"a": 20.0, "b": 20.0}, 15.0)
    assert long["a"]["rounds"] == long["b"]["rounds"] == 3
    assert cpu_cell.in_turn(calls, {"a": 0.9, "b": 20.0}, 15.0)["a"]["rounds"] == 4
    assert cpu_cell.in_turn(calls, {"a": 1e-3, "b": 1e-3}, 15.0)["a"]["rounds"] == 2 * cpu_cell.MAX_ROUNDS


def test_cosine_is_the_worst_tokens():
    truth = torch.randn(2, 5, 8)
    output = truth.clone()
    assert cpu_cell.min_cosine(output, truth) == pytest.approx(1.0)
    output[1, 3] = -output[1, 3]
    assert cpu_cell.min_cosine(output, truth) == pytest.approx(-1.0)
    assert cpu_cell.min_cosine(output[:, :4], truth) == 0.0
    output[1, 3, 0] = float("nan")
    assert cpu_cell.min_cosine(output, truth) == 0.0


@pytest.mark.parametrize("model", ["ViT-B", "E-RADIO"])
def test_a_cell(model, monkeypatch):
    """All contenders but those that take long to build; one that fails is told, and the others go on."""

    def refuse(*_):
        raise RuntimeError("not today")

    monkeypatch.setattr(cpu_cell.cpu_rivals, "openvino", refuse)
    monkeypatch.setattr(cpu_cell.cpu_rivals, "onnxruntime", refuse)
    monkeypatch.setattr(cpu_cell.cpu_rivals, "compiled", lambda official, x, precision: lambda: official(x.flip(0)))
    monkeypatch.setattr(cpu_cell, "ALONE_CALLS", 1)
    info = cpu_cell.measure(Case(model, 64, 2), 0.01, tiny=True)
    assert {"official float32", "official autocast", OURS["float32"], OURS["bfloat16"]} <= set(info["times_ms"])
    for name in ("OpenVINO f32", "OpenVINO bf16", "onnxruntime f32"):
        assert info["left_out"][name] == "RuntimeError: not today" and name not in info["times_ms"]
    assert min(info["calls"].values()) >= 3 and info["flop"] > 0 and set(info["matmul_tflops"]) == set(BYTES)
    cosine = copy.deepcopy(info["cosine"])
    assert cosine.pop("torch.compile float32") < 0.99  # another order of images: wrong
    cosine.pop("torch.compile autocast")
    assert min(cosine.values()) > 0.999
    assert cosine[OURS["float32"]] > 1 - 1e-9 and 1 - cosine[OURS["bfloat16"]] > 1e-9


def test_memory_of_a_dtype():
    """The module as the benchmark runs it: peak ≥ weights, and values that say what they take in the dtype."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "bench.memory", "ViT-B", "64", "2", "radio_fast", "--dtype", "float32", "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    spec = rivals.load_ours("ViT-B", "cpu", tiny=True).model.spec
    assert found["activations"] == activations(spec, Case("ViT-B", 64, 2), "float32")
    assert found["values"] * 4 >= found["weights"] > 0
