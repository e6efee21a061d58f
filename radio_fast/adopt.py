"""`accelerate`: this package's model on the tensors of one that other code has built."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from radio_fast.api import build
from radio_fast.checkpoint import plain_args
from radio_fast.errors import CheckpointError
from radio_fast.folder import native_backbone
from radio_fast.graphs import resolve_graphs
from radio_fast.layers.conditioner import InputConditioner
from radio_fast.model import RADIOModel
from radio_fast.models.eradio_weights import is_eradio
from radio_fast.models.probe import check_eradio, eradio_window, has_scaled_norms, num_heads
from radio_fast.models.registry import ARCHS, VERSIONS, Version, ViTDet, find_version, unknown_version
from radio_fast.models.spec import prefix_layout
from radio_fast.models.weights import ModelState, canonical_backbone, fold_spectral
from radio_fast.runtime import DTYPES, resolve_backend

ACCEPTED = (
    'what torch.hub.load("NVlabs/RADIO", "radio_model", …) returns, what the remote code of an nvidia/…RADIO… '
    "repository builds, or Transformers' RadioModel"
)
# How the official code's names of backbone tensors begin: a ViT's, the DINOv2 student's; a plain ViT's or E-RADIO's.
OFFICIAL = ("model.patch_generator.", "model.inner.patch_generator.", "model.patch_embed.")
NATIVE = "embeddings.patch_projection."
WRAPPERS = ("_orig_mod", "module", "radio_model")  # torch.compile's, DistributedDataParallel's, the remote code's
ARGS = "pass args=checkpoint['args'] (torch.hub.load(…, return_checkpoint=True) returns the checkpoint too)"


def accelerate(
    model: nn.Module,
    *,
    args: Any = None,
    version: str | None = None,
    backend: str = "auto",
    cuda_graphs: bool | None = None,
) -> RADIOModel:
    """This package's model with the weights, adaptors and settings of a RADIO model that other code has built.

    It is recognised by its structure and the names of its tensors. It is not changed, and nothing is read from disk:
    tensors are shared with it, on their device and in their dtype. Only what has to be folded or cast is new, made
    tensor by tensor: weights with a LayerScale, a BatchNorm or a spectral parametrisation, separate q, k and v, biases
    of linear layers that are not in float32. Kept too: an input conditioner made external, a ViTDet window, E-RADIO's
    window, resolutions. Not: hooks, and text towers of adaptors.

    Args:
        model: in eval mode, built by the official TorchHub code, its Hugging Face remote code, or Transformers'
            `RadioModel`; torch.compile's and DistributedDataParallel's wrappers around one are looked through.
        args: the checkpoint's `args` (a Namespace or dict), for what a model does not show; a Hugging Face model has
            them in its config. An error says where they are needed.
        version: its name (`radio_fast.versions()`), where the ViTDet rule can't be told without; else None.
        backend, cuda_graphs: as in `radio_fast.load`.

    Raises:
        ValueError: it is no RADIO model, in training mode, incomplete, on several devices, or computes something that
            this package does not: the message says what was found and what is accepted.
    """
    graphs = resolve_graphs(cuda_graphs)
    if version is not None and not isinstance(version, str):
        raise ValueError(f"version must be a version's name or None, got {version!r}")
    row = find_version(version) if version else None
    if version and row is None:
        raise unknown_version(version)
    radio, config = _unwrap(model)
    tensors = _tensors(radio)
    device, dtype = _place(tensors)
    backend = resolve_backend(backend, device)
    try:
        known = plain_args(args or getattr(config, "args", None) or {})
        known["dtype"] = dtype
        # Made under inference mode, the parameters could never be used with autograd again.
        with torch.inference_mode(False), torch.no_grad():
            if any(name.startswith(NATIVE) for name in tensors):
                state, blocks = _native_state(radio, config, tensors, known)
            else:
                state, blocks = _official_state(radio, config, tensors, known)
            window = None
            if is_eradio(state.arch, state.backbone):
                window = eradio_window(state.backbone)
                check_eradio(radio.model)
            else:
                kwargs = known["model_kwargs"]
                kwargs["num_heads"] = num_heads(blocks) or kwargs.get("num_heads")
                kwargs["scaled_ln"] = has_scaled_norms(blocks)
            external = not state.conditioner and isinstance(radio.input_conditioner, nn.Identity)
            if external:
                state.conditioner = InputConditioner().to(device).state_dict()
            row = row or find_version(str(getattr(config, "version", "") or "?"))
            ours = build(state, tuple(state.heads), device, None, row, backend)
    except CheckpointError as error:
        text = str(error).replace("the checkpoint", "the model").replace("The file", "The model")
        raise ValueError(f"this model can't be accelerated: {text}") from error
    if external:
        ours.make_preprocessor_external()
    _set_resolutions(ours, radio, config)
    if window is not None:
        ours.model.change_window_size(window)
    vitdet = getattr(radio, "window_size", None)
    if vitdet is not None and hasattr(ours.model, "set_vitdet"):
        ours.model.set_vitdet(vitdet, _vitdet_rule(ours, row))
    ours.graphs = graphs
    return ours


# -- what was given -------------------------------------------------------------------------------------------


def _unwrap(model: nn.Module) -> tuple[nn.Module, Any]:
    """The module that has the weights, and the outermost `config` around it.

    Raises:
        ValueError: it is none of a RADIO model, or in training mode.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"accelerate takes a RADIO model, an nn.Module, got {type(model).__name__}")
    radio, config = model, getattr(model, "config", None)
    while inner := [name for name in WRAPPERS if isinstance(getattr(radio, name, None), nn.Module)]:
        held = [name for name, _ in (*radio.named_parameters(), *radio.named_buffers())]
        if beside := [name for name in held if not name.startswith(f"{inner[0]}.")]:
            raise ValueError(
                f"{type(radio).__name__} has weights of its own around the RADIO model ({', '.join(beside[:3])}), "
                f"which would be lost: give accelerate its .{inner[0]}, and put the result in that place"
            )
        radio = getattr(radio, inner[0])
        config = config or getattr(radio, "config", None)
    if isinstance(radio, RADIOModel):
        raise ValueError("this is radio_fast's model already: its backend and graphs can be set as they are")
    names = [name for name, _ in radio.named_parameters()]
    official = any(name.startswith(OFFICIAL) for name in names) and hasattr(radio, "input_conditioner")
    native = any(name.startswith(NATIVE) for name in names) and hasattr(radio, "encoder")
    if not (official or native):
        found = ", ".join(names[:3]) + ", …" if names else "none"
        raise ValueError(
            f"{type(model).__name__} is no RADIO model (its parameters: {found}). accelerate takes {ACCEPTED}"
        )
    # An Identity may be one: make_preprocessor_external() puts a fresh one in.
    if any(module.training for module in radio.modules() if not isinstance(module, nn.Identity)):
        raise ValueError("the model is in training mode: call its .eval() first. What this makes is for inference")
    return radio, config


