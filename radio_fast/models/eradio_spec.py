"""What an E-RADIO checkpoint's tensors say about its structure, and how they are renamed and folded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from radio_fast.models.deferred import Deferred
from radio_fast.ops.window_attention import MAX_WINDOW

State = dict[str, "Tensor | Deferred"]
BN_EPS = 1e-5


def is_eradio(arch: str) -> bool:
    return arch.startswith("eradio")


@dataclass(frozen=True)
class ConvSpec:
    """A convolution with its BatchNorm; `shuffle`: pixels of r × r blocks become channels first."""

    in_channels: int
    out_channels: int
    kernel_size: int = 3
    stride: int = 1
    groups: int = 1
    shuffle: int = 1


@dataclass(frozen=True)
class AttentionSpec:
    """An attention block: windows at the map's resolution (sr_ratio 1), or at half of it (2)."""

    dim: int
    num_heads: int
    window: int
    mlp_hidden: int
    sr_ratio: int = 1
    conv_base: bool = False  # strided convolutions change the resolution, not pooling
    pre_conv: ConvSpec | None = None
    swiglu: bool = False
    layer_scale: bool = False
    qkv_bias: bool = False
    proj_bias: bool = False
    mlp_bias: tuple[bool, bool] = (False, False)


@dataclass(frozen=True)
class LevelSpec:
    """A level of one of three kinds: C2f (with a width), pairs of convolutions, or chains of attention blocks."""

    dim: int
    c2f: tuple[tuple[ConvSpec, ConvSpec], ...] = ()
    convs: tuple[tuple[ConvSpec, ConvSpec], ...] = ()
    chains: tuple[tuple[AttentionSpec, ...], ...] = ()
    c2f_width: int = 0  # c: half of what C2f's first convolution gives
    downsample: ConvSpec | None = None


@dataclass(frozen=True)
class ERADIOSpec:
    """Everything that shapes an E-RADIO."""

    arch: str
    stem: tuple[ConvSpec, ...]
    levels: tuple[LevelSpec, ...]
    neck_dims: tuple[int, ...]  # widths of the levels that the neck takes, the last ones
    embed_dim: int
    summary_idxs: tuple[int, ...] = (0,)
    num_prefix: int = 0
    num_cls_tokens: int = 0

    @property
    def patch_size(self) -> int:
        """Pixels a side of a feature: 4 at the first level, twice as many at each further one."""
        return 4 * 2 ** (len(self.levels) - len(self.neck_dims))

    @property
    def depth(self) -> int:
        return sum(len(level.c2f) + len(level.convs) + len(level.chains) for level in self.levels)


# -- from tensors ---------------------------------------------------------------------------------------------


def _children(state: Mapping[str, object], prefix: str) -> int:
    """How many modules are numbered under `prefix`.

    Raises:
        KeyError: a number is left out.
    """
    numbers = {int(m[1]) for key in state if (m := re.match(rf"{re.escape(prefix)}(\d{{1,9}})\.", key))}
    for expected, number in enumerate(sorted(numbers)):
        if number != expected:
            raise KeyError(f"{prefix}{expected}.")
    return len(numbers)


def _shape(state: State, key: str, ndim: int) -> tuple[int, ...]:
    if key not in state:
        raise KeyError(key)
    shape = tuple(state[key].shape)
    if len(shape) != ndim or 0 in shape:
        raise ValueError(f"{key} must have {ndim} dimensions and no empty one, got shape {shape}")
    return shape


