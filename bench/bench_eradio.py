"""The full-size E-RADIO (random weights, 390 million parameters) against the same network written with plain modules.

`./dev bench bench/bench_eradio.py --benchmark-json=bench/results/cpu/eradio.json`, then
`.venv/bin/python -m bench.table bench/results/cpu/eradio.json`. The rival's BatchNorms are unfolded; it runs with
float32 weights under `torch.autocast(bfloat16)`, the official recipe, and with its weights cast to bfloat16. All have
the same weights, window and images. Peak memory is that of a process which has the model and runs it once, over what it
had after the imports.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import radio_fast
from bench.eradio_state import Config, random_state, write_checkpoint
from bench.harness import compare, compiled, time_on_cpu, time_rivals
from bench.plain_eradio import PlainERADIO
from bench.shapes import FULL
from tests.numerics import assert_tokens

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
WINDOWS = {224: 7, 512: 16}  # the optimal ones
SHAPES = [(px, batch) for px in WINDOWS for batch in ((1, 8, 64) if CUDA else (1, 4) if FULL else (1,))]


def plain_model(state: dict, device: str) -> PlainERADIO:
    with torch.device("meta"):
        model = PlainERADIO(state)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False).to(device)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(ours in bfloat16, the plain one in float32 and in bfloat16) with the same weights."""
    state = random_state(Config())
    file = tmp_path_factory.mktemp("eradio") / "eradio.pth.tar"
    write_checkpoint(file, state)
    ours = radio_fast.load("e-radio_v2", checkpoint=file, dtype="bfloat16", device=DEVICE)
    file.unlink()
    plain = plain_model(state, DEVICE)
    return ours, plain, copy.deepcopy(plain).bfloat16()


@pytest.mark.parametrize(("pixels", "batch"), SHAPES, ids=lambda value: str(value))
def test_forward(benchmark, models, pixels, batch):
    ours, plain, cast = models
    for model in (ours.model, plain, cast):
        model.change_window_size(WINDOWS[pixels])
    x = torch.rand(batch, 3, pixels, pixels, device=DEVICE)
    conditioner = ours.input_conditioner

    def rival():
        with torch.autocast(DEVICE, torch.bfloat16):
            return plain(conditioner(x))

    rivals = {"radio_fast": lambda: ours(x), "plain, autocast": rival}
    rivals["plain, cast"] = lambda: cast(conditioner(x).bfloat16())
    with torch.inference_mode():
        if CUDA and (batch == 8 or FULL):  # each shape takes torch.compile a minute
            rivals["plain, autocast, compiled"] = compiled(rival)
        with FlopCounterMode(display=False) as counter:
            _, truth = plain(conditioner(x))
        assert_tokens(ours(x).features, truth)  # what is fast and wrong is not to be timed
        moved = sum(p.numel() * p.element_size() for p in ours.parameters())
        timer = time_rivals if CUDA else time_on_cpu
        compare(benchmark, rivals, counter.get_total_flops(), moved, ours="radio_fast", timer=timer)


# Runs in a process of its own and prints {"peak": bytes over what the imports took, "weights": bytes}.
MEASURE = """
import json, pathlib, sys
import torch
import radio_fast
from bench.bench_eradio import WINDOWS, plain_model
from bench.eradio_state import Config, random_state
contender, pixels, device, file = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
def status(name):
    return int(next(l for l in open("/proc/self/status") if l.startswith(name)).split()[1]) * 1024
before = status("VmRSS")
if contender == "radio_fast":
    model = radio_fast.load("e-radio_v2", checkpoint=file, dtype="bfloat16", device=device, window_size=WINDOWS[pixels])
else:
    state = torch.load(file, weights_only=True)
    model = plain_model(state, device)
    model = model.bfloat16() if contender == "plain, cast" else model
    del state
    model.change_window_size(WINDOWS[pixels])
if device == "cuda":
    torch.cuda.reset_peak_memory_stats()
else:
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # peak := present
with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=contender == "plain, autocast"):
    model(torch.rand(1, 3, pixels, pixels, device=device, dtype=next(model.parameters()).dtype))
peak = torch.cuda.max_memory_allocated() if device == "cuda" else status("VmHWM") - before
print(json.dumps({"peak": peak, "weights": sum(p.numel() * p.element_size() for p in model.parameters())}))
"""


@pytest.mark.parametrize("pixels", WINDOWS)
def test_peak_memory(benchmark, pixels, tmp_path):
    state = random_state(Config())
    files = {"radio_fast": tmp_path / "ours.pth.tar", "plain, autocast": tmp_path / "plain.pt"}
    write_checkpoint(files["radio_fast"], state)
    torch.save(state, files["plain, autocast"])
    files["plain, cast"] = files["plain, autocast"]
    del state

    def measure() -> dict:
        out = {}
        for contender, file in files.items():
            command = [sys.executable, "-c", MEASURE, contender, str(pixels), DEVICE, file]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            out[contender] = json.loads(done.stdout)
        return out

    result = benchmark.pedantic(measure, rounds=1)
    for file in set(files.values()):
        file.unlink()
    benchmark.extra_info.update(
        memory=result, peak_ratio=result["radio_fast"]["peak"] / result["plain, autocast"]["peak"]
    )
