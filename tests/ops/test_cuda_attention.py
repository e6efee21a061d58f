"""The CUDA extension's attention: its own sources, on a GPU, or compiled for the host emulation in tests/emu.

Every path (sm_70, sm_75, sm_80) on every machine: RADIO_FAST_ARCH forces the older ones. Bounds are those of the Triton
kernels: twice plain torch's error.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import radio_fast
from bench.cuda_report import shared_memory
from radio_fast import native, ops
from tests.conftest import GOLDEN, golden_source, outlier_input, qkv_like
from tests.emu.build import CSRC, build_emulation
from tests.numerics import GOLDEN_RTOL, assert_relative, assert_tokens, assert_within
from tests.ops.truth import MAPS, attention_truth, bias_like, window_truth

HALF, BFLOAT, FULL = torch.float16, torch.bfloat16, torch.float32
PATHS = [(70, HALF), (75, HALF), (80, HALF), (80, BFLOAT), (80, FULL)]  # float32 has one path, on every architecture
HEAD_DIMS = (16, 32, 64, 72, 80, 96)

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation needs g++")
pytestmark = [] if torch.cuda.is_available() else [needs_compiler]


@pytest.fixture(scope="session")
def emulation(tmp_path_factory) -> Path:
    """RADIO_FAST_TEST_CSRC: another copy of the sources, to see these tests fail on broken ones."""
    csrc = Path(os.environ.get("RADIO_FAST_TEST_CSRC") or CSRC)
    return build_emulation(tmp_path_factory.mktemp("emulation"), csrc=csrc)


@pytest.fixture(autouse=True)
def library(request, monkeypatch):
    """The library that runs here: the built one on a GPU, else the emulated one."""
    if torch.cuda.is_available():
        if reason := native.why_not_native():
            pytest.fail(reason)
        yield
        return
    monkeypatch.setenv("RADIO_FAST_LIBRARY", str(request.getfixturevalue("emulation")))
    yield


@pytest.fixture
def path(monkeypatch):
    def choose(sm: int) -> None:
        monkeypatch.setenv("RADIO_FAST_ARCH", str(sm))

    return choose


def check_window(qkv: Tensor, heads: int, window: int, bias: Tensor | None = None) -> Tensor:
    actual = ops.window_attention(qkv, heads, window, bias, backend="cuda")
    same_dtype = ops.window_attention(qkv, heads, window, bias, backend="reference")
    assert actual.is_contiguous()
    assert_within(actual, window_truth(qkv, heads, window, bias), same_dtype)
    return actual


def check(qkv: Tensor, heads: int, lengths: list[int] | None = None, window=None, **kwargs) -> None:
    cu_seqlens = None
    if lengths is not None:
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(qkv.device, torch.int32)
    actual = ops.attention(qkv, heads, cu_seqlens, window=window, backend="cuda", **kwargs)
    same_dtype = ops.attention(qkv, heads, cu_seqlens, window=window, backend="reference")
    assert actual.is_contiguous()
    assert_within(actual, attention_truth(qkv, heads, lengths, window), same_dtype)


# -- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sm", "dtype"), PATHS, ids=str)
@pytest.mark.parametrize(("window", "H", "W"), MAPS)
def test_every_window(window, H, W, sm, dtype, path, device, guarded):
    path(sm)
    H, W = (H, W) if dtype != FULL else (min(H, window), min(W, window))
    qkv = qkv_like(2 if window < 9 else 1, H, W, 3 * 16, dtype=dtype, device=device, seed=window)
    check_window(qkv, 1, window, ops.padded_bias(bias_like(1, window, dtype=dtype, device=device, seed=window)))


@pytest.mark.parametrize(("sm", "dtype"), PATHS, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim, sm, dtype, path, device, guarded):
    path(sm)
    qkv = qkv_like(1, 7, 10, 3 * 3 * head_dim, dtype=dtype, device=device, seed=head_dim)
    check_window(qkv, 3, 7, bias_like(3, 7, dtype=dtype, device=device))
    check_window(qkv_like(3, 9, 9, 3 * head_dim, dtype=dtype, device=device, seed=head_dim), 1, 9)


@pytest.mark.parametrize("sm", (70, 75, 80))
def test_large_windows(sm, path, device, guarded):
    """More positions than E-RADIO's 256: 17², and 32², the most."""
    path(sm)
    for window, size in ((17, 17), (32, 20)):
        qkv = qkv_like(1, size, 18, 3 * 16, dtype=HALF, device=device, seed=window)
        check_window(qkv, 1, window, bias_like(1, window, dtype=HALF, device=device))


