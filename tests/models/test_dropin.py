"""What users of the official model do with it: precisions, contexts, copies, threads, compilation."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch

import radio_fast
from tests.conftest import golden_source
from tests.numerics import assert_relative, assert_tokens

CASES = ["vit_h16", "vit_l16_half", "dinov2_g14", "vit_h16_norm", "eradio_small"]
pytestmark = pytest.mark.filterwarnings("ignore:attention windows")  # E-RADIO's, of small images


def image(model, batch=2, rows=4, columns=5, seed=1):
    p = model.min_resolution_step
    return torch.rand(batch, 3, rows * p, columns * p, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=["vit_h16", "eradio_small"])
def case(request):
    return request.param


@pytest.fixture(scope="module")
def model(case):
    return radio_fast.load(golden_source(case))


def test_no_parameter_asks_for_gradients(model):
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    assert not model(image(model)).summary.requires_grad


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["to", "method", "load"])
def test_half_precision(case, dtype, how):
    truth_model = radio_fast.load(golden_source(case))
    x = image(truth_model)
    truth = truth_model(x)
    if how == "load":
        model = radio_fast.load(golden_source(case), dtype=dtype)
    elif how == "to":
        model = radio_fast.load(golden_source(case)).to(dtype)
    else:
        model = radio_fast.load(golden_source(case))
        model = model.half() if dtype == torch.float16 else model.bfloat16()
    assert model.input_conditioner.norm_mean.dtype == torch.float32
    summary, features = model(x)
    assert summary.dtype == features.dtype == dtype
    # Rounded input, rounded weights: a cast image must do as well as a float32 one.
    cast = model(x.to(dtype))
    for output in (features, cast.features):
        assert_tokens(output, truth.features)
    S = len(model.model.summary_tokens)
    assert_tokens(summary.view(2, S, -1), truth.summary.view(2, S, -1))


def test_half_precision_keeps_the_conditioner_exact(model, case):
    """float16 → float32 must bring the input statistics back as they were, not rounded."""
    other = radio_fast.load(golden_source(case)).half().float()
    assert torch.equal(other.input_conditioner.norm_mean, model.input_conditioner.norm_mean)
    assert torch.equal(other.input_conditioner.norm_std, model.input_conditioner.norm_std)


@pytest.mark.parametrize("case", CASES)
def test_autocast(case):
    model = radio_fast.load(golden_source(case))
    x = image(model)
    truth = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    assert_tokens(output.features, truth.features)
    assert torch.equal(model(x).features, truth.features), "autocast left something behind"


def test_contexts_agree(model):
    x = image(model)
    plain = model(x)
    with torch.no_grad():
        no_grad = model(x)
    with torch.inference_mode():
        inference = model(x)
    for other in (no_grad, inference, model(x)):
        assert torch.equal(plain.features, other.features)
        assert torch.equal(plain.summary, other.summary)


def test_loaded_in_inference_mode_still_trains(case):
    """Positions cached under inference mode, or parameters made there, must not break a later backward."""
    with torch.inference_mode():
        model = radio_fast.load(golden_source(case))
        model(image(model))
    x = image(model).requires_grad_()
    model(x).features.sum().backward()
    assert x.grad is not None


def test_gradient_to_the_input(model):
    x = image(model, batch=1).requires_grad_()
    model(x).summary.square().sum().backward()
    assert torch.isfinite(x.grad).all()
    # Against a finite difference in a random direction, in float64: without the conditioner, which is float32, and in a
    # step so small that few of E-RADIO's ReLUs change sides.
    double = copy.deepcopy(model).double()
    double.make_preprocessor_external()
    x = image(model, batch=1).double().requires_grad_()
    double(x).summary.square().sum().backward()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    step = 1e-5
    with torch.no_grad():
        ahead, behind = (double(x + s * step * direction).summary.square().sum() for s in (1, -1))
    numeric = (ahead - behind) / (2 * step)
    assert_relative((x.grad * direction).sum(), numeric, 1e-3)


def test_gradient_to_the_parameters_when_asked(model):
    trained = copy.deepcopy(model).requires_grad_()
    trained(image(model)).features.square().mean().backward()
    missing = [name for name, p in trained.named_parameters() if p.grad is None]
    assert not missing


def test_state_dict_round_trip(model, case):
    state = {name: t.clone() for name, t in model.state_dict().items()}
    if case == "vit_h16":
        assert {"model.blocks.0.attn.qkv.weight", "model.patch_generator.cls_token.token"} <= set(state)
    else:
        assert {"model.levels.2.blocks.0.attention_blocks.0.attn.qkv.weight"} <= set(state)
    assert {"input_conditioner.norm_mean", "summary_idxs"} <= set(state)
    x = image(model)
    expected = model(x).features
    other = radio_fast.load(golden_source(case))
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert not torch.equal(other(x).features, expected)
    other.load_state_dict(state)
    assert torch.equal(other(x).features, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize(
    ("case", "options"),
    [("vit_h16", {}), ("vit_h16", {"adaptor_names": ["clip", "sam"]}), ("eradio_small", {})],
    ids=["plain", "adaptors", "E-RADIO"],
)
def test_copies(copied, case, options):
    model = radio_fast.load(golden_source(case), **options)
    x = image(model)
    expected = model(x)
    expected = expected["sam"] if options else expected
    other = copied(model)
    output = other(x)
    output = output["sam"] if options else output
    assert torch.equal(output.features, expected.features)
    with torch.no_grad():
        next(other.model.parameters()).add_(1)
    again = model(x)
    again = again["sam"] if options else again
    assert torch.equal(again.features, expected.features), "the copy shares weights with the original"


def test_saved_by_torch_and_loaded_into_a_fresh_one(model, case):
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = radio_fast.load(golden_source(case))
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(image(model)).features, model(image(model)).features)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("vit_b16_vitdet", {}),
        ("vit_b16_vitdet", {"vitdet_window_size": 2}),
        ("vit_b16_vitdet", {"adaptor_names": "sam"}),
        ("eradio_small", {"window_size": "optimal"}),
    ],
    ids=str,
)
def test_compile(case, options):
    """torch.compile without graph breaks (the eager backend: what is tested is the capture)."""
    model = radio_fast.load(golden_source(case), **options)
    x = image(model, rows=4, columns=2)
    expected = model(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        output = compiled(x)
    for a, b in (
        zip(expected.values(), output.values(), strict=True) if isinstance(output, dict) else [(expected, output)]
    ):
        assert_relative(b.features, a.features)


def test_threads(model):
    """Two threads on one model, different sizes, cold cache: each gets what it gets alone."""
    model = copy.deepcopy(model)
    inputs = [image(model, 1, 2 + i % 5, 3 + i % 4, seed=i) for i in range(24)]
    expected = [copy.deepcopy(model)(x).features for x in inputs]
    outputs: list = [None] * len(inputs)
    barrier = threading.Barrier(2)

    def work(part: int) -> None:
        barrier.wait()
        for i in range(part, len(inputs), 2):
            outputs[i] = model(inputs[i]).features

    threads = [threading.Thread(target=work, args=(part,)) for part in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for output, truth in zip(outputs, expected, strict=True):
        assert torch.equal(output, truth)


def test_noncontiguous_and_double_input(model):
    x = image(model)
    expected = model(x).features
    channels_last = x.to(memory_format=torch.channels_last)
    assert_relative(model(channels_last).features, expected)
    assert_relative(model(x.flip(3).flip(3)[:, :, :, :]).features, expected)
    strided = torch.zeros(2, 3, x.shape[2] * 2, x.shape[3] * 2)[:, :, ::2, ::2].copy_(x)
    assert torch.equal(model(strided).features, expected)
    assert model(x.double()).features.dtype == torch.float32


@pytest.mark.parametrize("case", CASES)
def test_images_do_not_see_each_other(case):
    model = radio_fast.load(golden_source(case))
    x = image(model, batch=3)
    together = model(x).features
    for i in range(3):
        assert_relative(model(x[i : i + 1]).features[0], together[i])


def test_external_preprocessor(model):
    x = image(model)
    expected = model(x).features
    external = copy.deepcopy(model)
    conditioner = external.make_preprocessor_external()
    assert torch.equal(external(conditioner(x)).features, expected)
    assert not torch.equal(external(x).features, expected)
    with external.cpe_video_mode(4):
        assert torch.equal(external(conditioner(x)).features, expected)


def test_deploy_changes_nothing(model):
    x = image(model)
    expected = model(x).features
    other = copy.deepcopy(model)
    other.switch_to_deploy()
    assert torch.equal(other(x).features, expected)


def test_empty_batch(model):
    summary, features = model(torch.zeros(0, 3, 64, 64))
    assert summary.shape == (0, model.summary_dim)
    assert features.shape == (0, (64 // model.patch_size) ** 2, model.embed_dim)
