"""What a user without a GPU would run in place of radio_fast: PyTorch, torch.compile, OpenVINO, onnxruntime.

All compute with the weights of the same random model. Each contender is a call that gives (summary, features); those
that have to be built are made by a function, which may fail alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import radio_fast
from bench import rivals
from bench.workload import Case
from radio_fast import RADIOModel

Call = Callable[[], tuple[Tensor, Tensor]]


class Official(nn.Module):
    """RADIO as people run it without radio_fast, float32: Transformers' RadioModel, or the plain E-RADIO.

    Image (B, 3, H, W) in [0, 1] → (summary, features).
    """

    def __init__(self, ours: RADIOModel, case: Case, tiny: bool = False):
        super().__init__()
        self.model = rivals.load_rival(ours, "cpu", tiny)
        self.conditioner = None
        if ours.blocks is None:
            self.model.change_window_size(rivals.eradio_window(case.pixels))
            self.conditioner = ours.input_conditioner  # Transformers' model has its own

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.conditioner is not None:
            return self.model(self.conditioner(x))
        out = self.model(x)
        return out.summary, out.features


def autocast(model: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> Call:
    """The official recipe: float32 weights under autocast to bfloat16."""

    def call() -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    return call


def compiled(official: Official, x: Tensor, precision: str) -> Call:
    """torch.compile with freezing, weights packed beforehand, for this very shape; it compiles in the first call.

    Freezing is set for the process: as an option of torch.compile it does not reach all of the compiler, and calls
    were slower.
    """
    from torch._inductor import config

    config.freezing = True
    model = torch.compile(official, dynamic=False)
    return autocast(model, x) if precision == "bfloat16" else lambda: model(x)


def openvino(official: Official, x: Tensor) -> dict[str, Callable[[], Call]]:
    """{contender: what makes its call}; one converted model for both precisions."""
    import openvino

    converted = openvino.convert_model(official, example_input=x, input=[list(x.shape)])
    core = openvino.Core()

    def made(precision: str) -> Call:
        hints = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
        hints["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
        request = core.compile_model(converted, "CPU", hints).create_infer_request()

        def call() -> tuple[Tensor, Tensor]:
            out = request.infer([x.numpy()], share_inputs=True)  # the results are copies, the caller's own
            return tuple(torch.from_numpy(value) for value in out.values())

        return call

    return {f"OpenVINO {name}": lambda name=name: made(name) for name in ("f32", "bf16")}


def onnxruntime(ours: RADIOModel, x: Tensor) -> Call:
    """float32: its CPU provider has no bfloat16. Threads that spin stop when a call ends, or they would take a core
    from whoever is timed next; inside of a call they do as they like.
    """
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        radio_fast.export_onnx(ours, path, x.shape[2:], dynamic_batch=False, batch=x.shape[0], check=False)
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda: tuple(map(torch.from_numpy, session.run(["summary", "features"], {"image": x.numpy()})))