def _tensors(radio: nn.Module) -> dict[str, Tensor]:
    """The tensors that images go through, checked one by one."""
    out = {}
    for name, value in radio.state_dict(keep_vars=True).items():
        if name.startswith("adaptors.") and name.split(".")[2] not in ("head_mlp", "feat_mlp"):
            continue  # text towers
        if not isinstance(value, Tensor):
            found = f"holds a {type(value).__name__}, as quantised modules do"
        elif type(value) not in (Tensor, nn.Parameter):
            found = f"is a {type(value).__name__}: quantised, sharded and other special tensors can't be shared"
        elif value.is_meta:
            found = "is on the meta device, without data: load or materialise the weights first"
        elif value.is_quantized or value.layout != torch.strided:
            found = f"is {'quantised' if value.is_quantized else str(value.layout).removeprefix('torch.')}"
        elif isinstance(value, nn.Parameter) and value.dtype not in DTYPES.values():
            found = f"is {str(value.dtype).removeprefix('torch.')}"
        else:
            out[name] = value
            continue
        raise ValueError(f"{name} {found}. accelerate takes plain float32, float16 or bfloat16 tensors")
    return out


def _place(tensors: Mapping[str, Tensor]) -> tuple[torch.device, torch.dtype]:
    """The one device, and the backbone's one dtype."""
    devices = {value.device: name for name, value in tensors.items()}
    if len(devices) > 1:
        found = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise ValueError(f"the model is on several devices ({found}): move it to one with .to(device) first")
    weights = {n: t for n, t in tensors.items() if isinstance(t, nn.Parameter) and not n.startswith("adaptors.")}
    dtypes = {value.dtype: name for name, value in weights.items()}
    if len(dtypes) > 1:
        found = ", ".join(f"{name} {str(dtype).removeprefix('torch.')}" for dtype, name in dtypes.items())
        raise ValueError(f"the backbone is of several dtypes ({found}): bring it to one with .to(dtype) first")
    return next(iter(devices)), next(iter(dtypes))


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


