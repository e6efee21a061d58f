"""The contenders: radio_fast, and what a user would run instead, all on the same weights in one process."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import radio_fast
from bench import eradio_state
from bench.plain_eradio import PlainERADIO
from bench.workload import MODELS, Case, vit_flop
from tests.numerics import assert_tokens

Call = Callable[[], tuple[Tensor, Tensor]]

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
TINY = {"ViT-B": "vit_b16_spectral", "ViT-L": "vit_l16_half", "ViT-H": "vit_h16"}
DISTINCT = 4  # images in a batch that differ; the rest repeats them, so that every image of any batch can be checked


def load_ours(model: str, device: str, tiny: bool = False, dtype: str = "bfloat16") -> radio_fast.RADIOModel:
    """radio_fast as a user gets it, with random weights; `tiny`: one of the tests' small models."""
    if model == "E-RADIO":
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "eradio.pth.tar"
            eradio_state.write_checkpoint(file, _eradio_state(tiny))
            return radio_fast.load("e-radio_v2", checkpoint=file, window_size="optimal", device=device, dtype=dtype)
    if tiny:
        return radio_fast.load(GOLDEN / TINY[model] / "checkpoint.pth.tar", device=device, dtype=dtype)
    return radio_fast.load(MODELS[model], random_init=True, device=device, dtype=dtype)


def _eradio_state(tiny: bool) -> dict[str, Tensor]:
    return eradio_state.random_state(eradio_state.SMALL if tiny else eradio_state.Config())


def load_rival(ours: radio_fast.RADIOModel, device: str, tiny: bool = False) -> nn.Module:
    """The float32 model to beat, with our weights: Transformers' RadioModel, for E-RADIO `PlainERADIO`."""
    if ours.blocks is not None:
        return transformers_model(ours).to(device)
    state = _eradio_state(tiny)
    with torch.device("meta"):
        model = PlainERADIO(state)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False).to(device)


