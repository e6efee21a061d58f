"""What the E-RADIO tests share."""

from __future__ import annotations

import pytest
import torch

import radio_fast
from bench.eradio_state import SMALL, Config, random_state, write_checkpoint
from bench.plain_eradio import PlainERADIO
from tests.conftest import golden_source

QUIET = pytest.mark.filterwarnings("ignore:attention windows")


def image(height: int, width: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def pair(tmp_path, config: Config = SMALL, seed: int = 0, **options) -> tuple[radio_fast.RADIOModel, PlainERADIO]:
    """Our model and the plain one with the same random weights."""
    state = random_state(config, seed)
    write_checkpoint(tmp_path / "eradio.pth.tar", state)
    plain = PlainERADIO(state)
    plain.load_state_dict(state)
    return radio_fast.load(tmp_path / "eradio.pth.tar", **options), plain.eval().requires_grad_(False)


def golden(**options) -> radio_fast.RADIOModel:
    return radio_fast.load(golden_source("eradio_small"), **options)
