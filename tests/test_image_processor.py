"""radio_fast.hf.ImageProcessor against Transformers' CLIPImageProcessor and against Pillow."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch

import radio_fast
from radio_fast.hf import ImageProcessor
from tests.conftest import GOLDEN, golden_source

Image = pytest.importorskip("PIL.Image")
PHOTO = Path(__file__).resolve().parents[1] / "examples" / "images" / "coffee.jpg"
LEVEL = 1 / 255


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).integers(0, 256, (301, 457, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def photo():
    with Image.open(PHOTO) as image:
        return image.convert("RGB")


def chw(array):
    return torch.from_numpy(np.array(array)).permute(2, 0, 1)


SIZES = [(224, 336), (512, 768), (48, 64)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("picture", ["photo", "noise", "RGBA", "L", "P", "path", "array"])
def test_equals_clip_image_processor(size, picture, photo, noise):
    transformers = pytest.importorskip("transformers", minversion="5.17", reason="pip install radio_fast[hf]")
    CLIPImageProcessor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    theirs = CLIPImageProcessor(
        size={"height": size[0], "width": size[1]}, do_center_crop=False, do_normalize=False, do_resize=True
    )
    image = {"photo": photo, "path": str(PHOTO), "array": noise}.get(picture)
    if image is None:
        image = Image.fromarray(noise)
        image = image if picture == "noise" else image.convert(picture)
    expected = theirs(images=[Image.open(PHOTO) if picture == "path" else image] * 2, return_tensors="pt").pixel_values
    ours = ImageProcessor(size)([image] * 2).pixel_values
    assert ours.shape == expected.shape == (2, 3, *size) and ours.dtype == torch.float32
    assert (ours - expected).abs().max() < 1e-6


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("picture", ["photo", "noise"])
def test_tensors_are_close_to_pillow(size, picture, photo, noise, device):
    """The distances that the docstring promises."""
    image = photo if picture == "photo" else Image.fromarray(noise)
    expected = ImageProcessor(size)(image).pixel_values
    batch = torch.stack([chw(image), chw(image).flip(0)]).to(device)
    levels, exact = (ImageProcessor(size)(x).pixel_values for x in (batch, batch / 255))
    assert levels.device.type == exact.device.type == device and levels.shape == (2, 3, *size)
    error = (levels[:1].cpu() - expected).abs()
    assert error.max() < 1.01 * LEVEL and (error > LEVEL / 2).float().mean() < 1e-3
    assert (exact[:1].cpu() - expected).abs().max() < 1.2 * LEVEL
    assert torch.equal(levels[1], levels[0].flip(0)) and exact.min() >= 0 and exact.max() <= 1
    assert torch.equal((levels * 255).round() / 255, levels)


def test_halves_are_rounded_up_as_in_pillow(noise):
    """At this ratio some weights are sums of few powers of two, and results lie between two levels."""
    square = noise[:256, :256]
    expected = ImageProcessor(384)(square).pixel_values
    assert ((ImageProcessor(384)(chw(square)).pixel_values - expected).abs() > LEVEL / 2).float().mean() < 4e-3


def test_every_kind_of_input(noise):
    image = Image.fromarray(noise)
    buffer = io.BytesIO()
    image.save(buffer, "png")
    processor = ImageProcessor((64, 96))
    expected = processor(image).pixel_values
    for same in (buffer.getvalue(), noise, noise.transpose(2, 0, 1), [image], (noise,), noise[::-1][::-1]):
        assert torch.equal(processor(same).pixel_values, expected)
    mixed = processor([image, noise, buffer.getvalue()])
    assert torch.equal(mixed.pixel_values, expected.repeat(3, 1, 1, 1)) and mixed["pixel_values"] is mixed.pixel_values
    floats = (noise / 255, (noise / 255).astype(np.float32).transpose(2, 0, 1), chw(noise).double() / 255)
    for x in floats:
        assert (processor(x).pixel_values - expected).abs().max() < 1.2 * LEVEL
    grey = processor(noise[:, :, 0]).pixel_values
    assert torch.equal(grey, processor(Image.fromarray(noise[:, :, 0])).pixel_values) and torch.equal(
        grey[:, 0], grey[:, 2]
    )
    assert processor([chw(noise), torch.stack([chw(noise)] * 2)]).pixel_values.shape == (3, 3, 64, 96)


def test_exif_orientation_of_files(tmp_path, noise):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(noise).save(tmp_path / "turned.png", exif=exif)
    upright = np.rot90(noise, -1)
    assert torch.equal(
        ImageProcessor(64)(tmp_path / "turned.png").pixel_values, ImageProcessor(64)(upright).pixel_values
    )


def test_sizes(noise):
    assert ImageProcessor()(noise).pixel_values.shape == (1, 3, 304, 464)  # 301 × 457
    assert ImageProcessor(step=32)(noise).pixel_values.shape == (1, 3, 288, 448)
    assert ImageProcessor()(noise[:3, :5]).pixel_values.shape == (1, 3, 16, 16)
    for size in (64, (64, 64), [64, 64], {"height": 64, "width": 64}):
        assert ImageProcessor(size)(noise).pixel_values.shape == (1, 3, 64, 64)
    assert ImageProcessor(64)(noise, size=(32, 48)).pixel_values.shape == (1, 3, 32, 48)
    legal = noise[:288, :448]
    assert torch.equal(ImageProcessor(64)(legal, do_resize=False).pixel_values[0], chw(legal) / 255)
    assert torch.equal(ImageProcessor()(legal).pixel_values, ImageProcessor(64, do_resize=False)(legal).pixel_values)


def test_for_a_model(noise):
    model = radio_fast.load(GOLDEN / "hf_vit_l16")
    processor = ImageProcessor.for_model(model)
    assert repr(processor) == "ImageProcessor(size=(768, 768), step=16, do_resize=True)"
    batch = ImageProcessor.for_model(model, size=(64, 96))(noise)
    assert list(batch) == ["pixel_values"] and model(batch.pixel_values).features.shape == (1, 24, model.embed_dim)
    assert batch.to(torch.bfloat16).pixel_values.dtype == torch.bfloat16
    file = radio_fast.load(golden_source("vit_b16_vitdet"), vitdet_window_size=2)
    assert ImageProcessor.for_model(file).size is None and ImageProcessor.for_model(file).step == 32
    file.set_resolutions(None, (432, 432))
    assert tuple(ImageProcessor.for_model(file).size) == (448, 448)


def broken(tmp_path):
    data = PHOTO.read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    return tmp_path / "cut.jpg"


SMALL = np.zeros((8, 8, 3), np.uint8)
REFUSED = {
    "nothing": (lambda p: None, "images must be an image, or a list of at least one, got NoneType"),
    "no images": (lambda p: [], "at least one, got an empty list"),
    "nested": (lambda p: [[SMALL]], "an image must be a PIL image, an array, a tensor, a path or bytes, got list"),
    "number": (lambda p: [5], "an image must be a PIL image, .*, got int"),
    "no file": (lambda p: p / "absent.png", "absent.png"),
    "no image": (lambda p: b"\x00" * 100, "no image of a known kind"),
    "cut file": (broken, "cut.jpg: "),
    "cut picture": (lambda p: Image.open(broken(p)), "the picture can't be read: "),
    "four channels": (lambda p: np.zeros((8, 8, 4), np.uint8), r"shape \(H, W, 3\), .*, got \(8, 8, 4\)"),
    "no pixels": (lambda p: np.zeros((0, 8, 3), np.uint8), r"got \(0, 8, 3\)"),
    "one dimension": (lambda p: np.zeros(8, np.uint8), r"got \(8,\)"),
    "tensor, channels last": (lambda p: torch.zeros(8, 9, 3), r"\(3, H, W\) or \(B, 3, H, W\), got \(8, 9, 3\)"),
    "empty tensor": (lambda p: torch.zeros(0, 3, 8, 8), r"got \(0, 3, 8, 8\)"),
    "integers": (lambda p: torch.zeros(3, 8, 8, dtype=torch.int64), "uint8, or float in .*, got torch.int64"),
    "integer array": (lambda p: np.zeros((8, 8, 3), np.int32), "uint8, or float in .*, got torch.int32"),
    "objects": (lambda p: np.full((8, 8, 3), None), "uint8, or float in .*, got object"),
    "0 to 255": (
        lambda p: torch.full((3, 8, 8), 200.0),
        r"must lie in \[0, 1\], this one in \[200, 200\]: divide by 255",
    ),
    "negative": (lambda p: torch.full((3, 8, 8), -0.5), r"this one in \[-0.5, -0.5\]"),
    "NaN": (lambda p: torch.full((3, 8, 8), torch.nan), r"must lie in \[0, 1\], this one in \[nan"),
    "two sizes": (
        lambda p: [SMALL, np.zeros((40, 8, 3), np.uint8)],
        r"in one size, these do in 16 × 16, 32 × 16: give",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tmp_path):
    make, text = REFUSED[name]
    with pytest.raises(ValueError, match=text):
        ImageProcessor()(make(tmp_path))


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((100,), {}, "size: sides must be multiples of 16, got 100 × 100; the nearest are 96 × 96"),
        ((0,), {}, r"size must be \(height, width\) in whole pixels, 1…16384, got 0"),
        (((64,),), {}, "size must be"),
        ((True,), {}, "size must be"),
        ((1 << 20,), {}, "size must be .* 1…16384"),
        (("64",), {}, "size must be"),
        (({"shortest_edge": 64},), {}, 'size must have "height" and "width"'),
        ((), {"step": 0}, "step must be a whole number"),
    ],
)
def test_refused_settings(args, kwargs, text):
    with pytest.raises(ValueError, match=text):
        ImageProcessor(*args, **kwargs)


def test_refused_calls():
    with pytest.raises(ValueError, match=r"do_resize=False: sides must be multiples of 16, got 8 × 8; .* 16 × 16"):
        ImageProcessor()(SMALL, do_resize=False)
    with pytest.raises(ValueError, match="return_tensors must be 'pt', got 'np'"):
        ImageProcessor()(SMALL, return_tensors="np")
