"""Which implementation of an op is the fastest here: measured at a bucket's first use, and kept in a file.

A call of a new bucket of shapes times every implementation that can run it on the call's own arguments, a few
milliseconds each, and ranks them. What fails, or disagrees with the plain form in float32, is left out with a log line.
RADIO_FAST_TUNE=0 leaves everything to the shipped order. The file lies in the cache folder's `tuning/`; its name has
the GPU's, and a hash of all that a measurement depends on: driver, torch, Triton, this package's kernels.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import re
import statistics
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from radio_fast import native
from radio_fast.ops._dispatch import HALF
from radio_fast.ops._providers import PACKAGES
from radio_fast.ops._state import capturing, overrides
from radio_fast.paths import default_cache_dir
from radio_fast.version import __version__

log = logging.getLogger("radio_fast")
FORMAT = 1
MAX_FILE = 4 << 20  # bytes: ten thousand buckets
WARMUP, ROUNDS = 3, 11
HEAD_START = 400_000  # cycles, 0.2 ms: the GPU waits while a call is enqueued, so that its work is timed, not Python
LARGEST_TIME = 1e9  # microseconds
FEW_MS = 4.0  # an implementation's rounds take about this long, and at least three are made
TIE = 1.02  # what is closer than this is noise: the shipped order decides

_lock = threading.RLock()  # timing one thing at a time; an op's implementations may have ops of their own to measure


def enabled() -> bool:
    """Whether first uses measure: RADIO_FAST_TUNE, "1" if unset.

    Raises:
        ValueError: neither "0" nor "1".
    """
    value = overrides().get("RADIO_FAST_TUNE", "1")
    if value not in ("0", "1"):
        raise ValueError(f"RADIO_FAST_TUNE must be 0 (the shipped order) or 1 (measure), got {value!r}")
    return value == "1"


class Record(NamedTuple):
    """One bucket: microseconds by implementation, best first, and why others were dropped."""

    times: dict[str, float]
    dropped: dict[str, str]


# -- file ------------------------------------------------------------------------------------------------------


def folder() -> Path:
    return default_cache_dir() / "tuning"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")[:1000]
    except OSError:
        text = ""
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return found[0] if found else str(getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")())


@cache
def _kernels() -> str:
    """A hash of the kernels' sources and of the extension that is loaded."""
    digest = hashlib.sha256()
    for path in sorted((Path(__file__).parent.parent / "kernels").glob("*.py")):
        digest.update(path.read_bytes())
    if native.why_not_native() is None:
        digest.update(native.library().path.read_bytes())
    return digest.hexdigest()[:16]


def identity(device: torch.device) -> dict[str, str]:
    """What a measurement depends on beside the call."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "gpu": gpu,
        "arch": os.environ.get("RADIO_FAST_ARCH", ""),
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "others": " ".join(f"{name} {_version(name)}" for name in PACKAGES),
        "radio_fast": __version__,
        "kernels": _kernels(),
    }


def path_of(who: dict[str, str]) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", who["gpu"].lower()).strip("-")[:60]
    return folder() / f"{slug}-{hashlib.sha256(json.dumps(who).encode()).hexdigest()[:12]}.json"


def _record(entry: Any) -> Record | None:
    """A record from the file, None if it is none: anyone may have written there."""
    if not isinstance(entry, dict):
        return None
    times, dropped = entry.get("us"), entry.get("dropped")
    if not isinstance(times, dict) or not isinstance(dropped, dict):
        return None
    numbers = all(type(t) in (int, float) and 0 < t < LARGEST_TIME for t in times.values())
    texts = all(isinstance(why, str) for why in dropped.values())
    return Record(times, dropped) if numbers and texts and "reference" in times else None


def read(path: Path) -> dict[str, dict[str, Record]]:
    """op → bucket → record; nothing of a file that is missing, damaged, or of another format."""
    try:
        if path.stat().st_size > MAX_FILE:
            raise ValueError(f"larger than {MAX_FILE} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"not of format {FORMAT}")
        choices = content["choices"].items()
        found = {op: {key: _record(entry) for key, entry in buckets.items()} for op, buckets in choices}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, AttributeError, RecursionError) as error:
        log.warning("tuning file %s is not used: %s", path, error)
        return {}
    return {op: {key: record for key, record in buckets.items() if record} for op, buckets in found.items()}


class Store:
    """A device's records, in memory and in its file."""

    def __init__(self, device: torch.device):
        self.who = identity(device)
        try:
            self.path = path_of(self.who)
        except RuntimeError as error:  # no home directory
            self.path, self.writable, self.records = None, False, {}
            log.warning("no tuning file, measurements last as long as this process: %s", error)
        else:
            self.records = read(self.path)
            self.writable = True

    def get(self, op: str, key: str) -> Record | None:
        return self.records.get(op, {}).get(key)

    def refreshed(self) -> dict[str, dict[str, Record]]:
        """op → bucket → record, those that other processes have written meanwhile among them."""
        for op, buckets in read(self.path).items() if self.path else ():
            self.records[op] = buckets | self.records.get(op, {})
        return self.records

    def put(self, op: str, key: str, record: Record) -> None:
        """Keep it, beside what other processes have written meanwhile."""
        self.records.setdefault(op, {})[key] = record
        if not self.writable:
            return
        from filelock import FileLock, Timeout

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock", timeout=5):
                choices = {
                    name: {k: {"us": r.times, "dropped": r.dropped} for k, r in sorted(buckets.items())}
                    for name, buckets in sorted(self.refreshed().items())
                }
                part = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
                part.write_text(json.dumps({"format": FORMAT} | self.who | {"choices": choices}, indent=1))
                part.replace(self.path)
        except (OSError, Timeout) as error:
            self.writable = False
            log.warning("the tuning file can't be written, measurements last as long as this process: %s", error)


