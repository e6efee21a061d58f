"""Hugging Face folders: `config.json` and weights, in the remote-code and in Transformers' own layout."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from radio_fast.checkpoint import check_tensors, plain_args, read_checkpoint
from radio_fast.errors import CheckpointError
from radio_fast.models.deferred import Deferred
from radio_fast.models.weights import ModelState, State, canonical_backbone, fold_spectral, missing_tensor

MAX_JSON_BYTES = 16 << 20


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} is no Hugging Face model folder: it has no {path.name}")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes, more than {MAX_JSON_BYTES}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


# In the order that Transformers looks for them: one file, or the index of several.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder's weights file, or of the shards its index names; shards elsewhere are refused."""
    for file in WEIGHTS:
        if (folder / file).is_file():
            return _read_shard(folder / file)
        index = folder / f"{file}.index.json"
        if index.is_file():
            return _read_shards(index, Path(file).suffix)
    raise CheckpointError(f"{folder} has no {' and no '.join(WEIGHTS)}: copy the whole folder")


def _read_shards(index: Path, suffix: str) -> dict[str, Tensor]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no weight_map")
    tensors: dict[str, Tensor] = {}
    for name in sorted({str(name) for name in weight_map.values()}):
        if Path(name).name != name:
            raise CheckpointError(f"{index} names a shard outside its folder: {name!r}")
        if not name.endswith(suffix):
            raise CheckpointError(f"{index} names a shard that is no {suffix} file: {name!r}")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent} has no {name}: copy the whole folder")
        tensors |= _read_shard(index.parent / name)
    if absent := sorted(weight_map.keys() - tensors.keys()):
        raise CheckpointError(f"{index} names tensors that its shards don't have: {', '.join(absent[:5])}")
    return tensors


