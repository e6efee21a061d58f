"""What CUDA graphs must not be used for, and what they must notice; on the CPU, as in test_graphs.py."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.func import functional_call, vjp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from radio_fast.graphs import cache as graphs_cache
from radio_fast.model import RadioOutput
from radio_fast.models.registry import ViTDet
from radio_fast.ops import _dispatch
from tests.tape import Recorder, Subclass, assert_same, eager, flat, image, load, replays, warm

pytestmark = [
    pytest.mark.filterwarnings("ignore:attention windows"),
    pytest.mark.usefixtures("without_amx"),  # the stand-in for graphs records PyTorch's operators
]

# -- calls that run as they are ----------------------------------------------------------------------------------------


class Plain(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def with_hook(model, x, register):
    handle = register(lambda *args: None)
    outputs = model(x)
    handle.remove()
    return outputs


def with_mode(model, x, mode):
    with mode:
        return model(x)


def with_attribute(model, x, owner, name, value):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, value)
        return model(x)


def with_gradients(model, x):
    model.model.blocks[1].attn.qkv.weight.requires_grad_()
    outputs = model(x)
    model.requires_grad_(False)
    assert outputs.features.requires_grad
    return outputs


def dual(model, x):
    with torch.autograd.forward_ad.dual_level():
        return model(x)


SKIPPED = {
    "off": lambda m, x: eager(m, x),
    "reference": lambda m, x: with_attribute(m, x, m, "backend", "reference"),
    "large": lambda m, x: with_attribute(m, x, graphs_cache, "MAX_ROWS", 7),
    "gradient of the image": lambda m, x: m(x.requires_grad_()),
    "gradient of a parameter": with_gradients,
    "subclass": lambda m, x: m(x.as_subclass(Subclass)),
    "compiled": lambda m, x: torch.compile(m, backend="eager", fullgraph=True)(x),
    "traced": lambda m, x: with_attribute(m, x, torch.jit, "is_tracing", lambda: True),
    "vmap": lambda m, x: RadioOutput(*(t[0] for t in vmap(m)(x[None]))),
    "vmap around it": lambda m, x: RadioOutput(*(t[0] for t in vmap(lambda _: tuple(m(x)))(torch.zeros(1)))),
    "vjp": lambda m, x: vjp(m, x)[0],
    "dual level": dual,
    "dispatch mode": lambda m, x: with_mode(m, x, Recorder()),
    "FLOP counter": lambda m, x: with_mode(m, x, FlopCounterMode(display=False)),
    "function mode": lambda m, x: with_mode(m, x, Plain()),
    "captured by the caller": lambda m, x: with_attribute(m, x, m.graphs.capture, "capturing", True),
    "hook": lambda m, x: with_hook(m, x, m.model.blocks[1].register_forward_hook),
    "pre-hook": lambda m, x: with_hook(m, x, m.model.blocks[1].mlp.fc2.register_forward_pre_hook),
    "global hook": lambda m, x: with_hook(m, x, nn.modules.module.register_module_forward_hook),
    "global pre-hook": lambda m, x: with_hook(m, x, nn.modules.module.register_module_forward_pre_hook),
    "forward replaced": lambda m, x: with_attribute(m, x, m.model.norm, "forward", m.model.norm.forward),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:There is a performance drop")
@pytest.mark.parametrize("way", SKIPPED.values(), ids=SKIPPED)
def test_runs_as_it_is(way):
    model = load()
    for _ in range(4):
        way(model, image(1))
    assert model.graphs.capture.log == []
    warm(model, image())
    before = len(model.graphs.capture.log)
    outputs = way(model, image(1))
    assert "replay" not in model.graphs.capture.log[before:]
    torch.testing.assert_close([*flat(outputs)], [*flat(eager(model, image(1)))])


def test_replays_under_what_changes_nothing():
    model = load()
    warm(model, image())
    model.register_forward_hook(lambda *args: None)  # the model's own are called around it
    with torch.device("cpu"):  # as torch.set_default_device
        model(image())
    model.requires_grad_()
    with torch.no_grad():
        model(image().requires_grad_())
    with torch.profiler.profile():
        model.requires_grad_(False)(image())
    assert replays(model) == 3


def test_parameters_that_ask_for_gradients():
    model = load().requires_grad_()
    with torch.no_grad():
        warm(model, image())
        assert_same(model(image(1)), eager(model, image(1)))
    (graph,) = model.graphs._graphs.values()
    assert replays(model) == 1 and not any(t.requires_grad for t in flat(graph.outputs))


def test_no_images():
    model = load()
    for _ in range(3):
        assert model(image(batch=0)).features.shape[0] == 0
    assert model.graphs.capture.log == []


def test_a_capture_under_way_is_not_waited_for():
    model = load()
    model(image())
    with graphs_cache._capturing:
        assert_same(model(image()), eager(model, image()))
        assert model.graphs.capture.log == []
    model(image())
    with graphs_cache._capturing:
        model(image())
    assert replays(model) == 1


# -- changes -----------------------------------------------------------------------------------------------------------


def half_of_a_part(model):
    model.model.blocks[1].mlp.fc1.double().float()


def other_module(model):
    model.model.norm = nn.Tanh()


def other_parameter(model):
    attn = model.model.blocks[0].attn
    attn.qkv.weight = nn.Parameter(attn.qkv.weight * 2, requires_grad=False)


def other_data(model):
    weight = model.model.blocks[0].attn.qkv.weight
    weight.data = weight.data * 2


def other_buffer(model):
    model.input_conditioner.norm_mean = torch.zeros(3, 1, 1)


def in_place(model):
    model.model.blocks[0].attn.qkv.weight.mul_(2)


def positions_in_place(model):
    model.model.patch_generator.pos_embed.add_(1)


def state_read(model):
    model.load_state_dict({name: t * 2 if t.is_floating_point() else t for name, t in model.state_dict().items()})


def state_assigned(model):
    state = {name: t * 2 if t.is_floating_point() else t for name, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def cast(model):
    model.bfloat16()


def cast_inside(model):
    model.model.double()


def external_conditioner(model):
    model.make_preprocessor_external()


CHANGES = [
    half_of_a_part, other_module, other_parameter, other_data, other_buffer, in_place, positions_in_place, state_read,
    state_assigned, cast, cast_inside, external_conditioner,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change):
    model = load()
    warm(model, image(rows=3))
    before = model(image(1, rows=3))
    assert replays(model) == 1
    with torch.no_grad():
        change(model)
    for _ in range(4):
        outputs = model(image(1, rows=3))
        assert_same(outputs, eager(model, image(1, rows=3)))
    if change is not half_of_a_part:
        assert not torch.equal(outputs.features.double(), before.features.double())
    # A graph that was hardly used has gone: the next capture takes a call more.
    assert (replays(model), model.graphs.capture.log.count("closed")) == ((5, 0) if change is in_place else (2, 1))


@pytest.mark.parametrize("name", ["cpb_mlp.0.bias", "cpb_mlp.2.weight", "relative_coords_table"])
def test_changes_of_what_makes_the_bias(name):
    model = load("eradio_small")
    warm(model, image())
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith(name):
                tensor.mul_(2)
    assert_same(model(image()), eager(model, image()))
    assert len(model.graphs) == 0


def test_a_parameter_of_one_element_replaced_by_its_equal():
    """The one case where comparing tensors has a truth value."""
    model = load()
    model.model.scale = nn.Parameter(torch.ones(1), requires_grad=False)
    warm(model, image())
    model.model.scale = nn.Parameter(torch.ones(1), requires_grad=False)
    model(image())
    assert len(model.graphs) == 0


def test_functional_call():
    model = load()
    doubled = {name: t * 2 for name, t in model.named_parameters()}
    for _ in range(3):
        inside = functional_call(model, doubled, (image(),))
        assert not torch.equal(inside.features, model(image()).features)
        assert_same(inside, functional_call(model, doubled, (image(),), {}))
        assert_same(model(image()), eager(model, image()))


def test_weights_that_change_all_the_time_are_not_captured_over_and_over():
    model = load()
    for _ in range(30):
        with torch.no_grad():
            model.model.patch_generator.pos_embed.mul_(1.01)  # an average of another model's, as in distillation
        model(image())
        assert_same(model(image()), eager(model, image()))
    assert model.graphs.capture.log.count("capture") <= 5  # of 60 calls


def test_a_cache_in_two_models():
    first = load()
    warm(first, image())
    second = copy.deepcopy(first)
    second.model.norm = nn.Tanh()
    second.graphs = first.graphs
    assert_same(second(image()), eager(second, image()))
    shallow = copy.copy(first)
    assert_same(shallow(image()), eager(first, image()))


def setting(owner, name, value):
    @contextmanager
    def change():
        before = getattr(owner, name)
        setattr(owner, name, value)
        yield
        setattr(owner, name, before)

    return change


@contextmanager
def environment(name):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, "reference")
        yield


@contextmanager
def called(function, value, before):
    function(value)
    yield
    function(before)


MATMUL = torch.backends.cuda.matmul
SETTINGS = {
    "TF32": lambda: called(torch.set_float32_matmul_precision, "high", "highest"),
    "TF32 of convolutions": setting(torch.backends.cudnn, "allow_tf32", False),
    "cuDNN": setting(torch.backends.cudnn, "deterministic", True),
    "reductions": setting(MATMUL, "allow_bf16_reduced_precision_reduction", False),
    "deterministic": lambda: called(torch.use_deterministic_algorithms, True, False),
    "attention": lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "backend": lambda: environment("RADIO_FAST_BACKEND"),
    "backend of an op": lambda: environment("RADIO_FAST_ATTENTION"),
}


@pytest.mark.parametrize("change", SETTINGS.values(), ids=SETTINGS)
def test_settings_have_graphs_of_their_own(change):
    torch.set_float32_matmul_precision("highest")  # as it is, but said: the key tells these apart
    model = load()
    warm(model, image())
    with change():
        assert_same(model(image()), eager(model, image()))
        assert replays(model) == 0
        model(image())
        assert len(model.graphs) == 2
    model(image())
    assert replays(model) == 1


def test_windows_have_graphs_of_their_own():
    model = load("eradio_small")
    for _ in range(3):
        for window in (2, 4):
            model.model.change_window_size(window)
            assert_same(model(image()), eager(model, image()))
    assert (len(model.graphs), replays(model)) == (2, 2)
    model = load("vit_b16_vitdet")
    warm(model, image())
    model.model.set_vitdet(2, ViTDet())
    assert_same(model(image()), eager(model, image()))
    assert replays(model) == 0


@pytest.mark.parametrize("of", ["all", "one", "norm"])
def test_backends_set_later(of):
    model = load()
    warm(model, image())
    if of == "all":
        model.model.set_backend("reference")
    elif of == "one":
        model.model.blocks[2].mlp.fc2.backend = "reference"
    else:
        model.model.set_backend("auto", fuse_norm=True)
    assert_same(model(image()), eager(model, image()))
    assert len(model.graphs) == 0


def test_biases_that_are_kept_in_16_bits(monkeypatch):
    """On a GPU cuBLAS's are cast once; a graph reads the cast, not the bias."""
    monkeypatch.setattr(_dispatch, "accelerated", lambda device: True)
    monkeypatch.setenv("RADIO_FAST_BACKEND", "reference")
    model = load(dtype="float16")
    warm(model, image())
    with torch.no_grad():
        model.blocks[1].attn.qkv.bias.add_(0.5)
    for seed in range(4):
        assert_same(model(image(seed)), eager(model, image(seed)))
