"""The tokens after chosen blocks, one by one or averaged over groups of blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from radio_fast.models.normalizers import IntermediateFeatureNormalizer
from radio_fast.models.vit import VisionTransformer


def resolve_indices(indices: int | list[int] | tuple[int, ...] | None, depth: int) -> list[int]:
    """Block numbers, ascending and without doubles.

    Raises:
        ValueError: a number outside −depth…depth−1, a count outside 1…depth, or something that is no number.
    """
    if indices is None:
        return list(range(depth))
    if isinstance(indices, int) and not isinstance(indices, bool):
        if not 1 <= indices <= depth:
            raise ValueError(f"indices as a count must lie in 1…{depth} (the model's blocks), got {indices}")
        return list(range(depth - indices, depth))
    if not isinstance(indices, (list, tuple)) or not all(type(i) is int for i in indices):
        raise ValueError(f"indices must be an int, a list of ints or None, got {indices!r}")
    if not indices or not all(-depth <= i < depth for i in indices):
        raise ValueError(f"indices must be one or more numbers in {-depth}…{depth - 1}, got {list(indices)}")
    return sorted({i % depth for i in indices})


def collect_intermediates(
    vit: VisionTransformer,
    tokens: Tensor,
    h: int,
    w: int,
    indices: int | list[int] | tuple[int, ...] | None,
    norm: bool,
    stop_early: bool,
    aggregation: str,
    alpha_scheme: str,
    normalizer: IntermediateFeatureNormalizer | None,
) -> tuple[Tensor, list[Tensor]]:
    """Run the blocks on tokens (B, P + T, D); return the last tokens and those of each index.

    Options as in `RADIOModel.forward_intermediates`. A sparse index is a group of one block, a dense one the group of
    blocks since the previous index; a group's rotation is the one of its last block. α multiplies patch tokens only.
    """
    take = resolve_indices(indices, len(vit.blocks))
    firsts = take if aggregation == "sparse" else [0] + [i + 1 for i in take[:-1]]
    group_of = {i: (first, last) for first, last in zip(firsts, take, strict=True) for i in range(first, last + 1)}
    P = vit.num_prefix
    if alpha_scheme == "none":
        normalizer = None
    collected: list[Tensor] = []
    total: Tensor = tokens

    def visit(i: int, x: Tensor) -> None:
        nonlocal total
        if i not in group_of:
            return
        first, last = group_of[i]
        if norm:
            x = vit.norm(x)
        if normalizer is not None:
            y = normalizer.normalize(x[:, P:], i, last)
            if alpha_scheme == "pre-alpha":
                y = y * normalizer.alphas[i]
            x = torch.cat([x[:, :P], y], dim=1)
        total = x if i == first else total + x
        if i == last:
            mean = total / (last - first + 1)
            if normalizer is not None and alpha_scheme == "post-alpha":
                alpha = normalizer.alphas[first : last + 1].mean()
                mean = torch.cat([mean[:, :P], mean[:, P:] * alpha], dim=1)
            collected.append(mean)

    final = vit.run_blocks(tokens, h, w, take[-1] if stop_early else None, visit)
    return (vit.norm(final) if norm else final), collected
