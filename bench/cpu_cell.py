"""One cell of `bench_cpu.py` in a process of its own: `python -m bench.cpu_cell MODEL PIXELS BATCH SECONDS [--tiny]`.

Builds the contenders, holds each one's output against official float32, times all in turn and prints a JSON object;
what it is at goes to stderr. A contender that can't be built or run is told with its reason, the others go on.

Threads that wait by spinning take a core from whoever runs next. So there is PAUSE before each contender, in which
OpenMP's and OpenVINO's fall asleep; onnxruntime's are told to stop when a call ends; and a short call has one before it
that is not timed, which wakes its threads and brings its weights back to the caches. Without that one, in turn takes up
to 9 % longer than alone, with it up to 4 %: `alone_ms`, of the same calls in a row, is in the table of each run.
OMP_WAIT_POLICY=passive would do without the pause, but torch's own calls then take up to 1.5 times as long, official
autocast most of all.
"""

from __future__ import annotations

import contextlib
import gc
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench import cpu_rivals, rivals
from bench.cpu_rivals import Call
from bench.cpu_table import CONTENDERS, OURS, PEERS
from bench.record import brief
from bench.timing import spread
from bench.workload import Case, vit_flop

MIN_ROUNDS, MAX_ROUNDS = 2, 12  # beside the check of each output, which is a round for those that take long
PAUSE = 0.01  # seconds between contenders
SHORT = 1.0  # seconds of a call, below which each round has one that is not timed, then SHORT_CALLS that are
SHORT_CALLS = 2
ALONE_CALLS, ALONE_SECONDS = 9, 3.0  # calls in a row, where a round takes less than so long
MATMUL_SIDE = 3072
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def tell(text: str) -> None:
    print(f"    {text}", file=sys.stderr, flush=True)


def timed(call: Callable) -> tuple[object, float]:
    """(what it returns, seconds)."""
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started


def min_cosine(output: Tensor, truth: Tensor) -> float:
    """Of the worst token, or image; 0 where the output has another shape or a value that is not finite."""
    if output.shape != truth.shape or not output.isfinite().all():
        return 0.0
    return torch.cosine_similarity(output.double(), truth.double(), dim=-1).min().item()


def matmuls(side: int) -> dict[str, Callable[[], Tensor]]:
    """{dtype: a large matrix product}: the rate that a floor is computed from."""
    calls = {}
    for name, dtype in DTYPES.items():
        a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
        calls[name] = lambda a=a, b=b: torch.mm(a, b)
    a, b = (torch.randint(-100, 100, (side, side), dtype=torch.int8) for _ in range(2))
    calls["int8"] = lambda: torch._int_mm(a, b)
    return calls


def in_turn(calls: dict[str, Callable], first_s: dict[str, float], seconds: float) -> dict[str, dict[str, float]]:
    """{contender: median and quartiles in ms, of how many calls}: rounds of all in turn, about `seconds` in all.

    `first_s`: seconds of the call that each has made, in turn too. Of a long one it counts as the first round.
    """
    short = {name for name in calls if first_s[name] < SHORT}
    expected = sum(first_s[name] * (1 + SHORT_CALLS if name in short else 1) for name in calls)
    times: dict[str, list[float]] = {name: [] if name in short else [first_s[name] * 1e3] for name in calls}
    for _ in range(round(min(MAX_ROUNDS, max(MIN_ROUNDS, seconds / expected)))):
        for name, call in calls.items():
            time.sleep(PAUSE)
            if name in short:
                call()
            times[name] += [timed(call)[1] * 1e3 for _ in range(SHORT_CALLS if name in short else 1)]
    return {name: spread(values) for name, values in times.items()}


def alone(calls: dict[str, Callable]) -> dict[str, float]:
    """{contender: median ms} of calls in a row, the others long asleep."""
    out = {}
    for name, call in calls.items():
        time.sleep(0.3)
        call()
        out[name] = statistics.median(timed(call)[1] * 1e3 for _ in range(ALONE_CALLS))
    return out


