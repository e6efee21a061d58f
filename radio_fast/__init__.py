"""RADIO vision foundation models, fast: `radio_fast.load(version)` returns a drop-in for the official model."""

from radio_fast.adopt import accelerate
from radio_fast.api import load
from radio_fast.download import DownloadError
from radio_fast.errors import CheckpointError
from radio_fast.export import ExportError, export_onnx
from radio_fast.model import RADIOModel, RadioOutput
from radio_fast.models.registry import versions
from radio_fast.version import __version__

__all__ = [
    "CheckpointError",
    "DownloadError",
    "ExportError",
    "RADIOModel",
    "RadioOutput",
    "__version__",
    "accelerate",
    "export_onnx",
    "load",
    "versions",
]
