"""The measuring engine from end to end, on small models on the CPU: what it measures, refuses, keeps and says."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5.17", reason="pip install radio_fast[bench]")
pytest.importorskip("matplotlib", reason="pip install radio_fast[bench]")

from PIL import Image

from bench import charts, engine, readme, report
from bench.record import ROOT, Record, brief, sources_digest
from bench.rivals import Rivals
from bench.targets import measured, value_of

CONTENDERS = ("radio_fast", "eager", "official")
ONLY = r"cases/(ViT-H-32px-b[14]|ViT-L-(32|128|512)px-b1|E-RADIO-(32|128)px-b4)$|ops/(ViT-H-32px-b4|E-RADIO)"
ONLY += r"|attention/ViT-H-128|compiled/ViT-H"


def run(folder: Path, only: str, *options: str) -> tuple[int, dict]:
    code = engine.main(["--tiny", "--out", str(folder), "--only", only, *options])
    return code, report.load(folder)


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    """Also where there is a GPU: a rehearsal is the same everywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A folder with a run's results, report and charts."""
    folder = tmp_path_factory.mktemp("results")
    code, _ = run(folder, ONLY)
    assert code == 0
    written = charts.draw(folder)
    text = report.markdown(report.load(folder), [path.name for path in written])
    (folder / "README.md").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def clean_compiler():
    yield
    torch._dynamo.reset()


# -- a run ----------------------------------------------------------------------------------------------------


def test_everything_is_measured(results):
    data = report.load(results)
    assert data["not_measured"] == {}
    assert {kind: len(cases) for kind, cases in data["results"].items()} == {
        "cases": 7, "ops": 2, "attention": 1, "compiled": 1,
    }  # fmt: skip
    for kind in ("cases", "compiled"):
        for case, result in data["results"][kind].items():
            contenders = result["contenders"]
            assert tuple(contenders) == CONTENDERS + ("compiled",) * (kind == "compiled"), case
            for found in contenders.values():
                assert 0 < found["q1"] <= found["ms"] <= found["q3"]
                assert found["images_per_s"] == pytest.approx(result["batch"] / found["ms"] * 1e3)
                assert found["tflops"] == pytest.approx(result["flop"] / found["ms"] / 1e9)
                assert ("latency" in found) == (result["batch"] == 1)
    rates = data["runs"][0]["ceilings"]
    assert rates["matmul_tflops"] > 0 and rates["copy_tbps"] > 0


def test_ops_are_those_of_a_vit(results):
    found = report.load(results)["results"]["ops"]["ViT-H-32px-b4"]
    for op in ("qkv", "attention", "proj", "norm", "fc1", "fc2"):
        assert found["ops"][op]["flop"] + found["ops"][op]["bytes"] > 0
        assert found["ops"][op]["launches"] == found["depth"] * (2 if op == "norm" else 1)
    assert found["launches_per_block"] >= 7
    assert found["kernel_us"] <= found["span_us"]


def test_environment_names_no_place(results):
    """Versions and machine, but no path, no host and no date, in all that is written."""
    run = report.load(results)["runs"][0]
    assert run["torch"] == torch.__version__ and run["cpu"] and run["sources"] == sources_digest()
    for file in ("results.json", "README.md"):
        text = (results / file).read_text(encoding="utf-8")
        for secret in (str(ROOT), str(Path.home()), str(results), sys.prefix):
            assert secret not in text
        assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", text)
        assert not re.search(r"\b20\d\d-\d\d-\d\d\b", text)


def test_report_has_every_section(results):
    text = (results / "README.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert titles == [
        "Targets", "Throughput, batch 4", "Throughput, batch 1", "Latency, batch 1 (each call waited for)",
        "Against torch.compile", "How time grows: ViT-L, batch 1", "Attention alone",
        "Where the time goes: ViT-H-32px-b4", "Where the time goes: E-RADIO-32px-b4",
    ]  # fmt: skip
    assert "times mean nothing" in text
    for chart in report.CHARTS:
        assert f"]({chart})" in text
    for line in text.splitlines():
        assert not re.search(r"\b(nan|inf|None)\b", line), line
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table


