"""A model's tensors between file and module: names, folding, checks, and the way into an empty module."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from radio_fast.errors import CheckpointError
from radio_fast.models.deferred import Deferred
from radio_fast.models.eradio_spec import ERADIOSpec, eradio_spec
from radio_fast.models.eradio_weights import canonical_eradio, is_eradio
from radio_fast.models.spec import ViTSpec, prefix_layout, spec_of_state

State = dict[str, "Tensor | Deferred"]
STORED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# What every block of a model has, or none.
_ALL_OR_NONE = ("attn.qkv.bias", "ls1.gamma", "ls2.gamma", "mlp.norm.weight", "norm1.alpha")


@dataclass
class ModelState:
    """What any file format is read into: tensors under this package's names and the arguments they came with."""

    arch: str
    args: Mapping[str, Any]
    backbone: State
    conditioner: State = field(default_factory=dict)
    heads: dict[str, tuple[State, State]] = field(default_factory=dict)  # teacher: (summary head, feature head)
    feature_normalizer: State = field(default_factory=dict)
    inter_feature_normalizer: State = field(default_factory=dict)
    fixed_size: bool = False  # a plain timm ViT, without CPE
    share: bool = False  # the tensors are a living model's: kept where nothing has to be folded or cast, and all used
    layout: tuple[int, int, tuple[int, ...]] | None = None  # cls tokens, registers, summary indices; None: from args
    # What a Hugging Face folder's config says beside the weights.
    default_adaptors: tuple[str, ...] = ()
    version: str | None = None
    max_resolution: int | None = None
    preferred_resolution: tuple[int, int] | None = None
    vitdet_window_size: int | None = None

    def spec(self) -> ViTSpec | ERADIOSpec:
        """The structure of the backbone.

        Raises:
            CheckpointError: a tensor is missing, or tensors and arguments contradict each other.
        """
        try:
            num_cls, num_registers, summary_idxs = self.layout or prefix_layout(self.args)
            if is_eradio(self.arch, self.backbone):
                return eradio_spec(self.arch, self.backbone, summary_idxs)
            stored = self.backbone.get("patch_generator.cls_token.token")
            if stored is not None:
                if stored.ndim != 2 or stored.shape[0] < num_cls:
                    raise ValueError(
                        f"patch_generator.cls_token.token must hold at least the {num_cls} cls tokens that the "
                        f"teachers ask for, got shape {tuple(stored.shape)}"
                    )
                num_registers = stored.shape[0] - num_cls
            layout = (num_cls, num_registers, summary_idxs)
            args = self.args
            spec = spec_of_state(
                self.backbone, self.arch, args["model_kwargs"], bool(args["model_norm"]), layout, self.fixed_size
            )
            for leaf in _ALL_OR_NONE:
                having = [f"blocks.{i}.{leaf}" in self.backbone for i in range(spec.depth)]
                if any(having) and not all(having):
                    raise KeyError(f"blocks.{having.index(False)}.{leaf}")
            return spec
        except KeyError as error:
            raise missing_tensor(str(error.args[0])) from None
        except (ValueError, IndexError) as error:
            raise CheckpointError(f"the checkpoint's backbone makes no sense: {error}") from error


def missing_tensor(key: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint lacks the backbone tensor {key!r}: it would run on random numbers. The file is incomplete or "
        f"not a RADIO model"
    )


# -- names ----------------------------------------------------------------------------------------------------

# Tensors that are there for training, or for inputs other than images.
_UNUSED = re.compile(r"^(mask_token$|head\.|patch_generator\.video_embedder\.)")