LAYOUTS = ("channels first", "wider", "every other", "odd", "odd rows", "odd images", "last axis")


def strided(qkv: Tensor, how: str) -> Tensor:
    """The same values in another layout, NaN between them."""
    B, H, W, width = qkv.shape
    if how == "channels first":
        return qkv.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    if how == "wider":
        view = qkv.new_full((B, H + 3, W + 2, width + 16), math.nan)[:, 1 : H + 1, 2:, 8 : width + 8]
    elif how == "every other":
        view = qkv.new_full((2 * B, 2 * H, 2 * W, width), math.nan)[::2, 1::2, ::2]
    elif how == "odd":  # nothing divisible by 16 bytes
        view = qkv.new_full((B, H, W, width + 3), math.nan)[..., 1 : width + 1]
    elif how == "odd rows":  # only the rows of the map begin at odd addresses
        view = qkv.new_full((B, H, W * width + 4), math.nan)[..., : W * width].unflatten(2, (W, width))
    elif how == "odd images":
        view = qkv.new_full((B, H * W * width + 4), math.nan)[:, : H * W * width].unflatten(1, (H, W, width))
    else:
        view = qkv.new_full((B, H, W, 2 * width), math.nan)[..., ::2]
    return view.copy_(qkv)


@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize(("sm", "dtype"), PATHS, ids=str)
def test_strides(how, sm, dtype, path, device, guarded):
    path(sm)
    qkv = qkv_like(2, 8, 10, 3 * 2 * 16, dtype=dtype, device=device)
    check_window(strided(qkv, how), 2, 5, bias_like(2, 5, dtype=dtype, device=device))
    tokens = qkv_like(2, 70, 3 * 2 * 32, dtype=dtype, device=device).unsqueeze(1)
    check(strided(tokens, how).squeeze(1), 2)


@pytest.mark.parametrize("how", ("padded", "odd pitch", "transposed", "expanded", "odd start"))
@pytest.mark.parametrize("sm", (70, 75, 80))
def test_bias_layouts(how, sm, path, device, guarded):
    path(sm)
    bias = bias_like(2, 5, dtype=HALF, device=device)
    if how == "padded":
        laid = ops.padded_bias(bias)
    elif how == "odd pitch":
        laid = bias.new_full((2, 25, 27), math.nan)[..., :25].copy_(bias)
    elif how == "transposed":
        laid = bias.transpose(1, 2).contiguous().transpose(1, 2)
    elif how == "expanded":
        laid = bias = bias[:1].expand(2, -1, -1)
    else:
        laid = bias.new_full((2, 25, 26), math.nan)[..., 1:].copy_(bias)
    assert torch.equal(laid, bias)
    check_window(qkv_like(1, 6, 9, 3 * 2 * 32, dtype=HALF, device=device), 2, 5, laid)


@pytest.mark.parametrize(("sm", "dtype"), PATHS, ids=str)
@pytest.mark.parametrize("last", (False, True))
def test_scores_far_apart(last, sm, dtype, path, device, guarded):
    """Scores in the hundreds, the largest in the first or the last step of keys."""
    path(sm)
    qkv = outlier_input(1, 12, 12, 3 * 32, dtype=dtype, seed=5, device=device)
    qkv[:, 11 if last else 0, :, 32:64] *= 8
    check_window(qkv, 1, 12, bias_like(1, 12, dtype=dtype, device=device, scale=100.0))


@pytest.mark.parametrize(("sm", "dtype"), PATHS, ids=str)
def test_keys_shut_out(sm, dtype, path, device, guarded):
    """A bias of −∞ for the first 70 of 81 keys: a whole step has none."""
    path(sm)
    bias = bias_like(1, 9, dtype=dtype, device=device)
    bias[..., :70] = -math.inf
    check_window(qkv_like(1, 9, 9, 3 * 32, dtype=dtype, device=device), 1, 9, bias)


