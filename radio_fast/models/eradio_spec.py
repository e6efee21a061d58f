"""What an E-RADIO checkpoint's tensors say about its structure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor

from radio_fast.models.deferred import Deferred
from radio_fast.ops.window_attention import MAX_WINDOW

State = dict[str, "Tensor | Deferred"]
MAX_DEPTH = 16  # parts of a name that are looked at; E-RADIO's have 10


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


class Tree:
    """A backbone's tensors by the modules they belong to: each key is looked at once, however many there are."""

    def __init__(self, state: State):
        self.state = state
        self.leaves: dict[str, set[str]] = {}  # module: what lies below it
        self.numbers: dict[str, set[int]] = {}  # module: the numbered ones directly below it
        for key in state:
            parts = key.split(".")[:MAX_DEPTH]
            for depth in range(1, len(parts)):
                module = ".".join(parts[:depth])
                self.leaves.setdefault(module, set()).add(key[len(module) + 1 :])
                if re.fullmatch(r"\d{1,9}", parts[depth]):
                    self.numbers.setdefault(module, set()).add(int(parts[depth]))

    def __contains__(self, key: str) -> bool:
        return key in self.state

    def children(self, module: str) -> int:
        """How many modules are numbered under it.

        Raises:
            KeyError: a number is left out.
        """
        numbers = self.numbers.get(module, set())
        for expected, number in enumerate(sorted(numbers)):
            if number != expected:
                raise KeyError(f"{module}.{expected}.*")
        return len(numbers)

    def shape(self, key: str, ndim: int) -> tuple[int, ...]:
        if key not in self.state:
            raise KeyError(key)
        shape = tuple(self.state[key].shape)
        if len(shape) != ndim or 0 in shape:
            raise ValueError(f"{key} must have {ndim} dimensions and no empty one, got shape {shape}")
        return shape

    def alike(self, modules: list[str]) -> None:
        """All of the modules have the same tensors, of which none may be missing in one.

        Raises:
            KeyError: one is.
        """
        everything = set().union(*(self.leaves.get(module, set()) for module in modules))
        for module in modules:
            for leaf in sorted(everything - self.leaves.get(module, set())):
                raise KeyError(f"{module}.{leaf}")


