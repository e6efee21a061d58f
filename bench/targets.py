"""Issue 6's targets, held against a results.json: met, missed and by how much, or not measured. Nothing is typed in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from bench.workload import LARGE_BATCH, SIDES, VITS, grid, plan

Value = float | None  # None: radio_fast failed there, which misses any target


class Target(NamedTuple):
    """What is asked for: a value in every one of `cases` cases that is at least (or, `at_most`, at most) `needed`."""

    text: str
    needed: float
    cases: int
    values: Callable[[dict], dict[str, Value]]
    at_most: bool = False
    unit: str = "×"
    digits: int = 2  # of the values, behind the point


class Outcome(NamedTuple):
    """`status`: "met", "met so far" (not in all cases yet), "missed" or "not measured"; `values`: {case: value}."""

    target: Target
    status: str
    values: dict[str, Value]

    @property
    def met(self) -> int:
        return sum(reaches(self.target, value) for value in self.values.values())

    @property
    def worst(self) -> tuple[str, Value]:
        """The case furthest from the target, and its value."""
        failed = [(case, value) for case, value in self.values.items() if value is None]
        pick = max if self.target.at_most else min
        return failed[0] if failed else pick(self.values.items(), key=lambda item: item[1])


def reaches(target: Target, value: Value) -> bool:
    if value is None:
        return False
    return value <= target.needed if target.at_most else value >= target.needed


def measured(data: dict, kind: str, keep: Callable[[dict], bool] = lambda _: True) -> Iterator[tuple[str, dict]]:
    """The cases of a kind that were measured at all."""
    for case, result in data["results"].get(kind, {}).items():
        if "error" not in result and keep(result):
            yield case, result


def value_of(result: dict, contender: str, *keys: str) -> Value:
    """contenders[contender][key]…, None if it failed."""
    found = result.get("contenders", {}).get(contender)
    for key in keys:
        found = found.get(key) if found else None
    return found


def speedups(data: dict, kind: str, rival: str, keep: Callable[[dict], bool], *keys: str) -> dict[str, Value]:
    """{case: the rival's time over ours}; cases in which the rival failed are left out, ours are None."""
    keys = keys or ("ms",)
    out: dict[str, Value] = {}
    for case, result in measured(data, kind, keep):
        ours, theirs = value_of(result, "radio_fast", *keys), value_of(result, rival, *keys)
        if ours is None or theirs is not None:
            out[case] = None if ours is None else theirs / ours
    return out


def matmul_rate(data: dict, result: dict) -> Value:
    """TFLOP/s of the large matrix product, measured in the run that `result` is of."""
    return data["runs"][result["run"]].get("ceilings", {}).get("matmul_tflops")


def share_of_matmul(data: dict, result: dict) -> Value:
    ours, rate = value_of(result, "radio_fast", "tflops"), matmul_rate(data, result)
    return None if ours is None or rate is None else ours / rate


def _large(result: dict) -> bool:
    return result["model"] in VITS and result["batch"] >= LARGE_BATCH


def _largest(result: dict) -> bool:
    return _large(result) and result["model"] in ("ViT-L", "ViT-H")


def _eradio(result: dict) -> bool:
    return result["model"] == "E-RADIO"


def _single(result: dict) -> bool:
    return result["model"] in VITS and result["batch"] == 1 and result["pixels"] in SIDES


def _in_grid(keep: Callable[[dict], bool]) -> int:
    return sum(keep(case._asdict()) for case in grid())


def _planned(kind: str, keep: Callable[[dict], bool] = lambda _: True) -> int:
    return sum(step.kind == kind and keep(step.case._asdict()) for step in plan("default"))


def _shares(data: dict) -> dict[str, Value]:
    return {case: share_of_matmul(data, result) for case, result in measured(data, "cases", _largest)}


def best_sdpa(result: dict) -> tuple[str, float] | None:
    """(backend, ms) of the fastest one that works."""
    times = {name: found["ms"] for name, found in result["contenders"].items() if "ms" in found}
    times.pop("radio_fast", None)
    return min(times.items(), key=lambda item: item[1]) if times else None


def _attention(data: dict) -> dict[str, Value]:
    out: dict[str, Value] = {}
    for case, result in measured(data, "attention"):
        ours, best = value_of(result, "radio_fast", "ms"), best_sdpa(result)
        if best is not None:
            out[case] = None if ours is None else best[1] / ours
    return out


def _memory(data: dict) -> dict[str, Value]:
    inverse = speedups(data, "memory", "official", lambda _: True, "peak")
    return {case: None if value is None else 1 / value for case, value in inverse.items()}


def _launches(data: dict) -> dict[str, Value]:
    return {case: r["launches_per_block"] for case, r in measured(data, "ops") if "launches_per_block" in r}


TARGETS = (
    Target(f"ViT, batch ≥ {LARGE_BATCH}: speed over torch.compile max-autotune", 1.15, _in_grid(_large),
           lambda data: speedups(data, "compiled", "compiled", _large)),
    Target(f"ViT, batch ≥ {LARGE_BATCH}: speed over eager", 1.5, _in_grid(_large),
           lambda data: speedups(data, "cases", "eager", _large)),
    Target("ViT, batch 1: latency of eager over ours", 3.0, _in_grid(_single),
           lambda data: speedups(data, "cases", "eager", _single, "latency", "ms")),
    Target(f"ViT-L and ViT-H, batch ≥ {LARGE_BATCH}: share of the measured matmul rate", 0.65, _in_grid(_largest),
           _shares, unit=""),
    Target("attention at head dim 80: speed over the best SDPA backend", 1.2, _planned("attention"), _attention),
    Target("E-RADIO: speed over eager", 3.0, _in_grid(_eradio),
           lambda data: speedups(data, "cases", "eager", _eradio)),
    Target("E-RADIO: speed over torch.compile max-autotune", 1.2, _in_grid(_eradio),
           lambda data: speedups(data, "compiled", "compiled", _eradio)),
    Target("peak memory over the official recipe's", 0.6, _planned("memory"), _memory, at_most=True),
    Target("launches in a ViT block", 7.0, _planned("ops", lambda case: case["model"] in VITS), _launches,
           at_most=True, unit=""),
)  # fmt: skip


def evaluate(data: dict, targets: tuple[Target, ...] = TARGETS) -> list[Outcome]:
    out = []
    for target in targets:
        values = target.values(data)
        if not values:
            status = "not measured"
        elif not all(reaches(target, value) for value in values.values()):
            status = "missed"
        else:
            status = "met" if len(values) >= target.cases else "met so far"
        out.append(Outcome(target, status, values))
    return out
