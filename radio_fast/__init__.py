"""RADIO vision foundation models, fast: `radio_fast.load(version)` returns a drop-in for the official model."""

from radio_fast import hf
from radio_fast.adopt import accelerate
from radio_fast.api import load
from radio_fast.errors import CheckpointError, DownloadError
from radio_fast.export import ExportError, export_onnx
from radio_fast.model import RADIOModel, RadioOutput
from radio_fast.models.packing import PackedOutput
from radio_fast.models.registry import versions
from radio_fast.serve.embedder import Embedder
from radio_fast.version import __version__
from radio_fast.zeroshot import ZeroShot, zero_shot

__all__ = [
    "CheckpointError",
    "DownloadError",
    "Embedder",
    "ExportError",
    "PackedOutput",
    "RADIOModel",
    "RadioOutput",
    "ZeroShot",
    "__version__",
    "accelerate",
    "export_onnx",
    "hf",
    "load",
    "versions",
    "zero_shot",
]