@pytest.mark.parametrize(("sm", "dtype"), PATHS, ids=str)
@pytest.mark.parametrize("window", (3, 9))
def test_every_key_shut_out(window, sm, dtype, path, device, guarded):
    """Queries whose bias is −∞ throughout get 0, as torch gives them; the others what they always get."""
    path(sm)
    qkv = qkv_like(1, window, window, 3 * 32, dtype=dtype, device=device)
    bias = bias_like(1, window, dtype=dtype, device=device)
    expected = ops.window_attention(qkv, 1, window, bias, backend="cuda").flatten(1, 2)
    bias[:, ::2] = -math.inf
    actual = ops.window_attention(qkv, 1, window, bias, backend="cuda").flatten(1, 2)
    assert torch.equal(actual[:, 1::2], expected[:, 1::2])
    assert (actual[:, ::2] == 0).all()
    assert (ops.window_attention(qkv, 1, window, bias, backend="reference").flatten(1, 2)[:, ::2] == 0).all()


def test_random_cases(path, device, guarded):
    draw = random.Random(11)
    for seed in range(24):
        sm, dtype = draw.choice(PATHS)
        path(sm)
        window = draw.randint(1, 16 if dtype != FULL else 8)
        H, W = (draw.randint((window + 2) // 2, 20) for _ in range(2))
        heads, head_dim = draw.randint(1, 2), draw.choice((16, 96))
        qkv = qkv_like(draw.randint(1, 2), H, W, 3 * heads * head_dim, dtype=dtype, device=device, seed=seed)
        bias = bias_like(heads, window, dtype=dtype, device=device, seed=seed) if draw.random() < 0.7 else None
        check_window(qkv, heads, window, bias)


# -- whole and packed images ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sm", "dtype"), PATHS, ids=str)
@pytest.mark.parametrize("N", (1, 7, 64, 113, 203, 257))
def test_lengths(N, sm, dtype, path, device, guarded):
    path(sm)
    check(qkv_like(1, N, 3 * 80, dtype=dtype, device=device, seed=N), 1)


@pytest.mark.parametrize(("sm", "dtype"), PATHS, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_dense_head_dims(head_dim, sm, dtype, path, device, guarded):
    path(sm)
    check(qkv_like(2, 70, 3 * 2 * head_dim, dtype=dtype, device=device, seed=head_dim), 2)


@pytest.mark.parametrize(("sm", "dtype"), PATHS, ids=str)
@pytest.mark.parametrize("lengths", ([70, 0, 1, 33], [0, 0, 16], [5, 0], [7, 130]), ids=str)
def test_packed_images(lengths, sm, dtype, path, device, guarded):
    path(sm)
    check(qkv_like(sum(lengths), 3 * 2 * 72, dtype=dtype, device=device, seed=7), 2, lengths)


@pytest.mark.parametrize("sm", (70, 75, 80))
@pytest.mark.parametrize(("h", "w", "k"), ((4, 6, 2), (14, 14, 7), (16, 16, 16)))
def test_vitdet_windows(h, w, k, sm, path, device, guarded):
    path(sm)
    check(qkv_like(2, h * w, 3 * 2 * 80, dtype=HALF, device=device, seed=k), 2, window=(h, w, k))


def test_longer_than_promised(path, device, poison):
    """Of an image beyond max_seqlen nothing is written, and nothing beside it."""
    path(80)
    qkv = qkv_like(90, 3 * 16, dtype=HALF, device=device)
    cu_seqlens = torch.tensor([0, 80, 90], dtype=torch.int32, device=device)
    out = ops.attention(qkv, 1, cu_seqlens, 64, backend="cuda")
    assert out[64:80].isnan().all()
    truth, same_dtype = attention_truth(qkv, 1, [80, 10]), ops.attention(qkv, 1, cu_seqlens, 80, backend="reference")
    for written in (slice(64), slice(80, None)):
        assert_within(out[written], truth[written], same_dtype[written])


def test_empty(device):
    for shape in ((0, 4, 4, 48), (2, 4, 4, 48)):
        assert (
            ops.window_attention(torch.zeros(shape, dtype=HALF, device=device), 1, 2, backend="cuda").shape[0]
            == shape[0]
        )
    assert ops.attention(torch.zeros(2, 0, 48, dtype=HALF, device=device), 1, backend="cuda").shape == (2, 0, 16)
    assert ops.attention(torch.zeros(0, 5, 48, dtype=HALF, device=device), 1, backend="cuda").shape == (0, 5, 16)


def test_operators(device):
    """Schema, fake form and dispatch as torch wants them."""
    qkv = qkv_like(1, 5, 6, 3 * 2 * 16, dtype=HALF, device=device)
    torch.library.opcheck(
        torch.ops.radio_fast.window_attention_cuda, (qkv, 2, 3, bias_like(2, 3, dtype=HALF, device=device))
    )
    tokens = qkv_like(1, 20, 3 * 2 * 16, dtype=HALF, device=device)
    torch.library.opcheck(torch.ops.radio_fast.attention_cuda, (tokens, 2, None, 0, []))


@pytest.mark.parametrize("sm", (70, 75, 80))
@pytest.mark.parametrize("case", ("vit_h16", "vit_so400m16", "vit_b16_vitdet", "eradio_small"))
def test_whole_models(case, sm, path, device, monkeypatch):
    """The golden outputs, with every attention in the extension: float32, and float16 by its tokens."""
    path(sm)
    stored = load_file(GOLDEN / case / "io.safetensors")
    for op in ("ATTENTION", "WINDOW_ATTENTION"):
        monkeypatch.setenv(f"RADIO_FAST_{op}", "cuda")
    options = {"vitdet_window_size": 2} if case == "vit_b16_vitdet" else {}
    options |= {"window_size": "optimal"} if case == "eradio_small" else {}
    x = (stored["0.image"].float() / 255).to(device)
    for dtype in (FULL, HALF) if sm == 80 else (HALF,):
        features = radio_fast.load(golden_source(case), device=device, dtype=dtype, **options)(x).features.cpu()
        if dtype == FULL:
            assert_relative(features, stored["0.out.features"], GOLDEN_RTOL[FULL])
        else:
            assert_tokens(features, stored["0.out.features"])


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dtype": torch.float64}, "dtype must be float16, bfloat16 or float32, got torch.float64"),
        ({"width": 3 * 48}, "head dim must be one of 16, 32, 64, 72, 80, 96, got 48"),
        ({"width": 3 * 128}, "head dim must be one of 16, 32, 64, 72, 80, 96, got 128"),
        ({"window": 0}, "window must be a number of positions in 1…32, got 0"),
        ({"window": 33}, "window must be a number of positions in 1…32, got 33"),
        ({"window": 12}, "window 12 is too large for a map with H = 6"),
        ({"bias": torch.float32}, "bias is torch.float32 on .*, expected torch.float16"),
        ({"grad": True}, "the kernels have no backward"),
    ],
    ids=str,
)
def test_bad_input(change, text, device):
    width, window = change.get("width", 48), change.get("window", 3)
    qkv = torch.zeros(1, 6, 7, width, dtype=change.get("dtype", HALF), device=device, requires_grad="grad" in change)
    bias = torch.zeros(1, window**2, window**2, dtype=change["bias"], device=device) if "bias" in change else None
    with pytest.raises(ValueError, match=text):
        ops.window_attention(qkv, 1, window, bias, backend="cuda")


def test_bfloat16_before_sm_80(path, device):
    for sm in (70, 75):
        path(sm)
        with pytest.raises(ValueError, match=f"bfloat16 needs sm_80 or newer, this is sm_{sm}'s path: use float16"):
            ops.attention(torch.zeros(1, 4, 48, dtype=BFLOAT, device=device), 1, backend="cuda")


@pytest.mark.parametrize("max_seqlen", (0, -1, 3.5, 1 << 31))
def test_longest(max_seqlen, device):
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="max_seqlen must be the longest packed image's tokens, got "):
        ops.attention(torch.zeros(4, 48, dtype=HALF, device=device), 1, cu_seqlens, max_seqlen, backend="cuda")


