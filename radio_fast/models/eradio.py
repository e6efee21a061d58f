"""The whole forward of E-RADIO: convolutions at high resolution, windowed attention at low, a neck over both.

Maps are (B, H, W, C) throughout, torch's channels-last format: linear layers, norms, attention and convolutions all
read them in place. BatchNorms are folded into the convolutions while loading (`eradio_weights.canonical_eradio`).
"""

from __future__ import annotations

import math
import operator
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from radio_fast import ops
from radio_fast.layers.block import Block
from radio_fast.layers.conv import Conv
from radio_fast.layers.mlp import Linear, Mlp
from radio_fast.layers.norm import LayerNorm
from radio_fast.layers.window_attention import WindowAttention
from radio_fast.models.backbone import Backbone
from radio_fast.models.eradio_spec import AttentionSpec, ConvSpec, ERADIOSpec, LevelSpec
from radio_fast.ops.window_attention import MAX_WINDOW

STEP = 32  # pixels: the last level's positions
LARGEST_OPTIMAL = 16


def make_conv(spec: ConvSpec, activation: str | None = None) -> Conv:
    return Conv(spec.in_channels, spec.out_channels, spec.kernel_size, spec.stride, spec.groups, activation=activation)


def pixel_unshuffle(x: Tensor, r: int) -> Tensor:
    """(B, H, W, C) → (B, H/r, W/r, C·r²), channels ordered (C, row, column)."""
    return x if r == 1 else F.pixel_unshuffle(x.permute(0, 3, 1, 2), r).permute(0, 2, 3, 1)


