"""What can be submitted, and what the model sees of it."""

from __future__ import annotations

import io
import os
import struct
import sys
import threading
import warnings
import zlib
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image

from radio_fast import images
from radio_fast.images import FORMATS, ImageError, ImageTooLarge, read_image, to_pixels, to_tensor
from radio_fast.serve import decode
from radio_fast.serve.decode import hold, read_pixels
from tests.serve.models import TIMEOUT, encoded

SIZE = (32, 48)
MANY = 10_000_000


def noise(height: int = 40, width: int = 60, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def pixels(image, size=SIZE, max_pixels: int = MANY) -> torch.Tensor:
    return read_pixels(hold(image, max_pixels), lambda height, width: size, max_pixels)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def huge_png(width: int, height: int) -> bytes:
    """A header that promises more than there is."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_files_are_read_as_the_command_line_reads_them(kind, tmp_path):
    data = encoded(noise(), kind)
    path = tmp_path / f"image.{kind.lower()}"
    path.write_bytes(data)
    truth = to_tensor(read_image(path), *SIZE)
    for image in (path, str(path), data, bytearray(data), memoryview(data), Image.open(path)):
        found = pixels(image)
        assert found.dtype == torch.uint8 and found.shape == (3, *SIZE)
        assert torch.equal(found.float() / 255, truth)


@pytest.mark.parametrize("size", [(40, 60), SIZE])
def test_all_kinds_of_input_mean_the_same(size):
    array = noise()
    truth = to_pixels(Image.fromarray(array), *size)
    assert torch.equal(pixels(array, size), truth)
    assert torch.equal(pixels(Image.fromarray(array), size), truth)
    assert torch.equal(pixels(torch.from_numpy(array).permute(2, 0, 1), size), truth)
    assert torch.equal(pixels(encoded(array), size), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_float_tensors(dtype):
    image = torch.rand(3, 40, 60, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(pixels(image, (40, 60)), image.float())
    resized = pixels(image)
    truth = torch.nn.functional.interpolate(image.float()[None], SIZE, mode="bicubic", antialias=True)[0]
    assert torch.equal(resized, truth.clamp(0, 1))
    edges = (torch.arange(60) % 2).expand(3, 40, 60).to(dtype)
    assert pixels(edges, (64, 96)).min() >= 0 and pixels(edges, (64, 96)).max() <= 1, "bicubic shoots over"


@pytest.mark.parametrize("value", [-0.01, 1.01, 255.0, float("nan"), float("inf")])
def test_floats_outside_their_range(value):
    image = torch.zeros(3, 8, 8)
    image[1, 2, 3] = value
    with pytest.raises(ImageError, match=r"floats must lie in \[0, 1\]"):
        pixels(image)


def test_strided_and_read_only_arrays():
    array = noise(80, 120)[::-2, ::2]
    assert torch.equal(pixels(array, (40, 60)), torch.from_numpy(array.copy()).permute(2, 0, 1))
    array = noise()
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(pixels(array, (40, 60)), torch.from_numpy(noise()).permute(2, 0, 1))


@pytest.mark.parametrize("make", [lambda a: a, lambda a: torch.from_numpy(a).permute(2, 0, 1), Image.fromarray])
def test_what_is_submitted_is_the_callers_again(make):
    array = noise()
    image = make(array)
    held = hold(image, MANY)
    if isinstance(image, Image.Image):
        image.paste((0, 0, 0), (0, 0, 60, 40))
    array[:] = 0
    assert torch.equal(read_pixels(held, lambda h, w: (h, w), MANY), torch.from_numpy(noise()).permute(2, 0, 1))


def test_a_pil_image_may_be_closed():
    data = encoded(noise())
    with Image.open(io.BytesIO(data)) as image:
        held = hold(image, MANY)
    assert torch.equal(read_pixels(held, lambda h, w: SIZE, MANY), pixels(data))


def test_tensors_with_gradients():
    assert not pixels(torch.rand(3, 8, 8, requires_grad=True)).requires_grad


# -- odd pictures ------------------------------------------------------------------------------------------------------


def test_one_pixel():
    found = pixels(encoded(np.full((1, 1, 3), 77, np.uint8)))
    assert (found == 77).all() and found.shape == (3, *SIZE)
    assert (pixels(np.full((1, 1, 3), 77, np.uint8)) == 77).all()
    assert pixels(torch.full((3, 1, 1), 0.5)).allclose(torch.tensor(0.5))


def test_turned_by_exif():
    array = noise()
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(Image.fromarray(array), "PNG", exif=exif)
    turned = torch.from_numpy(np.rot90(array, -1).copy()).permute(2, 0, 1)
    sizes = []
    found = read_pixels(data, lambda height, width: sizes.append((height, width)) or (height, width), MANY)
    assert torch.equal(found, turned) and sizes == [(60, 40)], "native sizes are of the upright picture"
    assert torch.equal(pixels(Image.open(io.BytesIO(data)), (60, 40)), turned)


def test_an_animation_is_its_first_picture():
    frames = [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(3)]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3, kind
        assert (pixels(data) == 0).all(), kind


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_modes(mode):
    image = Image.new(mode, (20, 10))
    kind = {"CMYK": "JPEG", "YCbCr": "JPEG", "I": "TIFF", "F": "TIFF"}.get(mode, "PNG")
    found = pixels(saved(image, kind))
    assert found.shape == (3, *SIZE) and (found == found[:, :1, :1]).all()
    assert torch.equal(pixels(image), found)


def test_16_bits_of_grey():
    image = Image.fromarray(np.array([[0, 65535], [32896, 257]], np.uint16))
    assert pixels(saved(image, "PNG"), (2, 2))[0].tolist() == [[0, 255], [128, 1]]


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [b"", b"no image", b"\xff\xd8\xff", b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"],
    ids=["empty", "text", "start of a JPEG", "start of a GIF", "a program"],
)
def test_no_image(data):
    with pytest.raises(ImageError, match=r"^image: "):
        pixels(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated(kind):
    data = encoded(noise(), kind)
    for part in (0.5, 0.9):
        with pytest.raises(ImageError):
            pixels(data[: int(len(data) * part)])


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_corrupt_bytes_give_an_image_or_an_image_error(kind):
    data = bytearray(encoded(noise(), kind))
    generator = np.random.default_rng(5)
    for _ in range(40):
        damaged = data.copy()
        for place in generator.integers(0, len(data), 4):
            damaged[place] = generator.integers(256)
        with suppress(ImageError):
            assert pixels(bytes(damaged)).shape == (3, *SIZE)


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "none.jpg", tmp_path, str(tmp_path / "none.jpg")):
        with pytest.raises(ImageError, match=str(path)):
            pixels(path)


def test_programs_are_no_images():
    """Pillow would start Ghostscript for an EPS file."""
    image = Image.new("RGB", (8, 8))
    Image.init()
    for kind in sorted({"EPS", "ICO", "PCX", "TGA"} - FORMATS):
        with pytest.raises(ImageError):
            pixels(saved(image, kind))


def test_large_images_are_refused_by_their_header(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageTooLarge, match=r"30000 × 20 pixels .* 100000 pixels are allowed"):
        pixels(huge_png(30_000, 20), max_pixels=100_000)
    with pytest.raises(ImageTooLarge, match="decompression bomb"):
        pixels(huge_png(100_000, 100_000), max_pixels=10**12)  # Pillow's own limit
    with pytest.raises(ImageTooLarge):
        hold(Image.open(io.BytesIO(huge_png(30_000, 20))), 100_000)
    monkeypatch.undo()
    assert issubclass(ImageTooLarge, ImageError)
    for image in (noise(), torch.zeros(3, 40, 60)):
        with pytest.raises(ImageTooLarge):
            pixels(image, max_pixels=2399)
        assert pixels(image, max_pixels=2400).shape == (3, *SIZE)
    assert pixels(encoded(noise()), max_pixels=2400).shape == (3, *SIZE)


def test_a_warning_of_pillow_made_an_error(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageTooLarge, match="decompression bomb"):
            read_image(encoded(noise()))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read_image(encoded(noise())).size == (60, 40)


def test_reading_changes_nothing_of_the_process():
    """Filters of warnings are the whole process's: two threads that put them back can leave the wrong ones."""
    before = list(warnings.filters), Image.MAX_IMAGE_PIXELS
    ready, seen = threading.Barrier(2), []

    def read() -> None:
        ready.wait(10)
        for _ in range(20):
            pixels(encoded(noise()))
            seen.append(list(warnings.filters) == before[0])

    others = [threading.Thread(target=read) for _ in range(2)]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join(30)
    assert len(seen) == 40 and all(seen) and before[1] == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (None, "an image must be a path"),
        (7, "got int"),
        ([1, 2], "got list"),
        (np.zeros((4, 4), np.uint8), r"\(H, W, 3\) of uint8, got \(4, 4\)"),
        (np.zeros((4, 4, 4), np.uint8), r"\(H, W, 3\)"),
        (np.zeros((4, 4, 3), np.float32), "of float32"),
        (np.zeros((0, 4, 3), np.uint8), r"\(0, 4, 3\)"),
        (torch.zeros(4, 4, 3), r"\(3, H, W\), got \(4, 4, 3\)"),
        (torch.zeros(1, 3, 4, 4), r"\(3, H, W\)"),
        (torch.zeros(3, 0, 4), r"\(3, 0, 4\)"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "uint8, or float .* got torch.int64"),
        (torch.zeros(3, 4, 4, dtype=torch.complex64), "got torch.complex64"),
    ],
)
def test_no_legal_input(image, said):
    with pytest.raises(ValueError, match=said) as raised:
        hold(image, MANY)
    assert not isinstance(raised.value, ImageError)


