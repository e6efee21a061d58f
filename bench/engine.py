"""Measure radio_fast against what a user would run instead: whole models, on one GPU, within a time budget.

`python -m bench.engine [--mode default|quick|compiled] [--budget SECONDS] [--out FOLDER] [--only REGEX] [--tiny]`

Each contender has the same weights, in the same process, and must agree with float32 (every token's cosine ≥ 0.999)
before it is timed. The most important steps come first; each one's result is in FOLDER/results.json as soon as it is
measured, and what the budget did not reach is listed there. A contender that fails is recorded with its message, and
the run goes on. "compiled" adds to the results that are there already. `--tiny` takes the tests' small models: it shows
on any CPU that all of this works, and its times mean nothing.

Exits with 1 if radio_fast itself failed or was wrong anywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from bench.harness import time_on_cpu, time_rivals
from bench.launches import capture, op_table
from bench.record import ROOT, Record, brief, environment, slug
from bench.rivals import Rivals, check, sdpa_rivals
from bench.timing import ceilings, latency, synchronize, throughput
from bench.workload import Case, Step, block_floors, plan, tokens
from bench.workload import tiny as tiny_steps
from radio_fast import ops

BUDGETS = {"default": 330, "quick": 100, "compiled": 480}  # seconds
COMPILE_AT_LEAST, COMPILE_AT_MOST = 60, 240  # seconds a max-autotune is given
THROUGHPUT_SECONDS, LATENCY_SECONDS = 1.0, 2.0  # of a case, all contenders together
ROOMY = 64 << 30  # bytes; a GPU with less holds one model's contenders at a time


class OutOfTime(BaseException):
    """The budget is used up, or someone ends the run. No Exception: nothing on the way may take it for its own."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block after `seconds`, or when the process is told to end.

    Told so once, it hears no second time: `timeout` tells its child and then its whole group, and the results are still
    to be written. What it hears afterwards is for the caller to restore.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return

    why = "the time budget"

    def stop(number: int, _frame) -> None:
        nonlocal why
        if number != signal.SIGALRM:
            why = "ended from outside"
            for one in (signal.SIGTERM, signal.SIGINT):
                signal.signal(one, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0.2)  # once more, should this one be lost: in a __del__ it is but printed
        raise OutOfTime(why)

    before = {number: signal.signal(number, stop) for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT)}
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            if why == "the time budget" or number == signal.SIGALRM:
                signal.signal(number, handler)