def positions_to_channels(x: Tensor) -> Tensor:
    """(B, H, W, C) → (B, H/2, W/2, 2·2·C), channels ordered (row, column, C)."""
    B, H, W, C = x.shape
    return x.reshape(B, H // 2, 2, W // 2, 2, C).transpose(2, 3).reshape(B, H // 2, W // 2, 4 * C)


def resize_nearest(x: Tensor, height: int, width: int) -> Tensor:
    """Nearest-neighbour resize of a map, the identity where it has that size."""
    if x.shape[1:3] == (height, width):
        return x
    return F.interpolate(x.permute(0, 3, 1, 2), size=(height, width), mode="nearest").permute(0, 2, 3, 1)


def repeat_positions(x: Tensor, ratio: int) -> Tensor:
    """Nearest up-sampling by a whole number."""
    return resize_nearest(x, ratio * x.shape[1], ratio * x.shape[2])


class Stem(nn.Module):
    """Two convolutions 3 × 3 of stride 2 with ReLU: a quarter of the image's sides."""

    def __init__(self, convs: tuple[ConvSpec, ...]):
        super().__init__()
        self.shuffle = convs[0].shuffle
        # Numbered as in checkpoints, where the activations take the odd numbers.
        self.conv_down = nn.ModuleDict({str(2 * i): make_conv(conv, "relu") for i, conv in enumerate(convs)})

    def forward(self, x: Tensor) -> Tensor:
        x = pixel_unshuffle(x, self.shuffle)
        for conv in self.conv_down.values():
            x = conv(x)
        return x


class ConvPair(nn.Module):
    """x + conv(act(conv(x))), the activation after the second one too where `last` names it."""

    def __init__(self, convs: tuple[ConvSpec, ConvSpec], names: tuple[str, str], activation: str, last: str | None):
        super().__init__()
        self.names = names
        self.add_module(names[0], make_conv(convs[0], activation))
        self.add_module(names[1], make_conv(convs[1], last))

    def forward(self, x: Tensor) -> Tensor:
        first, second = (getattr(self, name) for name in self.names)
        return x + second(first(x))


class C2f(nn.Module):
    """YOLOv8's: both halves of cv1 x and every bottleneck's output, chained from the second half, go through cv2."""

    def __init__(self, spec: LevelSpec):
        super().__init__()
        width, count = spec.c2f_width, len(spec.c2f)
        self.width = width
        self.cv1 = Linear(spec.dim, 2 * width, activation="silu")
        self.m = nn.ModuleList(ConvPair(convs, ("cv1", "cv2"), "silu", "silu") for convs in spec.c2f)
        self.cv2 = Linear((2 + count) * width, spec.dim, activation="silu")

    def forward(self, x: Tensor) -> Tensor:
        both = self.cv1(x)
        parts, y = [both], both[..., self.width :]
        for bottleneck in self.m:
            y = bottleneck(y)
            parts.append(y)
        return self.cv2(torch.cat(parts, dim=-1))


class AttentionBlock(Block):
    """0.5·x + 0.5·y, y: transformer block inside windows, at the map's resolution or at half of it.

    At the map's resolution a convolution is added first. Half of it is reached by a convolution 2 × 2 of stride 2, and
    left by a transposed one; or by pooling and a 1 × 1 convolution, and left by another and repeated positions.
    """

    def __init__(self, spec: AttentionSpec):
        dim, activation = spec.dim, "swiglu" if spec.swiglu else "gelu"
        super().__init__(
            LayerNorm(dim, 1e-5),
            WindowAttention(dim, spec.num_heads, spec.window, spec.qkv_bias, spec.proj_bias),
            LayerNorm(dim, 1e-5),
            Mlp(dim, spec.mlp_hidden, activation=activation, bias=spec.mlp_bias),
        )
        self.backend = "auto"
        self.spec = spec
        self.pre_conv = make_conv(spec.pre_conv) if spec.pre_conv else None
        if spec.conv_base:
            self.downsample_op = Linear(4 * dim, dim)
            self.upsample_op = Linear(dim, 4 * dim)
        elif spec.sr_ratio == 2:
            self.downsample_mixer = Linear(dim, dim)
            self.upsample_mixer = Linear(dim, dim)

    def forward(self, x: Tensor, window: int | None) -> Tensor:
        attend = super().forward
        if self.spec.conv_base:
            y = self.upsample_op(attend(self.downsample_op(positions_to_channels(x)), window))
        elif self.spec.sr_ratio == 2:
            pooled = F.avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
            # A 1 × 1 convolution before repeating the positions gives what it gives after, at a quarter of the work.
            y = repeat_positions(self.upsample_mixer(attend(self.downsample_mixer(pooled), window)), 2)
        else:
            y = attend(x, window, None if self.pre_conv is None else self.pre_conv(x))
        return ops.blend(y, x, backend=self.backend)


class AttentionChain(nn.Module):
    """Attention blocks one after the other, one for each resolution."""

    def __init__(self, specs: tuple[AttentionSpec, ...]):
        super().__init__()
        self.attention_blocks = nn.ModuleList(AttentionBlock(spec) for spec in specs)

    def forward(self, x: Tensor, window: int | None) -> Tensor:
        for block in self.attention_blocks:
            x = block(x, window)
        return x


class Downsample(nn.Module):
    """A convolution 3 × 3 of stride 2 that doubles the channels."""

    def __init__(self, spec: ConvSpec):
        super().__init__()
        self.shuffle = spec.shuffle
        self.reduction = make_conv(spec)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(pixel_unshuffle(x, self.shuffle))


class Level(nn.Module):
    """The blocks of one resolution, and the way down to the next.

    Attention runs on a map whose sides are multiples of the largest window times the largest resolution ratio; any
    other map is resized to the next such size before the blocks and back after them.
    """

    def __init__(self, spec: LevelSpec):
        super().__init__()
        attention = [block for chain in spec.chains for block in chain]
        self.built_window = max((block.window for block in attention), default=0)  # 0: convolutions only
        self.sr_ratio = max((block.sr_ratio for block in attention), default=1)
        if spec.c2f_width:
            self.blocks = C2f(spec)
        else:
            pairs = [ConvPair(convs, ("conv1", "conv2"), "gelu", None) for convs in spec.convs]
            self.blocks = nn.ModuleList(pairs + [AttentionChain(chain) for chain in spec.chains])
        self.downsample = Downsample(spec.downsample) if spec.downsample else None

    def step(self, window: int | None) -> int:
        """What the sides of an attention level's map must be multiples of."""
        return (window or self.built_window) * self.sr_ratio

    def forward(self, x: Tensor, window: int | None) -> tuple[Tensor, Tensor | None]:
        """(this level's output, the next level's input)."""
        if isinstance(self.blocks, C2f):
            x = self.blocks(x)
        elif self.built_window:
            H, W = x.shape[1:3]
            step = self.step(window)
            x = resize_nearest(x, -(-H // step) * step, -(-W // step) * step)
            for chain in self.blocks:
                x = chain(x, window)
            x = resize_nearest(x, H, W)
        else:
            for pair in self.blocks:
                x = pair(x)
        return x, None if self.downsample is None else self.downsample(x)


class NeckProjection(nn.Module):
    """Depthwise 3 × 3 convolution of the map at `ratio` times its size, then a linear layer, added to `other`."""

    def __init__(self, dim: int, width: int, ratio: int):
        super().__init__()
        self.ratio = ratio
        self.conv1 = Conv(dim, dim, 3, groups=dim)
        self.conv2 = Linear(dim, width)

    def forward(self, x: Tensor, other: Tensor | None) -> Tensor:
        x = repeat_positions(x, self.ratio)
        if other is not None:  # an odd number of positions grew by one on its way down and up; it never shrinks
            x = x[:, : other.shape[1], : other.shape[2]]
        return self.conv2(self.conv1(x), other)


class Neck(nn.Module):
    """The sum of the last levels' maps, each projected to the features' width at the first one's resolution."""

    def __init__(self, dims: tuple[int, ...], width: int):
        super().__init__()
        self.neck_features_proj = nn.ModuleList(NeckProjection(dim, width, 2**i) for i, dim in enumerate(dims))

    def forward(self, maps: list[Tensor]) -> Tensor:
        y = None
        for project, x in zip(self.neck_features_proj, maps, strict=True):
            y = project(x, y)
        return y


class ERADIO(Backbone):
    """Image (B, 3, H, W) → features (B, H/16 · W/16, F), row by row; H and W multiples of 32.

    The windows of the attention levels shape the result, so they stay as built (16 in the release) until
    `set_optimal_window_size`, `change_window_size` or `follow_image_size` is called; `attention_window` tells.
    """

    summary_tokens = (0,)

    def __init__(self, spec: ERADIOSpec):
        super().__init__()
        self.spec = spec
        self.embed_dim = spec.embed_dim
        self.num_prefix = 0
        self.patch_embed = Stem(spec.stem)
        self.levels = nn.ModuleList(Level(level) for level in spec.levels)
        self.high_res_neck = Neck(spec.neck_dims, spec.embed_dim)
        self._window: int | str | None = None
        self._steps: dict[int | None, int] = {}  # by window: what images' sides must be multiples of not to be resized
        self._warned: set[int | None] = set()

    # -- windows ----------------------------------------------------------------------------------------------------

    @property
    def attention_window(self) -> int | str | None:
        """The windows asked for: None, as built; a number of positions; or "optimal"."""
        return self._window

    def change_window_size(self, window_size: int) -> None:
        """Attend inside windows of this many positions a side, 1…32, in all attention levels."""
        if isinstance(window_size, bool) or not hasattr(window_size, "__index__") or not 1 <= window_size <= MAX_WINDOW:
            raise ValueError(f"window_size must be a number of positions in 1…{MAX_WINDOW}, got {window_size!r}")
        self._window = int(window_size)

    def set_optimal_window_size(self, image_dim: tuple[int, int]) -> None:
        """Take the window that suits images of (height, width) pixels.

        It is the largest divisor, up to 16, of n = min(height, width) // 32, the last level's shorter side.
        """
        try:
            height, width = (operator.index(side) for side in image_dim)
        except (TypeError, ValueError):
            raise ValueError(f"image_dim must be (height, width) in pixels, got {image_dim!r}") from None
        self._window = optimal_window(height, width)

    def follow_image_size(self) -> None:
        """From now on, for each image the window that `set_optimal_window_size` would set for its size."""
        self._window = "optimal"

    def _window_for(self, H: int, W: int) -> int | None:
        window = optimal_window(H, W) if self._window == "optimal" else self._window
        if window not in self._warned and not torch.compiler.is_compiling():
            if window not in self._steps:
                self._steps[window] = self._image_step(window)
            step = self._steps[window]
            if H % step or W % step:
                self._warned.add(window)
                self._warn_of_resizing(window, step, H, W)
        return window

    def _image_step(self, window: int | None) -> int:
        """Pixels whose multiples, as an image's sides, need no resizing of maps for this window."""
        steps = [level.step(window) * 4 << i for i, level in enumerate(self.levels) if level.built_window]
        return math.lcm(STEP, *steps)

    def _warn_of_resizing(self, window: int | None, step: int, H: int, W: int) -> None:
        shown = window or max(level.built_window for level in self.levels)
        near = " × ".join(str(max(round(side / step), 1) * step) for side in (H, W))
        fitting = (k for k in range(LARGEST_OPTIMAL, 0, -1) if math.gcd(H, W) % self._image_step(k) == 0)
        instead = "".join(
            f"a window of {k} (model.model.change_window_size) would fit this one; " for k in [*fitting][:1]
        )
        warnings.warn(
            f"attention windows of {shown} × {shown} don't fit the maps of a {H} × {W} image: they are resized to what "
            f"does, and back, which takes time and blurs. {instead}images of {near} would need no resizing",
            stacklevel=12,  # the call of the model
        )

    # -- forward ----------------------------------------------------------------------------------------------------

    @property
    def min_resolution_step(self) -> int:
        return STEP

    @property
    def step_reason(self) -> str:
        return "E-RADIO's last level"

    def autocast_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of the features stands for a prefix token."""
        return tokens.mean(dim=1, keepdim=True), tokens

    def forward(self, image: Tensor, conditioner: nn.Module | None = None, dtype: torch.dtype | None = None) -> Tensor:
        window = self._window_for(*image.shape[2:])
        x = image if conditioner is None else conditioner(image)
        x = x.to(dtype or self.patch_embed.conv_down["0"].weight.dtype).permute(0, 2, 3, 1)
        x = self.patch_embed(x)
        maps = []
        for level in self.levels:
            y, x = level(x, window)
            maps.append(y)
        taken = len(self.spec.neck_dims)
        return self.high_res_neck(maps[-taken:]).flatten(1, 2)


def optimal_window(height: int, width: int) -> int:
    """The largest divisor, up to 16, of min(height, width) / 32.

    Raises:
        ValueError: no image that E-RADIO takes is so small.
    """
    n = min(height, width) // STEP
    if n < 1:
        raise ValueError(f"image sides must be {STEP} pixels or more, got {height} × {width}")
    return next(k for k in range(LARGEST_OPTIMAL, 0, -1) if n % k == 0)
