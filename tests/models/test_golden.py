"""Every golden case: the official outputs, at the tolerance they were published with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file

import radio_fast
from tests.conftest import GOLDEN, golden_calls, golden_source
from tests.numerics import GOLDEN_RTOL, assert_relative


def flatten(output, name: str = "out") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in nested dicts, named tuples and lists, under the golden files' dotted names."""
    if isinstance(output, torch.Tensor):
        yield name, output
        return
    if isinstance(output, radio_fast.RadioOutput):
        output = output._asdict()
    items = output.items() if isinstance(output, dict) else enumerate(output)
    for key, value in items:
        yield from flatten(value, f"{name}.{key}")


@pytest.mark.filterwarnings("ignore:attention windows")
@pytest.mark.parametrize(("case", "number", "call"), golden_calls())
def test_golden(case, number, call):
    stored = load_file(GOLDEN / case / "io.safetensors")
    model = radio_fast.load(golden_source(case), **call.get("load", {}))
    if "num_summary_tokens" in call:
        assert model.num_summary_tokens == call["num_summary_tokens"]
        assert model.summary_idxs.tolist() == call["summary_idxs"]
    x = stored[f"{number}.image"].float() / 255
    if call.get("window") == "optimal":
        model.model.set_optimal_window_size(x.shape[2:])
    if call.get("deploy"):
        model.switch_to_deploy()
    output = getattr(model, call.get("method", "forward"))(x, **call.get("kwargs", {}))

    outputs = dict(flatten(output))
    prefix = f"{number}."
    expected = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(f"{prefix}out")}
    assert set(outputs) == set(expected)
    rtol = GOLDEN_RTOL[torch.bfloat16 if case.endswith("bf16") else torch.float32]
    for name, truth in expected.items():
        assert_relative(outputs[name], truth, rtol)


def test_all_cases_are_there():
    """An emptied folder would make the test above pass with nothing."""
    assert len(golden_calls()) == 39
