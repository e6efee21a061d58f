"""Measuring implementations against each other: on the CPU, with a clock of our own."""

from __future__ import annotations

import json
import logging
import re
import threading
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import radio_fast
from radio_fast import ops
from radio_fast.ops import _dispatch, _tuning
from radio_fast.ops._dispatch import OPS, Op, bucket
from tests.conftest import golden_source
from tests.numerics import GOLDEN_RTOL, assert_relative

CPU = torch.device("cpu")
X = torch.linspace(-2, 3, 60).view(5, 12).half()


def plain(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x)


def last_image_wrong(x: torch.Tensor) -> torch.Tensor:
    y = plain(x)
    y[-1] += 0.1
    return y


def raises(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no\nkernel image")


def no_memory(x: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture(autouse=True)
def pretend(monkeypatch):
    """The CPU is worth measuring on; ops and stores have decided nothing."""
    monkeypatch.setattr(_dispatch, "accelerated", lambda device: True)
    monkeypatch.delenv("RADIO_FAST_TUNE", raising=False)
    monkeypatch.setattr(_tuning, "_stores", {})
    for op in OPS.values():
        monkeypatch.setattr(op, "_rankings", {})


class Toy:
    """An op whose implementations take as long as they are said to."""

    def __init__(self, monkeypatch, **milliseconds: float):
        self.milliseconds = {"reference": 5.0} | milliseconds
        self.calls: list[str] = []
        self.measured = 0
        monkeypatch.setattr(_dispatch, "OPS", dict(OPS))
        self.op = Op("toy", self.named("reference", plain), key=lambda x: f"n{x.shape[0]}")
        self.op.implementations["reference"] = self.op.implementations["reference"]._replace(
            run=self.named("reference", plain)
        )
        monkeypatch.setattr(_tuning, "time_once", self.time_once)

    def named(self, name, function):
        def run(x):
            self.calls.append(name)
            return function(x)

        return run

    def add(self, name, function=plain, **options):
        self.op.add(name, self.named(name, function), lambda device, dtype: None, **options)
        return self

    def time_once(self, run, device):
        self.measured += 1
        run()
        return self.milliseconds[self.calls[-1]]

    def ran(self, x=X, limits=None) -> str:
        """What the call runs; its result is right."""
        assert torch.equal(self.op("auto", (x,), limits or {}), plain(x))
        return self.calls[-1]

    def forget(self, monkeypatch):
        """As a new process finds it."""
        self.op.forget()
        monkeypatch.setattr(_tuning, "_stores", {})
        self.measured = 0


def file() -> dict:
    (path,) = _tuning.folder().glob("*.json")
    return json.loads(path.read_text())


def test_fastest_runs_and_is_remembered(monkeypatch):
    toy = Toy(monkeypatch, slow=9.0, fast=1.0).add("slow").add("fast")
    assert toy.op.choose.__self__ is toy.op
    assert toy.ran() == "fast"
    measured = toy.measured
    assert measured > 0 and toy.ran() == "fast" and toy.measured == measured
    entry = file()["choices"]["toy"]["float16 n5"]
    assert entry == {"us": {"fast": 1000.0, "slow": 9000.0, "reference": 5000.0}, "dropped": {}}
    toy.forget(monkeypatch)
    assert toy.ran() == "fast" and toy.measured == 0, "another process reads the file"
    assert toy.ran(X[:3]) == "fast" and toy.measured > 0, "another bucket"
    assert toy.ran(X.float()) == "fast"
    assert set(file()["choices"]["toy"]) == {"float16 n5", "float16 n3", "float32 n5"}


def test_plain_torch_may_be_the_fastest(monkeypatch):
    assert Toy(monkeypatch, reference=1.0, kernel=2.0).add("kernel").ran() == "reference"


def test_ties_go_to_the_shipped_order(monkeypatch):
    toy = Toy(monkeypatch, reference=1.0, kernel=1.015, foreign=0.999).add("kernel").add("foreign", shipped=())
    assert toy.ran() == "kernel"
    assert Toy(monkeypatch, reference=1.0, kernel=1.03).add("kernel").ran(X[:2]) == "reference"


def test_what_is_not_shipped_runs_once_measured(monkeypatch):
    toy = Toy(monkeypatch, kernel=2.0, foreign=1.0).add("kernel").add("foreign", shipped=())
    assert toy.ran() == "foreign"
    toy.op.forget()
    monkeypatch.setenv("RADIO_FAST_TUNE", "0")
    assert toy.ran() == "kernel", "unmeasured"


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (raises, "RuntimeError: no kernel image"),
        (lambda x: plain(x) + 0.1, "its error is 0.1"),
        (last_image_wrong, "its error is 0.1"),
        (lambda x: plain(x) * float("nan"), "its error is nan"),
        (lambda x: plain(x)[:, :3], r"returned torch.float16 \(2, 3\), expected torch.float16 \(2, 12\)"),
        (lambda x: plain(x).float(), "returned torch.float32"),
    ],
    ids=["raises", "wrong", "last image", "nan", "shape", "dtype"],
)
def test_wrong_implementations_are_dropped(monkeypatch, caplog, function, reason):
    toy = Toy(monkeypatch, bad=0.1, good=1.0).add("bad", function).add("good")
    with caplog.at_level(logging.WARNING, "radio_fast"):
        assert toy.ran() == "good"
    (line,) = caplog.messages
    assert line.startswith("bad of toy is not used for this shape: ") and "\n" not in line
    dropped = file()["choices"]["toy"]["float16 n5"]["dropped"]
    assert list(dropped) == ["bad"]
    assert re.search(reason, dropped["bad"])
    caplog.clear()
    toy.forget(monkeypatch)
    assert toy.ran() == "good" and not caplog.messages and "bad" not in toy.calls[-1:]


