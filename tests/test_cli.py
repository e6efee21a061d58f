"""radio-fast as a user types it, each command in its own process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import radio_fast
from radio_fast.images import read_image, to_tensor
from tests.conftest import golden_source

ROOT = Path(__file__).parent.parent
CHECKPOINT = str(golden_source("vit_h16"))


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "radio_fast.cli", *map(str, args)]


def run(*args: str, code: int = 0) -> subprocess.CompletedProcess:
    env = os.environ | {"COLUMNS": "100", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command(*args), capture_output=True, text=True, cwd=ROOT, env=env, timeout=300)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in (("b.png", (40, 70)), ("a.jpg", (64, 64)), ("deeper/c.webp", (100, 30))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("not an image, and not named as one")
    return folder


def test_versions():
    text = run("versions").stdout
    for name in radio_fast.versions():
        assert re.search(rf"^{re.escape(name)} .*(NSCL \(non-commercial\)|NVIDIA Open Model)", text, re.M), name


def test_info_of_a_version_and_of_a_file():
    text = run("info", "c-radio_v4-so400m").stdout
    for fact in ("NVIDIA Open Model", "1152", "16 × 72", "C-RADIOv4-SO400M", "siglip2-g, dino_v3, sam3"):
        assert fact in text
    text = run("info", CHECKPOINT).stdout
    for fact in ("vit_huge_patch16_224", "2 × 80", "4 cls + 4 registers", "clip, siglip, dino_v2, sam", "float16"):
        assert fact in text
    assert "unknown version 'radio_v25-l': did you mean 'radio_v2.5-l'" in run("info", "radio_v25-l", code=1).stderr


def test_doctor():
    text = run("doctor").stdout
    for line in (
        "python",
        "torch",
        "triton",
        "GPU",
        "nvcc",
        "flash-attn",
        "xformers",
        "backend reference",
        "backend triton",
    ):
        assert re.search(rf"^(ok|--)\s+{line}", text, re.M), line
    findings = json.loads(run("doctor", "--json").stdout)
    assert {"name": "torch", "ok": True}.items() <= next(f for f in findings if f["name"] == "torch").items()


def test_embed(photos, tmp_path):
    out = tmp_path / "new" / "out.npz"
    run(
        "embed",
        photos,
        "-o",
        out,
        "--version",
        CHECKPOINT,
        "--resolution",
        "native",
        "--features",
        "--adaptors",
        "clip",
    )
    stored = np.load(out)
    names = [str(photos / n) for n in ("a.jpg", "b.png", "deeper/c.webp")]
    assert stored["paths"].tolist() == names
    assert stored["sizes"].tolist() == [[64, 64], [32, 64], [96, 32]]
    model = radio_fast.load(CHECKPOINT, adaptor_names="clip")
    for i, (name, size) in enumerate(zip(names, stored["sizes"].tolist(), strict=True)):
        output = model(to_tensor(read_image(name), *size).unsqueeze(0))
        np.testing.assert_allclose(stored["summary"][i], output["backbone"].summary[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(stored["clip.summary"][i], output["clip"].summary[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(stored[f"features/{i:06d}"], output["backbone"].features[0], rtol=1e-4, atol=1e-5)
        assert stored[f"clip.features/{i:06d}"].shape == output["clip"].features[0].shape
    assert not list(out.parent.glob("*.part"))


def test_embed_goes_on_past_files_that_are_no_images(photos, tmp_path):
    out = tmp_path / "out.npz"
    truncated = photos / "truncated.png"
    truncated.write_bytes((photos / "b.png").read_bytes()[:200])
    bad = [photos / "notes.txt", photos / "missing.png"]
    done = run("embed", photos, *bad, "-o", out, "--version", CHECKPOINT, "--resolution", "64", code=1)
    assert np.load(out)["summary"].shape == (3, 480)
    for path in (truncated, *bad):
        assert re.search(rf"left out: {re.escape(str(path))}", done.stderr), path
    assert "3 of 6 images embedded" in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--resolution", "50"), "nearest supported size is 48x48"),
        (("--resolution", "48x50"), "nearest supported size is 48x48"),
        (("--resolution", "large"), "must be a number of pixels, HEIGHTxWIDTH or 'native', got 'large'"),
        (("--adaptors", "clap"), "unknown adaptor 'clap': this checkpoint has 'clip', 'siglip', 'dino_v2', 'sam'"),
        (("--dtype", "fp8"), "dtype must be float32, float16, bfloat16 or int8, got 'fp8'"),
        (("--checkpoint", "nowhere.tar"), "no checkpoint at nowhere.tar"),
    ],
)
def test_embed_says_what_is_wrong(photos, tmp_path, args, message):
    version = () if "--checkpoint" in args else ("--version", CHECKPOINT)
    done = run("embed", photos, "-o", tmp_path / "out.npz", *version, *args, code=1)
    assert message in done.stderr
    assert not (tmp_path / "out.npz").exists()


def test_embed_of_an_empty_folder_and_without_weights(tmp_path, photos):
    (tmp_path / "empty").mkdir()
    done = run("embed", tmp_path / "empty", "-o", tmp_path / "out.npz", "--version", CHECKPOINT, code=1)
    assert "no images in" in done.stderr
    done = run("embed", photos, "-o", tmp_path / "out.npz", "--version", "radio_v2.5-b", code=1)
    assert "can't be reached" in done.stderr and "checkpoint=PATH" in done.stderr


# The command, whose third image takes as long to read as somebody keeps the pipe beside it open.
STUCK = """
import sys
from radio_fast import cli
pipe, read = sys.argv.pop(1), cli.read_image
def stuck(path):
    if path.name == "c.webp":
        open(pipe).read()
    return read(path)
