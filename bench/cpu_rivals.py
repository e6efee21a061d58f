"""What a user without a GPU would run in place of radio_fast: PyTorch, torch.compile, OpenVINO, onnxruntime.

All compute with the weights of the same random model; each contender is a call that gives (summary, features).
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bench.workload import MODELS
from radio_fast import RADIOModel, load

Call = Callable[[], tuple[Tensor, Tensor]]
OURS = ("float32", "bfloat16", "int8")


def load_ours(model: str, dtype: str) -> RADIOModel:
    return load(MODELS[model], random_init=True, dtype=dtype, device="cpu")


def official(theirs: nn.Module, x: Tensor) -> dict[str, Call]:
    """Transformers' RadioModel as people run RADIO: float32, and float32 weights under autocast to bfloat16."""

    def float32() -> tuple[Tensor, Tensor]:
        out = theirs(x)
        return out.summary, out.features

    def autocast() -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return float32()

    return {"official float32": float32, "official autocast": autocast}


def compiled(theirs: nn.Module, x: Tensor) -> dict[str, Call]:
    """The same two under torch.compile with freezing: weights packed beforehand, shapes fixed."""
    from torch._inductor import config

    torch._dynamo.reset()
    config.freezing = True
    calls = official(torch.compile(theirs, dynamic=False), x)
    return {name.replace("official", "torch.compile"): call for name, call in calls.items()}


def openvino(theirs: nn.Module, x: Tensor) -> dict[str, Call]:
    import openvino

    converted = openvino.convert_model(_Pair(copy.deepcopy(theirs)), example_input=x, input=[list(x.shape)])
    core, calls = openvino.Core(), {}
    for name in ("f32", "bf16"):
        hints = {"INFERENCE_PRECISION_HINT": name, "PERFORMANCE_HINT": "LATENCY"}
        hints["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
        request = core.compile_model(converted, "CPU", hints).create_infer_request()

        def call(request=request) -> tuple[Tensor, Tensor]:
            out = request.infer([x.numpy()], share_inputs=True)
            return tuple(torch.from_numpy(np.array(value)) for value in out.values())

        calls[f"OpenVINO {name}"] = call
    return calls


def onnxruntime(ours: RADIOModel, x: Tensor) -> dict[str, Call]:
    """float32: its CPU provider has no bfloat16."""
    import onnxruntime as ort

    import radio_fast

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        radio_fast.export_onnx(ours, path, x.shape[2:], dynamic_batch=False, batch=x.shape[0], check=False)
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def call() -> tuple[Tensor, Tensor]:
        return tuple(torch.from_numpy(out) for out in session.run(["summary", "features"], {"image": x.numpy()}))

    return {"onnxruntime f32": call}


class _Pair(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model(x)
        return out.summary, out.features
