"""`load`: the way to get a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from radio_fast.checkpoint import MappedRange, read_checkpoint, state_of_checkpoint
from radio_fast.download import check_sha256, fetch_repo, fetch_version, is_repo_id, verify
from radio_fast.errors import CheckpointError
from radio_fast.folder import read_folder
from radio_fast.graphs import resolve_graphs
from radio_fast.layers.conditioner import InputConditioner
from radio_fast.layers.window_attention import coords_table
from radio_fast.model import RADIOModel
from radio_fast.models.adaptors import Adaptor, TextAdaptor, build_head, canonical_head
from radio_fast.models.backbone import Backbone
from radio_fast.models.eradio import ERADIO
from radio_fast.models.eradio_spec import ERADIOSpec, released_spec
from radio_fast.models.eradio_weights import is_eradio
from radio_fast.models.int8 import check_int8, fill_int8
from radio_fast.models.normalizers import FeatureNormalizer, IntermediateFeatureNormalizer
from radio_fast.models.registry import Version, ViTDet, find_version, unknown_version
from radio_fast.models.spec import ViTSpec, spec_of_version
from radio_fast.models.text import text_tower
from radio_fast.models.vit import VisionTransformer
from radio_fast.models.weights import ModelState, fill, fold_layer_scale, missing_tensor
from radio_fast.ops.window_attention import MAX_WINDOW
from radio_fast.runtime import resolve_backend, resolve_device, resolve_dtype


def load(
    version: str | os.PathLike | None = "",
    *,
    checkpoint: str | os.PathLike | None = None,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | str | None = None,
    adaptor_names: str | Sequence[str] | None = None,
    vitdet_window_size: int | None = None,
    window_size: int | str | None = None,
    progress: bool = True,
    return_checkpoint: bool = False,
    backend: str = "auto",
    cuda_graphs: bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    sha256: str | None = None,
    timeout: float = 10.0,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    random_init: bool = False,
    seed: int = 0,
) -> RADIOModel | tuple[RADIOModel, dict[str, Any]]:
    """A RADIO model in eval mode, its parameters without gradients.

    Args:
        version: a version name (`radio_fast.versions()`; "" is the default one), a checkpoint file's path, a local
            Hugging Face folder, or a Hugging Face repository, ORGANISATION/NAME, where there is no such folder.
        checkpoint: a checkpoint file to use for the version named, instead of downloading its weights; the version's
            resolutions and ViTDet entry then apply.
        device: where the model goes; the CPU if None.
        dtype: float32, float16 or bfloat16, as torch dtype or name, for the whole model but the input normalisation.
            int8: on a CPU, a ViT's blocks multiply in int8 (docs/int8.md), all else is bfloat16.
            None: the backbone as its file says (float32, bfloat16 for radio_v2.1), the adaptors float32.
        adaptor_names: one or more of the checkpoint's adaptors; the model then returns a dict. None: none, or those a
            Hugging Face folder's config names; an empty list: none.
        vitdet_window_size: attend inside windows of this many patches a side, but for a few global blocks.
        window_size: the window of an E-RADIO's attention, in positions; it shapes the features. None: as built (16);
            "optimal": for each image the one that `model.model.set_optimal_window_size` would set for its size.
        progress: show a bar while downloading.
        return_checkpoint: return (model, the checkpoint's dict) instead; of a Hugging Face folder, its config.
        backend: "reference": plain PyTorch; "triton": the kernels, or an error saying why they can't run; "cpu": those
            for CPUs with AMX, or an error, and plain PyTorch for what they lack, such as float16; "auto": the kernels
            where they run, else plain PyTorch.
        cuda_graphs: False: launch the kernels of every call one by one; None: replay captured calls on a GPU, unless
            the environment says RADIO_FAST_GRAPHS=0; True: whatever it says (`radio_fast.graphs.GraphCache`).
        cache_dir: where downloads are kept; the environment's RADIO_FAST_CACHE or ~/.cache/radio_fast if None, and
            huggingface_hub's own cache for a repository.
        sha256: refuse a file with another hash.
        timeout: seconds to wait for the server of a download.
        revision: a repository's branch, tag or commit; "main" if None.
        token: for a repository that isn't public; None: HF_TOKEN, or what `hf auth login` has kept.
        local_files_only: take a repository from the cache, and ask no server.
        random_init: seeded random weights of the version's full-size architecture; the features carry no meaning.
        seed: for `random_init`.

    Raises:
        ValueError: an argument is off; the message names the legal values.
        CheckpointError: the file is damaged, refused, or not a RADIO model.
        DownloadError: the weights are neither in the cache nor to be had.
    """
    target, forced_dtype = resolve_device(device), resolve_dtype(dtype)
    backend = resolve_backend(backend, target)
    graphs = resolve_graphs(cuda_graphs)
    row, source, repo = _locate(version, checkpoint)
    if repo is None and (revision is not None or token is not None or local_files_only):
        raise ValueError(
            f"revision, token and local_files_only are for a Hugging Face repository (ORGANISATION/NAME), which "
            f"{str(version or '')!r} is not"
        )
    # Refused before anything is downloaded.
    if forced_dtype == torch.int8:
        check_int8(target, row is None or not row.is_eradio)
    _vitdet_rule(row, vitdet_window_size)
    check_window_size(window_size, row is None or row.is_eradio)

    if random_init:
        if source is not None or row is None:
            raise ValueError("random_init takes a version name, not a checkpoint")
        if adaptor_names or return_checkpoint:
            raise ValueError("random_init makes the backbone alone: it has no adaptors and no checkpoint")
        spec = released_spec(row.arch) if row.is_eradio else spec_of_version(row)
        backbone = _random_backbone(spec, seed, target, forced_dtype or getattr(torch, row.dtype))
        _set_windows(backbone, row, vitdet_window_size, window_size)
        model = RADIOModel(backbone, InputConditioner().to(target), version=row, backend=backend).eval()
        model.graphs = graphs
        return model

    check_sha256(sha256)
    if sha256 is not None and (repo is not None or (source is not None and source.is_dir())):
        raise ValueError("sha256 is a file's: a folder has several, a repository is pinned by revision=COMMIT")
    if repo is not None:
        source = fetch_repo(
            repo,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            progress=progress,
            timeout=timeout,
            local_files_only=local_files_only,
        )
    elif source is None:
        source = fetch_version(row, cache_dir=cache_dir, progress=progress, sha256=sha256, timeout=timeout)
    elif source.is_file():
        verify(source, sha256)
    # Made under inference mode, the parameters could never be used with autograd again.
    with torch.inference_mode(False), torch.no_grad():
        release, window = _keep, vitdet_window_size
        if source.is_dir():
            state, content = read_folder(source)
            row = row or (find_version(state.version) if state.version else None)
            if window is None and not is_eradio(state.arch, state.backbone):
                window = state.vitdet_window_size
        else:
            content = read_checkpoint(source)
            state = state_of_checkpoint(content)
            mapped = MappedRange(source, _tensors_of(content))
            mapped.release_all()
            release = mapped.release
        model = build(state, adaptor_names, target, forced_dtype, row, backend, release)
        if state.max_resolution is not None or state.preferred_resolution is not None:
            model.set_resolutions(state.max_resolution, state.preferred_resolution)
        _set_windows(model.model, row, window, window_size)
    model.graphs = graphs
    return (model, content) if return_checkpoint else model


def _vitdet_rule(row: Version | None, window_size: int | None) -> ViTDet:
    """Which blocks stay global; a file that is no released version has the plain rule.

    Raises:
        ValueError: a window is asked for and the version has no ViTDet mode.
    """
    if row is None or row.vitdet is not None:
        return ViTDet() if row is None else row.vitdet
    if window_size is not None:
        raise ValueError(f"{row.name} has no ViTDet mode: load it without vitdet_window_size")
    return ViTDet()


def check_window_size(window_size: int | str | None, has_windows: bool) -> None:
    """Refuse a `window_size` that no E-RADIO takes, or one for a ViT.

    Raises:
        ValueError: the message names what is legal.
    """
    if window_size is None:
        return
    if not has_windows:
        raise ValueError("window_size is E-RADIO's; a ViT takes vitdet_window_size")
    whole = isinstance(window_size, int) and not isinstance(window_size, bool)
    if window_size != "optimal" and not (whole and 1 <= window_size <= MAX_WINDOW):
        raise ValueError(f"window_size must be 'optimal' or a number in 1…{MAX_WINDOW}, got {window_size!r}")


def _set_windows(
    backbone: Backbone, row: Version | None, vitdet_window_size: int | None, window_size: int | str | None
) -> None:
    if not isinstance(backbone, ERADIO):
        check_window_size(window_size, has_windows=False)
        if vitdet_window_size is not None:
            backbone.set_vitdet(vitdet_window_size, _vitdet_rule(row, vitdet_window_size))
    elif vitdet_window_size is not None:
        raise ValueError("E-RADIO has no ViTDet mode: load it without vitdet_window_size")
    elif window_size == "optimal":
        backbone.follow_image_size()
    elif window_size is not None:
        backbone.change_window_size(window_size)


def make_backbone(spec: ViTSpec | ERADIOSpec) -> Backbone:
    """The empty network of a structure, on the meta device."""
    with torch.device("meta"):
        return ERADIO(spec) if isinstance(spec, ERADIOSpec) else VisionTransformer(spec)


def _keep(tensor: Tensor) -> None:
    """Tensors that are not mapped from a file have no pages to give back."""


def _tensors_of(content: dict[str, Any]) -> list[Tensor]:
    states = [content.get(name) for name in ("state_dict", "state_dict_ema")]
    values = [value for state in states if isinstance(state, Mapping) for value in state.values()]
    return [value for value in values if isinstance(value, Tensor)]


def _locate(
    version: str | os.PathLike | None, checkpoint: str | os.PathLike | None
) -> tuple[Version | None, Path | None, str | None]:
    """The registry row (None for a bare file), the file or folder to read (None: to be downloaded), and the repository.

    Raises:
        ValueError: a version that is neither known nor a path.
        FileNotFoundError: a path where nothing is.
    """
    if version is not None and not isinstance(version, (str, os.PathLike)):
        raise ValueError(f"version must be a name or a path, got {type(version).__name__}")
    if checkpoint is not None:
        if not isinstance(checkpoint, (str, os.PathLike)):
            raise ValueError(f"checkpoint must be a path, got {type(checkpoint).__name__}")
        path = Path(checkpoint).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"no checkpoint at {path}")
        row = find_version(version) if version and isinstance(version, str) else None
        if version and row is None:
            raise unknown_version(str(version))
        return row, path, None
    if version is None or isinstance(version, str):
        row = find_version(version)
        if row is not None:
            return row, None, None
    path = Path(version).expanduser()
    if path.exists():
        return None, path, None
    name = str(version)
    if isinstance(version, os.PathLike) or name.endswith((".tar", ".pth", ".pt")) or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no checkpoint at {path}")
    if is_repo_id(name):
        return None, None, name
    raise unknown_version(name)


def chosen_adaptors(state: ModelState, adaptor_names: str | Sequence[str] | None) -> tuple[str, ...]:
    """The adaptor names asked for, each once.

    Raises:
        ValueError: a name the checkpoint has no adaptor for; the message lists those it has.
    """
    if adaptor_names is None:
        adaptor_names = state.default_adaptors
    names = (adaptor_names,) if isinstance(adaptor_names, str) else adaptor_names
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"adaptor_names must be a name or a list of names, got {adaptor_names!r}")
    for name in names:
        if name not in state.heads:
            known = ", ".join(map(repr, state.heads)) or "none at all"
            raise ValueError(f"unknown adaptor {name!r}: this checkpoint has {known}")
        if not name or "." in name or name == "backbone" or hasattr(nn.ModuleDict(), name):
            raise CheckpointError(f"the checkpoint names an adaptor {name!r}, which can't be used as a name")
    return tuple(dict.fromkeys(names))


def build(
    state: ModelState,
    adaptor_names: str | Sequence[str] | None,
    device: torch.device,
    dtype: torch.dtype | None,
    row: Version | None,
    backend: str,
    release: Callable[[Tensor], None] = lambda tensor: None,
) -> RADIOModel:
    """The model of a state: `load` without the reading, `accelerate` without the looking."""
    spec = state.spec()
    names = chosen_adaptors(state, adaptor_names)
    int8 = dtype == torch.int8
    if int8:
        check_int8(device, isinstance(spec, ViTSpec))
        dtype = torch.bfloat16
    backbone_dtype = dtype or state.args["dtype"]
    backbone = make_backbone(spec)
    try:
        state.backbone = fold_layer_scale(state.backbone)
    except KeyError as error:
        raise missing_tensor(str(error.args[0])) from None
    except ValueError as error:
        raise CheckpointError(f"the checkpoint's backbone makes no sense: {error}") from error
    if int8:
        fill_int8(backbone, state.backbone, release)
    else:
        fill(backbone, state.backbone, "", device, backbone_dtype, release, state.share)

    conditioner = InputConditioner()
    fill(conditioner, dict(state.conditioner), "input_conditioner.", device, torch.float32, share=state.share)
    head_dtype = dtype or (None if state.share else torch.float32)
    adaptors = {name: _adaptor(state, spec, name, device, head_dtype, release) for name in names}
    normalizers = {}
    if state.feature_normalizer:
        normalizers["feature_normalizer"] = FeatureNormalizer(spec.embed_dim)
    if state.inter_feature_normalizer:
        rotation = state.inter_feature_normalizer.get("rotation")
        per_block = rotation is not None and rotation.ndim == 3
        normalizers["inter_feature_normalizer"] = IntermediateFeatureNormalizer(spec.depth, spec.embed_dim, per_block)
    for name, module in normalizers.items():
        fill(module, getattr(state, name), f"{name}.", device, backbone_dtype, release, state.share)
    return RADIOModel(backbone, conditioner, adaptors, **normalizers, version=row, backend=backend).to(device).eval()


def _adaptor(
    state: ModelState,
    spec: ViTSpec | ERADIOSpec,
    name: str,
    device: torch.device,
    dtype: torch.dtype | None,
    release: Callable,
) -> Adaptor:
    named = [(i, teacher) for i, teacher in enumerate(state.args["teachers"] or []) if teacher["name"] == name]
    if not named:
        raise CheckpointError(f"adaptor {name!r} is none of the teachers in the checkpoint's args")
    index, teacher = named[0]
    slot = teacher.get("token_slot")
    if slot is None:
        slot = index if state.args["cls_token_per_teacher"] else 0
    upsample = teacher.get("fd_upsample_factor") or 1
    if isinstance(spec, ERADIOSpec):
        slot = 0  # no tokens but the mean of the features
    elif not isinstance(slot, int) or not 0 <= slot < spec.num_prefix:
        raise CheckpointError(
            f"adaptor {name!r}: token_slot must be one of the {spec.num_prefix} prefix tokens, got {slot!r}"
        )
    if not isinstance(upsample, int) or not 1 <= upsample <= 16:
        raise CheckpointError(f"adaptor {name!r}: fd_upsample_factor must lie in 1…16, got {upsample!r}")
    heads = []
    for kind, tensors in zip(("head_mlp", "feat_mlp"), state.heads[name], strict=True):
        try:
            tensors = fold_layer_scale(canonical_head(tensors))
            with torch.device("meta"):
                head = build_head(tensors)
        except (KeyError, ValueError, IndexError) as error:
            raise CheckpointError(
                f"adaptor {name!r}: its {kind} is incomplete or of no known kind ({error})"
            ) from error
        width = [layer.out_features for layer in head.modules() if isinstance(layer, nn.Linear)][-1]
        if kind == "feat_mlp" and width % upsample**2:
            raise CheckpointError(
                f"adaptor {name!r}: {width} features are no multiple of the square of fd_upsample_factor, {upsample}"
            )
        fill(head, tensors, f"adaptors.{name}.{kind}.", device, dtype, release, state.share)
        heads.append(head)
    text = text_tower(teacher)
    return TextAdaptor(*heads, slot, upsample, text) if text else Adaptor(*heads, slot, upsample)


def _random_backbone(spec: ViTSpec | ERADIOSpec, seed: int, device: torch.device, dtype: torch.dtype) -> Backbone:
    """Weights of standard deviation 0.02 (E-RADIO's: 1/√inputs), norms at identity, biases small."""
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.no_grad():
        backbone = make_backbone(spec)
        state = {
            name: coords_table((table.shape[1] + 1) // 2, (table.shape[1] + 1) // 2)
            for name, table in backbone.named_buffers()
        }
        for name, empty in backbone.named_parameters():
            value = torch.empty(empty.shape)
            if name.endswith(("norm1.weight", "norm2.weight", "norm.weight")):
                value.fill_(1.0)
            elif name.endswith(".alpha"):
                value.fill_(0.5)
            else:
                deep = isinstance(spec, ERADIOSpec) and value.ndim > 1
                value.normal_(std=value[0].numel() ** -0.5 if deep else 0.02, generator=generator)
            state[name] = value
        if dtype == torch.int8:
            fill_int8(backbone, state)
        else:
            fill(backbone, state, "", device, dtype)
    return backbone
