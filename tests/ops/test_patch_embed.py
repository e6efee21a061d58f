"""The patch kernel against float64, within twice plain torch's error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from radio_fast import ops
from radio_fast.ops.patch_embed import patch_embed_ref
from tests.conftest import outlier_input
from tests.numerics import assert_within

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
IMAGE_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def make_image(B: int, H: int, W: int, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(B * H + W)
    image = torch.randint(0, 256, (B, 3, H, W), generator=generator, dtype=torch.uint8)
    image[:, 1] //= 2  # channels that differ: one taken for another shows
    return (image if dtype == torch.uint8 else (image.float() / 255).to(dtype)).to(device)


def make_weights(D: int, p: int, T: int, P: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    weight = torch.randn(D, 3 * p * p, generator=torch.Generator().manual_seed(D + p)) / (3 * p * p) ** 0.5
    return {
        "weight": weight.to(device, dtype),
        "bias": outlier_input(D, dtype=dtype, seed=1, device=device),
        "pos": outlier_input(T, D, dtype=dtype, seed=2, device=device),
        "prefix": outlier_input(P, D, dtype=dtype, seed=3, device=device),
    }


def conditioner(device: str) -> dict[str, Tensor]:
    return {name: torch.tensor(v, device=device).view(3, 1, 1) for name, v in (("mean", MEAN), ("std", STD))}


def truth(image: Tensor, weight, bias, pos, prefix, p: int, mean=None, std=None) -> Tensor:
    """(B, P + T, D) in float64, patch by patch."""
    image = image.double() / (255 if image.dtype == torch.uint8 else 1)
    if mean is not None:
        image = (image - mean.double()) / std.double()
    patches = torch.nn.functional.conv2d(image, weight.double().view(-1, 3, p, p), stride=p).flatten(2).transpose(1, 2)
    patches = patches + pos.double() + (0 if bias is None else bias.double())
    return torch.cat([prefix.double().expand(image.shape[0], -1, -1), patches], dim=1)


def check(image: Tensor, weight, bias, pos, prefix, p: int, mean=None, std=None) -> Tensor:
    args = image, weight, bias, pos, prefix, p, mean, std
    out = ops.patch_embed(*args, backend="triton")
    reference = ops.patch_embed(*args, backend="reference")
    assert torch.equal(reference, patch_embed_ref(*args))
    assert out.dtype == weight.dtype and out.is_contiguous()
    expected, P = truth(*args), prefix.shape[0]
    assert torch.equal(out[:, :P], prefix.expand(out.shape[0], -1, -1))
    assert_within(out[:, P:], expected[:, P:], reference[:, P:])
    # The bound is of a maximum, here of positions with outliers: without them, the projection alone.
    args = image, weight, None, torch.zeros_like(pos), prefix, p, mean, std
    plain = ops.patch_embed(*args, backend="triton")[:, P:]
    assert_within(plain, truth(*args)[:, P:], patch_embed_ref(*args)[:, P:])
    return out


@pytest.mark.parametrize("image_dtype", IMAGE_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [14, 16])
def test_dtypes(p, dtype, image_dtype, device, guarded):
    image = make_image(2, 2 * p, 3 * p, image_dtype, device)
    w = make_weights(48, p, 6, 4, dtype, device)
    check(image, *w.values(), p, **conditioner(device))
    check(image, *(w | {"bias": None}).values(), p)


@pytest.mark.parametrize("p", [14, 16])
@pytest.mark.parametrize(("B", "rows", "columns", "P", "D"), [(1, 1, 1, 1, 113), (1, 7, 11, 10, 32), (3, 1, 29, 8, 80)])
def test_shapes(B, rows, columns, P, D, p, device, guarded):
    """Tiles that end inside an image, hold several, and more prefix rows than one tile."""
    image = make_image(B, rows * p, columns * p, torch.uint8, device)
    w = make_weights(D, p, rows * columns, P, torch.float16, device)
    check(image, *w.values(), p, **conditioner(device))


def test_many_prefix_rows(device, guarded):
    """B·P over one tile; and none at all."""
    image = make_image(9, 14, 14, torch.uint8, device)
    w = make_weights(16, 14, 1, 9, torch.float16, device)
    check(image, *w.values(), 14)
    check(image, *(w | {"prefix": w["prefix"][:0]}).values(), 14)


def test_large_tile(device, guarded):
    """The tile for more than 1024 patches, whose last one is partly filled."""
    image = make_image(1, 14 * 5, 14 * 206, torch.uint8, device)
    w = make_weights(16, 14, 5 * 206, 3, torch.float16, device)
    check(image, *w.values(), 14, **conditioner(device))


@pytest.mark.parametrize("image_dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("p", [14, 16])
def test_strides(p, image_dtype, device, guarded):
    image = make_image(2, 2 * p, 3 * p, image_dtype, device)
    w = make_weights(32, p, 6, 2, torch.float16, device)
    rest = (*w.values(), p, *conditioner(device).values())
    expected = ops.patch_embed(image, *rest, backend="triton")
    padded = torch.full((2, 3, 2 * p + 2, 3 * p + 5), 77, dtype=image_dtype, device=device)
    padded[:, :, 1:-1, 3:-2] = image
    wide = torch.full((2, 3, 2 * p, 6 * p), 77, dtype=image_dtype, device=device)
    wide[..., ::2] = image
    for same in (
        image.contiguous(memory_format=torch.channels_last),
        padded[:, :, 1:-1, 3:-2],
        wide[..., ::2],
        image.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        assert torch.equal(ops.patch_embed(same, *rest, backend="triton"), expected)
    assert torch.equal(ops.patch_embed(image[:1].expand(2, -1, -1, -1), *rest, backend="triton")[1], expected[0])
    for name in ("weight", "pos", "prefix"):
        strided = w | {name: w[name].t().contiguous().t()}
        assert torch.equal(ops.patch_embed(image, *strided.values(), *rest[4:], backend="triton"), expected)


@pytest.mark.parametrize("p", [7, 20, 32])  # rows that no step divides, a padded and a wide one
def test_other_patch_sizes(p, device, guarded):
    check(make_image(1, p, 2 * p, torch.uint8, device), *make_weights(16, p, 2, 1, torch.float16, device).values(), p)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounds_the_normalised_image_once(dtype, device, guarded):
    """A weight that picks one pixel shows its value: rounded to the model's dtype as in the reference."""
    image = torch.arange(256, dtype=torch.uint8, device=device).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    weight = torch.eye(3 * 256, dtype=dtype, device=device)
    zeros = torch.zeros(1, 768, dtype=dtype, device=device)
    for stats in ({}, conditioner(device)):
        args = (image, weight, None, zeros, zeros[:0], 16)
        out, reference = (ops.patch_embed(*args, **stats, backend=b) for b in ("triton", "reference"))
        assert torch.equal(out, reference)


