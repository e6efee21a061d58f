"""RADIO as a user of Transformers' AutoModel expects it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, RadioConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import ModelOutput

from radio_fast.api import load
from radio_fast.errors import CheckpointError
from radio_fast.model import FEATURE_FORMATS, RADIOModel, RadioOutput, check_choice
from radio_fast.models.spec import ViTSpec

# What a config says of the weights, and must not contradict.
_STRUCTURE = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "num_cls_tokens", "num_registers",
    "summary_idxs",
)  # fmt: skip
# AutoModel's notes to itself, and its switch for code from a repository, of which none is ever run here.
_OF_AUTO_MODEL = ("_from_auto", "adapter_kwargs", "trust_remote_code")


class RadioFastConfig(RadioConfig):
    """Transformers' RadioConfig with what the weights show, and every other field of the folder's config.json."""


@dataclass
class RadioFastModelOutput(ModelOutput):
    """What `RadioFastModel` returns.

    It can be unpacked as the official model's, `summary, features = model(x)`: iterating gives these two, not the names
    of the fields as other ModelOutputs do. Indices, slices and `to_tuple()` count all fields that are there.

    Args:
        summary: (B, S·D).
        features: (B, T, D), or (B, D, h, w) for "NCHW".
        last_hidden_state: (B, P + T, D), prefix tokens before the patches.
        adaptors: by name, `RadioOutput(summary, features)` in float32; None without adaptors.
    """

    summary: Tensor | None = None
    features: Tensor | None = None
    last_hidden_state: Tensor | None = None
    adaptors: dict[str, RadioOutput] | None = None

    def __iter__(self) -> Iterator[Tensor | None]:
        yield self.summary
        yield self.features


class RadioFastModel(nn.Module):
    """A `RADIOModel` (as `radio_model`) behind the interface of Transformers' RadioModel.

    Everything else that RADIOModel has can be reached directly: `patch_size`, `forward_intermediates`, …
    """

    config_class = RadioFastConfig
    base_model_prefix = "radio_model"
    main_input_name = "pixel_values"

    def __init__(self, radio_model: RADIOModel, config: RadioFastConfig):
        super().__init__()
        self.radio_model = radio_model
        self.config = config
        self.training = radio_model.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("radio_model"), name)

    @property
    def backend(self) -> str:
        """As `RADIOModel.backend`; it can be set."""
        return self.radio_model.backend

    @backend.setter
    def backend(self, backend: str) -> None:
        self.radio_model.backend = backend

    @property
    def graphs(self) -> Any:
        """As `RADIOModel.graphs`; None switches them off."""
        return self.radio_model.graphs

    @graphs.setter
    def graphs(self, graphs: Any) -> None:
        self.radio_model.graphs = graphs

    @property
    def device(self) -> torch.device:
        return self.radio_model.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; biases stay in float32."""
        return next(p.dtype for p in self.radio_model.model.parameters() if p.ndim > 1)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        config: RadioConfig | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | int | None = None,
        device_map: Any = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> RadioFastModel:
        """A model in eval mode, its parameters without gradients.

        Args:
            pretrained_model_name_or_path: a Hugging Face repository or folder, in the remote-code layout or in
                Transformers' own, or whatever else `radio_fast.load` takes.
            config: checked against the weights, whose own config is used.
            dtype, torch_dtype: of the weights; None or "auto": as the config says.
            device, device_map: where to, one device for all of it; "auto" is the GPU if there is one.
            token, local_files_only: as for `radio_fast.load`, without effect on a folder.
            kwargs: `revision`, `adaptor_names` and the other arguments of `radio_fast.load`. trust_remote_code has no
                effect: no code of a repository is ever downloaded or run.

        Raises:
            ValueError: an argument that is not known, or not legal; a config that contradicts the weights.
            CheckpointError, DownloadError: as `radio_fast.load`.
        """
        if kwargs.get("_from_auto"):
            config = None  # AutoModel read it from this folder, with RadioConfig's defaults where that says nothing
        for name in _OF_AUTO_MODEL:
            kwargs.pop(name, None)
        known = [name for name in inspect.signature(load).parameters if name not in ("version", "return_checkpoint")]
        if unknown := sorted(kwargs.keys() - set(known)):
            raise ValueError(
                f"RadioFastModel.from_pretrained has no argument {', '.join(unknown)}; beside config, torch_dtype and "
                f"device_map it takes {', '.join(known)}"
            )
        if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
            raise ValueError(f"dtype is {dtype!r} and torch_dtype {torch_dtype!r}: give one of them")
        dtype = torch_dtype if dtype is None else dtype
        if device_map is not None:
            if device is not None:
                raise ValueError("device and device_map mean the same here: give one of them")
            device = _one_device(device_map)
        path = pretrained_model_name_or_path
        if not (isinstance(path, (str, os.PathLike)) and Path(path).expanduser().exists()):
            kwargs |= {"token": token, "local_files_only": local_files_only}
        radio_model, content = load(
            path,
            dtype=None if dtype == "auto" else dtype,
            device=device,
            return_checkpoint=True,
            **kwargs,
        )
        model = cls(radio_model, _config_of(radio_model, content))
        for name in _STRUCTURE if config is not None else ():
            given, own = getattr(config, name, None), getattr(model.config, name)
            if given is not None and given != own:
                raise ValueError(f"config.{name} is {given!r}, the weights have {own!r}: leave the config out")
        return model

    @classmethod
    def _from_config(cls, config: RadioConfig, **kwargs: Any) -> RadioFastModel:
        raise ValueError(
            "radio_fast.hf.register() is for from_pretrained; a model without weights is RadioModel(config)"
        )

    def forward(
        self,
        pixel_values: Tensor,
        feature_fmt: str = "NLC",
        return_dict: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> RadioFastModelOutput | tuple:
        """Embed a batch of images.

        Args:
            pixel_values: (B, 3, H, W), float, RGB in [0, 1].
            feature_fmt: "NLC": features (B, T, D); "NCHW": (B, D, H/p, W/p).
            return_dict: False for a plain tuple of the output's fields; the config's `return_dict` if None.

        Raises:
            ValueError: as `RADIOModel.forward`; hidden states or attention probabilities are asked for.
        """
        if output_hidden_states or output_attentions:
            raise ValueError(
                "RadioFastModel keeps no hidden states and no attention probabilities: call without "
                "output_hidden_states and output_attentions; forward_intermediates(pixel_values, indices) has blocks"
            )
        check_choice("feature_fmt", feature_fmt, FEATURE_FORMATS)
        tokens, outputs = self.radio_model.forward_tokens(pixel_values, feature_fmt)
        adaptors = None
        if isinstance(outputs, dict):
            adaptors = {name: output for name, output in outputs.items() if name != "backbone"}
            outputs = outputs["backbone"]
        output = RadioFastModelOutput(*outputs, last_hidden_state=tokens, adaptors=adaptors)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def _one_device(device_map: Any) -> Any:
    if isinstance(device_map, Mapping):
        devices = set(device_map.values())
        device_map = devices.pop() if len(devices) == 1 else device_map
    if device_map == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(device_map, (str, int, torch.device)):
        raise ValueError(
            f"device_map must be one device for the whole model, such as 'cuda' or 'auto', got {device_map}"
        )
    return device_map


def _config_of(model: RADIOModel, content: Mapping[str, Any]) -> RadioFastConfig:
    """The folder's config; what it doesn't say, or says in the remote-code layout's own fields, is read off the model.

    An E-RADIO has no layers, heads or prefix tokens as RadioConfig means them: those fields keep their defaults.
    """
    # A checkpoint file's dict has the weights, and no config.
    fields = (
        {} if "state_dict" in content else {k: v for k, v in content.items() if k not in ("auto_map", "model_type")}
    )
    spec = model.model.spec
    fields |= {"hidden_size": model.embed_dim, "patch_size": model.patch_size}
    if isinstance(spec, ViTSpec):
        fields |= {
            "num_hidden_layers": spec.depth,
            "num_attention_heads": spec.num_heads,
            "use_swiglu_ffn": spec.swiglu,
            "max_img_size": spec.grid_side * spec.patch_size,
            "num_cls_tokens": spec.num_cls_tokens,
            "num_registers": spec.num_registers,
            "summary_idxs": list(spec.summary_idxs),
        }
        if not spec.swiglu:
            fields.setdefault("mlp_ratio", spec.mlp_hidden / spec.embed_dim)
    for name in ("norm_mean", "norm_std"):
        fields.setdefault(name, getattr(model.input_conditioner, name).flatten().tolist())
    if model.preferred_resolution is not None:
        fields.setdefault("image_size", model.preferred_resolution.height)
    # What a file must not put in the place of a method.
    fields = {name: value for name, value in fields.items() if not callable(getattr(RadioFastConfig, name, None))}
    if type(fields.get("mlp_ratio")) is int:
        fields["mlp_ratio"] = float(fields["mlp_ratio"])
    try:
        return RadioFastConfig.from_dict(fields)
    except Exception as error:  # Transformers raises whatever a strange value leads to
        why = " ".join(str(error).split())[:200]
        raise CheckpointError(f"config.json: Transformers can't make a RadioConfig of it: {why}") from error


def register() -> Callable[[], None]:
    """From now on `AutoModel.from_pretrained` gives a `RadioFastModel` where a config's model_type is "radio".

    AutoModel takes no other class for a config class of Transformers' own, so model_type "radio" is given one of ours,
    a subclass, first.

    Returns:
        A function that takes this back.
    """
    before = CONFIG_MAPPING["radio"]
    AutoConfig.register("radio", RadioFastConfig, exist_ok=True)
    AutoModel.register(RadioFastConfig, RadioFastModel, exist_ok=True)

    def restore() -> None:
        AutoConfig.register("radio", before, exist_ok=True)

    return restore
