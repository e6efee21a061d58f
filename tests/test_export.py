"""Models as torch.export programs and as ONNX files, run by onnxruntime."""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import radio_fast
from radio_fast import export
from tests.conftest import golden_source
from tests.numerics import assert_relative
from tests.test_cli import run

pytestmark = pytest.mark.filterwarnings("ignore:attention windows")

# (golden case, what load is told, height and width)
MODELS = [
    pytest.param("vit_h16", {}, (64, 96), id="ViT"),
    pytest.param("dinov2_g14", {}, (56, 84), id="DINOv2"),
    pytest.param("vit_b16_vitdet", {"vitdet_window_size": 2}, (64, 96), id="ViTDet"),
    pytest.param("eradio_small", {"window_size": "optimal"}, (64, 96), id="E-RADIO"),
]
CASE = "vit_h16"


def load(case: str, options: dict) -> radio_fast.RADIOModel:
    return radio_fast.load(golden_source(case), backend="reference", cuda_graphs=False, **options)


def image(batch: int, size: tuple[int, int]) -> torch.Tensor:
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(batch))


# -- torch.export -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
@pytest.mark.parametrize(("case", "options", "size"), MODELS)
def test_torch_export(case, options, size, dynamic):
    """Exported, saved, loaded: the model's own outputs, for the batch it was traced with or any."""
    model = load(case, options)
    shapes = {"x": {0: torch.export.Dim("batch", min=1)}, "feature_fmt": None} if dynamic else None
    program = torch.export.export(model, (image(2, size), "NCHW"), dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch in (1, 2, 5) if dynamic else (2,):
        x = image(batch, size)
        output, truth = loaded(x, "NCHW"), model(x, "NCHW")
        assert isinstance(output, radio_fast.RadioOutput)
        assert_relative(output.features, truth.features, 1e-6)
        assert_relative(output.summary, truth.summary, 1e-6)


def test_torch_export_with_adaptors():
    model = load(CASE, {"adaptor_names": ["clip", "sam"]})
    shapes = {"x": {0: torch.export.Dim("batch", min=1)}}
    program = torch.export.export(model, (image(2, (48, 64)),), dynamic_shapes=shapes)
    x = image(3, (48, 64))
    output, truth = program.module()(x), model(x)
    assert list(output) == ["backbone", "clip", "sam"]
    for name in truth:
        assert_relative(output[name].features, truth[name].features, 1e-6)


# -- ONNX -------------------------------------------------------------------------------------------------------------


def session_of(path):
    return pytest.importorskip("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("case", "options", "size"), MODELS)
def test_onnx(case, options, size, tmp_path):
    model = load(case, options)
    done = radio_fast.export_onnx(model, tmp_path / "new" / "model.onnx", size)
    assert 0 < done.error < 1e-5
    assert done.inputs == {"image": ("batch", 3, *size)}
    assert [file.name for file in done.path.parent.iterdir()] == ["model.onnx"]
    session = session_of(done.path)
    assert [output.name for output in session.get_outputs()] == ["summary", "features"]
    for batch in (1, 3):
        x = image(batch, size)
        summary, features = session.run(None, {"image": x.numpy()})
        assert_relative(torch.from_numpy(summary), model(x).summary, 1e-4)
        assert_relative(torch.from_numpy(features), model(x).features, 1e-4)


@pytest.fixture(scope="module")
def with_adaptors(tmp_path_factory):
    """A model with adaptors in float16 with a fixed batch, its weights beside the file."""
    pytest.importorskip("onnxruntime")
    model = load(CASE, {"adaptor_names": ["clip", "sam"]}).half()
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    order, replace = [], Path.replace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "MAX_INLINE", 100_000)
        patch.setattr(Path, "replace", lambda self, target: order.append(self.name) or replace(self, target))
        done = radio_fast.export_onnx(model, path, (48, 64), dynamic_batch=False, batch=2)
    assert order == ["model.onnx.data", "model.onnx"], "the graph must not appear before its weights"
    return model, done


def test_onnx_with_adaptors(with_adaptors):
    model, done = with_adaptors
    names = ["summary", "features", "clip.summary", "clip.features", "sam.summary", "sam.features"]
    session = session_of(done.path)
    assert [output.name for output in session.get_outputs()] == list(done.outputs) == names
    assert done.outputs["sam.features"] == (2, 48, 56)  # 3 × 4 patches, each in 2 × 2
    x = image(2, (48, 64))
    results = dict(zip(names, session.run(None, {"image": x.numpy()}), strict=True))
    assert results["features"].dtype == np.float16 and results["sam.features"].dtype == np.float32
    truth = model(x)
    assert_relative(torch.from_numpy(results["sam.features"]), truth["sam"].features, 2e-2)
    assert_relative(torch.from_numpy(results["clip.summary"]), truth["clip"].summary, 2e-2)
    assert_relative(torch.from_numpy(results["summary"]), truth["backbone"].summary, 2e-2)


def test_weights_beside_the_file(with_adaptors, tmp_path):
    """What one file can't hold lies beside it, under a name that still fits when both are moved together."""
    _, done = with_adaptors
    files = {file.name: file for file in done.path.parent.iterdir()}
    assert set(files) == {"model.onnx", "model.onnx.data"}
    assert files["model.onnx"].stat().st_size < files["model.onnx.data"].stat().st_size
    assert done.bytes == sum(file.stat().st_size for file in files.values())
    for name, file in files.items():
        (tmp_path / name).write_bytes(file.read_bytes())
    assert session_of(tmp_path / "model.onnx").run(None, {"image": image(2, (48, 64)).numpy()})


def test_metadata(with_adaptors):
    meta = session_of(with_adaptors[1].path).get_modelmeta()
    assert meta.producer_name == "radio_fast"
    facts = {"patch_size": "16", "image_size": "48x64", "radio_fast_version": radio_fast.__version__}
    assert meta.custom_metadata_map == facts
    named = radio_fast.load("radio_v2.5-h", checkpoint=golden_source(CASE))
    assert export._metadata(named, (48, 64)) == facts | {"version": "radio_v2.5-h", "licence": "NSCL (non-commercial)"}


def test_the_model_is_left_alone():
    """Its weights are not copied, its backend and graphs stay."""
    model = radio_fast.load(golden_source(CASE), cuda_graphs=True)
    flat = export.Flat(model)
    assert (model.backend, flat.model.backend) == ("auto", "reference")
    assert model.graphs is not None and flat.model.graphs is None
    for (name, ours), (_, theirs) in zip(model.state_dict().items(), flat.model.state_dict().items(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr(), name


def test_failed_check_leaves_what_was_there(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    path.write_text("yesterday's")
    monkeypatch.setitem(export.TOLERANCE, torch.float32, 1e-12)
    model = load(CASE, {})
    with pytest.raises(radio_fast.ExportError, match=r"onnxruntime's summary differs by .* more than 1e-12"):
        radio_fast.export_onnx(model, path, 32)
    assert path.read_text() == "yesterday's"
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    (tmp_path / "model.onnx.data").write_text("of a larger one")
    assert radio_fast.export_onnx(model, path, 32, check=False).error is None
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    session_of(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 50}, r"multiples of 16 pixels, got 50 × 50; the nearest supported size is 48 × 48"),
        ({"image_size": (32, 40)}, r"got 32 × 40; the nearest supported size is 32 × 32"),
        ({"image_size": (32, 32, 3)}, r"a number of pixels or \(height, width\), got \(32, 32, 3\)"),
        ({"image_size": 0}, "a number of pixels or"),
        ({"opset": 17}, "opset must lie in 18…23, got 17"),
        ({"opset": 20.0}, "opset must lie in 18…23, got 20.0"),
        ({"batch": 2}, "batch must be a number of images from 1 on, and dynamic_batch False, got 2"),
        ({"batch": 0, "dynamic_batch": False}, "batch must be a number of images from 1 on"),
        ({"path": "."}, "path must be a file to write, . is a folder"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path):
    arguments = {"path": tmp_path / "model.onnx"} | arguments
    with pytest.raises(ValueError, match=message):
        radio_fast.export_onnx(load(CASE, {}), **arguments)
    assert not any(tmp_path.iterdir())


def test_bfloat16_can_not_be_checked(tmp_path):
    model = load(CASE, {"dtype": "bfloat16"})
    with pytest.raises(ValueError, match="can't run bfloat16: export float32 or float16, or without the check"):
        radio_fast.export_onnx(model, tmp_path / "model.onnx", 32)


def test_other_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"takes a model of radio_fast\.load, got Linear"):
        radio_fast.export_onnx(torch.nn.Linear(1, 1), tmp_path / "model.onnx")


def test_preferred_size():
    model = load("vit_b16_vitdet", {"vitdet_window_size": 3})
    assert export.legal_size(model, None) == (528, 528)  # 512 is no multiple of 48
    model.set_resolutions(1024, (768, 384))
    assert export.legal_size(model, None) == (768, 384)


def test_missing_extra(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(ImportError, match=r"needs onnxscript: pip install 'radio_fast\[export\]'"):
        radio_fast.export_onnx(load(CASE, {}), tmp_path / "model.onnx", 32)


# -- command line -----------------------------------------------------------------------------------------------------


def test_command(tmp_path):
    out = tmp_path / "out.onnx"
    done = run("export", golden_source(CASE), out, "--resolution", "32x48", "--adaptors", "clip", "--batch", "2")
    assert "image 2 × 3 × 32 × 48 → summary, features, clip.summary, clip.features; opset 20" in done.stdout
    assert "max relative error" in done.stdout and len(done.stdout.splitlines()) == 1
    assert session_of(out).run(["clip.summary"], {"image": image(2, (32, 48)).numpy()})[0].shape == (2, 48)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--resolution", "50"), "nearest supported size is 48 × 48"),
        (("--batch", "0"), "--batch must be 'dynamic' or a number of images from 1 on, got '0'"),
    ],
)
def test_command_says_what_is_wrong(arguments, message, tmp_path):
    done = run("export", golden_source(CASE), tmp_path / "out.onnx", *arguments, code=1)
    assert message in done.stderr
    assert not any(tmp_path.iterdir())


def test_command_without_the_extra(tmp_path):
    code = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *package: None if name.startswith("onnx") else find(name, *package)
from radio_fast.cli import main
sys.argv = ["radio-fast", "export", "radio_v2.5-b", sys.argv[1]]
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "o.onnx"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "pip install 'radio_fast[export]'" in done.stderr
