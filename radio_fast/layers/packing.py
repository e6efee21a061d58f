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
        parts = zip(x[0].split([N * images for N, images in runs]), runs, strict=True)
        return torch.cat([run(part.unflatten(0, (images, N))).flatten(0, 1) for part, (N, images) in parts]).unsqueeze(
            0
        )


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
    """The packing of images of h × w patches. One copy to the device, which nothing waits for.

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
    repeats = np.array(lengths)
    ends = np.cumsum([0, *lengths])
    starts = ends + P * np.arange(images + 1)
    patch = np.arange(total)
    parts = [
        starts,
        ends,
        patch + np.repeat(np.array([first_position[grid] for grid in grids]) - ends[:-1], repeats),
        patch + np.repeat(P * np.arange(1, images + 1), repeats),
        (starts[:-1, None] + np.arange(P)).ravel(),
    ]
    windows = None if k is None else _by_windows(grids, starts[:-1] + P, k)
    numbers = _to_device(np.concatenate(parts), torch.int32, device)
    tokens, patches, rows, prefix_rows = numbers.split([images + 1, images + 1, 2 * total, images * P])
    return Packing(
        grids,
        sizes,
        Segments(tokens, tuple(T + P for T in lengths)),
        Segments(patches, lengths),
        rows.view(2, total),
        prefix_rows,
        None if windows is None else _to_device(windows, torch.int64, device),
        k,
    )


def _by_windows(grids: tuple[tuple[int, int], ...], firsts: np.ndarray, k: int) -> np.ndarray:
    """The rows of all images' patches window by window; `firsts`: of each image's first patch."""
    orders = {
        (h, w): np.arange(h * w).reshape(h // k, k, w // k, k).swapaxes(1, 2).ravel() for h, w in dict.fromkeys(grids)
    }
    return np.concatenate([orders[grid] + first for grid, first in zip(grids, firsts, strict=True)])


def _to_device(numbers: np.ndarray, dtype: torch.dtype, device: torch.device) -> Tensor:
    numbers = torch.from_numpy(numbers).to(dtype)
    if device.type == "cuda":
        numbers = numbers.pin_memory()
    return numbers.to(device, non_blocking=True)