def canonical_backbone(state: Mapping[str, Tensor], arch: str) -> tuple[State, bool]:
    """Backbone tensors under this package's names, and whether they are a plain timm ViT's (no CPE).

    The DINOv2 student sits under `inner.`; LayerScale is `gamma` or `grandma`; a plain timm ViT has a convolution for
    the patches, and one position more, the cls token's, which is added to that token here.
    """
    if is_eradio(arch, state):
        try:
            return canonical_eradio(state), False
        except KeyError as error:
            raise missing_tensor(str(error.args[0])) from None
        except ValueError as error:
            raise CheckpointError(f"the checkpoint's backbone makes no sense: {error}") from error
    out = {}
    for key, value in state.items():
        key = key.removeprefix("inner.").replace(".grandma", ".gamma")
        if not _UNUSED.match(key):
            out[key] = value
    plain = "patch_embed.proj.weight" in out
    if plain:
        for key in ("cls_token", "pos_embed"):
            if key not in out:
                raise missing_tensor(key)
        cls_token, positions = out.pop("cls_token"), out.pop("pos_embed")
        projection = out.pop("patch_embed.proj.weight")
        width = projection.shape[0] if projection.ndim == 4 else None
        if cls_token.shape != (1, 1, width) or positions.ndim != 3 or positions.shape[::2] != (1, width):
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (projection, cls_token, positions))
            raise CheckpointError(
                f"a plain ViT's patch_embed.proj.weight, cls_token and pos_embed must be of shape (D, 3, p, p), "
                f"(1, 1, D) and (1, T + 1, D), got {shapes}"
            )
        out["patch_generator.embedder.weight"] = projection.flatten(1)
        if "patch_embed.proj.bias" in out:
            out["patch_generator.embedder.bias"] = out.pop("patch_embed.proj.bias")
        out["patch_generator.cls_token.token"] = cls_token[0] + positions[0, :1]
        out["patch_generator.pos_embed"] = positions[:, 1:]
    return out, plain


# -- spectral reparametrisation -------------------------------------------------------------------------------


def _spectral_weight(matrix: Tensor, v: Tensor, scale: Tensor, eps: float) -> Tensor:
    """matrix · scale / (uᵀ·matrix·v + eps), u and v after one more step of power iteration, in float32."""
    u = F.normalize(matrix @ v.float(), dim=0, eps=eps)
    v = F.normalize(matrix.T @ u, dim=0, eps=eps)
    return matrix * (scale / (u @ matrix @ v + eps))


def _spectral_part(group: State, prefix: str, columns: int) -> tuple[Tensor, Tensor]:
    """(v, the factor) of one of a parametrisation's matrices."""
    v, scale = group[f"{prefix}_v"], group[f"{prefix}scale"].float()
    if v.shape != (columns,) or scale.numel() != 1:
        raise ValueError(f"_v {tuple(v.shape)} and scale {tuple(scale.shape)} of {columns} columns")
    version = group.get(f"{prefix}_sn_version")
    return v, F.softplus(scale) + 0.05 if version is not None and version.item() == 2 else scale


