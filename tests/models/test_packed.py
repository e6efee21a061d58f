"""Images of several sizes in one call: each gets what it gets alone."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from itertools import groupby

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import radio_fast
from radio_fast import ops
from radio_fast.layers.packing import MAX_TOKENS, pack
from radio_fast.models.normalizers import FeatureNormalizer
from radio_fast.ops import _dispatch
from radio_fast.ops._dispatch import OPS, Op
from tests.conftest import golden_calls, golden_source
from tests.numerics import assert_relative, assert_tokens

GRIDS = [(3, 5), (1, 1), (2, 2), (2, 2), (5, 3), (1, 4), (3, 5)]  # in steps; neighbours of one size, and others
LOADS = sorted(
    {(call.values[0], json.dumps(call.values[2].get("load", {}), sort_keys=True)) for call in golden_calls()}
)

pytestmark = pytest.mark.filterwarnings("ignore:attention windows")


def load(case: str = "vit_h16", **options) -> radio_fast.RADIOModel:
    return radio_fast.load(golden_source(case), **options)


def make_images(model: radio_fast.RADIOModel, grids=GRIDS, seed: int = 0, dtype=torch.float32) -> list[Tensor]:
    """Images of `grids` steps, in random order; of its only size for a model that has one."""
    step, side = model.min_resolution_step, model.model.only_size
    if side:
        grids = [(side // step, side // step)] * 3
    elif model.blocks is None:  # E-RADIO, whose windows make small images large
        grids = [(1, 2), (1, 1), (1, 2)]
    else:
        grids = random.Random(seed).sample(grids, len(grids))
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randint(0, 256, (3, h * step, w * step), generator=generator, dtype=torch.uint8) for h, w in grids]
    return images if dtype == torch.uint8 else [(image.float() / 255).to(dtype) for image in images]


def cut(image: Tensor, p: int) -> Tensor:
    """Patches (T, 3·p·p), one by one."""
    rows, columns = image.shape[1] // p, image.shape[2] // p
    return torch.stack(
        [image[:, y * p : y * p + p, x * p : x * p + p].flatten() for y in range(rows) for x in range(columns)]
    )


def named(outputs) -> dict:
    return outputs if isinstance(outputs, dict) else {"backbone": outputs}


def pairs(packed, model, images: list[Tensor], **options):
    """(name, packed, alone) of every summary and of every image's features."""
    for i, image in enumerate(images):
        alone = named(model(image.unsqueeze(0), **options))
        assert list(alone) == list(named(packed))
        for name, out in named(packed).items():
            assert type(out) is radio_fast.PackedOutput and len(out.features) == len(images)
            assert type(out.features) is tuple and len(out.summary) == len(images)
            yield f"{name} summary", out.summary[i], alone[name].summary[0]
            yield f"{name} features", out.features[i], alone[name].features[0]


def assert_alone(packed, model, images: list[Tensor], **options) -> None:
    for _, ours, theirs in pairs(packed, model, images, **options):
        assert ours.dtype == theirs.dtype
        assert_relative(ours, theirs)


@pytest.mark.parametrize(("case", "options"), LOADS, ids=[f"{case}-{options}" for case, options in LOADS])
def test_each_image_as_alone(case, options):
    model = load(case, **json.loads(options))
    images = make_images(model)
    for fmt in radio_fast.model.FEATURE_FORMATS:
        packed = model.forward_packed(images, feature_fmt=fmt)
        assert_alone(packed, model, images, feature_fmt=fmt)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("case", "options"),
    [("vit_h16", {"adaptor_names": ["clip", "sam"]}), ("vit_b16_vitdet", {"vitdet_window_size": 2}),
     ("vit_b16_attn_head", {}), ("vit_h16_bf16", {}), ("eradio_small", {"window_size": "optimal"})],
    ids=["adaptors", "vitdet", "attention head", "bfloat16", "eradio"],
)  # fmt: skip
def test_half_precision(case, options, dtype):
    truth, model = load(case, dtype="float32", **options), load(case, dtype=dtype, **options)
    images = make_images(model)
    S = len(model.model.summary_tokens)
    for name, ours, theirs in pairs(model.forward_packed(images), truth, images):
        if name == "backbone summary":
            ours, theirs = ours.view(S, -1), theirs.view(S, -1)
        assert_tokens(ours, theirs)


