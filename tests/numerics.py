"""The one error bound that everything is held to.

Truth is float32 (float64 for a single kernel). In any dtype, the error may be twice what plain torch makes in that
dtype, plus the rounding of the output; a whole model's tokens must each point where the truth points. Worst values,
never means: a mean hides bad tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN_RTOL = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
MODEL_RTOL = 1e-5  # float32 without TF32, against another float32 implementation
MIN_COSINE = 0.999  # float16 and bfloat16


def _comparable(actual: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    actual, truth = actual.detach().double(), truth.detach().double()
    assert torch.isfinite(truth).all(), "the truth itself is not finite: the test's input is too large"
    assert torch.isfinite(actual).all(), f"{(~torch.isfinite(actual)).sum().item()} values are not finite"
    return actual, truth


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """max|actual − truth| / max|truth|."""
    actual, truth = _comparable(actual, truth)
    return ((actual - truth).abs().max() / truth.abs().max()).item()


def assert_within(actual: Tensor, truth: Tensor, same_dtype: Tensor) -> None:
    """max|actual − truth| ≤ 2·max|same_dtype − truth| + 2·max|t+0.3−0.3−t|, t the truth in the output's dtype.

    `same_dtype` is what plain torch makes of the same inputs in `actual`'s dtype. The second term is the rounding of
    the output, which torch's result may happen to be free of.
    """
    assert actual.dtype == same_dtype.dtype, f"dtype {actual.dtype}, expected {same_dtype.dtype}"
    rounded = truth.to(actual.dtype)
    rounding = (rounded + 0.3 - 0.3 - rounded).double().abs().max().item()
    actual, truth = _comparable(actual, truth)
    torch_error = (same_dtype.double() - truth).abs().max().item()
    error = (actual - truth).abs().max().item()
    bound = 2 * torch_error + 2 * rounding
    assert error <= bound, (
        f"error {error:.3g} > {bound:.3g}: 2 × torch's {torch_error:.3g} + 2 × rounding {rounding:.3g}"
    )


def assert_relative(actual: Tensor, truth: Tensor, rtol: float = MODEL_RTOL) -> None:
    """max|actual − truth| ≤ rtol · max|truth|."""
    error = relative_error(actual, truth)
    assert error <= rtol, f"relative error {error:.3g} > {rtol:.3g}"


def assert_tokens(actual: Tensor, truth: Tensor, minimum: float = MIN_COSINE) -> None:
    """The cosine with the truth along the last axis is at least `minimum` for every single token."""
    actual, truth = _comparable(actual, truth)
    worst = torch.cosine_similarity(actual, truth, dim=-1).min().item()
    assert worst >= minimum, f"worst token has cosine {worst:.6f} < {minimum} with the truth"
