"""CUDA graphs without a GPU: `tests/tape.py` stands in for torch.cuda.CUDAGraph."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn

import radio_fast
from radio_fast.graphs import GraphCache, resolve_graphs
from radio_fast.graphs import cache as graphs_cache
from tests.conftest import golden_source
from tests.tape import Subclass, Tape, assert_same, eager, image, load, replays, warm

pytestmark = [
    pytest.mark.filterwarnings("ignore:attention windows"),
    pytest.mark.usefixtures("without_amx"),  # the stand-in for graphs records PyTorch's operators
]

# -- replays -----------------------------------------------------------------------------------------------------------

CALLS = {
    "plain": ("vit_h16", {}, "__call__", {}),
    "map": ("vit_h16", {}, "__call__", {"feature_fmt": "NCHW"}),
    "adaptors": ("vit_h16", {"adaptor_names": ["clip", "sam"]}, "__call__", {"feature_fmt": "NCHW"}),
    "bfloat16": ("vit_h16", {"dtype": "bfloat16"}, "__call__", {}),
    "windows": ("vit_b16_vitdet", {"vitdet_window_size": 2}, "__call__", {}),
    "normalizer": ("vit_h16_norm", {}, "forward_intermediates", {"indices": [-1, 0], "aggregation": "dense"}),
    "prefix": ("vit_h16", {}, "forward_intermediates", {"return_prefix_tokens": True, "norm": True, "indices": 2}),
    "only": ("vit_h16", {}, "forward_intermediates", {"intermediates_only": True, "output_fmt": "NLC"}),
    "E-RADIO": ("eradio_small", {}, "__call__", {}),
    "optimal": ("eradio_small", {"window_size": "optimal"}, "__call__", {"feature_fmt": "NCHW"}),
}


@pytest.mark.parametrize(("case", "options", "method", "arguments"), CALLS.values(), ids=CALLS)
def test_replays_give_what_eager_gives(case, options, method, arguments):
    model = load(case, **options)
    for seed in range(4):
        x = image(seed, batch=2)
        assert_same(getattr(model, method)(x, **arguments), eager(model, x, method, **arguments))
    assert model.graphs.capture.log == ["made", "capture", *["turn", "replay", "done"] * 3]
    assert (len(model.graphs), replays(model)) == (1, 2)
    assert f"1 of 16 graphs, {model.graphs.memory / 2**20:.1f} MiB" in repr(model.graphs)


def test_one_graph_per_shape_layout_and_argument():
    model = load()
    calls = [
        {}, {"feature_fmt": "NCHW"}, {"x": image(batch=2)}, {"x": image(rows=2)}, {"x": image().double()},
        {"x": image().contiguous(memory_format=torch.channels_last)},
    ]  # fmt: skip
    for _ in range(3):
        for options in calls:
            options = {"x": image(1)} | options
            assert_same(model(**options), eager(model, options.pop("x"), **options))
    assert (len(model.graphs), replays(model)) == (len(calls), len(calls))
    for indices in (1, [2], (-1,)):  # the same block
        model.forward_intermediates(image(), indices)
    assert len(model.graphs) == len(calls) + 1
    with pytest.raises(ValueError, match="indices must be an int"):
        model.forward_intermediates(image(), True)  # equal to 1, and hashed like it


def test_crops_of_larger_images():
    model = load()
    for seed in range(3):
        crop = image(seed, rows=6, columns=6)[..., 16:80, 16:48]
        assert_same(model(crop), eager(model, crop))
    assert replays(model) == 1
    wide = image()[:, :1].expand(-1, 3, -1, -1)  # one channel seen three times
    for _ in range(3):
        assert_same(model(wide), eager(model, wide))


def test_outputs_are_the_callers():
    model = load()
    images = [image(seed) for seed in range(5)]
    expected = [eager(model, x) for x in images]
    held = [model(x) for x in images]
    assert replays(model) == 3
    images[-1].zero_()
    held[-1].features.zero_()
    for ours, theirs in zip(held[:-1], expected, strict=False):
        assert_same(ours, theirs)
    assert_same(model(image(4)), expected[4])


def test_not_a_number_is_no_difference():
    model = load()
    x = image()
    x[0, 0, 0, 0] = torch.nan
    warm(model, x)
    assert model(x).features.isnan().all() and replays(model) == 1
    assert_same(model(image()), eager(model, image()))


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_contexts(first):
    model = load()
    with first():
        warm(model, image())
    with torch.inference_mode():
        outputs = model(image(1))
        assert outputs.features.is_inference()
    assert_same(outputs, eager(model, image(1)))
    outputs = model(image(1))
    assert not outputs.features.is_inference() and replays(model) == 2
    nn.Linear(160, 2)(outputs.features).sum().backward()  # they can be saved for a backward


def test_weights_made_in_inference_mode():
    model = load()
    patches = model.model.patch_generator
    with torch.inference_mode():
        patches.pos_embed = nn.Parameter(patches.pos_embed.clone(), requires_grad=False)  # has no version
        for seed in range(3):
            assert_same(model(image(seed)), eager(model, image(seed)))
        patches.pos_embed.add_(1)
        assert_same(model(image()), eager(model, image()))
    assert replays(model) == 2


def test_autocast():
    """Its cache holds casts of parameters that ask for gradients; a graph must neither read nor fill it."""
    model = load().requires_grad_()
    with torch.no_grad():
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                warm(model, image())
                assert_same(model(image(1)), eager(model, image(1)))
            model.model.blocks[0].attn.qkv.weight.mul_(2)
        assert_same(model(image(1)), eager(model, image(1)))
    assert replays(model) == 4


def test_the_copy_of_the_image_is_run_before_the_capture(monkeypatch):
    """Kernels are compiled for a layout and an alignment, which no capture could wait for."""
    model, seen = load(), []
    forward = type(model.model).forward

    def record(self, x, *args):
        seen.append((x.data_ptr(), x.stride(), torch._C._len_torch_dispatch_stack()))
        return forward(self, x, *args)

    monkeypatch.setattr(type(model.model), "forward", record)
    crop = image(rows=6)[..., :64, :]
    warm(model, crop)
    as_it_is, warmed, captured = seen[1:]
    assert as_it_is[0] == crop.data_ptr() != warmed[0]
    assert warmed[:2] == captured[:2] and (warmed[2], captured[2]) == (0, 2)


def test_deterministic_fill():
    """torch.empty then fills what it gives, which must not become part of the graph."""
    model = load()
    torch.use_deterministic_algorithms(True)
    try:
        for seed in range(3):
            assert_same(model(image(seed)), eager(model, image(seed)))
    finally:
        torch.use_deterministic_algorithms(False)
    assert replays(model) == 1


def test_what_caches_let_go_stays_alive():
    model = load()
    warm(model, image(rows=3))
    (graph,) = model.graphs._graphs.values()
    positions = model.model.patch_generator._pos_cache
    ((_, table),) = positions.entries.values()
    assert any(t.untyped_storage().data_ptr() == table.untyped_storage().data_ptr() for t in graph.kept)
    weights = {t.untyped_storage().data_ptr() for t in model.parameters()}
    assert not any(t.untyped_storage().data_ptr() in weights for t in graph.kept)
    assert sum(t.untyped_storage().nbytes() for t in graph.kept) < 2**20  # no activations


# -- bounds ------------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first():
    model = load(max_graphs=2)
    sizes = [image(rows=rows) for rows in (2, 3, 4)]
    for x in (sizes[0], sizes[0], sizes[1], sizes[1], sizes[0], sizes[2], sizes[2]):
        model(x)
    assert [key[2][2] for key in model.graphs._graphs] == [32, 64]
    assert model.graphs.capture.log.count("closed") == 1
    for x in sizes:
        assert_same(model(x), eager(model, x))


def test_memory_is_bounded(caplog):
    probe = load()
    warm(probe, image())
    size = probe.graphs.memory
    assert size == next(iter(probe.graphs._graphs.values())).capture.bytes + image().nbytes
    assert size > sum(t.nbytes for t in (image(), *probe(image())))
    model = load(max_bytes=2 * size)
    for rows in (2, 3, 4):
        model(image(rows=rows))
        model(image(rows=rows))
        assert 0 < model.graphs.memory <= 2 * size
    assert [key[2][2] for key in model.graphs._graphs] == [48, 64]
    model = load(max_bytes=size - 1)
    for seed in range(4):
        assert_same(model(image(seed)), eager(model, image(seed)))
    log = model.graphs.capture.log
    assert (len(model.graphs), model.graphs.memory, log.count("capture"), log.count("closed")) == (0, 0, 1, 1)
    assert "MiB, more than the" in caplog.text


def test_the_limit_is_the_devices_unless_told():
    tape = Tape.fresh()
    tape.capacity = 1
    model = load(capture=tape)
    for _ in range(3):
        model(image())
    assert len(model.graphs) == 0


def test_many_shapes_in_turn_are_not_captured_over_and_over():
    model = load(max_graphs=2)
    for _ in range(20):
        for rows in range(1, 7):
            model(image(rows=rows, columns=1))
    assert model.graphs.capture.log.count("capture") <= 12  # of 120 calls
    model.graphs.clear()
    warm(model, image())


def test_counts_are_bounded(monkeypatch):
    monkeypatch.setattr(graphs_cache, "MAX_COUNTED", 3)
    model = load()
    for rows in range(1, 6):
        model(image(rows=rows))
    assert len(model.graphs._calls) == 3


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flaw", "told"),
    [
        ("fails", "RuntimeError: operation not permitted when stream is capturing"),
        ("differs", "its replay differs from the call"),
    ],
)
def test_what_fails_is_told_once_and_not_tried_again(flaw, told, caplog):
    model = load()
    model.graphs.capture.flaw = flaw
    for seed in range(5):
        assert_same(model(image(seed)), eager(model, image(seed)))
    assert model.graphs.capture.log.count("capture") == 1 and model.graphs.capture.log[-1] == "closed"
    assert [record.getMessage() for record in caplog.records] == [
        f"no CUDA graph for forward of 1×3×64×32 torch.float32: {told}"
    ]
    assert not caplog.records[0].exc_info
    model.graphs.capture.flaw = None
    warm(model, image(rows=2))  # others are
    model.graphs.clear()
    warm(model, image())


def test_a_synchronisation_is_a_failure(monkeypatch, caplog):
    model = load()
    grid = type(model.model).split
    monkeypatch.setattr(type(model.model), "split", lambda self, t: (t.sum().item(), grid(self, t))[1])
    for _ in range(3):
        model(image())
    assert len(caplog.records) == 1 and len(model.graphs) == 0


def test_unusual_parameters(caplog):
    model = load()
    linear = model.model.blocks[0].mlp.fc1
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Subclass), requires_grad=False)
    for _ in range(3):
        model(image())
    assert model.graphs.capture.log == []
    assert caplog.text.count("the model has a Subclass on cpu") == 1
    model = load()
    model.register_buffer("elsewhere", torch.zeros(1, device="meta"))
    for _ in range(3):
        model(image())
    assert model.graphs.capture.log == []


def test_errors_of_the_call_are_the_callers():
    model = load()
    warm(model, image())
    model.model.blocks[0].mlp.fc1.in_features = "broken"
    model.model.blocks[0].mlp.fc1.weight = nn.Parameter(torch.zeros(2, 2))
    for _ in range(4):
        with pytest.raises(RuntimeError):
            model(image())
    assert not graphs_cache._capturing.locked()


# -- the object --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_start_empty(copied):
    model = load(capture=Tape, max_graphs=3, max_bytes=1 << 30)
    Tape.log = []
    warm(model, image())
    other = copied(model)
    assert other.graphs is not model.graphs and len(other.graphs) == 0
    assert (other.graphs.max_graphs, other.graphs.max_bytes, other.graphs.capture) == (3, 1 << 30, Tape)
    warm(other, image())
    other.graphs.enabled = False
    assert not copied(other).graphs.enabled
    with torch.no_grad():
        other.model.patch_generator.pos_embed.add_(1)
    assert_same(model(image()), eager(model, image()))


def test_clear_and_enabled():
    model = load()
    warm(model, image())
    model.graphs.clear()
    assert (len(model.graphs), model.graphs.memory) == (0, 0) and model.graphs.capture.log[-1] == "closed"
    warm(model, image())
    model.graphs.enabled = False
    model(image())
    assert replays(model) == 0 and "off" in repr(model.graphs)
    model.double()
    assert len(model.graphs) == 0  # at once: memory is wanted elsewhere


def test_a_model_is_freed_at_once():
    model = load()
    warm(model, image())
    model(image())
    graph = weakref.ref(next(iter(model.graphs._graphs.values())))
    weight = weakref.ref(model.model.blocks[0].attn.qkv.weight)
    gc.disable()
    try:
        del model
        assert graph() is None and weight() is None
    finally:
        gc.enable()


def test_the_warning_names_the_callers_line():
    model = load("eradio_small")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model(image())
    assert told[0].filename == __file__


def test_load(monkeypatch):
    path = golden_source("vit_h16")
    assert isinstance(radio_fast.load(path).graphs, GraphCache)
    assert isinstance(radio_fast.load(path, return_checkpoint=True)[0].graphs, GraphCache)
    assert radio_fast.load(path, cuda_graphs=False).graphs is None
    assert radio_fast.load("radio_v2.5-b", random_init=True, cuda_graphs=False).graphs is None
    monkeypatch.setenv("RADIO_FAST_GRAPHS", "0")
    assert radio_fast.load(path).graphs is None
    assert radio_fast.load(path, cuda_graphs=True).graphs.max_bytes is None
    monkeypatch.setenv("RADIO_FAST_GRAPHS", "1")
    monkeypatch.setenv("RADIO_FAST_GRAPH_MEMORY", "100")
    model = radio_fast.load(path)
    assert model.graphs.max_bytes == 100 << 20
    for _ in range(3):
        model(image())  # on the CPU
    assert len(model.graphs) == 0 and not model.graphs._calls
    assert repr(model.graphs) == "GraphCache(0 of 16 graphs, 0.0 MiB of 100 MiB)"


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda patch: resolve_graphs("yes"), "cuda_graphs must be True, False or None, got 'yes'"),
        (lambda patch: resolve_graphs(1), "cuda_graphs must be True, False or None, got 1"),
        (
            lambda patch: patch.setenv("RADIO_FAST_GRAPHS", "on"),
            "RADIO_FAST_GRAPHS must be 0 (off) or 1 (on), got 'on'",
        ),
        (lambda patch: patch.setenv("RADIO_FAST_GRAPH_MEMORY", "-1"), "must be a whole number of MiB, got '-1'"),
        (lambda patch: patch.setenv("RADIO_FAST_GRAPH_MEMORY", "²"), "must be a whole number of MiB, got '²'"),
        (lambda patch: GraphCache(0), "max_graphs must be a whole number of at least 1, got 0"),
        (lambda patch: GraphCache(True), "max_graphs must be a whole number of at least 1, got True"),
        (lambda patch: GraphCache(max_bytes=-1), "max_bytes must be None or a whole number of bytes, got -1"),
        (lambda patch: GraphCache(max_bytes=0.5), "max_bytes must be None or a whole number of bytes, got 0.5"),
    ],
)
def test_legal_values(make, error, monkeypatch):
    with pytest.raises(ValueError) as raised:
        make(monkeypatch)
        resolve_graphs(None)
    assert error in str(raised.value)