def _conv(state: State, name: str, channels: int, stride: int = 1, shuffle: int = 1) -> ConvSpec:
    """The convolution `name` on a map of `channels`, of which `shuffle`² times as many come out of its shuffling."""
    out, per_group, kernel, other = _shape(state, f"{name}.weight", 4)
    channels *= shuffle**2
    if kernel != other or kernel % 2 == 0:
        raise ValueError(f"{name}.weight must have a square kernel with an odd side, got {kernel} × {other}")
    if channels % per_group or out % (channels // per_group):
        raise ValueError(f"{name}.weight, {(out, per_group, kernel, other)}, does not fit a map of {channels} channels")
    return ConvSpec(channels, out, kernel, stride, channels // per_group, shuffle)


def _stem(state: State) -> tuple[ConvSpec, ...]:
    """Convolutions that divide the image's sides by 4, together with the shuffling that the first one's width shows."""
    pattern = re.compile(r"patch_embed\.conv_down\.(\d{1,9})\.weight$")
    names = sorted(int(m[1]) for key in state if (m := pattern.match(key)))
    if not names:
        raise KeyError("patch_embed.conv_down.0.weight")
    inputs = _shape(state, f"patch_embed.conv_down.{names[0]}.weight", 4)[1]
    shuffle = {3: 1, 12: 2, 48: 4}.get(inputs)
    if shuffle is None:
        raise ValueError(f"the stem's first convolution must take 3, 12 or 48 channels, got {inputs}")
    convs, channels, left = [], 3, 4 // shuffle
    for name in names:
        stride = min(left, 2)
        left //= stride
        convs.append(_conv(state, f"patch_embed.conv_down.{name}", channels, stride, 1 if convs else shuffle))
        channels = convs[-1].out_channels
    if left > 1:
        raise ValueError(f"the stem must divide the image's sides by 4, its {len(names)} convolutions can't")
    return tuple(convs)


def _attention(state: State, name: str, dim: int) -> AttentionSpec:
    side = _shape(state, f"{name}.attn.pos_emb_funct.relative_coords_table", 4)[1]
    heads, _ = _shape(state, f"{name}.attn.pos_emb_funct.cpb_mlp.2.weight", 2)
    _, hidden = _shape(state, f"{name}.mlp.fc2.weight", 2)
    expanded, _ = _shape(state, f"{name}.mlp.fc1.weight", 2)
    window = (side + 1) // 2
    if window > MAX_WINDOW or dim % heads:
        raise ValueError(
            f"{name}: windows may have 1…{MAX_WINDOW} positions a side and heads must divide the width, "
            f"got {window}, and {heads} heads for {dim} channels"
        )
    pool = f"{name}.downsample_mixer.weight" in state
    conv_base = f"{name}.downsample_op.weight" in state
    pre_conv = None
    if f"{name}.pre_conv.weight" in state and not (pool or conv_base):
        per_group = _shape(state, f"{name}.pre_conv.weight", 4)[1]
        pre_conv = _conv(state, f"{name}.pre_conv", dim)
        if dim % per_group:
            raise ValueError(f"{name}.pre_conv.weight takes {per_group} channels a group, which don't divide {dim}")
    return AttentionSpec(
        dim=dim,
        num_heads=heads,
        window=window,
        mlp_hidden=hidden,
        sr_ratio=2 if pool or conv_base else 1,
        conv_base=conv_base,
        pre_conv=pre_conv,
        swiglu=expanded == 2 * hidden,
        layer_scale=f"{name}.ls1.gamma" in state,
        qkv_bias=f"{name}.attn.qkv.bias" in state,
        proj_bias=f"{name}.attn.proj.bias" in state,
        mlp_bias=(f"{name}.mlp.fc1.bias" in state, f"{name}.mlp.fc2.bias" in state),
    )


def _level(state: State, name: str, dim: int) -> LevelSpec:
    blocks = f"{name}.blocks"
    c2f, width, convs, chains = [], 0, [], []
    if f"{blocks}.cv1.weight" in state:
        width, odd = divmod(_shape(state, f"{blocks}.cv1.weight", 2)[0], 2)
        if odd:
            raise ValueError(f"{blocks}.cv1.weight must have an even number of rows, it is split in halves")
        for i in range(_children(state, f"{blocks}.m.")):
            first = _conv(state, f"{blocks}.m.{i}.cv1", width)
            c2f.append((first, _conv(state, f"{blocks}.m.{i}.cv2", first.out_channels)))
    else:
        for i in range(_children(state, f"{blocks}.")):
            block = f"{blocks}.{i}"
            if f"{block}.conv1.weight" in state:
                first = _conv(state, f"{block}.conv1", dim)
                convs.append((first, _conv(state, f"{block}.conv2", first.out_channels)))
            else:
                count = _children(state, f"{block}.attention_blocks.")
                if not count:
                    raise KeyError(f"{block}.attention_blocks.0.attn.qkv.weight")
                chains.append(tuple(_attention(state, f"{block}.attention_blocks.{j}", dim) for j in range(count)))
        if bool(convs) == bool(chains):
            raise KeyError(f"{blocks}.0.attention_blocks.0.attn.qkv.weight")
    downsample = None
    if f"{name}.downsample.reduction.weight" in state:
        inputs = _shape(state, f"{name}.downsample.reduction.weight", 4)[1]
        shuffle = 2 if inputs == 4 * dim else 1
        downsample = _conv(state, f"{name}.downsample.reduction", dim, 2 // shuffle, shuffle)
    return LevelSpec(dim, tuple(c2f), tuple(convs), tuple(chains), width, downsample)


def eradio_spec(arch: str, state: State, summary_idxs: tuple[int, ...]) -> ERADIOSpec:
    """Read the structure off a backbone's tensors (in this package's names).

    Raises:
        KeyError: a tensor that every E-RADIO has is missing; its name is the error's argument.
        ValueError: the tensors contradict each other.
    """
    stem = _stem(state)
    levels: list[LevelSpec] = []
    dim = stem[-1].out_channels
    count = _children(state, "levels.")
    for i in range(count):
        levels.append(_level(state, f"levels.{i}", dim))
        downsample = levels[-1].downsample
        if downsample is None and i + 1 < count:
            raise KeyError(f"levels.{i}.downsample.reduction.weight")
        dim = downsample.out_channels if downsample else dim
    projections = "high_res_neck.neck_features_proj"
    taken = _children(state, f"{projections}.")
    if not 1 <= taken <= count:
        raise KeyError(f"{projections}.{taken}.conv1.weight")
    neck_dims = tuple(level.dim for level in levels[-taken:])
    return ERADIOSpec(
        arch=arch,
        stem=stem,
        levels=tuple(levels),
        neck_dims=neck_dims,
        embed_dim=_shape(state, f"{projections}.0.conv2.weight", 2)[0],
        summary_idxs=summary_idxs,
    )


def released_spec(arch: str) -> ERADIOSpec:
    """The full-size structure of `e-radio_v2`, 390 million parameters, for random weights."""
    d, in_dim, window = 192, 64, 16
    levels = []
    for i, (depth, heads) in enumerate(((3, 2), (3, 4), (5, 8), (5, 16))):
        dim = d << i
        down = ConvSpec(dim, 2 * dim, 3, 2) if i < 3 else None
        if i < 2:
            bottleneck = (ConvSpec(dim // 2, dim // 2), ConvSpec(dim // 2, dim // 2))
            levels.append(LevelSpec(dim, c2f=depth * (bottleneck,), c2f_width=dim // 2, downsample=down))
        else:
            full = AttentionSpec(dim, heads, window, 4 * dim, pre_conv=ConvSpec(dim, dim))
            half = AttentionSpec(dim, heads, window, 4 * dim, sr_ratio=2, conv_base=True)
            levels.append(LevelSpec(dim, chains=depth * ((half, full) if i == 2 else (full,),), downsample=down))
    stem = (ConvSpec(3, in_dim, 3, 2), ConvSpec(in_dim, d, 3, 2))
    return ERADIOSpec(arch, stem, tuple(levels), (4 * d, 8 * d), 8 * d)


# -- names and folding ----------------------------------------------------------------------------------------

# Tensors that are derived from others, for training, or of the classifier.
_UNUSED = re.compile(r"^(head|norm)\.|\.(relative_bias|relative_position_index|num_batches_tracked)$")
_GAMMA = re.compile(r"\.(?:gamma_?|ls)([12])(?:\.gamma)?$")
# Where a BatchNorm stands, and the convolution it follows: the name both get once they are folded.
_BATCH_NORMS = (
    (re.compile(r"^(.*)\.bn$"), "{0}.conv", "{0}"),
    (re.compile(r"^(.*)\.norm([12])$"), "{0}.conv{1}", "{0}.conv{1}"),
    (re.compile(r"^(.*)\.norm$"), "{0}.conv1", "{0}.conv1"),
)
_BATCH_NORM_LEAVES = ("weight", "bias", "running_mean", "running_var")
# Convolutions that would run, wrongly, without the BatchNorm after them.
_NEED_ONE = (
    (re.compile(r"^(levels\.\d+\.blocks\.\d+)\.conv([12])$"), "{0}.norm{1}.weight"),
    (re.compile(r"^(high_res_neck\.neck_features_proj\.\d+)\.conv1$"), "{0}.norm.weight"),
)


def fold_weight(weight: Tensor, scale: Tensor, variance: Tensor) -> Tensor:
    """weight · scale / √(variance + ε), one factor per output channel: float64, rounded once to float32."""
    factor = scale.double() / torch.sqrt(variance.double() + BN_EPS)
    out = torch.empty(weight.shape, dtype=torch.float32)
    for rows in range(0, len(weight), 64):  # 170 MB in float64, were the widest weight of the release done at once
        part = slice(rows, rows + 64)
        out[part] = weight[part].double() * factor[part].view(-1, *(1,) * (weight.ndim - 1))
    return out


def fold_bias(scale: Tensor, variance: Tensor, mean: Tensor, shift: Tensor, bias: Tensor | None = None) -> Tensor:
    """shift + (bias − mean) · scale / √(variance + ε), in float64, rounded once to float32."""
    mean = mean.double() if bias is None else mean.double() - bias.double()
    return (shift.double() - mean * scale.double() / torch.sqrt(variance.double() + BN_EPS)).float()


def _batch_norms(state: State) -> dict[str, tuple[str, str]]:
    """The names of all BatchNorms: (convolution before it, both once folded).

    Raises:
        KeyError: a BatchNorm without a convolution, or the other way round.
    """
    found = {}
    for key in state:
        norm, _, leaf = key.rpartition(".")
        for pattern, conv, folded in _BATCH_NORMS:
            match = pattern.match(norm) if leaf in _BATCH_NORM_LEAVES else None
            if match and f"{conv.format(*match.groups())}.weight" in state:
                found[norm] = conv.format(*match.groups()), folded.format(*match.groups())
        if norm not in found and (leaf.startswith("running_") or (leaf == "weight" and norm.endswith(".bn"))):
            raise KeyError(f"{norm.rpartition('.')[0]}.conv.weight")
    followed = {conv for conv, _ in found.values()}
    for key in state:
        conv = key.removesuffix(".weight")
        for pattern, norm in _NEED_ONE:
            if conv not in followed and (match := pattern.match(conv)):
                raise KeyError(norm.format(*match.groups()))
    return found


def _fold(state: State, norm: str, conv: str, folded: str) -> None:
    for leaf in _BATCH_NORM_LEAVES:
        if f"{norm}.{leaf}" not in state:
            raise KeyError(f"{norm}.{leaf}")
    scale, shift, mean, variance = (state.pop(f"{norm}.{leaf}") for leaf in _BATCH_NORM_LEAVES)
    weight, bias = state.pop(f"{conv}.weight"), state.pop(f"{conv}.bias", None)
    out = weight.shape[:1]
    for name, tensor in (("weight", scale), ("bias", shift), ("running_mean", mean), ("running_var", variance)):
        if tensor.shape != out:
            raise ValueError(f"{norm}.{name} must have shape {tuple(out)} like {conv}, got {tuple(tensor.shape)}")
    if bias is not None and bias.shape != out:
        raise ValueError(f"{conv}.bias must have shape {tuple(out)}, got {tuple(bias.shape)}")
    state[f"{folded}.weight"] = Deferred(weight.shape, fold_weight, weight, scale, variance)
    sources = (scale, variance, mean, shift) if bias is None else (scale, variance, mean, shift, bias)
    state[f"{folded}.bias"] = Deferred(out, fold_bias, *sources)


def _then(value: Tensor | Deferred, shape: tuple[int, ...], change) -> Deferred:
    """`change` done to a tensor once it is wanted."""
    if isinstance(value, Deferred):
        return Deferred(shape, lambda *sources: change(value.make(*sources)), *value.sources)
    return Deferred(shape, change, value)


def canonical_eradio(state: Mapping[str, Tensor]) -> State:
    """An E-RADIO's tensors under this package's names, every BatchNorm folded into the convolution before it.

    Convolutions that are matrix products become linear layers' weights: 1 × 1 ones, and those of kernel and stride 2
    that change an attention block's resolution; their 2 × 2 positions become channels, ordered (row, column, channel).

    Raises:
        KeyError: a BatchNorm without its convolution, or without one of its tensors.
        ValueError: shapes that contradict each other.
    """
    out: State = {_GAMMA.sub(r".ls\1.gamma", key): value for key, value in state.items() if not _UNUSED.search(key)}
    for norm, (conv, folded) in _batch_norms(out).items():
        _fold(out, norm, conv, folded)
    for key, value in list(out.items()):
        shape = tuple(value.shape)
        if key.endswith(("sample_op.weight",)) and len(shape) == 4 and shape[2:] == (2, 2):
            if key.endswith(".downsample_op.weight"):
                out[key] = _then(value, (shape[0], 4 * shape[1]), lambda w: w.permute(0, 2, 3, 1).flatten(1))
            else:  # a transposed convolution's weight is (in, out, 2, 2)
                out[key] = _then(value, (4 * shape[1], shape[0]), lambda w: w.permute(2, 3, 1, 0).flatten(0, 2))
        elif key.endswith(".upsample_op.bias") and len(shape) == 1:
            out[key] = _then(value, (4 * shape[0],), lambda b: b.repeat(4))
        elif key.endswith(".weight") and len(shape) == 4 and shape[2:] == (1, 1):
            out[key] = _then(value, shape[:2], lambda w: w.flatten(1))
    return out