def packed_args(sizes, image_dtype, dtype, p, P, D, device, unused: int = 2):
    """Patches of images of `sizes`, positions in an order of their own with `unused` rows in front."""
    generator = torch.Generator().manual_seed(len(sizes))
    M = sum(sizes)
    patches = make_image(M, p, p, image_dtype, device)
    w = make_weights(D, p, M + unused, P, dtype, device)
    starts = torch.tensor([0, *sizes]).cumsum(0) + P * torch.arange(len(sizes) + 1)
    places = torch.cat([start + P + torch.arange(T) for start, T in zip(starts, sizes, strict=False)])
    rows = torch.stack([unused + torch.randperm(M, generator=generator), places])
    return patches, w, rows.to(device, torch.int32), starts.to(device, torch.int32)


def check_packed(patches, w, rows, starts, p: int, **stats) -> None:
    """Each image as the plain form has it, which is held against float64 above."""
    args = (patches, *w.values(), p, stats.get("mean"), stats.get("std"), rows, starts)
    out = ops.patch_embed(*args, backend="triton")
    reference = ops.patch_embed(*args, backend="reference")
    P = w["prefix"].shape[0]
    assert out.dtype == w["weight"].dtype and out.is_contiguous()
    assert out.shape == reference.shape == (patches.shape[0] + P * (len(starts) - 1), w["weight"].shape[0])
    done = 0
    for start, end in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        assert torch.equal(out[start : start + P], w["prefix"]) and torch.equal(
            reference[start : start + P], w["prefix"]
        )
        number = end - start - P
        own = patches[done : done + number]
        pos = w["pos"][rows[0, done : done + number].long()]
        alone = [
            truth(patch[None], w["weight"], w["bias"], place[None], w["prefix"], p, **stats)[0, P]
            for patch, place in zip(own, pos, strict=True)
        ]
        if number:
            assert_within(out[start + P : end], torch.stack(alone), reference[start + P : end])
        done += number


