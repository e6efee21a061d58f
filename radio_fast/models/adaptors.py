"""Adaptors: heads that map RADIO's summary and features into a teacher's space, and the way to its text tower."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from radio_fast.layers.attention import Attention
from radio_fast.layers.block import Block, call, call_rowwise
from radio_fast.layers.mlp import Mlp, untouched
from radio_fast.layers.norm import LayerNorm
from radio_fast.layers.packing import Packing, Segments
from radio_fast.models.text import TextTower, normalized

HEAD_EPS = 1e-5
ATTN_HEADS = 16


class MlpV1(nn.Module):
    """fc1 → LayerNorm → ReLU → [Linear → LayerNorm → ReLU]·n → fc2."""

    def __init__(self, dim: int, hidden: int, out: int, num_inner: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.norm = LayerNorm(hidden, HEAD_EPS)
        self.inner = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, hidden), LayerNorm(hidden, HEAD_EPS), nn.ReLU()) for _ in range(num_inner)
        )
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.fc1(x)))
        for layer in self.inner:
            x = layer(x)
        return self.fc2(x)


class MlpV2(nn.Module):
    """[LayerNorm → GELU →] fc1; x += Linear(GELU(LayerNorm x)) n times; LayerNorm → GELU → Linear."""

    def __init__(self, dim: int, hidden: int, out: int, num_inner: int, pre_norm: bool):
        super().__init__()
        if pre_norm:
            self.pre_norm = nn.Sequential(LayerNorm(dim, HEAD_EPS), nn.GELU())
        else:
            self.pre_norm = nn.Identity()
        self.fc1 = nn.Linear(dim, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(LayerNorm(hidden, HEAD_EPS), nn.GELU(), nn.Linear(hidden, hidden)) for _ in range(num_inner)
        )
        self.final = nn.Sequential(LayerNorm(hidden, HEAD_EPS), nn.GELU(), nn.Linear(hidden, out))

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(self.pre_norm(x))
        for block in self.blocks:
            x = x + block(x)
        return self.final(x)


def head_block(dim: int, hidden: int, qkv_bias: bool) -> Block:
    """The transformer block of an attention head."""
    return Block(LayerNorm(dim), Attention(dim, ATTN_HEADS, qkv_bias), LayerNorm(dim), Mlp(dim, hidden))


class AttnHead(nn.Module):
    """Transformer blocks over the patch tokens, then a v2 head."""

    def __init__(self, dim: int, num_blocks: int, hidden: int, qkv_bias: bool, mlp: MlpV2):
        super().__init__()
        self.blocks = nn.ModuleList(head_block(dim, hidden, qkv_bias) for _ in range(num_blocks))
        self.mlp = mlp

    def forward(self, x: Tensor, window: Segments | None = None) -> Tensor:
        for block in self.blocks:
            x = call(block, x, window)
        return self.mlp(x) if window is None else call_rowwise(self.mlp, x, window, MlpV2)


def _count(state: Iterable[str], prefix: str) -> int:
    return len({m[1] for key in state if (m := re.match(rf"{prefix}\.(\d+)\.", key))})


def _v2_from(state: Mapping[str, Tensor], prefix: str = "") -> MlpV2:
    hidden, dim = state[f"{prefix}fc1.weight"].shape
    out = state[f"{prefix}final.2.weight"].shape[0]
    return MlpV2(dim, hidden, out, _count(state, f"{prefix}blocks"), f"{prefix}pre_norm.0.weight" in state)


def build_head(state: Mapping[str, Tensor]) -> nn.Module:
    """An empty head of the kind (v1, v2, attn), widths and number of layers that its tensors show.

    Raises:
        KeyError: a tensor of the head is missing (the name is the error's argument), or it is of no known kind.
    """
    if "mlp.fc1.weight" in state:
        hidden, dim = state["blocks.0.mlp.fc1.weight"].shape
        if dim % ATTN_HEADS:
            raise ValueError(f"an attention head's width must be a multiple of {ATTN_HEADS}, got {dim}")
        qkv_bias = "blocks.0.attn.qkv.bias" in state
        return AttnHead(dim, _count(state, "blocks"), hidden, qkv_bias, _v2_from(state, "mlp."))
    if "final.2.weight" in state:
        return _v2_from(state)
    hidden, dim = state["fc1.weight"].shape
    return MlpV1(dim, hidden, state["fc2.weight"].shape[0], _count(state, "inner"))


def _run(head: nn.Module, x: Tensor, *window: Segments) -> Tensor:
    return head(x.to(next(head.parameters()).dtype), *window).float()


class Adaptor(nn.Module):
    """One teacher's pair of heads.

    Args:
        head_mlp: on the prefix token number `token_slot`, (B, D) → (B, S).
        feat_mlp: on the patch features, (B, T, D) → (B, T, u·u·C).
        upsample: u; the features come out on a grid u times finer.
    """

    def __init__(self, head_mlp: nn.Module, feat_mlp: nn.Module, token_slot: int, upsample: int = 1):
        super().__init__()
        self.head_mlp = head_mlp
        self.feat_mlp = feat_mlp
        self.token_slot = token_slot
        self.upsample = upsample

    @property
    def summary_dim(self) -> int:
        """S: the width of the summary."""
        *_, bias = self.head_mlp.parameters()  # of the last layer
        return len(bias)

    def forward(
        self,
        prefix: Tensor,
        features: Tensor,
        h: int | None,
        w: int | None,
        feature_fmt: str,
        packing: Packing | None = None,
    ) -> tuple[Tensor, Tensor | tuple[Tensor, ...]]:
        """(summary, features), float32: (B, S) and (B, h·u·w·u, C), or (B, C, h·u, w·u) for "NCHW".

        `packing`: of features (1, ΣT, D) of images of several sizes; there is then a tuple of each one's, without B.
        """
        summary = _run(self.head_mlp, prefix[:, self.token_slot])
        if packing is None:
            return summary, self._spread(_run(self.feat_mlp, features), h, w, feature_fmt)
        if untouched(self.feat_mlp, AttnHead):
            y = _run(self.feat_mlp, features, packing.patches)
        elif untouched(self.feat_mlp, MlpV1, MlpV2):
            y = _run(self.feat_mlp, features)
        else:  # whatever has been put in its place, or around it, may mix an image's tokens
            y = packing.patches.apart(partial(_run, self.feat_mlp), features)
        parts = zip(y.split(packing.patches.lengths, dim=1), packing.grids, strict=True)
        return summary, tuple(self._spread(part, *grid, feature_fmt)[0] for part, grid in parts)

    def _spread(self, y: Tensor, h: int, w: int, feature_fmt: str) -> Tensor:
        """(B, T, u·u·C) → (B, h·u·w·u, C), or (B, C, h·u, w·u) for "NCHW"."""
        u, B = self.upsample, y.shape[0]
        if u > 1:
            width = y.shape[-1] // u**2  # no −1: it has no answer for an empty batch
            y = y.reshape(B, h, w, u, u, width).transpose(2, 3).reshape(B, h * u * w * u, width)
        return to_nchw(y, h * u, w * u) if feature_fmt == "NCHW" else y


class TextAdaptor(Adaptor):
    """An adaptor whose teacher has a text tower (clip, siglip, siglip2-g).

    The tower is loaded when `encode_text` is first called, onto the device and as the dtype of the adaptor, and goes
    where the model goes (`.to`, `.half`, …). It is no part of `parameters()` and `state_dict()`.
    """

    def __init__(self, head_mlp: nn.Module, feat_mlp: nn.Module, token_slot: int, upsample: int, text: TextTower):
        super().__init__(head_mlp, feat_mlp, token_slot, upsample)
        self.text = text

    def tokenizer(self, texts: str | Sequence[str]) -> Tensor:
        """The tokens of texts, (B, context length), int64, on the CPU, cleaned and padded as the teacher was trained.

        Raises:
            ValueError: no string, or none at all.
            ImportError: open_clip or Transformers is missing; the message names the extra that brings it.
            DownloadError: the vocabulary is neither in the cache nor to be had.
            CheckpointError: the checkpoint names a text tower that does not exist, or a damaged one.
        """
        return self.text.tokenize(texts)

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Embed texts in the space of the adaptor's summary.

        Args:
            tokens: (B, context length), from `tokenizer`, on any device.
            normalize: divide each embedding by its L2 norm.

        Returns:
            (B, S), float32, on the adaptor's device.

        Raises:
            ValueError: tokens of another kind, length or range.
            ImportError, DownloadError, CheckpointError: as for `tokenizer`.
        """
        own = next(self.head_mlp.parameters())
        out = self.text.encode(tokens, own.device, own.dtype)
        return normalized(out) if normalize else out

    def _apply(self, fn, recurse=True):
        self.text.apply(fn, recurse)
        return super()._apply(fn, recurse)


def to_nchw(x: Tensor, h: int, w: int) -> Tensor:
    """(B, h·w, D) → (B, D, h, w)."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], h, w)


def canonical_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A head's tensors under this package's names.

    Only the inner layers of a v1 head differ between files: nested or flat, with or without a slot for the ReLU. Their
    order is the same in all of them: Linear, LayerNorm, Linear, LayerNorm, …
    """
    out, inner = {}, {}
    for key, value in state.items():
        if key.startswith("inner."):
            path, _, leaf = key.rpartition(".")
            inner.setdefault(tuple(int(i) for i in path.split(".")[1:]), {})[leaf] = value
        else:
            out[key] = value
    for n, path in enumerate(sorted(inner)):
        for leaf, value in inner[path].items():
            out[f"inner.{n // 2}.{n % 2}.{leaf}"] = value
    return out
