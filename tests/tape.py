"""A stand-in for CUDA graphs on the CPU: a tape of operators, bound to memory and not to objects, as theirs are."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import radio_fast
from radio_fast.graphs import GraphCache
from radio_fast.layers.conv import Conv
from radio_fast.model import RADIOModel
from tests.conftest import golden_source


def bound(value):
    """The same memory, whatever becomes of the object: `.data = …` gives that another one."""
    return value.detach() if isinstance(value, Tensor) else value


def storages(value) -> list[int]:
    return [t.untyped_storage().data_ptr() for t in tree_leaves(value) if isinstance(t, Tensor)]


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        self.steps.append((func, *tree_map(bound, (args, kwargs, outputs))))
        return outputs


class Capturing(Recorder):
    transparent = True  # as a stream that is captured


class Tape:
    """What `CudaCapture` is, for CPU tensors. `log` has the order of everything."""

    device_type = "cpu"
    capacity = 1 << 40  # bytes
    capturing = False  # the user's own graph
    flaw: str | None = None  # "fails", "differs"
    log: list[str]

    def __init__(self, device: torch.device):
        self.steps, self.bytes = [], 0
        self.note("made")

    @classmethod
    def fresh(cls) -> type[Tape]:
        """A class whose log and flaws are one test's own."""
        return type("Tape", (cls,), {"log": []})

    def note(self, what: str) -> None:
        self.log.append(what)

    @classmethod
    def limit(cls, device: torch.device) -> int:
        return cls.capacity

    @classmethod
    def busy(cls, device: torch.device) -> bool:
        return cls.capturing

    def capture(self, run):
        self.note("capture")
        if self.flaw == "fails":
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        with Capturing() as recorder:
            outputs = run()
        self.steps = recorder.steps
        own = {}
        for _, args, kwargs, made in self.steps:
            inputs = storages((args, kwargs))
            own.update({s: t for t in tree_leaves(made) if isinstance(t, Tensor)
                        for s in storages(t) if s not in inputs})  # fmt: skip
        self.bytes = sum(t.untyped_storage().nbytes() for t in own.values())
        for tensor in own.values():  # a capture computes nothing
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
        return outputs

    @contextmanager
    def turn(self, image):
        self.note("turn")
        yield
        self.note("done")

    def replay(self):
        self.note("replay")
        for func, args, kwargs, made in self.steps:
            inputs = storages((args, kwargs))
            for old, new in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.untyped_storage().data_ptr() not in inputs:
                    old.copy_(new)
        if self.flaw == "differs":
            next(t for t in reversed(tree_leaves(made)) if isinstance(t, Tensor)).add_(1)

    def close(self):
        self.note("closed")
        self.steps = []


class Subclass(torch.Tensor):
    pass


def load(case="vit_h16", capture=None, max_graphs=16, max_bytes=None, **options) -> RADIOModel:
    model = radio_fast.load(golden_source(case), **options)
    model.graphs = GraphCache(max_graphs, max_bytes, capture or Tape.fresh())
    for module in model.modules():
        if isinstance(module, Conv):
            module.backend = "reference"  # as on a GPU: what a CPU packs has no storage that a tape could tell
    return model


def image(seed=0, batch=1, rows=4, columns=2) -> torch.Tensor:
    return torch.rand(batch, 3, 16 * rows, 16 * columns, generator=torch.Generator().manual_seed(seed))


def eager(model, x, method="__call__", **options):
    model.graphs.enabled = False
    try:
        return getattr(model, method)(x, **options)
    finally:
        model.graphs.enabled = True


def flat(outputs) -> list[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [t for item in (outputs.values() if isinstance(outputs, dict) else outputs) for t in flat(item)]


def assert_same(ours, theirs) -> None:
    assert type(ours) is type(theirs)
    for a, b in zip(flat(ours), flat(theirs), strict=True):
        assert a.stride() == b.stride() and a.dtype == b.dtype
        assert torch.equal(a, b)


def replays(model) -> int:
    """Replays that gave a caller something: one of each graph was the check."""
    log = model.graphs.capture.log
    return log.count("replay") - log.count("capture")


def warm(model, *args, **kwargs) -> None:
    for _ in range(2):
        model(*args, **kwargs)
    assert len(model.graphs) == 1
