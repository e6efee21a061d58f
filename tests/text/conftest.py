"""What a machine has that has used the text towers before: the packages, and full caches. No test has a connection."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import radio_fast
from tests.text import towers

NAMES = ("clip", "siglip", "siglip2-g", "siglip2-so400m")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """open_clip, which knows two tiny models; Hugging Face's cache with a tokenizer and both SigLIP 2; a checkpoint."""
    open_clip = towers.import_open_clip()
    folder = tmp_path_factory.mktemp("text")
    with torch.random.fork_rng(devices=[]):
        files = towers.make_open_clip(open_clip, folder)
        hub = folder / "hub"
        towers.make_t5_tokenizer(hub)
        repos = {repo: towers.make_siglip2(hub, repo) for repo in (towers.GIANT, towers.SO400M)}
    teachers = {
        "clip": {"model": towers.CLIP, "pretrained": str(files[towers.CLIP])},
        "siglip": {"model": towers.SIGLIP, "pretrained": str(files[towers.SIGLIP])},
        "dino_v2": {"name": "siglip2-g", "type": "siglip2", "model": "siglip2-g-384"},
        "sam": {"name": "siglip2-so400m", "type": "siglip2", "model": "siglip2-so400m"},
    }
    checkpoint = towers.make_checkpoint(folder / "radio.pth.tar", teachers)
    return SimpleNamespace(
        open_clip=open_clip, folder=folder, files=files, hub=hub, repos=repos, checkpoint=checkpoint, teachers=teachers
    )


@pytest.fixture(autouse=True)
def offline(tiny, monkeypatch):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tiny.hub))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def model(tiny):
    return radio_fast.load(tiny.checkpoint, adaptor_names=NAMES)


@pytest.fixture
def with_teacher(tiny, tmp_path):
    """A model whose adaptor is of another teacher."""

    def load(name: str, **entry):
        key = next(key for key, teacher in tiny.teachers.items() if teacher.get("name", key) == name)
        teachers = {**tiny.teachers, key: {**tiny.teachers[key], **entry}}
        path = towers.make_checkpoint(tmp_path / "radio.pth.tar", teachers)
        return radio_fast.load(path, adaptor_names=[name])

    return load