@pytest.mark.parametrize("chart", report.CHARTS)
def test_charts_are_pictures(results, chart):
    image = Image.open(results / chart).convert("RGB")
    assert image.width >= 600 and image.height >= 300
    colours = {colour for _, colour in image.getcolors(1 << 24)}
    ours = tuple(int(charts.COLOURS["radio_fast"][i : i + 2], 16) for i in (1, 3, 5))
    assert ours in colours and len(colours) > 20


def test_charts_of_nothing(tmp_path):
    Record(tmp_path / "results.json", {"gpu": None, "sources": "", "tiny": True})
    assert charts.draw(tmp_path) == []


def test_summary_fits_a_terminal(results):
    lines = report.summary(report.load(results)).splitlines()
    assert sum("launches in a ViT block" in line for line in lines) == 1
    assert any(line.startswith("ViT-H-32px-b4") and "× eager" in line for line in lines)
    assert max(len(line) for line in lines[1:]) <= 120


# -- what goes wrong ------------------------------------------------------------------------------------------


def breaking(monkeypatch, contender: str, replacement) -> None:
    """Put `replacement(call)` in the place of a contender's call."""
    calls = Rivals.calls

    def changed(self, case, compiled=False):
        found = calls(self, case, compiled)
        return found | {contender: replacement(found[contender])}

    monkeypatch.setattr(Rivals, "calls", changed)


def raising(call):
    def broken():
        raise torch.OutOfMemoryError("CUDA out of memory in /opt/site-packages/torch/nn/linear.py")

    return broken


def wrong(call):
    def turned():
        summary, features = call()
        features = features.clone()
        features[-1, 0] *= -1
        return summary, features

    return turned


def test_a_contender_that_raises_is_written_down(tmp_path, monkeypatch, capsys):
    breaking(monkeypatch, "eager", raising)
    code, data = run(tmp_path, "cases/ViT-H-32px-b4")
    found = data["results"]["cases"]["ViT-H-32px-b4"]["contenders"]
    assert found["eager"] == {"error": "OutOfMemoryError: CUDA out of memory in …/linear.py", "wrong": False}
    assert found["radio_fast"]["ms"] > 0 and found["official"]["ms"] > 0
    assert code == 0
    assert "eager OutOfMemoryError" in capsys.readouterr().err
    assert "cases/ViT-H-32px-b4: eager: OutOfMemoryError" in report.markdown(data)


@pytest.mark.parametrize(("contender", "code"), [("radio_fast", 1), ("official", 0)])
def test_what_is_wrong_is_not_timed(tmp_path, monkeypatch, contender, code):
    breaking(monkeypatch, contender, wrong)
    found_code, data = run(tmp_path, "cases/ViT-H-32px-b4")
    found = data["results"]["cases"]["ViT-H-32px-b4"]["contenders"]
    assert found[contender]["wrong"] and "worst token has cosine -" in found[contender]["error"]
    assert "ms" not in found[contender]
    assert all("ms" in found[name] for name in CONTENDERS if name != contender)
    assert found_code == code


def test_a_case_that_fails_does_not_end_the_run(tmp_path, monkeypatch):
    truth = Rivals.truth

    def sometimes(self, case):
        if case.batch == 4:
            raise RuntimeError("no such kernel")
        return truth(self, case)

    monkeypatch.setattr(Rivals, "truth", sometimes)
    code, data = run(tmp_path, "cases/ViT-H-32px-b[14]")
    assert data["results"]["cases"]["ViT-H-32px-b4"]["error"] == "RuntimeError: no such kernel"
    assert value_of(data["results"]["cases"]["ViT-H-32px-b1"], "radio_fast", "ms") > 0
    assert [case for case, _ in measured(data, "cases")] == ["ViT-H-32px-b1"]
    assert code == 1