# -- its state ------------------------------------------------------------------------------------------------


def _official_state(
    radio: nn.Module, config: Any, tensors: Mapping[str, Tensor], known: dict[str, Any]
) -> tuple[ModelState, Iterable[nn.Module]]:
    """Of a model in the checkpoints' names, and its blocks."""
    network = getattr(radio.model, "inner", radio.model)
    named = _under(tensors, "model.")
    arch = known["model"] or _arch(radio.model, named)
    eps = _spectral_eps(network, 1e-12)
    backbone, plain = canonical_backbone(fold_spectral(named, eps), arch)
    idxs = getattr(radio, "summary_idxs", None)
    if idxs is None:
        idxs = prefix_layout(known)[2]
    idxs = tuple(int(i) for i in (idxs.flatten().tolist() if isinstance(idxs, Tensor) else idxs))
    num_cls = getattr(radio, "num_cls_tokens", None) or max(prefix_layout(known)[0], *(i + 1 for i in idxs), 1)
    known["model_norm"] = "norm.weight" in backbone and not is_eradio(arch, backbone)
    heads, teachers = {}, []
    for name, adaptor in dict(getattr(radio, "adaptors", None) or {}).items():
        pair = [_under(tensors, f"adaptors.{name}.{mlp}.") for mlp in ("head_mlp", "feat_mlp")]
        if not all(pair):
            raise ValueError(f"adaptor {name!r} has no head_mlp and feat_mlp with weights: its heads can't be found")
        heads[name] = tuple(fold_spectral(head, _spectral_eps(adaptor, 1e-6)) for head in pair)
        slot, upsample = _adaptor_facts(name, adaptor, config, known)
        said = next((teacher for teacher in known["teachers"] or [] if teacher["name"] == name), {})
        text = {key: said[key] for key in ("type", "model", "pretrained") if key in said}  # what its text tower is
        teachers.append({"name": name, "token_slot": slot, "fd_upsample_factor": upsample} | text)
    known["teachers"] = teachers
    return ModelState(
        arch=arch,
        args=known,
        backbone=backbone,
        fixed_size=plain,
        share=True,
        conditioner=_under(tensors, "input_conditioner."),
        heads=heads,
        feature_normalizer=_under(tensors, "feature_normalizer."),
        inter_feature_normalizer=_under(tensors, "inter_feature_normalizer."),
        layout=(num_cls, 0, idxs),
    ), getattr(network, "blocks", ())


def _native_state(
    radio: nn.Module, config: Any, tensors: Mapping[str, Tensor], known: dict[str, Any]
) -> tuple[ModelState, Iterable[nn.Module]]:
    """Of Transformers' RadioModel, and its blocks."""
    idxs = tuple(tensors["summary_idxs"].tolist()) if "summary_idxs" in tensors else tuple(config.summary_idxs)
    return ModelState(
        arch="radio",
        args=known,
        backbone=canonical_backbone(native_backbone(tensors), "radio")[0],
        share=True,
        conditioner=_under(tensors, "input_conditioner."),
        layout=(config.num_cls_tokens, 0, idxs),
    ), radio.encoder.layer


