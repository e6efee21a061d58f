from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def rounded_like_a_gpu(nearest_bfloat16):
    """Every kernel test runs with bfloat16 rounded to nearest."""