def test_a_lost_device_ends_the_run_with_what_there_was(tmp_path, monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(engine, "synchronize", lost)
    code, data = run(tmp_path, "cases/ViT-H-32px")
    assert code == 1
    assert list(data["results"]["cases"]) == ["ViT-H-32px-b4"]
    assert set(data["not_measured"].values()) == {"the GPU gave up after cases/ViT-H-32px-b4"}


# -- the budget -----------------------------------------------------------------------------------------------


def test_the_budget_cuts_off_the_end(tmp_path):
    started = time.monotonic()
    code, data = run(tmp_path, "cases/", "--budget", "4")
    assert time.monotonic() - started < 20
    assert code == 0
    done, missing = set(data["results"].get("cases", {})), set(data["not_measured"])
    planned = {step.case.id for step in engine.tiny_steps(engine.plan("default")) if step.kind == "cases"}
    assert missing and done | {step.removeprefix("cases/") for step in missing} == planned
    assert not done & {step.removeprefix("cases/") for step in missing}
    assert set(data["not_measured"].values()) == {"the time budget"}
    assert "## Not measured\n\n- the time budget: cases/" in report.markdown(data)


def test_a_hanging_step_is_ended_by_the_budget(tmp_path, monkeypatch):
    breaking(monkeypatch, "eager", lambda call: lambda: time.sleep(60))
    started = time.monotonic()
    _, data = run(tmp_path, "cases/ViT-H-32px-b4", "--budget", "3")
    assert time.monotonic() - started < 20
    assert data["not_measured"] == {"cases/ViT-H-32px-b4": "the time budget"}


def test_compiling_has_its_own_limit(tmp_path, monkeypatch):
    """It ends that contender alone, even if what runs swallows exceptions; the run's own limit is still there after."""
    monkeypatch.setattr(engine, "COMPILE_AT_MOST", 0.3)
    record = Record(tmp_path / "results.json", {"gpu": None, "sources": ""})
    it = engine.Engine(record, seconds=2.0)

    def slow():
        while True:
            with contextlib.suppress(Exception):  # an autotuner's "this candidate failed, go on"
                time.sleep(10)

    with pytest.raises(engine.OutOfTime), engine.time_limit(it.left()):
        with pytest.raises(TimeoutError, match="max-autotune took more than 0 s"):
            it.compile(slow)
        slow()
    assert -5 < it.left() <= 0
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_a_killed_run_leaves_what_it_had(tmp_path, monkeypatch):
    """Each result is on disk before the next step begins."""

    class Killed(BaseException):
        pass

    cases = engine.Engine.cases

    def once(self, case, compiled=False):
        if self.record.data["results"]:
            raise Killed
        return cases(self, case, compiled)

    monkeypatch.setattr(engine.Engine, "cases", once)
    with pytest.raises(Killed):
        run(tmp_path, "cases/ViT-H")
    data = report.load(tmp_path)
    assert list(data["results"]["cases"]) == ["ViT-H-32px-b4"]
    assert data["not_measured"] and "cases/ViT-H-32px-b4" not in data["not_measured"]
    assert "ViT-H-32px-b4" in report.markdown(data)


# -- several runs ---------------------------------------------------------------------------------------------


def test_results_are_kept_for_the_same_gpu_only(tmp_path):
    file, here = tmp_path / "results.json", {"gpu": "A", "sources": "1"}
    Record(file, here).put("compiled", "x", {"ms": 1})
    assert Record(file, here, keep=True).has("compiled", "x")
    assert not Record(file, here | {"sources": "2"}, keep=True).has("compiled", "x")  # other code: measured again
    kept = Record(file, here, keep=True)
    assert [run["sources"] for run in kept.data["runs"]] == ["1", "1", "2", "1"]
    assert kept.data["results"]["compiled"]["x"] == {"ms": 1, "run": 0}
    assert Record(file, here | {"gpu": "B"}, keep=True).data["results"] == {}
    assert Record(file, here).data == {"runs": [here], "results": {}, "not_measured": {}}


def test_compiled_adds_and_does_not_repeat(tmp_path, results):
    data = report.load(results)
    (tmp_path / "results.json").write_text(json.dumps(data))
    only = "(cases|compiled)/ViT-H-32px-b4"
    code, data = run(tmp_path, only, "--mode", "compiled")
    assert code == 0 and len(data["runs"]) == 2
    assert data["results"]["cases"]["ViT-H-32px-b4"]["run"] == 0
    assert data["results"]["compiled"]["ViT-H-32px-b4"]["run"] == 0
    data["results"]["compiled"]["ViT-H-32px-b4"]["error"] = "it failed"
    (tmp_path / "results.json").write_text(json.dumps(data))
    _, data = run(tmp_path, only, "--mode", "compiled")
    assert data["results"]["compiled"]["ViT-H-32px-b4"]["run"] == 2


def test_needs_a_gpu_or_tiny(capsys):
    with pytest.raises(SystemExit):
        engine.main([])
    assert "--tiny" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no kernel image", "ValueError: no kernel image"),
        ("two\n  lines", "ValueError: two lines"),
        ("in /home/someone/.venv/lib/x.py line 3", "ValueError: in …/x.py line 3"),
        ("1/2 of 3 img/s", "ValueError: 1/2 of 3 img/s"),
        ("", "ValueError: no message"),
        ("x" * 999, "ValueError: " + "x" * 228),
    ],
)
def test_errors_are_one_line_without_paths(text, expected):
    assert brief(ValueError(text)) == expected


