"""torch.hub's entry: `torch.hub.load("<this repository>", "radio_model", version="radio_v2.5-h", …)`.

torch.hub imports this file with the repository's root first on sys.path, so that the package beside it is found.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import inspect
import os
import sys
from typing import Any

import radio_fast

dependencies = ["torch", "numpy", "safetensors", "huggingface_hub", "filelock", "tqdm"]


def _kernels_of_an_archive() -> None:
    """torch.hub unpacks GitHub's archives without symbolic links: `radio_fast/kernels` is then a small text file.

    The folder it names becomes radio_fast.kernels, never a package of its own: Transformers would take it for another.
    """
    link = os.path.join(os.path.dirname(radio_fast.__file__), "kernels")
    if os.path.isdir(link) or "radio_fast.kernels" in sys.modules:
        return
    spec = importlib.machinery.ModuleSpec("radio_fast.kernels", None, is_package=True)
    spec.submodule_search_locations.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "kernels"))
    radio_fast.kernels = sys.modules["radio_fast.kernels"] = importlib.util.module_from_spec(spec)


_kernels_of_an_archive()


def radio_model(
    version: str = "",
    progress: bool = True,
    return_checkpoint: bool = False,
    adaptor_names: str | list[str] | None = None,
    vitdet_window_size: int | None = None,
    neck_name: str | None = None,
    num_tokens: int | None = None,
    **kwargs: Any,
) -> Any:
    """A RADIO model in eval mode: `radio_fast.load(version, …)` under the official entry's name and arguments.

    Args:
        version: a version name (`radio_fast.versions()`), a checkpoint file, a Hugging Face folder or repository;
            "" is the default.
        progress: show a bar while downloading.
        return_checkpoint: return (model, the checkpoint's dict).
        adaptor_names: one or more of the checkpoint's adaptors; the model then returns a dict.
        vitdet_window_size: attend inside windows of this many patches a side, but for a few global blocks.
        neck_name, num_tokens: RADIO1D's, which has no released weights: refused.
        kwargs: whatever else `radio_fast.load` takes, such as device, dtype and backend.

    Raises:
        ValueError: an argument is not known, or its value not legal; the message names those that are.
        CheckpointError, DownloadError: as `radio_fast.load`.
    """
    for name, value in (("neck_name", neck_name), ("num_tokens", num_tokens)):
        if value is not None:
            raise ValueError(f"{name}={value!r} is not supported (RADIO1D has no released weights): leave it out")
    known = [name for name in inspect.signature(radio_fast.load).parameters if name != "version"]
    if unknown := sorted(kwargs.keys() - set(known)):
        raise ValueError(f"radio_model has no argument {', '.join(unknown)}; it takes version, {', '.join(known)}")
    return radio_fast.load(
        version,
        progress=progress,
        return_checkpoint=return_checkpoint,
        adaptor_names=adaptor_names,
        vitdet_window_size=vitdet_window_size,
        **kwargs,
    )