def transformers_model(ours: radio_fast.RADIOModel) -> nn.Module:
    """Transformers' RadioModel (attention: sdpa) in float32, with copies of our plain ViT's weights."""
    from transformers import RadioConfig, RadioModel

    spec = ours.model.spec
    config = RadioConfig(
        hidden_size=spec.embed_dim,
        num_hidden_layers=spec.depth,
        num_attention_heads=spec.num_heads,
        mlp_ratio=spec.mlp_hidden / spec.embed_dim,
        qkv_bias=spec.qkv_bias,
        patch_size=spec.patch_size,
        max_img_size=spec.grid_side * spec.patch_size,
        num_cls_tokens=spec.num_cls_tokens,
        num_registers=spec.num_registers,
        summary_idxs=list(spec.summary_idxs),
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        theirs = RadioModel(config)
    state = ours.model.state_dict()
    conditioner = {f"input_conditioner.{k}": v.clone() for k, v in ours.input_conditioner.state_dict().items()}
    tensors = {"summary_idxs": ours.summary_idxs.clone()} | conditioner
    for name, empty in theirs.state_dict().items():
        if name not in tensors:
            tensors[name] = _tensor_for(name, empty, state).to(torch.float32, copy=True)
    theirs.load_state_dict(tensors, assign=True)
    return theirs.eval().requires_grad_(False)


def _tensor_for(name: str, empty: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Ours of the tensor that Transformers calls `name`: other names, and q, k and v apart."""
    for theirs, ours in {
        "embeddings.patch_projection.": "patch_generator.embedder.",
        "embeddings.position_embedding": "patch_generator.pos_embed",
        "embeddings.cls_register_token": "patch_generator.cls_token.token",
        "encoder.layer.": "blocks.",
        ".attention.output.dense.": ".attn.proj.",
        ".layer_scale1.lambda1": ".ls1.gamma",
        ".layer_scale2.lambda1": ".ls2.gamma",
    }.items():
        name = name.replace(theirs, ours)
    for part, letter in enumerate(("query", "key", "value")):
        if f".attention.attention.{letter}." in name:
            return state[name.replace(f".attention.attention.{letter}.", ".attn.qkv.")].chunk(3)[part]
    if name.endswith(".gamma") and name not in state:
        return torch.ones(empty.shape)  # Transformers has a LayerScale in every model
    return state[name]


class Rivals:
    """All contenders of one model: `ours`, the rival in float32 and cast to bfloat16."""

    def __init__(self, model: str, device: str, tiny: bool = False):
        self.device, self.tiny = device, tiny
        self.ours = load_ours(model, device, tiny)
        self.float32 = load_rival(self.ours, device, tiny)
        self.bf16 = copy.deepcopy(self.float32).bfloat16()
        self.spec = self.ours.model.spec
        self._truths: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    @property
    def is_vit(self) -> bool:
        return self.ours.blocks is not None

    def _set_windows(self, pixels: int) -> None:
        """The window that ours takes for this size (`window_size="optimal"`), in the rivals too."""
        if not self.is_vit:
            window = eradio_window(pixels)
            for model in (self.float32, self.bf16):
                model.change_window_size(window)

    def image(self, case: Case) -> Tensor:
        """(B, 3, H, W) in [0, 1], float32: DISTINCT images, again and again."""
        generator = torch.Generator().manual_seed(case.pixels)
        few = torch.rand(min(case.batch, DISTINCT), 3, case.pixels, case.pixels, generator=generator)
        return few.to(self.device).repeat(-(-case.batch // DISTINCT), 1, 1, 1)[: case.batch]

    def truth(self, case: Case) -> tuple[Tensor, Tensor]:
        """(summary, features) of the distinct images by the rival in float32, without TF32."""
        key = (case.pixels, min(case.batch, DISTINCT))
        if key not in self._truths:
            self._truths.clear()  # at 2048 pixels one is a quarter of a gigabyte
            self._set_windows(case.pixels)
            tf32 = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = False
            try:
                with torch.backends.cudnn.flags(allow_tf32=False), torch.inference_mode():
                    self._truths[key] = self._rival(self.float32, self.image(case)[:DISTINCT])
            finally:
                torch.backends.cuda.matmul.allow_tf32 = tf32
        return self._truths[key]

    def _rival(self, model: nn.Module, x: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """`x` in `dtype` already for Transformers, which normalises inside; ours normalises for the plain E-RADIO."""
        if self.is_vit:
            out = model(x)
            return out.summary, out.features
        x = self.ours.input_conditioner(x)
        return model(x if dtype is None else x.to(dtype))

    def calls(self, case: Case, compiled: bool = False) -> dict[str, Call]:
        """{contender: a call that gives (summary, features)}, for use under inference_mode.

        radio_fast gets float32 images and rounds them itself; the rivals in bfloat16 get them rounded beforehand.
        """
        self._set_windows(case.pixels)
        x = self.image(case)
        rounded = x.bfloat16() if self.is_vit else x

        def official() -> tuple[Tensor, Tensor]:
            with torch.autocast(self.device, torch.bfloat16):
                return self._rival(self.float32, x)

        calls: dict[str, Call] = {
            "radio_fast": lambda: tuple(self.ours(x)),
            "eager": lambda: self._rival(self.bf16, rounded, torch.bfloat16),
            "official": official,
        }
        if compiled:
            model = torch.compile(self.bf16, dynamic=False, **_compile_options(self.tiny))

            def call() -> tuple[Tensor, Tensor]:
                torch.compiler.cudagraph_mark_step_begin()  # its graphs' outputs last until the next call, no longer
                return self._rival(model, rounded, torch.bfloat16)

            calls["compiled"] = call
        return calls

    def flop(self, case: Case) -> int:
        """Of a whole batch: matrix products, convolutions and attention."""
        if self.is_vit:
            return case.batch * sum(vit_flop(self.spec, case.pixels))
        return eradio_flop(self.float32, case)


def _compile_options(tiny: bool) -> dict[str, str]:
    """max-autotune; for a rehearsal no code is generated, which would need a C++ compiler."""
    if tiny:
        return {"backend": "eager"}
    from torch._inductor import select_algorithm

    select_algorithm.PRINT_AUTOTUNE = False  # it would print a table for every product
    return {"mode": "max-autotune"}


def eradio_flop(model: PlainERADIO, case: Case) -> int:
    """As torch counts them, of a whole batch."""
    with torch.device("meta"):
        plain = PlainERADIO(_meta_state(model)).eval()
        plain.change_window_size(eradio_window(case.pixels))
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            plain(torch.empty(1, 3, case.pixels, case.pixels))
    return case.batch * counter.get_total_flops()


def _meta_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.to("meta") for name, tensor in model.state_dict().items()}


def eradio_window(pixels: int) -> int:
    """The largest divisor, up to 16, of the last level's side, pixels / 32: the official optimal window."""
    return next(k for k in range(16, 0, -1) if pixels // 32 % k == 0)


def check(output: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> None:
    """Every token of every image, and every summary, points where the truth points (cosine ≥ 0.999).

    Raises:
        AssertionError: one does not, or has another shape, or is not finite; the message has the worst cosine.
    """
    for actual, expected in zip(output, truth, strict=True):
        for first in range(0, len(actual), len(expected)):
            part = actual[first : first + len(expected)]
            assert_tokens(part, expected[: len(part)])


def sdpa_rivals(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """{backend: call} of the SDPA backends that take these inputs: torch has to say which, so each is tried."""
    out = {}
    for name, backend in {
        "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
        "sdpa flash": SDPBackend.FLASH_ATTENTION,
        "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    }.items():

        def call(backend=backend):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

        try:
            call()
        except RuntimeError as error:
            print(f"{name} left out: {str(error).splitlines()[0]}")
        else:
            out[name] = call
    return out
