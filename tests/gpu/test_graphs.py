"""CUDA graphs on a GPU: replays against eager calls, streams, threads, memory, the user's own graphs."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

import radio_fast
from tests.conftest import golden_source
from tests.tape import assert_same, eager, flat, warm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("ignore:attention windows"),
]

MODELS = {
    "ViT float32": ("vit_h16", {}),
    "ViT bfloat16": ("vit_h16", {"dtype": "bfloat16"}),
    "ViT float16": ("vit_l16_half", {"dtype": "float16"}),
    "adaptors": ("vit_h16", {"adaptor_names": ["clip", "sam"]}),
    "windows": ("vit_b16_vitdet", {"vitdet_window_size": 2}),
    "E-RADIO": ("eradio_small", {}),
    "E-RADIO float16": ("eradio_small", {"window_size": "optimal", "dtype": "float16"}),
}


def load(case="vit_h16", **options) -> radio_fast.RADIOModel:
    return radio_fast.load(golden_source(case), device="cuda", cuda_graphs=True, **options)


def image(seed=0, batch=2, rows=8, columns=6) -> torch.Tensor:
    return torch.rand(batch, 3, 16 * rows, 16 * columns, generator=torch.Generator().manual_seed(seed)).cuda()


@pytest.mark.parametrize(("case", "options"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("fmt", ["NLC", "NCHW"])
def test_replays_give_what_eager_gives(case, options, fmt, caplog):
    model = load(case, **options)
    for seed in range(5):
        x = image(seed)
        assert_same(model(x, feature_fmt=fmt), eager(model, x, feature_fmt=fmt))
    (graph,) = model.graphs._graphs.values()
    assert graph.replays == 4 and not caplog.records
    assert model.graphs.memory > 0


def test_intermediates():
    model = load()
    for seed in range(4):
        options = {"indices": 2, "return_prefix_tokens": True, "norm": True}
        ours = model.forward_intermediates(image(seed), **options)
        assert_same(ours, eager(model, image(seed), "forward_intermediates", **options))
    assert len(model.graphs) == 1


@pytest.mark.parametrize("version", ["radio_v2.5-b", "e-radio_v2"])
def test_full_size(version):
    options = {"window_size": "optimal"} if version == "e-radio_v2" else {}
    model = radio_fast.load(version, random_init=True, device="cuda", dtype="bfloat16", **options)
    for batch in (1, 8):
        for seed in range(3):
            x = image(seed, batch, 14, 14)
            assert_same(model(x), eager(model, x))
    assert len(model.graphs) == 2


def test_outputs_are_not_overwritten():
    model = load()
    warm(model, image())
    images = [image(seed) for seed in range(20)]
    expected = [eager(model, x) for x in images]
    for ours, theirs in zip([model(x) for x in images], expected, strict=True):
        assert_same(ours, theirs)


def test_one_model_after_the_other_on_one_thread():
    """Graphs of two models, used in turn and dropped in turn, have no workspace in common."""
    models = [load("vit_h16", adaptor_names=["clip"]) for _ in range(2)]
    expected = eager(models[0], image())
    for model in models:
        warm(model, image())
    for _ in range(3):
        for model in models:
            assert_same(model(image()), expected)
    models[1].graphs.clear()
    torch.cuda.empty_cache()
    for _ in range(3):
        assert_same(models[0](image()), expected)


def test_streams():
    """Calls on several streams without any order between them."""
    model = load()
    warm(model, image())
    inputs = [image(seed) for seed in range(24)]
    expected = [eager(model, x) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    outputs = []
    for i, x in enumerate(inputs):
        with torch.cuda.stream(streams[i % 3]):
            torch.cuda._sleep(int(1e5) * (i % 4))
            outputs.append(model(x))
    torch.cuda.synchronize()
    for ours, theirs in zip(outputs, expected, strict=True):
        assert_same(ours, theirs)


def test_threads_with_streams_of_their_own():
    model = load("vit_h16", adaptor_names=["clip"])
    inputs = [image(seed, 1 + seed % 2, 2 + seed % 3) for seed in range(48)]
    expected = [eager(model, x) for x in inputs]
    torch.cuda.synchronize()
    outputs: list = [None] * len(inputs)
    barrier = threading.Barrier(4)
    errors = []

    def work(part: int) -> None:
        try:
            barrier.wait()
            with torch.cuda.stream(torch.cuda.Stream()) as _:
                for i in [*range(part, len(inputs), 4)] * 4:
                    outputs[i] = model(inputs[i])
                torch.cuda.current_stream().synchronize()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for ours, theirs in zip(outputs, expected, strict=True):
        assert_same(ours, theirs)
    assert len(model.graphs) > 0


@pytest.mark.parametrize("case", ["vit_h16", "eradio_small"])
def test_no_synchronisation(case):
    model = load(case)
    x = image()
    warm(model, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            model(x)
        eager(model, x)  # nor without graphs
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_replay_is_one_launch():
    model = load()
    warm(model, image())
    x = image()
    torch.cuda.synchronize()
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profile:
        outputs = model(x)
        torch.cuda.synchronize()
    counts = {event.key: event.count for event in profile.key_averages()}
    if not any(name.startswith("cuda") for name in counts):
        pytest.skip("the profiler does not see the CUDA runtime here")
    assert counts["cudaGraphLaunch"] == 1
    assert sum(count for name, count in counts.items() if "LaunchKernel" in name) <= 1 + len(flat(outputs))  # copies


def test_memory_is_bounded_and_given_back():
    model = load()
    model.graphs.max_bytes = 256 << 20
    torch.cuda.empty_cache()
    for rows in range(2, 12):
        for _ in range(2):
            model(image(rows=rows))
        assert model.graphs.memory <= 256 << 20
    held = torch.cuda.memory_reserved()
    model.graphs.clear()
    gc.collect()
    torch.cuda.empty_cache()
    assert model.graphs.memory == 0
    assert torch.cuda.memory_reserved() < held


def test_a_model_that_goes_gives_its_streams_back():
    from radio_fast.graphs.capture import CudaCapture

    for _ in range(3):
        model = load()
        warm(model, image())
        del model
        gc.collect()
        spare = len(CudaCapture._spare[torch.device("cuda", torch.cuda.current_device())])
    assert spare >= 1
    model = load()
    warm(model, image())
    assert len(CudaCapture._spare[torch.device("cuda", torch.cuda.current_device())]) == spare - 1
    assert_same(model(image(1)), eager(model, image(1)))


def test_in_a_graph_of_the_users_own():
    model = load()
    warm(model, image())
    static = image()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        outputs = model(static)
    static.copy_(image(7))
    graph.replay()
    assert_same(outputs, eager(model, image(7)))
    assert_same(model(image(3)), eager(model, image(3)))
    assert len(model.graphs) == 1


@pytest.mark.parametrize("way", ["data", "in place", "half", "positions", "cpu and back"])
def test_changes_are_noticed(way):
    model = load()
    warm(model, image())
    with torch.no_grad():
        if way == "data":
            weight = model.model.blocks[0].attn.qkv.weight
            weight.data = weight.data * 2
        elif way == "in place":
            model.model.blocks[0].attn.qkv.weight.mul_(2)
        elif way == "positions":
            model.model.patch_generator.pos_embed.add_(1)
        elif way == "half":
            model.half()
        else:
            model.cpu().cuda()
    for seed in range(5):
        assert_same(model(image(seed)), eager(model, image(seed)))


def test_contexts():
    model = load()
    with torch.inference_mode():
        warm(model, image())
        assert_same(model(image(1)), eager(model, image(1)))
    assert not model(image(1)).features.is_inference()
    with torch.autocast("cuda", torch.bfloat16):
        for seed in range(3):
            assert_same(model(image(seed)), eager(model, image(seed)))
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for seed in range(3):
            assert_same(model(image(seed)), eager(model, image(seed)))
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(model.graphs) == 3


def test_random_numbers_go_on():
    """A capture leaves the generator as it was."""
    model = load()
    torch.cuda.manual_seed(3)
    expected = torch.rand(4, device="cuda"), torch.rand(4, device="cuda")
    torch.cuda.manual_seed(3)
    assert torch.equal(torch.rand(4, device="cuda"), expected[0])
    warm(model, image())
    model(image())
    assert torch.equal(torch.rand(4, device="cuda"), expected[1])


def test_addresses_are_compared_in_one_go():
    from radio_fast.graphs.state import pointer_check

    tensors = [torch.zeros(3, device="cuda") for _ in range(4)]
    check = pointer_check(tensors, [t.data_ptr() for t in tensors])
    assert check() and check.__class__.__name__ == "partial"
    tensors[2].data = torch.zeros(3, device="cuda")
    assert not check()