def _conv(tree: Tree, name: str, channels: int, stride: int = 1, shuffle: int = 1, out: int | None = None) -> ConvSpec:
    """The convolution `name` on a map of `channels`, `shuffle`² times as many after its shuffling, to `out` of them."""
    rows, per_group, kernel, other = tree.shape(f"{name}.weight", 4)
    channels *= shuffle**2
    if kernel != other or kernel % 2 == 0:
        raise ValueError(f"{name}.weight must have a square kernel with an odd side, got {kernel} × {other}")
    if channels % per_group or rows % (channels // per_group):
        raise ValueError(
            f"{name}.weight, {(rows, per_group, kernel, other)}, does not fit a map of {channels} channels"
        )
    if out is not None and rows != out:
        raise ValueError(f"{name}.weight must give the {out} channels it is added to, got {rows}")
    if f"{name}.bias" not in tree:
        raise KeyError(f"{name}.bias")
    return ConvSpec(channels, rows, kernel, stride, channels // per_group, shuffle)


def _stem(tree: Tree) -> tuple[ConvSpec, ...]:
    """Convolutions that divide the image's sides by 4, together with the shuffling that the first one's width shows."""
    stem = "patch_embed.conv_down"
    names = sorted(number for number in tree.numbers.get(stem, ()) if f"{stem}.{number}.weight" in tree)
    if not names:
        raise KeyError(f"{stem}.0.conv.weight")
    inputs = tree.shape(f"{stem}.{names[0]}.weight", 4)[1]
    shuffle = {3: 1, 12: 2, 48: 4}.get(inputs)
    if shuffle is None:
        raise ValueError(f"the stem's first convolution must take 3, 12 or 48 channels, got {inputs}")
    convs, channels, left = [], 3, 4 // shuffle
    for name in names:
        stride = min(left, 2)
        left //= stride
        convs.append(_conv(tree, f"{stem}.{name}", channels, stride, 1 if convs else shuffle))
        channels = convs[-1].out_channels
    if left > 1:
        raise ValueError(f"the stem must divide the image's sides by 4, its {len(names)} convolutions can't")
    return tuple(convs)


def _attention(tree: Tree, name: str, dim: int) -> AttentionSpec:
    side = tree.shape(f"{name}.attn.pos_emb_funct.relative_coords_table", 4)[1]
    heads, _ = tree.shape(f"{name}.attn.pos_emb_funct.cpb_mlp.2.weight", 2)
    _, hidden = tree.shape(f"{name}.mlp.fc2.weight", 2)
    expanded, _ = tree.shape(f"{name}.mlp.fc1.weight", 2)
    window = (side + 1) // 2
    if window > MAX_WINDOW or dim % heads:
        raise ValueError(
            f"{name}: windows may have 1…{MAX_WINDOW} positions a side and heads must divide the width, "
            f"got {window}, and {heads} heads for {dim} channels"
        )
    down, up = (f"{name}.downsample_{{}}.weight", f"{name}.upsample_{{}}.weight")
    conv_base, pool = (down.format(kind) in tree or up.format(kind) in tree for kind in ("op", "mixer"))
    pre_conv = None
    if f"{name}.pre_conv.weight" in tree and not (pool or conv_base):
        pre_conv = _conv(tree, f"{name}.pre_conv", dim, out=dim)
    return AttentionSpec(
        dim=dim,
        num_heads=heads,
        window=window,
        mlp_hidden=hidden,
        sr_ratio=2 if pool or conv_base else 1,
        conv_base=conv_base,
        pre_conv=pre_conv,
        swiglu=expanded == 2 * hidden,
        qkv_bias=f"{name}.attn.qkv.bias" in tree,
        proj_bias=f"{name}.attn.proj.bias" in tree,
        mlp_bias=(f"{name}.mlp.fc1.bias" in tree, f"{name}.mlp.fc2.bias" in tree),
    )


def _level(tree: Tree, name: str, dim: int, last: bool) -> LevelSpec:
    blocks = f"{name}.blocks"
    c2f, width, convs, chains = [], 0, [], []
    if f"{blocks}.cv1.weight" in tree:
        width, odd = divmod(tree.shape(f"{blocks}.cv1.weight", 2)[0], 2)
        if odd:
            raise ValueError(f"{blocks}.cv1.weight must have an even number of rows, it is split in halves")
        for i in range(tree.children(f"{blocks}.m")):
            first = _conv(tree, f"{blocks}.m.{i}.cv1", width)
            c2f.append((first, _conv(tree, f"{blocks}.m.{i}.cv2", first.out_channels, out=width)))
    else:
        names = [f"{blocks}.{i}" for i in range(tree.children(blocks))]
        if not names:
            raise KeyError(f"{blocks}.0.*")
        tree.alike(names)
        for block in names:
            if f"{block}.conv1.weight" in tree:
                first = _conv(tree, f"{block}.conv1", dim)
                convs.append((first, _conv(tree, f"{block}.conv2", first.out_channels, out=dim)))
            else:
                count = tree.children(f"{block}.attention_blocks")
                if not count:
                    raise KeyError(f"{block}.attention_blocks.0.*")
                chains.append(tuple(_attention(tree, f"{block}.attention_blocks.{j}", dim) for j in range(count)))
    downsample = None
    if f"{name}.downsample.reduction.weight" in tree and not last:
        inputs = tree.shape(f"{name}.downsample.reduction.weight", 4)[1]
        shuffle = 2 if inputs == 4 * dim else 1
        downsample = _conv(tree, f"{name}.downsample.reduction", dim, 2 // shuffle, shuffle)
    return LevelSpec(dim, tuple(c2f), tuple(convs), tuple(chains), width, downsample)


# What every attention block of a model has, or none.
_ALL_OR_NONE = ("attn.qkv.bias", "attn.proj.bias", "mlp.fc1.bias", "mlp.fc2.bias", "ls1.gamma", "ls2.gamma")


def eradio_spec(arch: str, state: State, summary_idxs: tuple[int, ...]) -> ERADIOSpec:
    """Read the structure off a backbone's tensors (in this package's names).

    Raises:
        KeyError: a tensor that every E-RADIO has is missing, or one that its siblings have; its name is the error's
            argument.
        ValueError: the tensors contradict each other.
    """
    tree = Tree(state)
    stem = _stem(tree)
    levels: list[LevelSpec] = []
    dim = stem[-1].out_channels
    count = tree.children("levels")
    for i in range(count):
        levels.append(_level(tree, f"levels.{i}", dim, last=i + 1 == count))
        downsample = levels[-1].downsample
        if downsample is None and i + 1 < count:
            raise KeyError(f"levels.{i}.downsample.reduction.conv.weight")
        dim = downsample.out_channels if downsample else dim
    attention = [
        f"levels.{i}.blocks.{j}.attention_blocks.{k}"
        for i, level in enumerate(levels)
        for j, chain in enumerate(level.chains)
        for k in range(len(chain))
    ]
    for leaf in _ALL_OR_NONE:
        lacking = [name for name in attention if f"{name}.{leaf}" not in tree]
        if lacking and len(lacking) < len(attention):
            raise KeyError(f"{lacking[0]}.{leaf}")
    projections = "high_res_neck.neck_features_proj"
    taken = tree.children(projections)
    if not 1 <= taken <= count:
        raise KeyError(f"{projections}.{taken}.conv1.weight")
    return ERADIOSpec(
        arch=arch,
        stem=stem,
        levels=tuple(levels),
        neck_dims=tuple(level.dim for level in levels[-taken:]),
        embed_dim=tree.shape(f"{projections}.0.conv2.weight", 2)[0],
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
