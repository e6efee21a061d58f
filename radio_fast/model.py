"""RADIOModel: the public module. Image in, `RadioOutput(summary, features)` out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import _register_namedtuple

from radio_fast.layers.conditioner import InputConditioner
from radio_fast.layers.packing import pack
from radio_fast.models.adaptors import Adaptor, to_nchw
from radio_fast.models.backbone import Backbone
from radio_fast.models.eradio import ERADIO
from radio_fast.models.intermediates import collect_intermediates, resolve_indices
from radio_fast.models.normalizers import FeatureNormalizer, IntermediateFeatureNormalizer
from radio_fast.models.packing import (
    PackedOutput,
    check_images,
    check_patches,
    cut,
    glue,
    in_groups,
    packed_outputs,
    read_grids,
    to_float,
)
from radio_fast.models.registry import Resolution, Version
from radio_fast.ops import _dispatch

FEATURE_FORMATS = ("NLC", "NCHW")


class RadioOutput(NamedTuple):
    """summary (B, S·D) and features, (B, T, D) for "NLC" or (B, D, h, w) for "NCHW"."""

    summary: Tensor
    features: Tensor


# What torch.export.save writes for it; torch has no public name for this, as it has for dataclasses.
_register_namedtuple(RadioOutput, serialized_type_name="radio_fast.RadioOutput")


def check_choice(name: str, value: object, legal: tuple[str, ...]) -> None:
    if value not in legal:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, legal))}, got {value!r}")


class RADIOModel(nn.Module):
    """A RADIO vision foundation model (Ranzinger et al., 2024).

    `model(x)` takes x (B, 3, H, W), float, RGB in [0, 1] (normalised inside), H and W multiples of
    `min_resolution_step`, and returns `RadioOutput(summary, features)`; with adaptors a dict {"backbone": RadioOutput,
    name: RadioOutput, …}, the adaptors' in float32. Safe to call from several threads.

    `graphs`: the CUDA graphs of its calls (`radio_fast.graphs.GraphCache`), None where `load` was told to do without.

    Use `radio_fast.load` to make one.
    """

    graphs: Any = None

    def __init__(
        self,
        model: Backbone,
        conditioner: InputConditioner | None = None,
        adaptors: Mapping[str, Adaptor] | None = None,
        feature_normalizer: FeatureNormalizer | None = None,
        inter_feature_normalizer: IntermediateFeatureNormalizer | None = None,
        version: Version | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        self.input_conditioner = conditioner or InputConditioner()
        self.model = model
        self.adaptors = nn.ModuleDict(adaptors or {})
        self.feature_normalizer = feature_normalizer
        self.inter_feature_normalizer = inter_feature_normalizer
        self.version = version
        self.backend = backend
        self.register_buffer("summary_idxs", torch.tensor(model.spec.summary_idxs))
        self._max_resolution = version.max_resolution if version else None
        self._preferred_resolution = version.preferred_resolution if version else None

    def set_resolutions(self, max_resolution: int | None, preferred_resolution: tuple[int, int] | None) -> None:
        """What a file says of the image sizes, in place of the version table."""
        self._max_resolution = max_resolution
        self._preferred_resolution = None if preferred_resolution is None else Resolution(*preferred_resolution)

    @property
    def backend(self) -> str:
        """Which implementation of the ops runs, as in `load`; it can be set."""
        return self._backend

    @backend.setter
    def backend(self, backend: str) -> None:
        self._backend = backend
        self.model.set_backend(backend)

    # -- properties -------------------------------------------------------------------------------------------------

    @property
    def patch_size(self) -> int:
        """p, in pixels."""
        return self.model.spec.patch_size

    @property
    def max_resolution(self) -> int | None:
        """The longest side seen in training, in pixels; None for a file that is no released version."""
        return self._max_resolution

    @property
    def preferred_resolution(self) -> Resolution | None:
        """The image size the version does best at, in pixels; None for a file that is no released version."""
        return self._preferred_resolution

    @property
    def window_size(self) -> int | None:
        """Side of a ViTDet window in patches; None outside ViTDet mode. E-RADIO's: `model.attention_window`."""
        return self.model.window_size

    @property
    def min_resolution_step(self) -> int:
        """H and W must be multiples of this many pixels: the patch size, times a ViTDet window; 32 (E-RADIO)."""
        return self.model.min_resolution_step

    @property
    def num_summary_tokens(self) -> int | None:
        """P: prefix tokens in front of the patches, cls tokens and registers; None for E-RADIO, which has none."""
        return self.model.spec.num_prefix or None

    @property
    def num_cls_tokens(self) -> int | None:
        return self.model.spec.num_cls_tokens or None

    @property
    def embed_dim(self) -> int:
        """D: the width of a feature."""
        return self.model.embed_dim

    @property
    def summary_dim(self) -> int:
        """S·D: the width of the summary."""
        return len(self.model.summary_tokens) * self.embed_dim

    @property
    def blocks(self) -> nn.ModuleList | None:
        """The transformer blocks; None for E-RADIO, whose blocks are parts of `model.levels`."""
        return getattr(self.model, "blocks", None)

    # -- methods of the official model ------------------------------------------------------------------------------

    def make_preprocessor_external(self) -> nn.Module:
        """Hand out the input conditioner and stop applying it inside: the caller then passes conditioner(x)."""
        conditioner, self.input_conditioner = self.input_conditioner, nn.Identity()
        return conditioner

    def get_nearest_supported_resolution(self, height: int, width: int) -> Resolution:
        """The legal image size nearest to height × width pixels, at least one step each way."""
        step = self.min_resolution_step
        return Resolution(*(max(round(side / step), 1) * step for side in (height, width)))

    def switch_to_deploy(self) -> None:
        """No effect: weights are folded while loading."""

    @contextmanager
    def cpe_video_mode(self, t: int | None = None) -> Iterator[None]:
        """No effect at inference: the frames of a clip share their positions in training only."""
        yield

    def forward(self, x: Tensor, feature_fmt: str = "NLC") -> RadioOutput | dict[str, RadioOutput]:
        """Embed a batch of images.

        Args:
            x: (B, 3, H, W), float, RGB in [0, 1].
            feature_fmt: "NLC": features (B, T, D), T = H/p · W/p row by row; "NCHW": (B, D, H/p, W/p).

        Raises:
            ValueError: wrong rank, channels, dtype or size; a wrong size's error names the nearest legal one.
        """
        check_choice("feature_fmt", feature_fmt, FEATURE_FORMATS)
        self._check_image(x)
        replayed = self._replay(RADIOModel.forward, x, feature_fmt)
        return self._eager(x, feature_fmt)[1] if replayed is None else replayed

    def forward_tokens(
        self, x: Tensor, feature_fmt: str = "NLC"
    ) -> tuple[Tensor, RadioOutput | dict[str, RadioOutput]]:
        """All tokens after the last block and the final norm, if there is one, (B, P + T, D), prefix tokens first; and
        what `forward` makes of them. E-RADIO has no prefix tokens: (B, T, D).
        """
        check_choice("feature_fmt", feature_fmt, FEATURE_FORMATS)
        self._check_image(x)
        replayed = self._replay(RADIOModel.forward_tokens, x, feature_fmt)
        return self._eager(x, feature_fmt) if replayed is None else replayed

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | tuple[int, ...] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        aggregation: str = "sparse",
        norm_alpha_scheme: str = "post-alpha",
    ):
        """The tokens after chosen blocks, and the final output.

        Args:
            x: as for `forward`.
            indices: the blocks, in ascending order whatever the order given: an int n for the last n, a list (negative
                numbers count from the end), None for all.
            return_prefix_tokens: give `RadioOutput(summary, features)` per block instead of the features alone.
            norm: apply the final norm to the intermediates and to the final output (the latter gets none otherwise).
            stop_early: leave out the blocks after the last one chosen; the final output is then that block's.
            output_fmt: "NCHW" or "NLC", for intermediates and final output.
            intermediates_only: return the list alone.
            aggregation: "sparse": the tokens after block i; "dense": the mean over the blocks since the previous index.
            norm_alpha_scheme: with an intermediate normalizer (y its output, α its factors): "post-alpha" gives
                mean(α)·mean(y), "pre-alpha" mean(α·y), "none" leaves the normalizer out.

        Returns:
            A list with one entry per block, or (final output, that list).

        Raises:
            ValueError: as for `forward`; indices or options that are not legal.
            NotImplementedError: the model is an E-RADIO.
        """
        if isinstance(self.model, ERADIO):
            raise NotImplementedError(
                "E-RADIO has no forward_intermediates: its levels differ in resolution and width. ViTs have it"
            )
        check_choice("output_fmt", output_fmt, FEATURE_FORMATS)
        check_choice("aggregation", aggregation, ("sparse", "dense"))
        check_choice("norm_alpha_scheme", norm_alpha_scheme, ("none", "pre-alpha", "post-alpha"))
        self._check_image(x)
        indices = tuple(resolve_indices(indices, len(self.model.blocks)))
        replayed = self._replay(
            RADIOModel.forward_intermediates, x, indices, bool(return_prefix_tokens), bool(norm), bool(stop_early),
            output_fmt, bool(intermediates_only), aggregation, norm_alpha_scheme,
        )  # fmt: skip
        if replayed is not None:
            return replayed
        h, w = self.model.grid(x)

        def run(dtype: torch.dtype | None) -> tuple[Tensor, ...]:
            tokens = self.model.patch_generator(x, self._conditioner(), dtype)
            final, collected = collect_intermediates(
                self.model, tokens, h, w, indices, norm, stop_early, aggregation, norm_alpha_scheme,
                self.inter_feature_normalizer,
            )  # fmt: skip
            return final, *collected

        final, *collected = self._compute(x, run)
        outputs = [self._backbone_output(t, h, w, output_fmt, per_block=True) for t in collected]
        intermediates = outputs if return_prefix_tokens else [out.features for out in outputs]
        if intermediates_only:
            return intermediates
        return self._outputs(final, h, w, output_fmt), intermediates

    def forward_packed(
        self,
        images: Sequence[Tensor] | Tensor,
        image_grid_hw: Tensor | Sequence[Sequence[int]] | None = None,
        feature_fmt: str = "NLC",
    ) -> PackedOutput | dict[str, PackedOutput]:
        """Embed images of several sizes in one pass, without padding: each gets what it would get alone.

        The patches of all images lie in one row and attend inside their own image. E-RADIO's maps can't: its images
        are grouped by size. CUDA graphs are not used.

        Args:
            images: list of (3, H, W), float in [0, 1] or uint8 (divided by 255). Beside `image_grid_hw`: their patches
                (ΣT, 3·p·p), each image's row by row, the pixels of each ordered (channel, row, column).
            image_grid_hw: (B, 2), the rows and columns of patches of each image; on the GPU it is waited for.
            feature_fmt: "NLC": each image's features (T, D); "NCHW": (D, H/p, W/p).

        Returns:
            `PackedOutput(summary, features)`: (B, S·D), and a tuple of B tensors, parts of one; with adaptors a dict of
            them, as in `forward`.

        Raises:
            ValueError: no image; one of a wrong rank, dtype, device or size, named by its number; grids that don't fit.
        """
        check_choice("feature_fmt", feature_fmt, FEATURE_FORMATS)
        p = self.patch_size
        if image_grid_hw is None:
            check_images(images, self.model.device)
            sizes = [(image.shape[1], image.shape[2]) for image in images]
        else:
            check_patches(images, p, self.model.device)
            sizes = [(h * p, w * p) for h, w in read_grids(image_grid_hw, images.shape[0])]
        for i, (H, W) in enumerate(sizes):
            self._check_size(H, W, f"images[{i}]: ")
        grids = tuple((H // p, W // p) for H, W in sizes)
        conditioner = self._conditioner()
        foreign = conditioner is not None and not isinstance(conditioner, InputConditioner)
        if image_grid_hw is not None and (foreign or isinstance(self.model, ERADIO)):  # they take whole images
            images, image_grid_hw = glue(images, grids, p), None
        if isinstance(self.model, ERADIO):
            return in_groups(images, lambda x: self._eager(x, feature_fmt)[1])
        if foreign:
            images, conditioner = [conditioner(to_float(image).unsqueeze(0))[0] for image in images], None
        packing = pack(grids, self.model.num_prefix, self.model.device, self.window_size)
        patches = cut(images, p) if image_grid_hw is None else images.unflatten(1, (3, p, p))
        tokens = self._compute(patches, lambda dtype: self.model(patches, conditioner, dtype, packing))
        return packed_outputs(self, tokens[0], packing, feature_fmt)

    # -- pieces -----------------------------------------------------------------------------------------------------

    def _replay(self, method: Callable, x: Tensor, *args) -> Any:
        """What a CUDA graph gives for `method(self, x, *args)`; None where it has to be run."""
        if torch.compiler.is_compiling() or self.graphs is None:
            return None
        return self.graphs.run(self, method, x, args)

    def _eager(self, x: Tensor, fmt: str) -> tuple[Tensor, RadioOutput | dict[str, RadioOutput]]:
        tokens = self._compute(x, lambda dtype: self.model(x, self._conditioner(), dtype))
        return tokens, self._outputs(tokens, *self.model.grid(x), fmt)

    def _compute(self, x: Tensor, run: Callable[[torch.dtype | None], Any]) -> Any:
        """run(dtype): tokens, computed in autocast's dtype without PyTorch's autocast where kernels may run, which it
        knows nothing of; of the dtype that they would have with it. run(None) elsewhere.
        """
        kind = x.device.type
        if (
            not torch.is_autocast_enabled(kind)
            or torch.compiler.is_compiling()
            or self.backend == "reference"
            or not _dispatch.has_kernels(x.device)
            or (torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters())))
        ):
            return run(None)
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            tokens = run(dtype)
        out = self.model.autocast_dtype(dtype)
        return tokens.to(out) if isinstance(tokens, Tensor) else tuple(t.to(out) for t in tokens)

    def _apply(self, fn, recurse=True):
        self.model.check_move(fn)
        if self.graphs is not None:
            self.graphs.drop()
        return super()._apply(fn, recurse)

    def _conditioner(self) -> nn.Module | None:
        return None if isinstance(self.input_conditioner, nn.Identity) else self.input_conditioner

    def _check_image(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise ValueError(f"x must be a tensor of shape (B, 3, H, W), got {type(x).__name__}")
        if x.ndim != 4:
            raise ValueError(f"x must have 4 dimensions, (B, 3, H, W), got shape {tuple(x.shape)}")
        if x.shape[1] != 3:
            raise ValueError(f"x must have 3 channels (RGB) in dimension 1, got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"x must be a float tensor in [0, 1], got {x.dtype}: convert with x.float() / 255")
        self._check_size(*x.shape[2:])
        device = self.model.device
        if x.device != device:
            raise ValueError(f"x is on {x.device} and the model on {device}: move one of them with .to(...)")

    def _check_size(self, H: int, W: int, which: str = "") -> None:
        step = self.min_resolution_step
        if H % step or W % step or not H or not W:
            near = self.get_nearest_supported_resolution(H, W)
            raise ValueError(
                f"{which}image height and width must be multiples of {step} pixels ({self.model.step_reason}), "
                f"got {H} × {W}; the nearest supported size is {near.height} × {near.width}"
            )
        side = self.model.only_size
        if side is not None and not side == H == W:
            raise ValueError(f"{which}this model has no CPE and takes only {side} × {side} images, got {H} × {W}")

    def _backbone_output(self, tokens: Tensor, h: int, w: int, fmt: str, per_block: bool = False) -> RadioOutput:
        prefix, features = self.model.split(tokens)
        # Not indexed by a list: its copy to the GPU would be waited for, and can't be captured.
        summary = torch.cat([prefix[:, i] for i in self.model.summary_tokens], dim=1)
        if self.feature_normalizer is not None and not per_block:
            features = self.feature_normalizer(features)
        return RadioOutput(summary, to_nchw(features, h, w) if fmt == "NCHW" else features)

    def _outputs(self, tokens: Tensor, h: int, w: int, fmt: str) -> RadioOutput | dict[str, RadioOutput]:
        if not self.adaptors:
            return self._backbone_output(tokens, h, w, fmt)
        backbone = self._backbone_output(tokens, h, w, "NLC")
        prefix, _ = self.model.split(tokens)
        outputs = {"backbone": backbone}
        for name, adaptor in self.adaptors.items():
            outputs[name] = RadioOutput(*adaptor(prefix, backbone.features, h, w, fmt))
        if fmt == "NCHW":
            outputs["backbone"] = RadioOutput(backbone.summary, to_nchw(backbone.features, h, w))
        return outputs
