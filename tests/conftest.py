from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


def golden_source(case: str) -> Path:
    """What to give `load` for a golden case: its checkpoint file, or the Hugging Face folder it is."""
    file = GOLDEN / case / "checkpoint.pth.tar"
    return file if file.exists() else GOLDEN / case


def golden_calls() -> list:
    """(case, number of the call, the call) for every golden case of a ViT, as pytest parameters."""
    params = []
    for path in sorted(GOLDEN.glob("*/case.json")):
        if path.parent.name.startswith("eradio"):
            continue
        for number, call in enumerate(json.loads(path.read_text())["calls"]):
            params.append(pytest.param(path.parent.name, number, call, id=f"{path.parent.name}-{number}"))
    return params


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(20)


@pytest.fixture(autouse=True)
def no_leftovers(monkeypatch, tmp_path):
    """Tests neither find nor leave anything in the user's cache."""
    monkeypatch.setenv("RADIO_FAST_CACHE", str(tmp_path / "cache"))