_stores: dict[tuple, Store] = {}


def store(device: torch.device) -> Store:
    slot = (device, *map(os.environ.get, ("RADIO_FAST_ARCH", "RADIO_FAST_CACHE", "XDG_CACHE_HOME", "HOME")))
    with _lock:
        if slot not in _stores:
            _stores[slot] = Store(device)
        return _stores[slot]


# -- measuring -------------------------------------------------------------------------------------------------


def time_once(run: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds that a call's kernels take."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure(runs: dict[str, Callable[[], Any]], device: torch.device) -> tuple[dict[str, float], dict[str, str]]:
    """Median microseconds of each, in interleaved rounds after a warm-up; and why others failed."""
    rounds, failed = {}, {}
    times: dict[str, list[float]] = {name: [] for name in runs}

    def once(name: str) -> None:
        if name not in failed:
            try:
                times[name].append(time_once(runs[name], device))
            except Exception as error:
                _unless_fatal(error, device)
                failed[name] = _one_line(error)

    for name in runs:
        for _ in range(WARMUP):
            once(name)
        rounds[name] = max(3, min(ROUNDS, int(FEW_MS / max(min(times[name], default=1.0), 1e-6))))
        times[name].clear()
    for i in range(ROUNDS):
        for name in runs:
            if i < rounds[name]:
                once(name)
    return {name: round(1e3 * statistics.median(t), 3) for name, t in times.items() if name not in failed}, failed


def _sample(value: Any) -> Any:
    """The first and the last image of a batched tensor."""
    return value[:: value.shape[0] - 1] if isinstance(value, Tensor) else value


def disagreement(result: tuple[Tensor, ...], truth: tuple[Tensor, ...], plain: tuple[Tensor, ...]) -> str | None:
    """None if the error of each result is at most four times that of plain PyTorch in its dtype, and rounding.

    Rounding: eight units in the last place of the largest value. The same is asked of all channels together, each taken
    relative to its largest value, of the root of the mean square: beside an outlier, nonsense would pass. Wider than
    the tests' rule, since a call may have one row, and plain PyTorch luck with it; what is wrong is wrong by more.
    """
    for ours, true, theirs in zip(result, truth, plain, strict=True):
        if ours.shape != true.shape or ours.dtype != theirs.dtype:
            return f"returned {ours.dtype} {tuple(ours.shape)}, expected {theirs.dtype} {tuple(true.shape)}"
        if not ours.numel():
            continue
        true, eps = true.double(), torch.finfo(ours.dtype).eps
        errors = [t.double() - true for t in (ours, theirs)]
        largest = true.abs().max()
        channels = true.abs().flatten(0, -2).amax(0) if true.ndim > 1 else largest
        relative = [(e / (channels + eps * largest + 1e-30)).square().mean().sqrt().item() for e in errors]
        error, allowed = (e.abs().max().item() for e in errors)
        for found, bound in (
            (error, 4 * allowed + 8 * eps * largest.item()),
            (relative[0], 4 * relative[1] + 8 * eps),
        ):
            if not found <= bound:  # NaN too
                return f"its error is {found:.3g}, at most {bound:.3g} is rounding"
    return None


def _unless_fatal(error: Exception, device: torch.device) -> None:
    """Raise what says nothing about the implementation it met: no memory, or a GPU that does nothing any more."""
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # raises again what has broken the context


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _candidates(op: Any, args: tuple, limits: Any) -> list[str]:
    device, dtype = args[0].device, args[0].dtype
    usable = op.usable(device, dtype)
    return [name for name, reason in usable.items() if reason is None and limits.get(name) is None]


class _NotNow(Exception):
    """Nothing can be said of this bucket from these arguments."""


def _measure_all(op: Any, args: tuple, names: list[str]) -> Record:
    """Run every implementation, drop those that fail or disagree, time the rest."""
    first = args[0]
    batched = bool(op.batched) and first.ndim > 1 and first.shape[0] > 1
    some = tuple(_sample(arg) if batched and i in op.batched else arg for i, arg in enumerate(args))
    wide = op.truth if first.dtype in HALF else torch.float64

    def results(name: str, arguments: tuple, whole: bool) -> tuple[Tensor, ...]:
        found = op.implementations[name].run(*arguments)
        found = found if isinstance(found, tuple) else (found,)
        return tuple(map(_sample, found)) if whole and batched else found

    exact = tuple(a.to(wide) if isinstance(a, Tensor) and a.is_floating_point() else a for a in some)
    truth = results("reference", exact, False)
    if not all(t.isfinite().all() for t in truth):
        raise _NotNow("its result is not finite")
    plain = results("reference", some, False)
    runs, dropped = {}, {}
    for name in names:
        try:
            reason = disagreement(results(name, args, True), truth, plain)
        except Exception as error:  # whatever another package may raise
            _unless_fatal(error, first.device)
            reason = _one_line(error)
        if reason is None:
            runs[name] = lambda name=name: op.implementations[name].run(*args)
        else:
            dropped[name] = reason
    times, failed = measure(runs, first.device)
    dropped |= failed
    if "reference" not in times:
        raise _NotNow(f"plain PyTorch fails: {dropped['reference']}")
    for name, reason in dropped.items():
        log.warning("%s of %s is not used for this shape: %s", name, op.name, reason)
    return Record(times, dropped)


def ranking_of(times: dict[str, float], shipped: tuple[str, ...]) -> tuple[str, ...]:
    """Implementations, fastest first; of those that tie with it, the one that is shipped as earlier."""
    order = sorted(times, key=times.__getitem__)
    ties = [name for name in order if times[name] <= TIE * times[order[0]]]
    first = next((name for name in shipped if name in ties), order[0])
    return (first, *(name for name in order if name != first))


def rank(op: Any, key: str, args: tuple, limits: Any, shipped: tuple[str, ...]) -> tuple[str, ...] | None:
    """The implementations of `op` for this bucket, fastest first; None if it can't be told now.

    Args:
        args: of the call, which are what is timed.
        limits: what the call breaks of an implementation's limits.
        shipped: the order unmeasured, which settles ties.
    """
    device = args[0].device
    if capturing(device) or not args[0].numel():
        return None
    with _lock, torch.no_grad(), torch.cuda.device_of(args[0]):
        records = store(device)
        key = f"{str(args[0].dtype).removeprefix('torch.')} {key}"
        names = _candidates(op, args, limits)
        record = records.get(op.name, key)
        if record is None or not set(names) <= {*record.times, *record.dropped}:  # one was installed since
            if len(names) < 2:
                return tuple(names) or shipped
            try:
                record = _measure_all(op, args, names)
            except torch.OutOfMemoryError:
                log.warning("no memory is left to measure %s: its shipped order is taken", op.name)
                return shipped
            except _NotNow as reason:
                log.info("%s can't be measured: %s", op.name, reason)
                return None
            ranking = ranking_of(record.times, shipped)
            records.put(op.name, key, Record({name: record.times[name] for name in ranking}, record.dropped))
            return ranking
        times = {name: t for name, t in record.times.items() if name in names}
        return ranking_of(times, shipped) if times else shipped
