"""Peak memory of a contender, in a process of its own: `python -m bench.memory MODEL PIXELS BATCH CONTENDER`.

Prints {"weights": bytes, "peak": bytes}: of the parameters, and the most that was in use from the moment the model was
there, through three forward passes (the first one has autotuning and graph capture in it). On a GPU what torch's
allocator gave out; on the CPU resident memory over what it was after a small model's call. Of radio_fast also
{"values": how many its parameters and buffers have, "activations": bytes, see `workload.activations`}; `--dtype` is for
it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from bench import rivals
from bench.workload import Case, activations


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def measure(case: Case, contender: str, tiny: bool, dtype: str = "bfloat16") -> dict[str, int]:
    """Weights and peak of one of "radio_fast", "eager" and "official", in bytes."""
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    small = rivals.load_ours(
        case.model, "cpu", True, dtype
    )  # what a first load and call bring along is not the model's
    with torch.inference_mode():
        small(torch.rand(1, 3, 64, 64))
    if contender != "radio_fast":
        rivals.load_rival(small, "cpu", tiny=True)
    before = _resident("VmRSS")
    if contender == "radio_fast":
        model = rivals.load_ours(case.model, device, tiny, dtype)
    else:
        model = rivals.load_rival(rivals.load_ours(case.model, "cpu", tiny), "cpu", tiny)
        model = (model.bfloat16() if contender == "eager" else model).to(device)
        if case.model == "E-RADIO":
            model.change_window_size(rivals.eradio_window(case.pixels))
    image = torch.rand(case.batch, 3, case.pixels, case.pixels)
    image = image.to(device, torch.bfloat16 if contender == "eager" else torch.float32)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # peak := present
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=contender == "official"):
        for _ in range(3):
            model(image)
    peak = torch.cuda.max_memory_allocated() if cuda else _resident("VmHWM") - before
    found = {"weights": sum(p.nbytes for p in model.parameters()), "peak": peak}
    if contender == "radio_fast":
        found["values"] = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
        found["activations"] = activations(model.model.spec, case, dtype)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("pixels", type=int)
    parser.add_argument("batch", type=int)
    parser.add_argument("contender", choices=("radio_fast", "eager", "official"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    case = Case(options.model, options.pixels, options.batch)
    print(json.dumps(measure(case, options.contender, options.tiny, options.dtype)))