cli.read_image = stuck
cli.main()
"""


def test_interrupted_embed_keeps_what_is_done(photos, tmp_path):
    """Ctrl-C in the middle: a readable file with the images before, exit code 130."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    out = tmp_path / "out.npz"
    paths = (photos / "a.jpg", photos / "b.png", photos / "deeper" / "c.webp")
    args = ("embed", *paths, "-o", out, "--version", CHECKPOINT, "--resolution", "64", "--batch-size", "1")
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, str(pipe), *map(str, args)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore Ctrl-C, and so would everything they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    writer, deadline = None, time.monotonic() + 120
    while writer is None and time.monotonic() < deadline:
        try:  # succeeds once the process has opened the pipe to read it
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            time.sleep(0.1)
    assert writer is not None, "the third image was never opened"
    time.sleep(1)  # a signal between opening and reading would not wake the read: Python looks at it afterwards
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    os.close(writer)
    assert process.returncode == 130, stdout + stderr
    assert np.load(out)["paths"].tolist() == [str(photos / "a.jpg")]
    assert "Traceback" not in stderr


def test_read_image_modes(tmp_path):
    grey16 = Image.fromarray(np.array([[0, 65535], [32896, 257]], np.uint16))
    grey16.save(tmp_path / "grey16.png")
    assert np.asarray(read_image(tmp_path / "grey16.png"))[..., 0].tolist() == [[0, 255], [128, 1]]
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        path = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (5, 3), 1 if mode in "1P" else None).save(path)
        assert read_image(path).mode == "RGB" and read_image(path).size == (5, 3)


def test_read_image_obeys_exif_orientation(tmp_path):
    image = Image.new("RGB", (10, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90°
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (4, 10)


def test_decompression_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("L", (400, 400)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    with pytest.raises(radio_fast.images.ImageError, match=r"large\.png: .*decompression bomb"):
        read_image(tmp_path / "large.png")


def test_to_tensor_range_and_layout():
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 1] = (255, 51, 0)
    x = to_tensor(Image.fromarray(pixels), 2, 3)
    assert x.shape == (3, 2, 3) and x.dtype == torch.float32
    assert x[:, 0, 1].tolist() == pytest.approx([1.0, 0.2, 0.0])


def test_command_line_without_its_extra(tmp_path):
    """Without typer: one line that says what to install."""
    code = "import sys; sys.modules['typer'] = None; import radio_fast.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 1
    assert "pip install 'radio_fast[cli]'" in done.stderr and "Traceback" not in done.stderr


def test_info_and_embed_of_an_eradio(photos, tmp_path):
    file = golden_source("eradio_small")
    text = run("info", file).stdout
    assert "1.8 M (backbone)" in text and "float16" in text
    assert "96 channels, 2 × attention, 1 heads of 96" in " ".join(text.replace("│", " ").split())
    assert "5 × attention, 8 heads of 96" in " ".join(run("info", "eradio_v1").stdout.replace("│", " ").split())
    out = tmp_path / "o.npz"
    arguments = ("embed", photos, "-o", out, "--version", file, "--resolution", "96")
    run(*arguments, "--window-size", "optimal")
    assert np.load(out)["summary"].shape[1] == 160
    assert (
        "window_size must be 'optimal' or a number in 1…32, got 0"
        in run(*arguments, "--window-size", "0", code=1).stderr
    )