@pytest.mark.parametrize("image_dtype", IMAGE_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [14, 16])
def test_packed(p, dtype, image_dtype, device, guarded):
    patches, w, rows, starts = packed_args([3, 1, 5], image_dtype, dtype, p, 4, 48, device)
    check_packed(patches, w, rows, starts, p, **conditioner(device))
    # Without positions' outliers, as in `check`.
    check_packed(patches, w | {"bias": None, "pos": torch.zeros_like(w["pos"])}, rows, starts, p)


@pytest.mark.parametrize(
    ("sizes", "P", "D"), [([1], 1, 113), ([77, 1, 60, 2], 10, 16), ([1] * 9, 9, 16), ([5, 6], 0, 32)]
)
def test_packed_shapes(sizes, P, D, device, guarded):
    """Tiles that hold several images and end inside one, more prefix rows than one tile, none at all."""
    patches, w, rows, starts = packed_args(sizes, torch.uint8, torch.float16, 14, P, D, device)
    check_packed(patches, w, rows, starts, 14, **conditioner(device))


def test_packed_strides(device, guarded):
    patches, w, rows, starts = packed_args([3, 1, 5], torch.uint8, torch.float16, 16, 2, 32, device)
    expected = ops.patch_embed(patches, *w.values(), 16, None, None, rows, starts, backend="triton")
    nhwc = patches.contiguous(memory_format=torch.channels_last)
    wide = torch.stack([rows, rows], 2).flatten(1)[:, ::2]
    spaced = torch.stack([starts, starts], 1).flatten()[::2]
    assert torch.equal(ops.patch_embed(nhwc, *w.values(), 16, None, None, wide, spaced, backend="triton"), expected)


def test_packed_large_tile(device, guarded):
    """The tile for more than 1024 patches; every image of one size is what the plain form makes of it."""
    patches, w, rows, starts = packed_args([515, 515], torch.uint8, torch.float16, 14, 3, 16, device)
    rows[0] = torch.arange(515).repeat(2)
    out = ops.patch_embed(patches, *w.values(), 14, None, None, rows, starts, backend="triton")
    image = patches.view(2, 515, 3, 14, 14).permute(0, 2, 3, 1, 4).reshape(2, 3, 14, 515 * 14)
    plain = ops.patch_embed(image, *(w | {"pos": w["pos"][:515]}).values(), 14, backend="triton")
    assert torch.equal(out.view_as(plain), plain)


def test_operator(device):
    image = make_image(1, 14, 28, torch.uint8, device)
    w = make_weights(16, 14, 2, 2, torch.float16, device)
    stats = conditioner(device).values()
    nhwc = image.contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(torch.ops.radio_fast.patch_embed.default, (image, *w.values(), 14, *stats))
    torch.library.opcheck(
        torch.ops.radio_fast.patch_embed.default, (nhwc, *(w | {"bias": None}).values(), 14, None, None)
    )
    patches, w, rows, starts = packed_args([2, 1], torch.uint8, torch.float16, 14, 2, 16, device)
    torch.library.opcheck(torch.ops.radio_fast.patch_embed.default, (patches, *w.values(), 14, *stats, rows, starts))