class Cell:
    """The contenders of one case that could be built: `calls`; `left_out`: {contender: why it was not}."""

    def __init__(self, case: Case, tiny: bool = False):
        self.case, self.tiny = case, tiny
        self.x = torch.rand(case.batch, 3, case.pixels, case.pixels, generator=torch.Generator().manual_seed(0))
        self.calls: dict[str, Call] = {}
        self.cosine: dict[str, float] = {}
        self.first_s: dict[str, float] = {}
        self.left_out: dict[str, str] = {}
        self.truth: tuple[Tensor, Tensor] | None = None
        ours = self._load("float32")
        self.official = cpu_rivals.Official(ours, case, tiny).eval()
        self.flop = self._flop(ours)
        self._add("official float32", lambda: lambda: self.official(self.x))  # the truth, so the first
        self._add(OURS["float32"], lambda: lambda: tuple(ours(self.x)))
        for dtype in ("bfloat16", "int8"):
            self._add(OURS[dtype], lambda dtype=dtype: self._ours(dtype))
        self._add("official autocast", lambda: cpu_rivals.autocast(self.official, self.x))
        self._add("onnxruntime f32", lambda: cpu_rivals.onnxruntime(ours, self.x))
        with self._or_left_out("OpenVINO f32", "OpenVINO bf16"):
            for name, make in cpu_rivals.openvino(self.official, self.x).items():
                self._add(name, make)
        for precision in PEERS:
            name = next(name for name in PEERS[precision] if name.startswith("torch.compile"))
            self._add(name, lambda precision=precision: cpu_rivals.compiled(self.official, self.x, precision))

    def _load(self, dtype: str) -> torch.nn.Module:
        return rivals.load_ours(self.case.model, "cpu", self.tiny, dtype)

    def _ours(self, dtype: str) -> Call:
        model = self._load(dtype)
        return lambda: tuple(model(self.x))

    def _flop(self, ours: torch.nn.Module) -> int:
        if ours.blocks is not None:
            return self.case.batch * sum(vit_flop(ours.model.spec, self.case.pixels))
        return rivals.eradio_flop(self.official.model, self.case)

    @contextlib.contextmanager
    def _or_left_out(self, *names: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        except Exception as error:  # of any package
            for name in names:
                self.calls.pop(name, None)
                self.left_out[name] = brief(error)
                tell(f"{name} left out: {self.left_out[name]}")
        else:
            seconds, worst = time.perf_counter() - started, [f"{self.cosine[n]:.6f}" for n in names if n in self.cosine]
            tell(f"{', '.join(names)} built and checked in {seconds:.1f} s; worst cosine {', '.join(worst)}")
        gc.collect()

    def _add(self, name: str, make: Callable[[], Call]) -> None:
        with self._or_left_out(name):
            call = make()
            output, seconds = timed(call)
            self.truth = self.truth or output
            self.cosine[name] = min(map(min_cosine, output, self.truth))
            # What a first call does for all that follow is not a call's time, least of all compiling.
            again = seconds < 4 * SHORT or name.startswith("torch.compile")
            self.first_s[name] = timed(call)[1] if again else seconds
            self.calls[name] = call


def measure(case: Case, seconds: float, tiny: bool = False) -> dict:
    """What the JSON has of a cell.

    times_ms, calls (how many were timed), alone_ms, cosine (of the worst token with official float32) and left_out are
    by contender. flop: of a call. matmul_tflops: {dtype: the rate of a large product, timed in the same rounds}.
    """
    with torch.inference_mode():
        cell = Cell(case, tiny)
        rates = matmuls(256 if tiny else MATMUL_SIDE)
        calls: dict[str, Callable] = {**cell.calls, **{f"torch.mm {name}": call for name, call in rates.items()}}
        first_s = dict(cell.first_s)
        for name in calls.keys() - first_s.keys():
            first_s[name] = min(timed(calls[name])[1] for _ in range(2))
        order = [name for name in CONTENDERS if name in cell.calls]
        calls = {name: calls[name] for name in (*order, *(name for name in calls if name not in order))}
        times = in_turn(calls, first_s, seconds)
        alone_ms = alone(cell.calls) if sum(cell.first_s.values()) < ALONE_SECONDS else {}
    flop = 2 * (256 if tiny else MATMUL_SIDE) ** 3
    return {
        **case._asdict(),
        "flop": cell.flop,
        "times_ms": {name: times[name]["ms"] for name in order},
        "quartiles_ms": {name: [times[name]["q1"], times[name]["q3"]] for name in order},
        "calls": {name: times[name]["rounds"] for name in order},
        "alone_ms": alone_ms,
        "cosine": cell.cosine,
        "left_out": cell.left_out,
        "matmul_tflops": {name: flop / times[f"torch.mm {name}"]["ms"] / 1e9 for name in rates},
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # tracers' remarks on Transformers' code
    model, pixels, batch, seconds = sys.argv[1:5]
    print(json.dumps(measure(Case(model, int(pixels), int(batch)), float(seconds), "--tiny" in sys.argv[5:])))