def fold_spectral(state: State, eps: float) -> State:
    """Replace `X.parametrizations.weight.*` by the weight `X.weight` that they describe, made when it is wanted.

    Raises:
        CheckpointError: a parametrisation lacks a tensor or is of another kind.
    """
    marker = ".parametrizations.weight."
    out: State = {}
    groups: dict[str, State] = {}
    for key, value in state.items():
        layer, found, rest = key.partition(marker)
        if found:
            groups.setdefault(layer, {})[rest] = value
        else:
            out[key] = value
    for layer, group in groups.items():
        try:
            original = group["original"]
            parts = sorted({m[1] for key in group if (m := re.match(r"0\.parts\.(\d+)\.", key))}, key=int)
            prefixes = [f"0.parts.{n}." for n in parts] or ["0."]
            if original.ndim != 2 or original.shape[0] % len(prefixes):
                raise ValueError(f"{tuple(original.shape)} in {len(prefixes)} parts")
            values = [value for prefix in prefixes for value in _spectral_part(group, prefix, original.shape[1])]
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{layer}: its weight parametrisation is not a spectral one ({error})") from error

        def make(original: Tensor, *values: Tensor) -> Tensor:
            chunks = original.float().chunk(len(values) // 2)
            pairs = zip(values[::2], values[1::2], strict=True)
            return torch.cat([_spectral_weight(c, *pair, eps) for c, pair in zip(chunks, pairs, strict=True)])

        out[f"{layer}.weight"] = Deferred(original.shape, make, original, *values)
    return out


# -- LayerScale -----------------------------------------------------------------------------------------------

_LAYER_SCALE = re.compile(r"^(.*)ls([12])\.gamma$")
_SCALED = {"1": ("attn.proj",), "2": ("mlp.fc2", "mlp.w3")}


def fold_layer_scale(state: State) -> State:
    """γ·(W·x + b) = (γ·W)·x + γ·b: every LayerScale goes into the layer before it, in float32, rounded once.

    In float16 a row with a small γ loses digits below 2⁻²⁴. They are those of a sum that is added to the residual
    stream, whose own rounding is larger by the factor that γ is small.

    Raises:
        KeyError: the layer before a LayerScale, or the other one of its block, is missing; its name is the error's
            argument.
        ValueError: a factor of another shape than its layer's output, or no numbers.
    """
    out = dict(state)
    for key in state:
        found = _LAYER_SCALE.match(key)
        if not found:
            continue
        block, number = found.groups()
        other = f"{block}ls{3 - int(number)}.gamma"
        if other not in state:
            raise KeyError(other)
        layers = [f"{block}{layer}" for layer in _SCALED[number]]
        layer = next((layer for layer in layers if f"{layer}.weight" in state), None)
        if layer is None:
            raise KeyError(f"{layers[0]}.weight")
        gamma, weight = out.pop(key), out[f"{layer}.weight"]
        if gamma.dtype not in STORED_DTYPES or gamma.shape != weight.shape[:1]:
            raise ValueError(
                f"{key} must be {weight.shape[0]} floating-point factors, got {gamma.dtype} {tuple(gamma.shape)}"
            )
        out[f"{layer}.weight"] = Deferred.then(weight, weight.shape, _scale_rows, gamma)
        if f"{layer}.bias" in out:
            bias = out[f"{layer}.bias"]
            out[f"{layer}.bias"] = Deferred.then(bias, bias.shape, _scale_rows, gamma)
    return out


def _scale_rows(weight: Tensor, gamma: Tensor) -> Tensor:
    return weight.float() * gamma.float().view(-1, *[1] * (weight.ndim - 1))


# -- into the module ------------------------------------------------------------------------------------------


def fill(
    module: nn.Module,
    state: State,
    where: str,
    device: torch.device,
    dtype: torch.dtype | None,
    release: Callable[[Tensor], None] = lambda tensor: None,
    share: bool = False,
) -> None:
    """Give a module built on the meta device its tensors, each copied once to `device` as `dtype` (None: as it is).

    `state` is emptied on the way and `release` called for each tensor that has been copied, so that at no time two
    copies of the whole model exist. With `share` no tensor is copied that is on `device`, in `dtype` and contiguous.

    Raises:
        CheckpointError: a tensor is missing or has another shape. Unexpected ones get a warning, or are refused with
            `share`: a living model would not have them for nothing.
    """
    wanted = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, empty in wanted.items():
        value = state.pop(name, None)
        if value is None:
            raise missing_tensor(f"{where}{name}") if not where else CheckpointError(f"{where}{name} is missing")
        if value.shape != empty.shape:
            raise CheckpointError(
                f"{where}{name} has shape {tuple(value.shape)} in the checkpoint, expected {tuple(empty.shape)}"
            )
        if value.dtype not in STORED_DTYPES:
            raise CheckpointError(
                f"{where}{name} is stored as {value.dtype}; weights must be float16, bfloat16 or float32"
            )
        owner_name, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        kept = value.dtype
        stored = value.sources if isinstance(value, Deferred) else (value,)
        try:
            value = value() if isinstance(value, Deferred) else value
        except ValueError as error:
            raise CheckpointError(f"{where}{name}: {error}") from None
        layout = getattr(owner, "weight_format", None) if value.ndim == 4 else None
        own = torch.float32 if leaf in getattr(owner, "float32", ()) else dtype or kept
        # What folding has made is no one else's: copied again, the largest weight would exist three times.
        shared = any(value.untyped_storage().data_ptr() == t.untyped_storage().data_ptr() for t in stored)
        copied = value.detach().to(
            device=device, dtype=own, copy=shared and not share, memory_format=layout or torch.contiguous_format
        )
        if share and layout is None:
            copied = copied.contiguous()  # `to` leaves a transposed matrix as it is
        for tensor in stored:
            release(tensor)
        if isinstance(empty, nn.Parameter):
            setattr(owner, leaf, nn.Parameter(copied, requires_grad=False))
        else:
            owner.register_buffer(leaf, copied)
    if state:
        names = sorted(f"{where}{name}" for name in state)
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        if share:
            raise CheckpointError(f"it has tensors that this package knows no use of: {', '.join(names[:5])}{more}")
        warnings.warn(f"the checkpoint has tensors this model does not use: {', '.join(names[:5])}{more}", stacklevel=3)
    state.clear()
