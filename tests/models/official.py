"""Stand-ins for models that the official code builds: its attributes and tensor names (radio.md), nothing computed.

They hold what `radio_fast.accelerate` looks at: tensors filled from a golden checkpoint, norms and activations that can
be called, head counts. The official code itself is under a non-commercial licence and never opened here.
"""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from radio_fast.checkpoint import plain_args, read_checkpoint
from radio_fast.models.spec import prefix_layout
from tests.conftest import GOLDEN, golden_source

BUFFERS = {"running_mean", "running_var", "relative_coords_table", "_u", "_v", "norm_mean", "norm_std", "mean", "tx"}
BUFFERS |= {"alphas", "means", "rotation"}


class Node(nn.Module):
    """A module of names only; iterates over its numbered children as a ModuleList does."""

    def __iter__(self):
        return iter(self._modules.values())


class Norm(nn.LayerNorm):
    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def tree(tensors: dict[str, Tensor], eps: float = 1e-6) -> Node:
    """Nested modules with these tensors as parameters and buffers."""
    root = Node()
    for key, value in tensors.items():
        *path, leaf = key.split(".")
        node = root
        for depth, part in enumerate(path):
            if part not in node._modules:
                norm = re.fullmatch(r"norm\d", part) and f"{'.'.join(path[: depth + 1])}.running_mean" not in tensors
                node.add_module(part, Norm(value.shape[0], eps, device="meta") if norm else Node())
            node = node._modules[part]
        value = value.clone()
        if leaf in BUFFERS or not value.is_floating_point():
            node.register_buffer(leaf, value)
        else:
            setattr(node, leaf, nn.Parameter(value))
    return root


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


class Official(nn.Module):
    """What the TorchHub code returns for a golden checkpoint, in eval mode."""

    def __init__(self, case: str, adaptor_names=(), vitdet_window_size=None):
        super().__init__()
        content = read_checkpoint(golden_source(case))
        self._make(content["state_dict"], plain_args(content["args"]), adaptor_names, vitdet_window_size)

    def _make(self, tensors, args, adaptor_names, window):
        names = [adaptor_names] if isinstance(adaptor_names, str) else list(adaptor_names or ())
        kwargs = args["model_kwargs"]
        tensors = {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
        eradio = "base_model.patch_embed.conv_down.0.conv.weight" in tensors
        network = tree(under(tensors, "base_model."), 1e-5 if eradio else 1e-6)
        self.model = network.to(args["dtype"])
        for i, block in enumerate(getattr(getattr(network, "inner", network), "blocks", ())):
            block.attn.num_heads = kwargs["num_heads"]
            block.mlp.act = nn.GELU()
            if kwargs.get("scaled_ln"):
                block.norm1.scale = block.norm2.scale = (i + 1) ** -0.5
        self.input_conditioner = tree(under(tensors, "input_conditioner."))
        self.adaptors = nn.ModuleDict()
        teachers = [teacher["name"] for teacher in args["teachers"]]
        for name in names:
            index, adaptor = teachers.index(name), Node()
            for mlp, group in (("head_mlp", "_heads"), ("feat_mlp", "_feature_projections")):
                found = under(tensors, f"{group}.{name}.") or under(tensors, f"{group}.{index}.")
                adaptor.add_module(mlp, tree(found))
            adaptor.head_idx = index if args["cls_token_per_teacher"] else 0
            adaptor.feat_mlp.upsample_factor = args["teachers"][index].get("fd_upsample_factor", 1)
            self.adaptors[name] = adaptor
        self.feature_normalizer = tree(under(tensors, "_feature_normalizer.")).to(args["dtype"])
        self.inter_feature_normalizer = tree(under(tensors, "_intermediate_feature_normalizer.")).to(args["dtype"])
        num_cls, _, idxs = prefix_layout(args)
        self.num_cls_tokens = num_cls
        self.register_buffer("summary_idxs", torch.tensor((0,) if "dino" in args["model"] else idxs))
        self.window_size = window
        self.max_resolution, self.preferred_resolution = 1024, (768, 512)
        self.eval()

    def make_preprocessor_external(self) -> nn.Module:
        conditioner, self.input_conditioner = self.input_conditioner, nn.Identity()
        return conditioner


class FromFolder(Official):
    """The same, built from a golden Hugging Face folder."""

    def __init__(self, case: str, config: dict, adaptor_names):
        nn.Module.__init__(self)
        tensors = under(load_file(GOLDEN / case / "model.safetensors"), "radio_model.")
        renamed = {f"base_model.{key}": value for key, value in under(tensors, "model.").items()}
        renamed |= {key: value for key, value in tensors.items() if key.startswith("input_conditioner.")}
        for name in adaptor_names:
            renamed |= {f"_heads.{name}.{k}": v for k, v in under(tensors, f"adaptors.{name}.head_mlp.").items()}
            feature = under(tensors, f"adaptors.{name}.feat_mlp.")
            renamed |= {f"_feature_projections.{name}.{k}": v for k, v in feature.items()}
        self._make(renamed, plain_args(config["args"]), adaptor_names, config.get("vitdet_window_size"))
        if "summary_idxs" in tensors:
            self.summary_idxs = tensors["summary_idxs"]


class RemoteCode(nn.Module):
    """What `AutoModel.from_pretrained(…, trust_remote_code=True)` returns: a wrapper with a config."""

    def __init__(self, case: str, adaptor_names=None):
        super().__init__()
        config = json.loads((GOLDEN / case / "config.json").read_text())
        self.config = SimpleNamespace(**config)
        names = config["adaptor_names"] if adaptor_names is None else adaptor_names
        self.radio_model = FromFolder(case, config, names)
        for adaptor in self.radio_model.adaptors.values():  # the config has what these tell
            del adaptor.head_idx, adaptor.feat_mlp.upsample_factor
        self.eval()