class Engine:
    def __init__(self, record: Record, seconds: float, small: bool = False):
        self.record, self.tiny = record, small
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.started, self.deadline = time.monotonic(), time.monotonic() + seconds
        self.loaded: dict[str, Rivals] = {}
        self.failed: list[str] = []  # steps at which radio_fast failed or was wrong

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:4.0f} s] {text}", file=sys.stderr, flush=True)

    def rivals(self, model: str) -> Rivals:
        if model not in self.loaded:
            if self.device == "cpu" or torch.cuda.get_device_properties(0).total_memory < ROOMY:
                self.loaded.clear()
            self.free()
            self.loaded[model] = Rivals(model, self.device, self.tiny)
        return self.loaded[model]

    def free(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    # -- the run ----------------------------------------------------------------------------------------------------

    def run(self, steps: list[Step]) -> None:
        missing = self.record.data["not_measured"]
        missing.update({step.id: "the time budget" for step in steps})
        self.record.save()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with time_limit(self.left()):
                self.record.data["runs"][-1]["ceilings"] = ceilings(self.tiny)
                for step in steps:
                    self.take(step, missing)
        except OutOfTime as stop:
            self.say(f"stopped: {stop}")
            if missing and str(stop) != "the time budget":
                missing.update(dict.fromkeys(missing, str(stop)))
        self.record.save()
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def take(self, step: Step, missing: dict[str, str]) -> None:
        """Measure one step and write it down, whatever comes of it."""
        if step.kind == "compiled" and not self.tiny and self.left() < COMPILE_AT_LEAST:
            missing[step.id] = "too little left of the time budget to compile"
            return
        try:
            with torch.inference_mode():
                result = getattr(self, step.kind)(step.case)
        except Exception as error:  # of this case alone: out of memory, a rival that does not build
            result = {"error": brief(error)}
        missing.pop(step.id, None)
        self.record.put(step.kind, step.case.id, result)
        ours = result.get("contenders", {}).get("radio_fast", result)
        if "error" in ours and not ours["error"].startswith("OutOfMemoryError"):
            self.failed.append(f"{step.id}: {ours['error']}")
        self.say(f"{step.id}  {summary(result)}")
        if step.kind == "compiled":
            torch._dynamo.reset()
        try:
            synchronize()
            self.free()
        except Exception as error:  # the device's context is gone, and every later call would fail with the same words
            self.failed.append(brief(error))
            raise OutOfTime(f"the GPU gave up after {step.id}") from error

    # -- steps, by kind ---------------------------------------------------------------------------------------------

    def cases(self, case: Case, compiled: bool = False) -> dict:
        """Time, images per second, rate; at batch 1 latency too; of every contender that is right."""
        rivals = self.rivals(case.model)
        truth = rivals.truth(case)
        contenders, calls = {}, {}
        for name, call in rivals.calls(case, compiled).items():
            started = time.monotonic()
            try:
                if name == "compiled" and not self.tiny:
                    self.compile(call)
                check(call(), truth)
            except Exception as error:
                contenders[name] = {"error": brief(error), "wrong": isinstance(error, AssertionError)}
                self.free()
            else:
                calls[name] = call
                contenders[name] = {"first_s": time.monotonic() - started}
        for name, times in throughput(calls, 0.0 if self.tiny else THROUGHPUT_SECONDS).items() if calls else ():
            contenders[name] |= times | {"images_per_s": case.batch / times["ms"] * 1e3}
        if case.batch == 1 and calls:
            for name, times in latency(calls, 0.0 if self.tiny else LATENCY_SECONDS).items():
                contenders[name]["latency"] = times
        flop = rivals.flop(case)
        for times in contenders.values():
            if "ms" in times:
                times["tflops"] = flop / times["ms"] / 1e9
        return {**case._asdict(), "flop": flop, "contenders": contenders}

    def compiled(self, case: Case) -> dict:
        return self.cases(case, compiled=True)

    def compile(self, call) -> None:
        """The first call, within its own limit; the run's limit stays what it was."""
        limit = min(COMPILE_AT_MOST, self.left())
        try:
            with time_limit(limit):
                call()
        except OutOfTime as stop:
            if str(stop) != "the time budget" or self.left() <= 0:
                raise
            raise TimeoutError(f"max-autotune took more than {limit:.0f} s") from stop
        finally:
            signal.setitimer(signal.ITIMER_REAL, max(self.left(), 0.01))

    def ops(self, case: Case) -> dict:
        """radio_fast's kernels by op, and a ViT's floors."""
        rivals = self.rivals(case.model)
        call = rivals.calls(case)["radio_fast"]
        check(call(), rivals.truth(case))
        capture(call)  # the profiler's own start is slow
        depth, floors = (rivals.spec.depth, block_floors(rivals.spec, case)) if rivals.is_vit else (None, {})
        return case._asdict() | op_table(capture(call), depth, floors)

    def attention(self, case: Case) -> dict:
        """That op alone, as dispatched, against every SDPA backend, at a model's heads and length."""
        spec = self.rivals(case.model).spec
        N, H, d = tokens(spec, case.pixels), spec.num_heads, spec.embed_dim // spec.num_heads
        packed = torch.randn(case.batch, N, 3, H, d, device=self.device, dtype=torch.bfloat16)
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        calls = {"radio_fast": lambda: ops.attention(packed.flatten(2), H)} | sdpa_rivals(q, k, v)
        truth = F.scaled_dot_product_attention(q.float(), k.float(), v.float()).transpose(1, 2).flatten(2)
        contenders = {}
        for name in list(calls):
            try:
                check((calls[name](),), (truth,))
            except Exception as error:
                contenders[name] = {"error": brief(error), "wrong": isinstance(error, AssertionError)}
                del calls[name]
        times = (time_rivals if self.device == "cuda" else time_on_cpu)(calls)
        flop = 4 * case.batch * H * N * N * d
        contenders |= {name: {"ms": ms, "tflops": flop / ms / 1e9} for name, ms in times.items()}
        return {**case._asdict(), "tokens": N, "heads": H, "head_dim": d, "flop": flop, "contenders": contenders}

    def memory(self, case: Case) -> dict:
        """Peaks, each contender in a process of its own; they run side by side, nothing is timed."""
        processes, contenders = {}, {}
        try:
            for name in ("radio_fast", "eager", "official"):
                command = [sys.executable, "-m", "bench.memory", *map(str, case), name, *["--tiny"] * self.tiny]
                processes[name] = subprocess.Popen(
                    command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
                )
            for name, process in processes.items():
                out, errors = process.communicate()
                last = (errors.strip().splitlines() or ["no message"])[-1]
                contenders[name] = {"error": brief(RuntimeError(last))} if process.returncode else json.loads(out)
        finally:
            for process in processes.values():
                if process.poll() is None:
                    process.kill()
        return {**case._asdict(), "contenders": contenders}


def summary(result: dict) -> str:
    """A result in one line."""
    if "error" in result:
        return result["error"]
    if "ops" in result:
        blocks = f", {result['launches_per_block']:.2f} launches a block" if "launches_per_block" in result else ""
        return f"{result['kernel_us'] / 1e3:.3f} ms in {result['launches']} launches{blocks}"
    out = []
    for name, found in result["contenders"].items():
        if "error" in found:
            out.append(f"{name} {found['error']}")
        else:
            out.append(f"{name} {found['ms']:.3f} ms" if "ms" in found else f"{name} {found['peak'] / 1e6:.0f} MB")
    return "  ".join(out)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=tuple(BUDGETS), default="default", help="which steps; see bench/workload.py")
    parser.add_argument("--budget", type=float, help=f"seconds (by mode: {BUDGETS})")
    parser.add_argument("--out", type=Path, help="folder for results.json (bench/results/<gpu>)")
    parser.add_argument("--only", default="", metavar="REGEX", help="only steps whose id, kind/case, matches")
    parser.add_argument("--tiny", action="store_true", help="small models: a rehearsal for the CPU")
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --tiny rehearses on the CPU")
    run = environment() | {"mode": options.mode, "tiny": options.tiny}
    folder = options.out or (ROOT / "out" / "tiny" if options.tiny else ROOT / "bench" / "results" / slug(run["gpu"]))
    record = Record(folder / "results.json", run, keep=options.mode == "compiled" or bool(options.only))
    steps = plan(options.mode)
    steps = [step for step in (tiny_steps(steps) if options.tiny else steps) if re.search(options.only, step.id)]
    if options.mode == "compiled":
        steps = [step for step in steps if not record.has(step.kind, step.case.id)]
    engine = Engine(record, options.budget or BUDGETS[options.mode], options.tiny)
    engine.run(steps)
    engine.say(f"{len(steps) - len(record.data['not_measured'])} of {len(steps)} steps measured")
    for failure in engine.failed:
        engine.say(f"FAILED {failure}")
    return 1 if engine.failed else 0


if __name__ == "__main__":
    sys.exit(main())