def test_limits(device):
    image = make_image(1, 14, 28, torch.uint8, device)
    w = make_weights(16, 14, 2, 2, torch.float32, device)
    stats = conditioner(device)

    def refuses(text: str, image: Tensor = image, p: int = 14, mean=None, std=None, **changed) -> None:
        with pytest.raises(ValueError, match=f"the triton backend of patch_embed can't run here: .*{text}"):
            ops.patch_embed(image, *(w | changed).values(), p, mean, std, backend="triton")

    refuses(r"H and W multiples of 14, got \(1, 3, 14, 27\)", image[..., 1:])
    refuses(r"must have shape \(B, 3, H, W\).* got \(1, 2, 14, 28\)", image[:, 1:])
    refuses("image must be uint8, float16, bfloat16 or float32, got torch.int16", image.short())
    refuses("image is on meta, the weights on", image.to("meta"))
    refuses(r"weight must have shape \(D, 588\), got \(16, 587\)", weight=w["weight"][:, 1:])
    refuses(r"pos and prefix must have shapes \(2, 16\) and \(P, 16\), got \(1, 16\)", pos=w["pos"][:1])
    refuses(r"pos and prefix must have .* \(2, 15\)", prefix=w["prefix"][:, 1:])
    refuses(r"bias must have shape \(16,\), got \(15,\)", bias=w["bias"][1:])
    refuses("bias is torch.float16, expected torch.float32", bias=w["bias"].half())
    refuses("dtype must be float16, bfloat16 or float32, got torch.float64", weight=w["weight"].double())
    refuses("mean must hold 3 float32 values, got torch.float64", mean=stats["mean"].double(), std=stats["std"])
    refuses(r"std must hold 3 float32 values, got torch.float32 \(2, 1, 1\)", mean=stats["mean"], std=stats["std"][1:])
    refuses("mean and std go together", mean=stats["mean"])
    refuses("no backward", weight=w["weight"].clone().requires_grad_())


def test_packed_limits(device):
    patches, w, rows, starts = packed_args([2, 1], torch.uint8, torch.float32, 14, 2, 16, device)

    def refuses(text: str, patches: Tensor = patches, rows: Tensor = rows, starts: Tensor = starts, **changed) -> None:
        with pytest.raises(ValueError, match=f"the triton backend of patch_embed can't run here: .*{text}"):
            ops.patch_embed(patches, *(w | changed).values(), 14, None, None, rows, starts, backend="triton")

    refuses("rows and starts go together", rows=None)
    refuses("rows and starts go together", starts=None)
    refuses(r"patches must have shape \(T, 3, 14, 14\), got \(3, 3, 14, 28\)", patches.repeat(1, 1, 1, 2))
    refuses(r"rows must be int32 of shape \(2, 3\) on .*, got torch.int64 \(2, 3\)", rows=rows.long())
    refuses(r"rows must be int32 of shape \(2, 3\) on .*, got torch.int32 \(2, 2\)", rows=rows[:, 1:])
    refuses(r"rows must be int32 of shape .* on meta", rows=rows.to("meta"))
    refuses(r"starts must be int32 of shape \(3,\) on .*, got torch.int64 \(3,\)", starts=starts.long())
    refuses(r"starts must be .*, got torch.int32 \(3, 1\)", starts=starts[:, None])
    refuses(r"starts must be of shape \(images \+ 1,\), got \(0,\)", starts=starts[:0])
    refuses(r"pos and prefix must have shapes \(5, 16\) and \(P, 16\), got \(5, 15\)", pos=w["pos"][:, 1:])