@pytest.mark.parametrize(
    ("case", "options", "grids", "fuse_norm"),
    [("vit_h16", {}, [(3, 5), (1, 1)], False), ("vit_b16_vitdet", {"vitdet_window_size": 2}, [(2, 1), (1, 1)], True)],
    ids=["vit", "vitdet, fused"],
)  # fmt: skip
def test_kernels(case, options, grids, fuse_norm, device, poison):
    """Every op's Triton kernel."""
    pytest.importorskip("triton")
    model = load(case, backend="triton", device=device, **options)
    model.model.set_backend("triton", fuse_norm=fuse_norm)
    truth = load(case, backend="reference", **options)
    images = make_images(model, grids)
    for _, ours, theirs in pairs(model.forward_packed([x.to(device) for x in images]), truth, images):
        assert_relative(ours.cpu(), theirs)


@pytest.mark.parametrize("case", ["vit_h16", "dinov2_g14", "vit_b16_vitdet", "eradio_small"])
def test_patches_and_grids(case):
    """The two forms are equal, whatever the grids come in."""
    model = load(case, **({"vitdet_window_size": 2} if case == "vit_b16_vitdet" else {}))
    p = model.patch_size
    images = make_images(model)
    patches = torch.cat([cut(image, p) for image in images])
    grids = [(image.shape[1] // p, image.shape[2] // p) for image in images]
    expected = tree_leaves(model.forward_packed(images))
    for form in (grids, torch.tensor(grids), torch.tensor(grids, dtype=torch.int32).numpy(), [*map(list, grids)]):
        for ours, theirs in zip(tree_leaves(model.forward_packed(patches, form)), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", ["vit_h16", "eradio_small"])
def test_uint8(case):
    model = load(case)
    images, pixels = make_images(model), make_images(model, dtype=torch.uint8)
    expected = tree_leaves(model.forward_packed(images))
    p = model.patch_size
    patches = torch.cat([cut(image, p) for image in pixels])
    grids = [(image.shape[1] // p, image.shape[2] // p) for image in pixels]
    mixed = [pixels[i] if i % 2 else image for i, image in enumerate(images)]
    mixed[0] = mixed[0].double()
    for outputs in (model.forward_packed(pixels), model.forward_packed(patches, grids), model.forward_packed(mixed)):
        for ours, theirs in zip(tree_leaves(outputs), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", ["vit_h16", "vit_b16_vitdet"])
def test_any_strides(case):
    model = load(case)
    images = make_images(model)
    expected = tree_leaves(model.forward_packed(images))
    strided = [x.permute(1, 2, 0).contiguous().permute(2, 0, 1) for x in images]
    strided[0] = torch.cat([images[0], images[0]], dim=2)[:, :, : images[0].shape[2]]
    for ours, theirs in zip(tree_leaves(model.forward_packed(strided)), expected, strict=True):
        assert torch.equal(ours, theirs)


# -- what runs ---------------------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Counts what waits for a GPU: a tensor's values in Python."""

    transparent = True

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **kwargs or {})


@pytest.fixture
def waits(monkeypatch):
    counter = Waits()

    def counted(real):
        def method(*args, **kwargs):
            counter.count += 1
            return real(*args, **kwargs)

        return method

    for name in ("tolist", "numpy", "cpu"):  # a CPU tensor's call no operator
        monkeypatch.setattr(Tensor, name, counted(getattr(Tensor, name)))
    with torch.no_grad(), counter:
        yield counter


@pytest.fixture
def calls(monkeypatch):
    """How often each op is called."""
    seen = Counter()
    choose = Op.choose

    def count(op, backend, args, limits):
        seen[op.name] += 1
        if op.name == "attention" and args[2] is not None:
            lengths = [*args[5]]
            assert args[3] == max(lengths) and args[2].equal(torch.tensor([0, *lengths]).cumsum(0).int())
        return choose(op, backend, args, limits)

    monkeypatch.setattr(Op, "choose", count)
    return seen


@pytest.mark.parametrize(
    ("case", "options"),
    [("vit_h16", {"adaptor_names": ["clip", "sam"]}), ("vit_b16_vitdet", {"vitdet_window_size": 2}),
     ("vit_b16_attn_head", {"adaptor_names": ["dino_v2", "clip"]})],
    ids=["adaptors", "vitdet", "attention head"],
)  # fmt: skip
def test_as_many_calls_for_many_images_as_for_one(case, options, calls, waits, without_amx):
    model = load(case, **options)
    images = make_images(model)
    waits.count = 0
    model.forward_packed(images[:1])
    assert calls["pos_embed"] == 1 and calls["patch_embed"] == 1
    assert calls["attention"] >= len(model.blocks)
    one = calls - Counter(pos_embed=1)
    calls.clear()
    model.forward_packed(images)
    assert calls == one | Counter(pos_embed=1), "one launch for the positions of all new sizes"
    calls.clear()
    model.forward_packed(sorted(images * 2, key=Tensor.numel))  # the longest comes last
    assert calls == one
    assert waits.count == 0


def test_grids_on_the_gpu_are_read_at_once(waits):
    """One tensor of all sizes is one wait, not one for each image."""
    model = load()
    grids, patches = torch.tensor([[2, 2], [1, 3]]), torch.rand(7, 768)
    waits.count = 0
    model.forward_packed(patches, grids)
    assert waits.count == 1


def test_eradio_runs_once_for_each_size(monkeypatch):
    model = load("eradio_small")
    images = make_images(model)
    batches = []
    model.model.register_forward_pre_hook(lambda module, args: batches.append(tuple(args[0].shape)))
    model.forward_packed(images)
    assert sum(batch[0] for batch in batches) == len(images)
    assert len(batches) == len({tuple(image.shape) for image in images})


def test_graphs_are_left_alone():
    model = load()
    images = make_images(model)
    for _ in range(3):
        model.forward_packed(images)
    assert model.graphs is None or len(model.graphs) == 0


def test_positions_are_kept_one_by_one():
    """A size that a packed call has brought in serves a plain call, and takes no more memory than its own."""
    model = load()
    cache = model.model.patch_generator._pos_cache
    images = make_images(model, [(2, 3), (3, 2), (2, 3)])
    model.forward_packed(images)
    D = model.embed_dim
    assert len(cache.entries) == 2 and cache.bytes == 2 * 6 * D * 4
    for _, pos in cache.entries.values():
        assert pos.untyped_storage().nbytes() == 6 * D * 4
    model(images[0].unsqueeze(0))
    assert len(cache.entries) == 2


# -- around the model --------------------------------------------------------------------------------------------


class Recolour(nn.Module):
    """A conditioner that looks at a whole image."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 4 and x.is_floating_point()
        return x - x.mean(dim=(1, 2, 3), keepdim=True)


@pytest.mark.parametrize("case", ["vit_h16", "eradio_small"])
def test_conditioners(case):
    model = load(case)
    images = make_images(model)
    before = tree_leaves(model.forward_packed(images))
    conditioner = model.make_preprocessor_external()
    outside = tree_leaves(model.forward_packed([conditioner(image) for image in images]))
    for ours, theirs in zip(outside, before, strict=True):
        assert_relative(ours, theirs)
    model.input_conditioner = Recolour()
    assert_alone(model.forward_packed(images), model, images)
    p = model.patch_size
    pixels = make_images(model, dtype=torch.uint8)
    grids = [(image.shape[1] // p, image.shape[2] // p) for image in pixels]
    assert_alone(model.forward_packed(torch.cat([cut(x, p) for x in pixels]), grids), model, images)


@pytest.mark.parametrize("options", [{}, {"vitdet_window_size": 2}], ids=["", "vitdet"])
def test_gradients(options):
    model = load("vit_b16_vitdet", backend="reference", **options).requires_grad_()
    model.zero_grad()
    images = [x.requires_grad_() for x in make_images(model)]
    packed = model.forward_packed(images)
    sum(leaf.square().sum() for leaf in tree_leaves(packed)).backward()
    ours = [images[0].grad, images[-1].grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    images = [x.detach().clone().requires_grad_() for x in images]
    model.zero_grad()
    for image in images:
        sum(leaf.square().sum() for leaf in model(image.unsqueeze(0))).backward()
    theirs = [images[0].grad, images[-1].grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    assert len(ours) > 20
    for a, b in zip(ours, theirs, strict=True):
        assert_relative(a, b, 1e-4)  # of sums over all images, in another order


def test_inference_mode():
    model = load(adaptor_names=["clip", "sam"])
    images = make_images(model)
    expected = tree_leaves(model.forward_packed(images))
    model = load(adaptor_names=["clip", "sam"])
    with torch.inference_mode():
        ours = tree_leaves(model.forward_packed(images))
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)
    images[0].requires_grad_()
    tree_leaves(model.forward_packed(images))[0].sum().backward()  # positions made in inference mode would refuse


@pytest.mark.parametrize(
    ("case", "options", "dtype"),
    [("vit_h16", {}, torch.float16), ("vit_b16_vitdet", {"vitdet_window_size": 1}, torch.bfloat16)],
    ids=["vit", "vitdet"],
)
def test_autocast(case, options, dtype, monkeypatch, nearest_bfloat16):
    """Kernels in autocast's dtype, results in the dtype that an image alone has."""
    pytest.importorskip("triton")
    monkeypatch.setattr(_dispatch, "accelerated", lambda device: True)
    monkeypatch.setenv("RADIO_FAST_TUNE", "0")
    for op in OPS.values():
        monkeypatch.setattr(op, "_rankings", {})
    model = load(case, **options)
    truth = load(case, backend="reference", **options)
    images = make_images(model, [(2, 1), (1, 1)])
    with torch.no_grad():
        with torch.autocast("cpu", dtype):
            packed = model.forward_packed(images)
            assert packed.features[0].dtype == model(images[0].unsqueeze(0)).features.dtype
        for _, ours, theirs in pairs(packed, truth, images):
            assert_tokens(ours, theirs)


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x)


def test_hooks_see_each_image_alone():
    """As in a plain call: neighbours of one size together."""
    model = load()
    images = make_images(model)
    expected = tree_leaves(model.forward_packed(images))
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append((module, *out.shape)))
    for ours, theirs in zip(tree_leaves(model.forward_packed(images)), expected, strict=True):
        assert_relative(ours, theirs)
    P, D = model.num_summary_tokens, model.embed_dim
    runs = [(T, len([*same])) for T, same in groupby(image.shape[1] * image.shape[2] // 256 for image in images)]
    assert seen == [(block, count, T + P, D) for block in model.blocks for T, count in runs]
    model.blocks[1].register_forward_hook(lambda module, args, out: 0.5 * out)
    assert_alone(model.forward_packed(images), model, images)


def blended(x: Tensor) -> Tensor:
    """Something that mixes an image's tokens."""
    return 0.5 * x + x.mean(dim=1, keepdim=True)


def patch(module: nn.Module) -> None:
    forward = type(module).forward
    module.forward = lambda x: blended(forward(module, x))  # of one argument, which does for a plain call


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, out: blended(out))


def hook_before(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, args: (blended(args[0]), *args[1:]))


class Blended(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return blended(x)


@pytest.mark.parametrize(
    ("place", "touch"),
    [("block", patch), ("norm", patch), ("normalizer", patch), ("mlp head", patch), ("attention head", patch),
     ("its mlp", patch), ("its block", patch), ("block", hook), ("norm", hook_before), ("mlp head", hook),
     ("attention head", hook_before)],
)  # fmt: skip
def test_what_mixes_tokens_mixes_no_images(place, touch):
    attention = place in ("attention head", "its mlp", "its block")
    if attention:
        model = copy.deepcopy(load("vit_b16_attn_head", adaptor_names=["dino_v2", "clip"]))
        head = next(m for m in model.adaptors.values() if hasattr(m.feat_mlp, "blocks") and hasattr(m.feat_mlp, "mlp"))
    else:
        model = copy.deepcopy(load(adaptor_names=["clip", "sam"]))
        head = model.adaptors["sam"]
    if place == "normalizer":
        model.feature_normalizer = FeatureNormalizer(model.embed_dim)
    images = make_images(model)
    before = tree_leaves(model.forward_packed(images))
    touch({
        "block": lambda: model.blocks[1], "norm": lambda: model.model.norm,
        "normalizer": lambda: model.feature_normalizer, "mlp head": lambda: head.feat_mlp,
        "attention head": lambda: head.feat_mlp, "its mlp": lambda: head.feat_mlp.mlp,
        "its block": lambda: head.feat_mlp.blocks[0],
    }[place]())  # fmt: skip
    after = model.forward_packed(images)
    assert any((ours - theirs).abs().max() > 1e-3 for ours, theirs in zip(tree_leaves(after), before, strict=True))
    assert_alone(after, model, images)


def test_modules_in_the_place_of_others():
    model = copy.deepcopy(load())
    model.model.norm = Blended()
    model.feature_normalizer = Blended()
    images = make_images(model)
    assert_alone(model.forward_packed(images), model, images)


def test_wrapped_modules_get_each_image_alone():
    """A wrapper takes what it takes of a plain call, and may mix all the tokens it is given."""
    model = load("vit_b16_attn_head", adaptor_names=["dino_v2", "clip"])
    images = make_images(model)
    expected = tree_leaves(model.forward_packed(images))
    model = copy.deepcopy(model)
    head = next(m for m in model.adaptors.values() if hasattr(m.feat_mlp, "blocks") and m.feat_mlp.blocks)
    wrappers = [Wrapper(model.blocks[1]), Wrapper(head.feat_mlp)]
    model.blocks[1], head.feat_mlp = wrappers
    for ours, theirs in zip(tree_leaves(model.forward_packed(images)), expected, strict=True):
        assert_relative(ours, theirs)
    assert all(wrapper.calls > 1 for wrapper in wrappers)


def test_pytree():
    outputs = load().forward_packed([torch.rand(3, 32, 16), torch.rand(3, 16, 16)])
    assert [tuple(leaf.shape[:1]) for leaf in tree_leaves(outputs)] == [(2,), (2,), (1,)]


# -- bad input ---------------------------------------------------------------------------------------------------

X = torch.rand(3, 32, 32)
PATCHES = torch.rand(6, 768)
BAD = {
    "tensor": ((torch.rand(2, 3, 32, 32),), r"images must be a list of \(3, H, W\) tensors, got Tensor"),
    "generator": ((iter([X]),), "images must be a list"),
    "empty": (([],), "one image or more, got none"),
    "rank": (([X, X[None]],), r"images\[1\] must be a tensor of shape \(3, H, W\), got shape \(1, 3, 32, 32\)"),
    "channels": (([X[:2]],), r"images\[0\] must be a tensor of shape \(3, H, W\), got shape \(2, 32, 32\)"),
    "no tensor": (([X, X.numpy()],), r"images\[1\] must be a tensor of shape \(3, H, W\), got ndarray"),
    "dtype": (([X, X, X.int()],), r"images\[2\] must be uint8 or float in \[0, 1\], got torch.int32"),
    "bool": (([X > 0],), r"images\[0\] must be uint8 or float"),
    "complex": (([X.to(torch.complex64)],), r"images\[0\] must be uint8 or float"),
    "device": (([X, X.to("meta")],), r"images\[1\] is on meta and the model on cpu"),
    "sparse": (([X, X.to_sparse()],), r"images\[1\] must be dense, got torch.sparse_coo"),
    "sparse patches": ((PATCHES.to_sparse(), [(2, 3)]), "images must be dense"),
    "size": (([X, X[:, :, :23]],), r"images\[1\]: image height and width must be multiples of 16 .*got 32 × 23; "
             "the nearest supported size is 32 × 16"),
    "no pixels": (([X, X[:, :0]],), r"images\[1\]: .*got 0 × 32; the nearest supported size is 16 × 32"),
    "format": (([X], None, "NHWC"), "feature_fmt must be one of 'NLC', 'NCHW', got 'NHWC'"),
    "list and grids": (([X], [(2, 2)]), r"images must be patches of shape \(T, 768\), got list"),
    "images and grids": ((X[None], [(2, 2)]), r"must be patches of shape \(T, 768\), got shape \(1, 3, 32, 32\)"),
    "patch size": ((PATCHES[:, 1:], [(2, 3)]), r"\(T, 768\), got shape \(6, 767\)"),
    "patches' dtype": ((PATCHES.long(), [(2, 3)]), "images must be uint8 or float"),
    "patches' device": ((PATCHES.to("meta"), [(2, 3)]), "images is on meta and the model on cpu"),
    "too few": ((PATCHES, [(2, 2)]), "image_grid_hw has 4 patches .*images has 6"),
    "too many": ((PATCHES, [(2, 3), (1, 1)]), "image_grid_hw has 7 patches"),
    "huge": ((PATCHES, [(2**40, 2**40)]), f"image_grid_hw has {2**80} patches"),
    "no grid": ((PATCHES, []), "one image or more"),
    "none of all": ((PATCHES[:0], []), "one image or more"),
    "zero": ((PATCHES, [(2, 3), (0, 5)]), "one row and column of patches or more"),
    "negative": ((PATCHES, [(-2, -3)]), "one row and column of patches or more"),
    "float": ((PATCHES, [(2.0, 3.0)]), r"image_grid_hw must be \(B, 2\), whole numbers"),
    "float tensor": ((PATCHES, torch.tensor([[2.0, 3.0]])), r"image_grid_hw must be \(B, 2\)"),
    "one pair": ((PATCHES, torch.tensor([2, 3])), r"image_grid_hw must be \(B, 2\)"),
    "one number": ((PATCHES, 6), r"image_grid_hw must be \(B, 2\)"),
    "rank 0": ((PATCHES, torch.tensor(6)), r"image_grid_hw must be \(B, 2\)"),
    "three": ((PATCHES, torch.tensor([[2, 3, 1]])), r"image_grid_hw must be \(B, 2\)"),
    "text": ((PATCHES, ["ab"]), r"image_grid_hw must be \(B, 2\)"),
}  # fmt: skip


@pytest.fixture(scope="module")
def vit():
    return load()


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, vit):
    args, text = BAD[name]
    with pytest.raises(ValueError, match=text):
        vit.forward_packed(*args)


def test_sizes_of_other_models():
    vitdet = load("vit_b16_vitdet", vitdet_window_size=4)
    with pytest.raises(ValueError, match=r"images\[1\]: .*multiples of 64 .*the nearest supported size is 64 × 64"):
        vitdet.forward_packed([torch.rand(3, 64, 64), torch.rand(3, 64, 80)])
    with pytest.raises(ValueError, match=r"images\[0\]: .*multiples of 64 .*got 32 × 64"):
        vitdet.forward_packed(torch.rand(8, 768), [(2, 4)])
    eradio = load("eradio_small")
    with pytest.raises(ValueError, match=r"images\[1\]: .*multiples of 32 .*got 48 × 64"):
        eradio.forward_packed([torch.rand(3, 64, 64), torch.rand(3, 48, 64)])
    with pytest.raises(ValueError, match="one image or more"):
        eradio.forward_packed([])


def test_fixed_size(vit):
    model = copy.deepcopy(vit)
    model.model.only_size = 32
    model.forward_packed([X, X])
    with pytest.raises(ValueError, match=r"images\[1\]: this model has no CPE and takes only 32 × 32 .*got 32 × 16"):
        model.forward_packed([X, X[:, :, :16]])


def test_rows_are_counted_in_32_bits():
    with pytest.raises(ValueError, match=f"at most {MAX_TOKENS} fit in one call"):
        pack(((1 << 16, 1 << 15),), 1, torch.device("cpu"))


# -- the packing -------------------------------------------------------------------------------------------------


def test_packing():
    packing = pack(((2, 1), (1, 1), (2, 1)), 3, torch.device("cpu"))
    assert packing.sizes == ((2, 1), (1, 1))
    assert packing.tokens.cu_seqlens.tolist() == [0, 5, 9, 14] and packing.tokens.lengths == (5, 4, 5)
    assert packing.patches.cu_seqlens.tolist() == [0, 2, 3, 5] and packing.patches.lengths == (2, 1, 2)
    assert packing.rows.tolist() == [[0, 1, 2, 0, 1], [3, 4, 8, 12, 13]]
    assert packing.prefix_rows.tolist() == [0, 1, 2, 5, 6, 7, 9, 10, 11]
    assert packing.window_rows is None
    parts = packing.tokens.cu_seqlens, packing.patches.cu_seqlens, packing.rows, packing.prefix_rows
    assert [part.storage_offset() % 4 for part in parts] == [0, 0, 0, 0], "aligned, as Triton compiles for"


def test_windows_of_a_packing():
    packing = pack(((2, 4), (2, 2)), 1, torch.device("cpu"), window_size=2)
    assert packing.window_rows.tolist() == [1, 2, 5, 6, 3, 4, 7, 8, 10, 11, 12, 13]
    x = torch.rand(1, 14, 3)
    assert torch.equal(packing.put_back(torch.zeros_like(x), packing.windows(x))[0, 1:9], x[0, 1:9])


def test_reference_attention_takes_lengths_or_reads_them(waits):
    qkv = torch.rand(9, 3 * 32)
    starts = torch.tensor([0, 2, 4, 4, 9], dtype=torch.int32)
    expected = ops.attention(qkv, 2, starts, backend="reference")
    assert waits.count == 1
    assert torch.equal(ops.attention(qkv, 2, starts, seqlens=(2, 2, 0, 5), backend="reference"), expected)
    assert waits.count == 1
    alone = torch.cat([ops.attention(part.unsqueeze(0), 2)[0] for part in qkv.split([2, 2, 5])])
    assert_relative(expected, alone)


def test_lengths_that_do_not_fit():
    qkv, starts = torch.rand(9, 3 * 32), torch.tensor([0, 4, 9], dtype=torch.int32)
    for lengths in ((4, 4), (4, 5, 0), (9,)):
        with pytest.raises(ValueError, match="seqlens must have the 2 packed images' tokens, 9 together"):
            ops.attention(qkv, 2, starts, seqlens=lengths)
    with pytest.raises(ValueError, match="seqlens go with cu_seqlens"):
        ops.attention(qkv.unsqueeze(0), 2, seqlens=(9,))
