"""Tiny text towers in the places where the real ones are looked for, and a checkpoint whose adaptors name them."""

from __future__ import annotations

import argparse
import importlib.machinery
import json
import sys
import types
from pathlib import Path

import pytest
import torch

from radio_fast.checkpoint import read_checkpoint
from tests.conftest import golden_source

CLIP, SIGLIP = "tiny-clip", "tiny-SigLIP"  # open_clip's names of them
VOCABULARY = "timm/ViT-B-16-SigLIP"  # the repository of its SigLIPs' tokenizer
CLIP_DIM, SIGLIP_DIM, SIGLIP2_DIM = 48, 64, 80  # widths of vit_h16's heads
GIANT, SO400M = "google/siglip2-giant-opt-patch16-384", "google/siglip2-so400m-patch16-naflex"
_TORCHVISION = {
    "torchvision": "",
    "torchvision.ops": "",
    "torchvision.ops.misc": "FrozenBatchNorm2d",
    "torchvision.transforms": "Normalize Compose RandomResizedCrop InterpolationMode ToTensor Resize CenterCrop "
    "ColorJitter Grayscale",
    "torchvision.transforms.functional": "",
}


def import_open_clip():
    """open_clip, also without torchvision, which has no CPU build on the package index: what open_clip's image half
    imports of it has a stand-in meanwhile. The text half uses none of it.
    """
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        from transformers.utils import is_torchvision_available, is_torchvision_v2_available

        # Transformers asks once: before it could take the stand-in for the real one.
        is_torchvision_available(), is_torchvision_v2_available()
        before = set(sys.modules)
        for name, members in _TORCHVISION.items():
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
            module.__path__ = []
            for member in members.split():
                setattr(module, member, type(member, (), {"BICUBIC": "bicubic", "BILINEAR": "bilinear"}))
            sys.modules[name] = module
            parent, _, leaf = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], leaf, module)
        try:
            return pytest.importorskip("open_clip")
        finally:
            for name in set(sys.modules) - before:
                if name.split(".")[0] == "torchvision":
                    del sys.modules[name]
    return pytest.importorskip("open_clip")


def make_open_clip(open_clip, folder: Path) -> dict[str, Path]:
    """Two models that open_clip then knows by name, and the files of their weights: CLIP's is a pickle, as dfn5b's."""
    vision = {"image_size": 16, "patch_size": 16, "width": 32, "head_width": 16, "layers": 1}
    text = {"width": 32, "heads": 2, "layers": 2}
    configs = {
        CLIP: {
            "embed_dim": CLIP_DIM,
            "quick_gelu": True,
            "vision_cfg": vision,
            "text_cfg": {**text, "context_length": 12},
        },
        SIGLIP: {
            "embed_dim": SIGLIP_DIM,
            "init_logit_bias": -10,
            "custom_text": True,
            "vision_cfg": vision,
            "text_cfg": {
                **text,
                "context_length": 16,
                "vocab_size": 300,
                "no_causal_mask": True,
                "proj_bias": True,
                "pool_type": "last",
                "hf_tokenizer_name": VOCABULARY,
                "tokenizer_kwargs": {"clean": "canonicalize"},
            },
        },
    }
    files = {CLIP: folder / "clip.bin", SIGLIP: folder / "siglip.safetensors"}
    for seed, (name, config) in enumerate(configs.items()):
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{name}.json")
        torch.manual_seed(seed)
        model = open_clip.create_model(name)
        randomize(model)
        if files[name].suffix == ".bin":
            torch.save(model.state_dict(), files[name])
        else:
            from safetensors.torch import save_file

            save_file(model.state_dict(), files[name])
    return files


def make_t5_tokenizer(folder: Path) -> None:
    """What the timm repositories of open_clip's SigLIPs have as tokenizer, in Hugging Face's cache at `folder`."""
    import transformers as tf

    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghiklmnoprstuv"]
    tokenizer = tf.T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)
    tokenizer.save_pretrained(cached(folder, VOCABULARY))


def cached(folder: Path, repo: str) -> Path:
    """An empty snapshot of a repository in Hugging Face's cache at `folder`."""
    where = folder / f"models--{repo.replace('/', '--')}"
    revision = "0" * 40
    (where / "refs").mkdir(parents=True)
    (where / "refs" / "main").write_text(revision)
    (where / "snapshots" / revision).mkdir(parents=True)
    return where / "snapshots" / revision


def make_siglip2(folder: Path, repo: str) -> Path:
    """A SigLIP 2 in Hugging Face's cache at `folder`, as its repository has it; the folder with its files.

    Those of one image size are of type siglip and have a Gemma tokenizer, naflex is of type siglip2.
    """
    import transformers as tf

    naflex = repo == SO400M
    text = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "vocab_size": 300, "projection_size": SIGLIP2_DIM, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(5 + naflex)
    if naflex:
        model = tf.Siglip2Model(tf.Siglip2Config(text_config=text, vision_config={**vision, "num_patches": 4}))
    else:
        size = {"image_size": 32, "patch_size": 16}
        model = tf.SiglipModel(tf.SiglipConfig(text_config=text, vision_config={**vision, **size}))
    randomize(model)
    snapshot = cached(folder, repo)
    model.save_pretrained(snapshot)
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"acdehiopt"]
    kind = tf.Siglip2Tokenizer if naflex else tf.GemmaTokenizer
    tokenizer = kind(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])
    tokenizer.save_pretrained(snapshot)
    return snapshot


def randomize(model: torch.nn.Module) -> None:
    """Weights none of which is zero or one: none can be left out unseen."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.3)
            if name == "logit_scale":
                p.fill_(2.5)
            elif name == "logit_bias":
                p.fill_(-1.5)


def make_checkpoint(path: Path, teachers: dict[str, dict]) -> Path:
    """vit_h16 with other names and types for its teachers (clip, siglip, dino_v2, sam)."""
    content = read_checkpoint(golden_source("vit_h16"))
    args = argparse.Namespace(**vars(content["args"]))
    args.teachers = [{**teacher, **teachers.get(teacher["name"], {})} for teacher in args.teachers]
    renamed = {old: teachers[old]["name"] for old in teachers if "name" in teachers[old]}
    state = {}
    for key, value in content["state_dict"].items():
        group, _, rest = key.partition(".")
        name, _, rest = rest.partition(".")
        if group in ("_heads", "_feature_projections") and name in renamed:
            key = f"{group}.{renamed[name]}.{rest}"
        state[key] = value
    torch.save({**content, "args": args, "state_dict": state}, path)
    return path