def test_rounding_is_no_disagreement(monkeypatch):
    """Another order of operations, in the dtype's own precision."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        toy = Toy(monkeypatch, other=1.0).add("other", lambda x: (x.float().sin() * (1 + 2e-7)).to(x.dtype))
        toy.op("auto", (X.to(dtype),), {})
        assert toy.calls[-1] == "other"


def test_shipped_order_without_tuning(monkeypatch):
    monkeypatch.setenv("RADIO_FAST_TUNE", "0")
    toy = Toy(monkeypatch, first=9.0, second=1.0).add("first").add("second")
    assert toy.ran() == "first" and toy.measured == 0 and not _tuning.folder().exists()
    monkeypatch.setenv("RADIO_FAST_TUNE", "yes")
    toy.op.forget()
    with pytest.raises(ValueError, match=r"RADIO_FAST_TUNE must be 0 .* or 1 .*, got 'yes'"):
        toy.op("auto", (X,), {})


def test_new_implementation_is_measured(monkeypatch):
    toy = Toy(monkeypatch, old=2.0, new=1.0).add("old")
    assert toy.ran() == "old"
    toy.add("new")
    toy.forget(monkeypatch)
    assert toy.ran() == "new" and toy.measured > 0


def test_implementation_that_went_is_not_chosen(monkeypatch):
    toy = Toy(monkeypatch, here=2.0, gone=1.0).add("here").add("gone")
    assert toy.ran() == "gone"
    gone = toy.op.implementations["gone"]
    toy.op.implementations["gone"] = gone._replace(why_not=lambda device, dtype: "not installed", run=None)
    toy.forget(monkeypatch)
    assert toy.ran() == "here" and toy.measured == 0
    del toy.op.implementations["gone"]
    toy.forget(monkeypatch)
    assert toy.ran() == "here"


def test_limits_of_one_call(monkeypatch):
    toy = Toy(monkeypatch, fast=1.0, slow=2.0).add("fast").add("slow")
    assert toy.ran(limits={"fast": "not aligned"}) == "slow"
    assert toy.ran() == "fast", "measured for the call that it can run"
    assert toy.ran(limits={"fast": "not aligned"}) == "slow"


def test_no_memory_to_measure(monkeypatch, caplog):
    toy = Toy(monkeypatch, kernel=1.0).add("kernel", no_memory)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):  # the shipped order's: the user's own call has no memory
            toy.op("auto", (X,), {})
    assert caplog.messages == ["no memory is left to measure toy: its shipped order is taken"], "said, and tried, once"
    assert not _tuning.folder().exists()


def test_not_while_a_graph_is_captured(monkeypatch):
    toy = Toy(monkeypatch, first=9.0, second=1.0).add("first").add("second")
    monkeypatch.setattr(_tuning, "capturing", lambda device: True)
    assert toy.ran() == "first" and toy.measured == 0
    monkeypatch.setattr(_tuning, "capturing", lambda device: False)
    assert toy.ran() == "second", "asked again"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("row", [0, -1])
def test_values_that_say_nothing(monkeypatch, bad, row):
    """A first image that is not finite must not decide for all that follow."""
    toy = Toy(monkeypatch, first=9.0, second=1.0).add("first").add("second")
    x = X.clone()
    x[row, 0] = bad
    toy.op("auto", (x,), {})
    assert toy.calls[-1] == "first" and not _tuning.folder().exists()
    assert toy.ran() == "second", "asked again"


def test_plain_torch_fails_too(monkeypatch, caplog):
    """Then it is the call, or the GPU, that is at fault: nobody is dropped for good."""
    toy = Toy(monkeypatch, kernel=1.0).add("kernel", raises)
    once = toy.time_once
    failing = True

    def time_once(run, device):
        if failing:
            raise RuntimeError("CUDA error: launch failed")
        return once(run, device)

    monkeypatch.setattr(_tuning, "time_once", time_once)
    with pytest.raises(RuntimeError, match="no\nkernel image"):  # the shipped order's
        toy.op("auto", (X,), {})
    assert not _tuning.folder().exists()
    failing = False
    assert toy.ran() == "reference" and list(file()["choices"]["toy"]["float16 n5"]["dropped"]) == ["kernel"]


def test_failure_while_it_is_timed(monkeypatch, caplog):
    """As of an implementation that runs out of something at the fourth call."""
    toy = Toy(monkeypatch, bad=0.1, good=1.0).add("bad").add("good")
    once = toy.time_once

    def time_once(run, device):
        took = once(run, device)
        if toy.calls.count("bad") > 3 and toy.calls[-1] == "bad":
            raise RuntimeError("out of workspace")
        return took

    monkeypatch.setattr(_tuning, "time_once", time_once)
    assert toy.ran() == "good"
    assert file()["choices"]["toy"]["float16 n5"]["dropped"] == {"bad": "RuntimeError: out of workspace"}


def test_nonsense_beside_an_outlier(monkeypatch):
    """The largest channel alone would pass for the whole."""
    toy = Toy(monkeypatch, bad=0.1).add("bad", lambda x: x * (torch.arange(x.shape[-1]) == 3))
    toy.op.implementations["reference"] = toy.op.implementations["reference"]._replace(
        run=toy.named("reference", lambda x: 1 * x)
    )
    x = X.bfloat16()
    x[:, 3] = 1500
    toy.op("auto", (x,), {})
    assert toy.calls[-1] == "reference"


def test_under_modes_and_transforms(monkeypatch):
    """Nothing is measured, nothing remembered."""
    toy = Toy(monkeypatch, first=9.0, second=1.0).add("first").add("second")
    with FlopCounterMode(display=False):
        assert toy.ran() == "first"
    torch.func.vmap(lambda x: toy.op("auto", (x,), {}))(X[None])
    assert toy.calls[-1] == "first" and toy.measured == 0
    assert toy.ran() == "second"


def test_one_row(monkeypatch):
    """x of (K,), as ops document it: there is no batch to sample."""
    toy = Toy(monkeypatch, kernel=1.0).add("kernel")
    assert toy.ran(X[0]) == "kernel"


def test_no_home(monkeypatch, caplog):
    """A user without a home directory measures, and keeps nothing."""
    toy = Toy(monkeypatch, kernel=1.0).add("kernel")

    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(_tuning, "folder", nowhere)
    assert toy.ran() == toy.ran(X[:3]) == "kernel"
    assert caplog.messages == [
        "no tuning file, measurements last as long as this process: Could not determine home directory."
    ]


def test_empty_batches_are_not_measured(monkeypatch):
    toy = Toy(monkeypatch, kernel=1.0).add("kernel")
    assert toy.ran(X[:0]) == "kernel" and toy.measured == 0


def test_threads_measure_once(monkeypatch):
    toy = Toy(monkeypatch, kernel=4.0).add("kernel")
    inner = toy.time_once

    def slowly(run, device):
        time.sleep(0.002)
        return inner(run, device)

    monkeypatch.setattr(_tuning, "time_once", slowly)
    threads = [threading.Thread(target=toy.op, args=("auto", (X,), {})) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert toy.measured == 2 * (_tuning.WARMUP + 3)


# -- the file ----------------------------------------------------------------------------------------------------------


def with_entry(entry: str) -> str:
    return f'{{"format": 1, "choices": {{"toy": {{"float16 n5": {entry}}}}}}}'


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": 99, "choices": {}}',
        '{"format": 1}',
        '{"format": 1, "choices": [1]}',
        '{"format": 1, "choices": {"toy": 3}}',
        with_entry("3"),
        with_entry('{"us": {"reference": 5, "fast": "1"}, "dropped": {}}'),
        with_entry('{"us": {"reference": 5, "slow": -1, "fast": 9}, "dropped": {}}'),
        with_entry('{"us": {"reference": 5, "slow": 1}, "dropped": {"fast": 1}}'),
        with_entry('{"us": {"reference": 5, "slow": NaN}, "dropped": {}}'),
        with_entry('{"us": {"reference": 5, "slow": 1' + 401 * "0" + '}, "dropped": {}}'),
        with_entry('{"us": {"reference": 5, "slow": true}, "dropped": {}}'),
        with_entry('{"us": {"slow": 1}, "dropped": {"reference": "no"}}'),
        "[" * 100_000,
        '"' + "x" * (5 << 20) + '"',
        "\ud800",
    ],
    ids=range(19),
)
def test_damaged_file_is_measured_anew(monkeypatch, content):
    toy = Toy(monkeypatch, slow=9.0, fast=1.0).add("slow").add("fast")
    path = _tuning.path_of(_tuning.identity(CPU))
    path.parent.mkdir(parents=True)
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    assert toy.ran() == "fast" and toy.measured > 0
    assert file()["choices"]["toy"]["float16 n5"]["us"]["fast"] == 1000.0


def test_folder_that_can_not_be_written(monkeypatch, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file")
    toy = Toy(monkeypatch, kernel=1.0).add("kernel")
    assert toy.ran() == "kernel"
    assert toy.ran(X[:3]) == "kernel"
    (line,) = caplog.messages
    assert "the tuning file can't be written" in line


def test_two_processes_keep_each_others_records(monkeypatch):
    toy = Toy(monkeypatch, kernel=1.0).add("kernel")
    other = _tuning.Store(CPU)
    assert toy.ran() == "kernel"
    other.put("toy", "float16 n7", _tuning.Record({"kernel": 1.0, "reference": 2.0}, {}))
    assert set(file()["choices"]["toy"]) == {"float16 n5", "float16 n7"}
    assert not list(_tuning.folder().glob("*.part"))


def test_what_a_measurement_depends_on(monkeypatch):
    """Another driver, torch, kernel or path of an older GPU: another file."""
    before = _tuning.identity(CPU)
    assert set(before) == {"gpu", "arch", "driver", "torch", "triton", "others", "radio_fast", "kernels"}
    paths = {_tuning.path_of(before | {key: "other"}) for key in before} | {_tuning.path_of(before)}
    assert len(paths) == len(before) + 1
    assert "/" not in _tuning.path_of(before | {"gpu": "../../NVIDIA/H200"}).name
    monkeypatch.setenv("RADIO_FAST_ARCH", "80")
    assert _tuning.identity(CPU)["arch"] == "80"


def test_bucket():
    assert [bucket(n) for n in (1, 2, 3, 4, 5, 6, 7, 9, 13, 206, 739, 1034)] == [
        1, 2, 3, 4, 6, 6, 8, 12, 16, 256, 768, 1536,
    ]  # fmt: skip
    assert all(n <= bucket(n) < 1.5 * n + 1 for n in range(1, 5000))


# -- the real ops ------------------------------------------------------------------------------------------------------


@pytest.fixture
def wall_time(monkeypatch):
    """One call each: the interpreter is slow."""

    def measure(runs, device):
        times = {}
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            times[name] = (time.perf_counter() - started) * 1e6
        return times, {}

    monkeypatch.setattr(_tuning, "measure", measure)


def test_every_op_is_measured(wall_time, caplog, nearest_bfloat16):
    """All real implementations that run here agree with each other, by the rule that drops those which don't."""
    generator = torch.Generator().manual_seed(1)

    def new(*shape):
        return torch.randn(*shape, generator=generator).half()

    x, w, one, stat = new(3, 7, 64), new(64, 64), new(64), torch.ones(3, 7)
    ops.linear(x, w, one.float(), "gelu", x)
    ops.ln_linear(x, stat, stat, one, one, 1.0, w, one)
    ops.layer_norm(x, one, one, 1e-6)
    ops.add_norm_stats(x, x, None, 1e-6)
    ops.norm_stats(x, 1e-6)
    ops.linear_add_norm(x, w, one, x, one, one, 1e-6)
    ops.attention(new(3, 7, 3 * 32), 2)
    ops.attention(new(2, 16, 3 * 32), 2, window=(4, 4, 2))
    ops.window_attention(new(2, 4, 4, 3 * 32), 2, 4, new(2, 16, 16))
    ops.blend(new(2, 4, 4, 8), new(2, 4, 4, 8))
    ops.patch_embed(torch.rand(2, 3, 32, 32), new(64, 768), None, new(4, 64), new(2, 64), 16)
    measured = file()["choices"]
    assert set(measured) == {name for name in OPS if name not in ("pos_embed", "linear_int8", "toy")}
    for op, buckets in measured.items():
        for entry in buckets.values():
            assert len(entry["us"]) >= 2, f"{op} has a choice"
    assert not caplog.messages


@pytest.mark.parametrize("case", ["vit_h16", "eradio_small"])
def test_whole_model(case, wall_time, nearest_bfloat16, caplog):
    """Whatever was measured to be fastest: the reference's output."""
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    model = radio_fast.load(golden_source(case), **{"window_size": 1} if case == "eradio_small" else {})
    with torch.inference_mode():
        tuned = model(x)
        model.model.set_backend("reference")
        truth = model(x)
    for ours, theirs in zip(tuned, truth, strict=True):
        assert_relative(ours, theirs, GOLDEN_RTOL[torch.float32])
    assert {"linear", "linear_add_norm"} <= set(file()["choices"]) and not caplog.messages
