"""Peak memory of a contender, in a process of its own: `python -m bench.memory MODEL PIXELS BATCH CONTENDER [--tiny]`.

Prints {"weights": bytes, "peak": bytes}: of the parameters, and the most that was in use from the moment the model was
there, through three forward passes (the first one has autotuning and graph capture in it). On a GPU what torch's
allocator gave out; on the CPU resident memory over what it was after the imports.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from bench import rivals
from bench.workload import Case


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def measure(case: Case, contender: str, tiny: bool) -> dict[str, int]:
    """Weights and peak of one of "radio_fast", "eager" and "official", in bytes."""
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    small = rivals.load_ours(case.model, "cpu", tiny=True)  # what a first load imports is not the model's
    if contender != "radio_fast":
        rivals.load_rival(small, "cpu", tiny=True)
    before = _resident("VmRSS")
    if contender == "radio_fast":
        model = rivals.load_ours(case.model, device, tiny)
    else:
        model = rivals.load_rival(rivals.load_ours(case.model, "cpu", tiny), "cpu", tiny)
        model = (model.bfloat16() if contender == "eager" else model).to(device)
        if case.model == "E-RADIO":
            model.change_window_size(rivals.eradio_window(case.pixels))
    dtype = torch.bfloat16 if contender == "eager" else torch.float32
    image = torch.rand(case.batch, 3, case.pixels, case.pixels).to(device, dtype)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # peak := present
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=contender == "official"):
        for _ in range(3):
            model(image)
    peak = torch.cuda.max_memory_allocated() if cuda else _resident("VmHWM") - before
    return {"weights": sum(p.nbytes for p in model.parameters()), "peak": peak}


if __name__ == "__main__":
    name, pixels, batch, contender = sys.argv[1:5]
    print(json.dumps(measure(Case(name, int(pixels), int(batch)), contender, "--tiny" in sys.argv[5:])))