# -- the README -----------------------------------------------------------------------------------------------


def test_readme_is_up_to_date(capsys):
    assert readme.main(["--check"]) == 0, capsys.readouterr().err


def test_readme_says_when_there_is_no_gpu_figure(tmp_path, results):
    assert "No GPU figure has been published yet" in readme.section(tmp_path)
    (tmp_path / "rehearsal").mkdir()
    (tmp_path / "rehearsal" / "results.json").write_text((results / "results.json").read_text())
    assert "No GPU figure has been published yet" in readme.section(tmp_path)


def test_readme_shows_what_was_measured(tmp_path, results):
    data = report.load(results)
    data["runs"][0] |= {"tiny": False, "gpu": "NVIDIA X1", "memory_gib": 5, "driver": "1.2", "commit": "abcdef0123456"}
    folder = tmp_path / "nvidia-x1"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(data))
    (folder / "latency.png").touch()
    text = readme.section(tmp_path)
    assert "No GPU figure" not in text and "### NVIDIA X1" in text
    assert "NVIDIA X1 (5 GiB, driver 1.2)" in text and "commit abcdef012345" in text
    assert "nvidia-x1/latency.png)" in text and "scaling.png" not in text
    ours, eager = (value_of(data["results"]["cases"]["ViT-H-32px-b1"], n, "latency", "ms") for n in CONTENDERS[:2])
    row = next(line for line in text.splitlines() if line.startswith("| ViT-H-32px-b1 "))
    assert f"| {report.ratio(eager / ours)} |" in row
    assert readme.updated(readme.updated(f"a\n{readme.BEGIN}{readme.END}b", text), "new").startswith("a\n")


@pytest.mark.parametrize("text", ["nothing", readme.BEGIN, f"{readme.BEGIN}{readme.END}{readme.END}"])
def test_readme_without_markers_is_an_error(text):
    with pytest.raises(ValueError, match="must have one line"):
        readme.updated(text, "")


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0.00"), (0.01234, "0.0123"), (1.5, "1.50"), (14.02, "14.0"), (123.4, "123"),
     (98765.4, "98765"), (0.00001234, "0.000012")],
)  # fmt: skip
def test_numbers(value, text):
    assert report.number(value) == text