def test_without_pillow(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "PIL"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"radio_fast\[cli\]"):
        hold(b"anything", MANY)
    assert pixels(noise(*SIZE)).shape == pixels(torch.zeros(3, *SIZE)).shape == (3, *SIZE)


# -- what could hold a thread up, or mislead it ------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes among the files")
def test_a_pipe_is_no_image(tmp_path):
    """Without a writer it could not even be opened."""
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    found: list[ImageError] = []

    def read() -> None:
        with pytest.raises(ImageError, match=r"pipe\.png: no regular file") as raised:
            read_image(pipe)
        found.append(raised.value)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    assert found
    with pytest.raises(ImageError, match="no regular file"):
        read_image("/dev/null")


def test_files_are_closed(tmp_path, monkeypatch):
    opened = []
    real = images._open_regular
    monkeypatch.setattr(images, "_open_regular", lambda *args: opened.append(real(*args)) or opened[-1])
    (tmp_path / "good").write_bytes(encoded(noise()))
    (tmp_path / "bad").write_bytes(b"no image")
    read_image(tmp_path / "good")
    with pytest.raises(ImageError):
        read_image(tmp_path / "bad")
    assert len(opened) == 2
    for fd in opened:
        with pytest.raises(OSError):
            os.fstat(fd)


def test_a_lazy_image_of_several_threads(monkeypatch):
    """Pillow reads a file's pixels and tags when they are first asked for: one thread at a time does."""
    exif = Image.Exif()
    exif[0x0112] = 6
    shared = Image.open(io.BytesIO(saved(Image.fromarray(noise()), "JPEG", exif=exif)))
    locked: dict[str, bool] = {}

    def watched(name: str, real):
        def method(self, *args):
            locked.setdefault(name, decode._reading.locked())
            return real(self, *args)

        monkeypatch.setattr(type(shared), name, method)

    for name in ("load", "getexif"):
        watched(name, getattr(type(shared), name))
    assert hold(shared, MANY).size == (40, 60)
    assert locked == {"load": True, "getexif": True} and not decode._reading.locked()


@pytest.mark.parametrize(
    "make",
    [lambda a: a, Image.fromarray, encoded, lambda a: torch.from_numpy(a).permute(2, 0, 1)],
    ids=["array", "PIL", "file", "tensor"],
)
@pytest.mark.parametrize("size", [(40, 60), SIZE])
def test_pixels_lie_as_the_model_takes_them(make, size):
    assert pixels(make(noise()), size).is_contiguous()


@pytest.mark.parametrize("image", [torch.zeros(3, 4, 4).to("meta"), torch.zeros(3, 4, 4).to_sparse()], ids=str)
def test_tensors_without_pixels(image):
    with pytest.raises(ValueError, match="a tensor must be dense"):
        hold(image, MANY)
