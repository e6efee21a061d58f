"""`radio-fast tune` and `doctor --ops`, on a CPU that is taken for worth measuring on."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import radio_fast
from radio_fast import cli
from radio_fast import tune as tuning
from radio_fast.ops import _dispatch, _tuning
from radio_fast.ops._dispatch import OPS
from tests.conftest import golden_source


@pytest.fixture
def worth_it(monkeypatch):
    """Each op's plain form takes 2 ms and all others 1 ms; a call in the interpreter is enough."""
    monkeypatch.setattr(_dispatch, "accelerated", lambda device: True)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")  # a GPU's choices, without the CPU's kernels
    monkeypatch.setattr(_tuning, "_stores", {})
    for op in OPS.values():
        monkeypatch.setattr(op, "_rankings", {})

    def measure(runs, device):
        return {name: 2000.0 if name == "reference" else 1000.0 for name in runs}, {}

    monkeypatch.setattr(_tuning, "measure", measure)


def run(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "200"}, catch_exceptions=True)


@pytest.fixture(scope="module")
def source() -> str:
    return str(golden_source("vit_h16"))


def test_tune_fills_the_file(worth_it, source, nearest_bfloat16, monkeypatch):
    result = run("tune", source, "--device", "cpu", "--resolution", "32", "--batch", "2,1", "--dtype", "float32")
    assert result.exit_code == 0, result.output + repr(result.exception)
    (path,) = _tuning.folder().glob("*.json")
    assert str(path) in result.output
    found = json.loads(path.read_text())["choices"]
    assert list(found["attention"]) == ["float32 d80 heads2 n12", "float32 d80 heads4 n12"]
    assert "2.00×" in result.output and "triton" in result.output
    # and a model runs on what is in the file, without a measurement
    for op in OPS.values():
        op.forget()
    monkeypatch.setattr(_tuning, "_stores", {})
    monkeypatch.setattr(_tuning, "measure", None)
    radio_fast.load(source)(torch.rand(2, 3, 32, 32))


def test_tune_skips_what_does_not_fit(worth_it, source, monkeypatch):
    def forward(self, x, feature_fmt="NLC"):
        if len(x) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(radio_fast.RADIOModel, "forward", forward)
    model = radio_fast.load(source)
    steps = list(tuning.tune(model, [(64, 32), (32, 32)], [4, 1]))
    assert [tuple(step) for step in steps] == [
        (1, 32, 32, None),
        (1, 64, 32, None),
        (4, 32, 32, "out of memory"),
        (4, 64, 32, "out of memory"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "nothing to tune on cpu: plain PyTorch runs there"),
        (["--device", "gpu"], "device must be a torch device such as 'cpu'"),
        (["--device", "cpu", "--batch", "1,00"], "--batch must be numbers of images from 1 on"),
        (["--device", "cpu", "--batch", "0"], "--batch must be numbers of images from 1 on"),
        (["--device", "cpu", "--batch", "1;2"], "--batch must be numbers of images from 1 on"),
    ],
)
def test_tune_says_what_is_wrong(source, arguments, message):
    result = run("tune", source, *arguments)
    assert isinstance(result.exception, ValueError) and message in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resolution", "33"], "the nearest supported size is 32x32"),
        (["--resolution", "native"], "'native' is for embed"),
        (["--dtype", "int8"], "dtype must be float32, float16 or bfloat16"),
    ],
)
def test_tune_on_a_gpu_says_what_is_wrong(worth_it, source, arguments, message):
    result = run("tune", source, "--device", "cpu", *arguments)
    assert isinstance(result.exception, ValueError) and message in str(result.exception)


def test_tune_when_measuring_is_off(worth_it, source, monkeypatch):
    monkeypatch.setenv("RADIO_FAST_TUNE", "0")
    result = run("tune", source, "--device", "cpu", "--resolution", "32")
    assert "RADIO_FAST_TUNE=0 is set" in str(result.exception)


def test_doctor_shows_ops(worth_it, source, nearest_bfloat16):
    assert "Nothing has been measured on cpu: a model's first call does" in run("doctor", "--ops").output
    run("tune", source, "--device", "cpu", "--resolution", "32", "--batch", "1", "--dtype", "float32")
    result = run("doctor", "--ops")
    assert result.exit_code == 0, result.output
    assert "xformers" in result.output and "it is for NVIDIA GPUs, not for cpu" in result.output
    report = json.loads(run("doctor", "--ops", "--json").output)
    assert report["device"] == "cpu"
    assert set(report["implementations"]) == set(OPS)
    assert report["implementations"]["layer_norm"]["reference"] is None
    row = next(row for row in report["choices"] if row["op"] == "layer_norm")
    assert row["winner"] == "triton" and row["gain"] == 2.0 and row["bucket"].startswith("float32 d")


def test_doctor_shows_what_another_process_measured(worth_it, source):
    _tuning.store(torch.device("cpu"))
    other = _tuning.Store(torch.device("cpu"))
    other.put("layer_norm", "float16 d[red] rows1", _tuning.Record({"triton": 3.0, "reference": 4.0}, {}))
    output = run("doctor", "--ops").output
    assert "d[red]" in output, "no markup of a file's making"
    assert "3.0" in output


def test_doctor_without_a_gpu():
    assert "Nothing has been measured on cpu: plain PyTorch runs there" in run("doctor", "--ops").output