@pytest.mark.parametrize("window", ((-3, -4, 1), (2, 2), (4.0, 1, 1), (0, 4, 1)))
def test_odd_windows(window, device):
    with pytest.raises(ValueError, match=r"window must be \(h, w, k\), positive numbers|needs h·w = 12 tokens"):
        ops.attention(torch.zeros(1, 12, 48, dtype=HALF, device=device), 1, window=window, backend="cuda")


def test_starts_between_others(device):
    """cu_seqlens need not be contiguous."""
    qkv = qkv_like(20, 3 * 16, dtype=HALF, device=device)
    starts = torch.tensor([0, 7, 20], dtype=torch.int32, device=device)
    strided = torch.stack([starts, starts + 99], 1)[:, 0]
    expected = ops.attention(qkv, 1, starts, 13, backend="cuda")
    assert torch.equal(ops.attention(qkv, 1, strided, 13, backend="cuda"), expected)


def test_compile(device):
    """One graph, without a look inside the choice or the library."""

    def both(qkv):
        return ops.window_attention(qkv, 1, 2, backend="cuda"), ops.attention(qkv.flatten(1, 2), 1, backend="cuda")

    qkv = qkv_like(1, 4, 6, 3 * 16, dtype=HALF, device=device)
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(qkv), both(qkv), strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the emulation")
def test_threads(device):
    qkv = qkv_like(1, 9, 9, 3 * 32, dtype=HALF, device=device)
    expected = ops.window_attention(qkv, 1, 9, backend="cuda")
    with ThreadPoolExecutor(4) as pool:
        for actual in pool.map(lambda _: ops.window_attention(qkv, 1, 9, backend="cuda"), range(8)):
            assert torch.equal(actual, expected)