def _read_shard(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".bin":
        tensors = {str(key): value for key, value in read_checkpoint(path).items()}
        check_tensors(tensors)
        return tensors
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def read_folder(folder: str | Path) -> tuple[ModelState, dict[str, Any]]:
    """The model state in a Hugging Face folder, and its config.

    Raises:
        CheckpointError: no such folder layout, a damaged file, or arguments that contradict the tensors.
    """
    folder = Path(folder)
    config = _read_json(folder / "config.json")
    tensors = _read_tensors(folder)
    remote_code = isinstance(config.get("args"), Mapping)
    if not remote_code and config.get("model_type") != "radio":
        raise CheckpointError(
            f"{folder / 'config.json'} is of model_type {config.get('model_type')!r}; this needs a RADIO folder: "
            f"with args (remote-code layout) or model_type 'radio'"
        )
    return (_remote_code if remote_code else _native)(config, tensors), config


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _summary_idxs(tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    stored = tensors.get("radio_model.summary_idxs", tensors.get("summary_idxs"))
    return None if stored is None else tuple(int(i) for i in stored.flatten()[:4096])


def _remote_code(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelState:
    args = plain_args(config["args"])
    teachers = args["teachers"] or []
    heads, layout = {}, None
    per_name = config.get("adaptor_configs")
    for name in per_name if isinstance(per_name, Mapping) else ():
        pair = tuple(_under(tensors, f"radio_model.adaptors.{name}.{mlp}.") for mlp in ("head_mlp", "feat_mlp"))
        if all(pair):
            heads[name] = tuple(fold_spectral(head, 1e-6) for head in pair)
    summary_idxs = _summary_idxs(tensors)
    if summary_idxs is None and args["cls_token_per_teacher"]:
        summary_idxs = tuple(i for i, teacher in enumerate(teachers) if teacher.get("use_summary", True))
    if summary_idxs:
        num_cls = len({teacher["name"] for teacher in teachers}) if args["cls_token_per_teacher"] else 1
        layout = (max(num_cls, 1), 0, summary_idxs)
    backbone, plain = canonical_backbone(
        fold_spectral(_under(tensors, "radio_model.model."), 1e-12), args["model"] or ""
    )
    names = config.get("adaptor_names") or ()
    if not isinstance(names, (str, list, tuple)):
        raise CheckpointError(f"config.json: adaptor_names must be a list of names, got {names!r}")
    preferred = config.get("preferred_resolution")
    if preferred is not None and not (
        isinstance(preferred, list) and len(preferred) == 2 and all(type(side) is int for side in preferred)
    ):
        raise CheckpointError(f"config.json: preferred_resolution must be [height, width], got {preferred!r}")
    for name in ("max_resolution", "vitdet_window_size"):
        if config.get(name) is not None and type(config[name]) is not int:
            raise CheckpointError(f"config.json: {name} must be an integer or null, got {config[name]!r}")
    return ModelState(
        arch=args["model"] or "",
        args=args,
        backbone=backbone,
        fixed_size=plain,
        conditioner=_under(tensors, "radio_model.input_conditioner."),
        heads=heads,
        feature_normalizer=_under(tensors, "radio_model.feature_normalizer."),
        inter_feature_normalizer=_under(tensors, "radio_model.inter_feature_normalizer."),
        layout=layout,
        default_adaptors=tuple([names] if isinstance(names, str) else map(str, names)),
        version=str(config["version"]) if config.get("version") else None,
        max_resolution=config.get("max_resolution"),
        preferred_resolution=None if preferred is None else tuple(preferred),
        vitdet_window_size=config.get("vitdet_window_size"),
    )


# -- Transformers' own layout ---------------------------------------------------------------------------------

_EMBEDDINGS = {
    "radio_model.model.": "",
    "embeddings.patch_projection.": "patch_generator.embedder.",
    "embeddings.position_embedding": "patch_generator.pos_embed",
    "embeddings.cls_register_token": "patch_generator.cls_token.token",
    "encoder.layer.": "blocks.",
}
_IN_BLOCK = (
    (".attention.output.dense.", ".attn.proj."),
    (".attention.o_proj.", ".attn.proj."),
    (".layer_scale1.lambda1", ".ls1.gamma"),
    (".layer_scale2.lambda1", ".ls2.gamma"),
    (".mlp.weights_in.", ".mlp.w12."),
    (".mlp.weights_out.", ".mlp.w3."),
)
_QKV = re.compile(r"\.attention\.(?:attention\.)?(query|key|value|q_proj|k_proj|v_proj)\.(weight|bias)$")


def native_backbone(tensors: Mapping[str, Tensor]) -> State:
    """Backbone tensors from Transformers' names into this package's; q, k and v in one matrix.

    On disk Transformers writes the remote-code names, but for what that layout has no name for (its LayerScale and
    SwiGLU); in memory its modules have names of their own. Both are taken, and any mixture.

    A LayerScale of ones everywhere is dropped: Transformers has the parameter where the model has none.
    """
    out: State = {}
    qkv: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        for old, new in _EMBEDDINGS.items():
            if key.startswith(old):
                key = new + key.removeprefix(old)
        if not key.startswith(("blocks.", "patch_generator.")):
            continue
        for old, new in _IN_BLOCK:
            key = key.replace(old, new)
        if match := _QKV.search(key):
            qkv.setdefault(f"{key[: match.start()]}.attn.qkv.{match[2]}", {})[match[1][0]] = value
        else:
            out[key] = value
    for key, parts in qkv.items():
        for letter in "qkv":
            if letter not in parts:
                raise missing_tensor(f"{key} ({letter})")
        q, k, v = (parts[letter] for letter in "qkv")
        if not q.shape == k.shape == v.shape:
            shapes = ", ".join(str(tuple(part.shape)) for part in (q, k, v))
            raise CheckpointError(f"{key}: q, k and v must have the same shape, got {shapes}")
        out[key] = Deferred((3 * q.shape[0], *q.shape[1:]), lambda *parts: torch.cat(parts), q, k, v)
    scales = [key for key in out if key.endswith(".gamma")]
    if all(bool((out[key] == 1).all()) for key in scales):
        for key in scales:
            del out[key]
    return out


def _native(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelState:
    def field(name: str, kind: type, default: Any) -> Any:
        value = config.get(name, default)
        if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
            raise CheckpointError(f"config.json: {name} must be of type {kind.__name__}, got {value!r}")
        return value

    # No tensor shows these, and every released model has them so.
    if config.get("hidden_act", "gelu") != "gelu" and not config.get("use_swiglu_ffn"):
        raise CheckpointError(f"config.json: hidden_act must be 'gelu', got {config['hidden_act']!r}")
    if config.get("layer_norm_eps", 1e-6) != 1e-6:
        raise CheckpointError(f"config.json: layer_norm_eps must be 1e-6, got {config['layer_norm_eps']!r}")
    backbone, _ = canonical_backbone(native_backbone(tensors), "radio")
    num_cls = field("num_cls_tokens", int, 3)
    summary_idxs = _summary_idxs(tensors) or tuple(field("summary_idxs", list, [0, 1]))
    if not all(type(i) is int for i in summary_idxs):
        raise CheckpointError(f"config.json: summary_idxs must be a list of integers, got {config['summary_idxs']!r}")
    if "patch_generator.embedder.weight" in backbone:
        width = backbone["patch_generator.embedder.weight"].shape[0]
    else:
        raise missing_tensor("patch_generator.embedder.weight")
    if field("hidden_size", int, 1280) != width:
        raise CheckpointError(f"config.json: hidden_size is {config.get('hidden_size')}, the tensors have {width}")
    kwargs = {"num_heads": field("num_attention_heads", int, 16), "depth": field("num_hidden_layers", int, 32)}
    dtype = config.get("dtype") or config.get("torch_dtype")
    conditioner = {}
    for name in ("norm_mean", "norm_std"):
        stored = tensors.get(f"radio_model.input_conditioner.{name}", tensors.get(f"input_conditioner.{name}"))
        if stored is None and name in config:
            values = config[name]
            if not isinstance(values, list) or len(values) != 3 or not all(type(v) in (int, float) for v in values):
                raise CheckpointError(f"config.json: {name} must be a list of 3 numbers, got {values!r}")
            stored = torch.tensor(values, dtype=torch.float32)
        if stored is not None:
            conditioner[name] = stored.view(3, 1, 1) if stored.numel() == 3 else stored
    return ModelState(
        arch="radio",
        args=plain_args({"model_kwargs": kwargs, "dtype": dtype}),
        backbone=backbone,
        conditioner=conditioner,
        layout=(num_cls, 0, summary_idxs),
    )
