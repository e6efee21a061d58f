from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MAX_TOKENS = 2**31 - 1  # rows are counted in 32 bits


class Segments(NamedTuple):
    """Images of several lengths, one after another: where each begins, (images + 1,) int32, and how long each is."""

    cu_seqlens: Tensor
    lengths: tuple[int, ...]

    def apart(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`run`, which takes batches (B, N, D), on the images of x (1, tokens, D), neighbours of one length at once."""
        runs = [(N, len([*same])) for N, same in groupby(self.lengths)]
        parts = x.split([N * images for N, images in runs], dim=1)
        batches = (part[0].unflatten(0, (images, N)) for part, (N, images) in zip(parts, runs, strict=True))
        return torch.cat([run(batch).flatten(0, 1) for batch in batches]).unsqueeze(0)


@dataclass(frozen=True)
class Packing:
    """Where the tokens of images of several sizes lie in one row of them, (1, Σ(P + T), D).

    Each image's P prefix tokens come first, then its T = h·w patches, row by row.

    Args:
        grids: (h, w) of each image, in patches.
        sizes: those without doubles.
        tokens: the images as they lie there.
        patches: the images without their prefix tokens.
        rows: (2, ΣT) int32, of each patch: its row in the positions of `sizes` and its row among the tokens.
        prefix_rows: (B·P,) int32, the prefix tokens' rows.
        window_rows: (ΣT,) int64, the patches' rows, window by window, in ViTDet mode.
        window_size: k of ViTDet mode.
    """

    grids: tuple[tuple[int, int], ...]
    sizes: tuple[tuple[int, int], ...]
    tokens: Segments
    patches: Segments
    rows: Tensor
    prefix_rows: Tensor
    window_rows: Tensor | None
    window_size: int | None

    @property
    def patch_rows(self) -> Tensor:
        """(ΣT,) int32, the patches' rows among the tokens."""
        return self.rows[1]

    def windows(self, x: Tensor) -> Tensor:
        """The patches of tokens x (1, Σ(P + T), D), window by window: (windows, k·k, D)."""
        return x[0].index_select(0, self.window_rows).unflatten(0, (-1, self.window_size**2))

    def put_back(self, x: Tensor, windows: Tensor) -> Tensor:
        """x with its patches replaced by those of `windows`."""
        return x.index_copy(1, self.window_rows, windows.flatten(0, 1).unsqueeze(0))


def pack(
    grids: tuple[tuple[int, int], ...], num_prefix: int, device: torch.device, window_size: int | None = None
) -> Packing:
    """The packing of images of h × w patches. Its tensors' copies to the device are not waited for.

    Raises:
        ValueError: more tokens than 32 bits can count.
    """
    P, k = num_prefix, window_size
    sizes = tuple(dict.fromkeys(grids))
    lengths = tuple(h * w for h, w in grids)
    total, images = sum(lengths), len(grids)
    if total + images * P > MAX_TOKENS:
        raise ValueError(f"the images have {total + images * P} tokens together, at most {MAX_TOKENS} fit in one call")
    first_position = dict(zip(sizes, np.cumsum([0] + [h * w for h, w in sizes]), strict=False))
    ends = np.cumsum([0, *lengths])
    starts = ends + P * np.arange(images + 1)
    shifts = np.array([first_position[grid] for grid in grids]) - ends[:-1], P * np.arange(1, images + 1)
    rows = np.arange(total) + np.stack([np.repeat(shift, lengths) for shift in shifts])
    prefix_rows = (starts[:-1, None] + np.arange(P)).ravel()
    tokens, patches, rows, prefix_rows = _to_device([starts, ends, rows, prefix_rows], torch.int32, device)
    return Packing(
        grids,
        sizes,
        Segments(tokens, tuple(T + P for T in lengths)),
        Segments(patches, lengths),
        rows,
        prefix_rows,
        None if k is None else _to_device([_by_windows(grids, starts[:-1] + P, k)], torch.int64, device)[0],
        k,
    )


def _by_windows(grids: tuple[tuple[int, int], ...], firsts: np.ndarray, k: int) -> np.ndarray:
    """The rows of all images' patches window by window; `firsts`: of each image's first patch."""
    orders = {
        (h, w): np.arange(h * w).reshape(h // k, k, w // k, k).swapaxes(1, 2).ravel() for h, w in dict.fromkeys(grids)
    }
    return np.concatenate([orders[grid] + first for grid, first in zip(grids, firsts, strict=True)])


def _to_device(arrays: list[np.ndarray], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Tensors of the arrays, by one copy."""
    # Each begins at 16 bytes: for a pointer that does not, Triton compiles a kernel once more.
    flat = torch.from_numpy(np.concatenate([np.pad(a.ravel(), (0, -a.size % 4)) for a in arrays])).to(dtype)
    if device.type == "cuda":
        flat = flat.pin_memory()
    parts = flat.to(device, non_blocking=True).split([-(-a.size // 4) * 4 for a in arrays])
    return [part[: a.size].view(a.shape) for part, a in zip(parts, arrays, strict=True)]
