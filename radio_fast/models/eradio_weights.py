"""An E-RADIO checkpoint's tensors under this package's names, BatchNorms folded into the convolutions before them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from radio_fast.models.deferred import Deferred
from radio_fast.models.eradio_spec import State

BN_EPS = 1e-5


def is_eradio(arch: str, state: Mapping[str, object]) -> bool:
    """By the name, or, in a file without a telling one, by what only an E-RADIO has."""
    return arch.startswith("eradio") or any(key.startswith("patch_embed.conv_down.") for key in state)


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
    (re.compile(r"^(.*)\.conv$"), "{0}.bn.weight"),
    (re.compile(r"^(levels\.\d+\.blocks\.\d+)\.conv([12])$"), "{0}.norm{1}.weight"),
    (re.compile(r"^(high_res_neck\.neck_features_proj\.\d+)\.conv1$"), "{0}.norm.weight"),
)

# 1 × 1 convolutions.
_LINEAR = re.compile(r"\.blocks\.cv[12]\.weight$|sample_mixer\.weight$|\.neck_features_proj\.\d+\.conv2\.weight$")


def fold_weight(weight: Tensor, scale: Tensor, variance: Tensor) -> Tensor:
    """weight · scale / √(variance + ε), one factor per output channel: float64, rounded once to float32."""
    if not bool(((variance >= 0) & torch.isfinite(variance)).all()):
        raise ValueError("its BatchNorm's running_var must be finite and not negative")
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
        convs = []
        for pattern, conv, folded in _BATCH_NORMS if leaf in _BATCH_NORM_LEAVES else ():
            if match := pattern.match(norm):
                convs.append(conv.format(*match.groups()))
                if f"{convs[-1]}.weight" in state:
                    found[norm] = convs[-1], folded.format(*match.groups())
        if norm not in found and (leaf.startswith("running_") or norm.endswith(".bn")):
            raise KeyError(f"{(convs or [norm])[0]}.weight")
    followed = {conv for conv, _ in found.values()}
    pairs = [conv for conv in followed if conv[-1].isdecimal() and ".blocks." in conv]
    lacking = sorted(conv for conv in pairs if f"{conv}.bias" not in state)
    if lacking and len(lacking) < len(pairs):
        raise KeyError(f"{lacking[0]}.bias")
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
    if bias is None and norm.endswith(".norm"):  # the neck's, alone, always have one
        raise KeyError(f"{conv}.bias")
    out = weight.shape[:1]
    for name, tensor in (("weight", scale), ("bias", shift), ("running_mean", mean), ("running_var", variance)):
        if tensor.shape != out:
            raise ValueError(f"{norm}.{name} must have shape {tuple(out)} like {conv}, got {tuple(tensor.shape)}")
    if bias is not None and bias.shape != out:
        raise ValueError(f"{conv}.bias must have shape {tuple(out)}, got {tuple(bias.shape)}")
    state[f"{folded}.weight"] = Deferred(weight.shape, fold_weight, weight, scale, variance)
    sources = (scale, variance, mean, shift) if bias is None else (scale, variance, mean, shift, bias)
    state[f"{folded}.bias"] = Deferred(out, fold_bias, *sources)


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
        if key.endswith("sample_op.weight") and len(shape) == 4 and shape[2:] == (2, 2):
            if key.endswith(".downsample_op.weight"):
                out[key] = Deferred.then(value, (shape[0], 4 * shape[1]), lambda w: w.permute(0, 2, 3, 1).flatten(1))
            else:  # a transposed convolution's weight is (in, out, 2, 2)
                out[key] = Deferred.then(value, (4 * shape[1], shape[0]), lambda w: w.permute(2, 3, 1, 0).flatten(0, 2))
        elif key.endswith(".upsample_op.bias") and len(shape) == 1:
            out[key] = Deferred.then(value, (4 * shape[0],), lambda b: b.repeat(4))
        elif _LINEAR.search(key) and len(shape) == 4 and shape[2:] == (1, 1):
            out[key] = Deferred.then(value, shape[:2], lambda w: w.flatten(1))
    return out