def _arch(network: nn.Module, named: Mapping[str, Tensor]) -> str:
    """An architecture's name, told by timm's entry or by what the tensors show."""
    if is_eradio("", named):
        return "eradio"
    if any(name.startswith("inner.") for name in named):
        return "dino_v2_g_student"
    for entry in ("pretrained_cfg", "default_cfg"):
        cfg = getattr(network, entry, None)
        name = cfg.get("architecture") if isinstance(cfg, Mapping) else getattr(cfg, "architecture", None)
        if name in ARCHS:
            return name
    table, patches = named.get("patch_generator.pos_embed"), named.get("patch_generator.embedder.weight")
    if table is None or patches is None:
        return "vit_224"
    patch_size = math.isqrt(patches.shape[1] // 3)
    if math.isqrt(table.shape[1]) * patch_size == 592:
        # The _v2_ architectures, built for 592 pixels, do not resize such a table first; the others do.
        raise ValueError(
            f"the model does not show its architecture, which a position table for 592 pixels needs: {ARGS}"
        )
    return f"vit_patch{patch_size}_224"


def _spectral_eps(module: nn.Module, default: float) -> float:
    """The ε of the parametrisations in a module, which they keep as an attribute."""
    for name, part in module.named_modules():
        if ".parametrizations." in name and isinstance(getattr(part, "eps", None), float):
            return part.eps
    return default


def _adaptor_facts(name: str, adaptor: nn.Module, config: Any, known: Mapping[str, Any]) -> tuple[int, int]:
    """(the prefix token that the summary head takes, the feature head's upsampling): no tensor shows them."""
    teachers = known["teachers"] or []
    entry = (getattr(config, "adaptor_configs", None) or {}).get(name) or {}
    feature = entry.get("feature") or {}
    for index, teacher in enumerate(teachers):
        if teacher["name"] == name:
            default = teacher.get("token_slot")
            slot = default if default is not None else index if known["cls_token_per_teacher"] else 0
            return slot, teacher.get("fd_upsample_factor") or 1
    slot = entry.get("head_idx", getattr(adaptor, "head_idx", None))
    upsample = feature.get("upsample_factor")
    for module in (adaptor, adaptor.feat_mlp):
        upsample = upsample or getattr(module, "upsample_factor", None)
    if slot is None or upsample is None:
        lacking = "head_idx" if slot is None else "upsample_factor"
        raise ValueError(f"adaptor {name!r} has no {lacking}, which no tensor shows: {ARGS}")
    return slot, upsample


# -- its settings ---------------------------------------------------------------------------------------------


def _set_resolutions(ours: RADIOModel, radio: nn.Module, config: Any) -> None:
    largest, preferred = (
        getattr(radio, name, None) or getattr(config, name, None) or getattr(ours, name)
        for name in ("max_resolution", "preferred_resolution")
    )
    ours.set_resolutions(largest, None if preferred is None else tuple(preferred))


def _vitdet_rule(ours: RADIOModel, row: Version | None) -> ViTDet:
    """Which blocks stay global: the version's rule; without one that of all versions that look the same.

    Raises:
        ValueError: they differ.
    """
    if row is None:
        rows = [one for one in VERSIONS.values() if one.vitdet is not None and _looks_like(ours, one)]
        if len({one.vitdet for one in rows}) > 1:
            names = " or ".join(repr(one.name) for one in rows)
            raise ValueError(
                f"which blocks of this model attend inside windows depends on its version: pass version={names}"
            )
        row = rows[0] if rows else None
    if row is not None and row.vitdet is None:
        raise ValueError(f"{row.name} has no ViTDet mode, but the model has a window_size: pass the version it is of")
    return ViTDet() if row is None else row.vitdet


def _looks_like(ours: RADIOModel, row: Version) -> bool:
    spec, arch = ours.model.spec, ARCHS.get(row.arch)
    return (
        arch is not None
        and (spec.embed_dim, spec.depth, spec.patch_size) == (arch.embed_dim, arch.depth, arch.patch_size)
        and (ours.max_resolution, ours.preferred_resolution) == (row.max_resolution, row.preferred_resolution)
    )
