"""What a model that other code has built computes, as far as its tensors don't show it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from radio_fast.layers.window_attention import coords_table
from radio_fast.models.eradio_weights import BN_EPS
from radio_fast.models.weights import State


def num_heads(blocks: Iterable[nn.Module]) -> int | None:
    """The attention heads that the blocks' modules name; no tensor shows them."""
    names = ("num_heads", "num_attention_heads")
    found = {getattr(m, n) for block in blocks for m in block.modules() for n in names if hasattr(m, n)}
    if len(found) > 1:
        raise ValueError(f"all blocks must have the same number of attention heads, found {sorted(found)}")
    return next(iter(found), None)


def has_scaled_norms(blocks: Iterable[nn.Module]) -> bool:
    """Whether norms are multiplied by 1/√i (`scaled_ln`): no tensor shows it, nor their ε, so they are tried.

    Raises:
        ValueError: a norm is neither that nor a LayerNorm of ε 1e-6, or the MLP's activation is no exact GELU.
    """
    kinds = set()
    for i, block in enumerate(blocks):
        for name in ("norm1", "norm2"):
            norm = getattr(block, name, None)
            if getattr(norm, "weight", None) is None:
                raise ValueError(f"block {i} has no {name} with a weight")
            if hasattr(norm, "alpha"):
                continue  # DynamicTanh, which has no ε
            D = norm.weight.shape[0]
            # Of variance 1e-6, so that the ε counts for half.
            x = 1e-3 * torch.randn(1, D, generator=torch.Generator().manual_seed(i)).to(norm.weight)
            plain = F.layer_norm(x, (D,), norm.weight, norm.bias, 1e-6).float()
            y = norm(x).float()
            scales = [s for s in (1.0, (i + 1) ** -0.5) if _alike(y, s * plain, norm.weight.dtype)]
            if not scales:
                raise ValueError(f"block {i}: {name} is neither a LayerNorm of ε 1e-6 nor that times 1/√{i + 1}")
            kinds |= {scales[0] != 1.0} if i else set()
        act = next((getattr(block.mlp, n) for n in ("act", "activation") if hasattr(block.mlp, n)), None)
        if act is not None and not hasattr(block.mlp, "w12"):
            x = torch.linspace(-4, 4, 65)
            if not _alike(act(x), F.gelu(x), torch.float32):
                raise ValueError(f"block {i}: the MLP's activation must be the exact GELU, found {act}")
    if len(kinds) > 1:
        raise ValueError("some blocks multiply their norms by 1/√i and others don't")
    return kinds == {True}


def _alike(y: Tensor, truth: Tensor, dtype: torch.dtype) -> bool:
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    return y.shape == truth.shape and bool((y - truth).abs().max() <= bound * truth.abs().max())


def check_eradio(network: nn.Module) -> None:
    """E-RADIO's norms must all have its ε."""
    for name, module in network.named_modules():
        if isinstance(module, (nn.LayerNorm, _BatchNorm)) and module.eps != BN_EPS:
            raise ValueError(f"{name} must have ε {BN_EPS}, found {module.eps}")


def eradio_window(backbone: State) -> int | None:
    """The window that was set after building, None for the one as built; tables go back to the built one.

    A model whose window was changed has a table of offsets for the new window, in units of the built one: its largest
    entry, log2(8·(k − 1)/(built − 1) + 1) / log2(8), says which that was.
    """
    found = set()
    tables = {name: table for name, table in backbone.items() if name.endswith(".relative_coords_table")}
    for table in tables.values():
        k = (table.shape[1] + 1) // 2
        far = 8 ** table.max().item() - 1
        found.add((k, k if k == 1 else 1 + round(8 * (k - 1) / far)))
    changed = {(k, built) for k, built in found if k != built}
    if not changed:
        return None
    if len(found) > 1:
        raise ValueError(f"E-RADIO's windows must be the same in all levels, found (now, as built): {sorted(found)}")
    ((k, built),) = changed
    for name, table in tables.items():
        backbone[name] = coords_table(built, built).to(table)
    return k