@needs_compiler
def test_report_knows_the_shared_memory(tmp_path):
    """bench/cuda_report.py repeats params.h's formula."""
    program = tmp_path / "sizes.cc"
    program.write_text(
        '#include <stdio.h>\n#include <initializer_list>\n#include "params.h"\nint main() {'
        "for (int path : {70, 75, 80}) for (int dim : {16, 32, 64, 80, 96})"
        'printf("sm%d %d %d\\n", path, dim, rf::shared_bytes_of(path, dim, 16));'
        'printf("plain 0 %d\\n", rf::plain_shared_bytes_of(16)); }'
    )
    include = [f"-I{CSRC / name}" for name in ("common", "attention")]
    subprocess.run(["g++", "-std=c++17", *include, program, "-o", tmp_path / "sizes"], check=True)
    lines = subprocess.run([tmp_path / "sizes"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 16
    for source, dim, size in map(str.split, lines):
        assert shared_memory(source, int(dim)) == int(size), (source, dim)


# -- the emulation is unkind enough -----------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the emulation")
@pytest.mark.parametrize("order", (1, 2, 3))
@pytest.mark.parametrize("sm", (70, 75, 80))
def test_any_order_of_threads(order, sm, path, device, guarded, monkeypatch):
    """Descending and shuffled: where a barrier is missing, some order shows it."""
    path(sm)
    expected = ops.window_attention(*(arguments := order_case(device)), backend="cuda")
    monkeypatch.setenv("RF_EMU_ORDER", str(order))
    assert torch.equal(ops.window_attention(*arguments, backend="cuda"), expected)


def order_case(device: str) -> tuple:
    qkv = qkv_like(1, 9, 11, 3 * 2 * 32, dtype=HALF, device=device)
    return qkv, 2, 9, bias_like(2, 9, dtype=HALF, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the emulation")
def test_addresses(tmp_path):
    """No access outside qkv, bias, output, or shared memory, which is exactly as large as asked for."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("g++ has no AddressSanitizer here")
    library = build_emulation(tmp_path, sanitize=True)
    env = os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    script = CSRC.parent / "tests" / "emu" / "addresses.py"
    done = subprocess.run([sys.executable, script, library], capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "cases without a bad access" in done.stdout
