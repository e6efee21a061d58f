"""Adaptors that understand text: the teacher's own numbers, loaded late, safely, and wherever the model goes."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import sys
import threading
import time

import pytest
import torch

import radio_fast
from radio_fast.models.text import OpenClipText, Siglip2Text, canonicalize
from tests.conftest import golden_source
from tests.numerics import assert_tokens
from tests.text import towers
from tests.text.conftest import NAMES

TEXTS = ["A photo of a Cat_dog!", "cat", "the  head,\tof a dolphin"]


def image(model):
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def tower_of(model, name):
    return model.adaptors[name].text.load(torch.device("cpu"), torch.float32).module


# -- what it computes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_open_clip_text_is_open_clips(model, tiny, name):
    teacher = tiny.teachers[name]
    rival = tiny.open_clip.create_model(teacher["model"], teacher["pretrained"]).eval()
    adaptor = model.adaptors[name]
    tokens = adaptor.tokenizer(TEXTS)
    if name == "clip":
        assert torch.equal(tokens, tiny.open_clip.get_tokenizer(teacher["model"])(TEXTS))
    with torch.no_grad():
        expected, normalized = rival.encode_text(tokens), rival.encode_text(tokens, normalize=True)
    assert torch.equal(adaptor.encode_text(tokens), expected)
    assert torch.equal(adaptor.encode_text(tokens, normalize=True), normalized)
    assert expected.shape == (3, model(image(model))[name].summary.shape[1])
    assert not torch.equal(expected[0], expected[1])


@pytest.mark.parametrize(
    ("name", "repo", "kind"),
    [("siglip2-g", towers.GIANT, "SiglipModel"), ("siglip2-so400m", towers.SO400M, "Siglip2Model")],
)
def test_siglip2_text_is_transformers(model, tiny, name, repo, kind):
    import transformers

    rival = getattr(transformers, kind).from_pretrained(tiny.repos[repo]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.repos[repo], padding_side="right")
    adaptor = model.adaptors[name]
    tokens = adaptor.tokenizer(TEXTS)
    clean = ["a photo of a cat dog", "cat", "the head of a dolphin"]
    padded = tokenizer(clean, padding="max_length", max_length=64, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(tokens, padded)
    assert tokens.shape == (3, 64) and tokens.dtype == torch.int64
    with torch.no_grad():
        expected = rival.get_text_features(input_ids=tokens).pooler_output
    assert torch.equal(adaptor.encode_text(tokens), expected)
    lengths = adaptor.encode_text(tokens, normalize=True).norm(dim=-1)
    assert torch.allclose(lengths, torch.ones(3)) and not torch.allclose(expected.norm(dim=-1), lengths)


@pytest.mark.parametrize("name", ["clip", "siglip", "siglip2-g"])
def test_logit_scale_and_bias_are_the_towers(model, name):
    tower = model.adaptors[name].text.load(torch.device("cpu"), torch.float32)
    assert tower.logit_scale == pytest.approx(2.718281828**2.5)
    assert tower.logit_bias == (None if name == "clip" else -1.5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A Photo", "a photo"),
        ("night_club", "night club"),
        ("it's  a\tdog.\n", "its a dog"),
        ("_a_-_b_", "a b"),
        ("ÉTÉ", "été"),
        ("?!", ""),
    ],
)
def test_canonical_text(text, expected):
    assert canonicalize(text) == expected


def test_siglip_text_is_canonical_too(model):
    tokens = model.adaptors["siglip"].tokenizer(["A photo, of a CAT_dog!", "a photo of a cat dog"])
    assert torch.equal(tokens[0], tokens[1])


def test_one_string_is_a_batch_of_one(model):
    clip = model.adaptors["clip"]
    assert torch.equal(clip.tokenizer("cat"), clip.tokenizer(["cat"]))


# -- when it is loaded --------------------------------------------------------------------------------------------


def test_images_and_tokens_load_no_tower(model, monkeypatch):
    def refuse(self):
        raise AssertionError("the tower was loaded")

    for kind in (OpenClipText, Siglip2Text):
        monkeypatch.setattr(kind, "_load", refuse)
    assert set(model(image(model))) == {"backbone", *NAMES}
    for name in NAMES:
        tokens = model.adaptors[name].tokenizer(TEXTS)
        with pytest.raises(AssertionError, match="the tower was loaded"):
            model.adaptors[name].encode_text(tokens)


@pytest.mark.parametrize(
    ("name", "package", "extra"), [("clip", "open_clip", "clip"), ("siglip2-g", "transformers", "siglip2")]
)
def test_without_the_package_images_work_and_text_names_the_extra(tiny, monkeypatch, name, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    model = radio_fast.load(tiny.checkpoint, adaptor_names=[name])
    assert model(image(model))[name].summary.isfinite().all()
    for use in (lambda a: a.tokenizer("cat"), lambda a: a.encode_text(torch.zeros(1, 12, dtype=torch.int64))):
        with pytest.raises(
            ImportError, match=rf"adaptor '{name}' needs {package}: pip install 'radio_fast\[{extra}\]'"
        ):
            use(model.adaptors[name])


def test_siglips_tokenizer_names_the_extra(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    model = radio_fast.load(tiny.checkpoint, adaptor_names=["siglip"])
    with pytest.raises(ImportError, match=r"needs transformers: pip install 'radio_fast\[clip\]'"):
        model.adaptors["siglip"].tokenizer("cat")


@pytest.mark.parametrize("name", ["siglip", "siglip2-g", "siglip2-so400m"])
def test_nothing_cached_and_no_connection(tiny, monkeypatch, tmp_path, name):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    adaptor = radio_fast.load(tiny.checkpoint, adaptor_names=[name]).adaptors[name]
    with pytest.raises(radio_fast.DownloadError, match=f"adaptor '{name}' .*HF_HOME.*images work without it"):
        adaptor.tokenizer("cat")
    if name != "siglip":
        with pytest.raises(radio_fast.DownloadError, match="google/siglip2"):
            adaptor.encode_text(torch.zeros(1, 64, dtype=torch.int64))
    # It is asked for again: a failure is not for ever.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tiny.hub))
    assert adaptor.tokenizer("cat").shape[0] == 1


def test_open_clips_weights_without_a_connection(with_teacher):
    """The teacher of the released C-RADIOv3, whose weights no one has here."""
    model = with_teacher("clip", model="ViT-H-14-378-quickgelu", pretrained="dfn5b")
    assert model.adaptors["clip"].tokenizer("cat").shape == (1, 77)
    with pytest.raises(radio_fast.DownloadError, match="open_clip ViT-H-14-378-quickgelu, dfn5b"):
        model.adaptors["clip"].encode_text(torch.zeros(1, 77, dtype=torch.int64))


def test_siglip2_offline_with_the_tokenizer_alone(tiny, monkeypatch, tmp_path):
    import huggingface_hub.constants as constants

    shutil.copytree(tiny.hub, tmp_path / "hub", ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    adaptor = radio_fast.load(tiny.checkpoint, adaptor_names=["siglip2-g"]).adaptors["siglip2-g"]
    tokens = adaptor.tokenizer("cat")
    with pytest.raises(radio_fast.DownloadError, match=r"has no \*\.safetensors"):
        adaptor.encode_text(tokens)


def test_threads_load_once(model, monkeypatch):
    loads = []
    for kind in (OpenClipText, Siglip2Text):

        def slow(self, load=kind._load):
            loads.append(self.name)
            time.sleep(0.05)
            return load(self)

        monkeypatch.setattr(kind, "_load", slow)
    expected = copy.deepcopy(model).adaptors["siglip2-g"]
    expected = expected.encode_text(expected.tokenizer(TEXTS))
    loads.clear()
    results, barrier = [], threading.Barrier(4)

    def work():
        adaptor = model.adaptors["siglip2-g"]
        barrier.wait()
        for _ in range(20):  # tokenizers too are shared
            results.append(adaptor.encode_text(adaptor.tokenizer(TEXTS)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == ["siglip2-g"]
    assert len(results) == 80 and all(torch.equal(result, expected) for result in results)


def test_loaded_under_modes_it_is_an_ordinary_tower(model):
    adaptor = model.adaptors["clip"]
    tokens = adaptor.tokenizer(TEXTS)
    with torch.inference_mode(), torch.device("meta"):
        adaptor.encode_text(tokens)
    module = tower_of(model, "clip")
    assert not any(p.is_inference() or p.requires_grad or p.is_meta for p in module.parameters())
    assert not module.training
    out = adaptor.encode_text(tokens)
    assert not out.is_inference() and not out.requires_grad


# -- where it lives -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_only_the_text_half_is_kept(model, name):
    module = tower_of(model, name)
    assert not [key for key in module.state_dict() if "vis" in key]
    assert any("token_embedding" in key for key in module.state_dict())


def test_no_part_of_state_and_parameters(model):
    before = set(model.state_dict()), len(list(model.parameters())), len(list(model.modules()))
    for name in NAMES:
        model.adaptors[name].encode_text(model.adaptors[name].tokenizer("cat"))
    assert (set(model.state_dict()), len(list(model.parameters())), len(list(model.modules()))) == before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("loaded_before", [True, False])
def test_follows_the_models_dtype(model, name, loaded_before):
    adaptor = model.adaptors[name]
    tokens = adaptor.tokenizer(TEXTS)
    truth = copy.deepcopy(adaptor).encode_text(tokens)
    if loaded_before:
        adaptor.encode_text(tokens)
    model.bfloat16()
    out = adaptor.encode_text(tokens)
    assert {p.dtype for p in tower_of(model, name).parameters()} == {torch.bfloat16}
    assert out.dtype == torch.float32
    assert_tokens(out, truth, minimum=0.99)  # tiny widths: 32 channels average little out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("loaded_before", [True, False])
def test_follows_the_models_device(model, name, loaded_before):
    """The meta device stands for a GPU."""
    adaptor = model.adaptors[name]
    tokens = adaptor.tokenizer(TEXTS)
    if loaded_before:
        adaptor.encode_text(tokens)
    model.to("meta")
    out = adaptor.encode_text(tokens)
    assert out.device.type == "meta"
    assert {p.device.type for p in tower_of(model, name).parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["clip", "siglip2-g"])
def test_deepcopy_has_its_own_tower(model, name):
    tokens = model.adaptors[name].tokenizer(TEXTS)
    expected = model.adaptors[name].encode_text(tokens)
    other = copy.deepcopy(model)
    assert torch.equal(other.adaptors[name].encode_text(tokens), expected)
    with torch.no_grad():
        for p in tower_of(other, name).parameters():
            p.mul_(2)
    assert not torch.equal(other.adaptors[name].encode_text(tokens), expected)
    assert torch.equal(model.adaptors[name].encode_text(tokens), expected)


@pytest.mark.parametrize("name", ["clip", "siglip2-g"])
def test_pickle_leaves_the_tower_behind(model, name):
    size = len(pickle.dumps(model))
    tokens = model.adaptors[name].tokenizer(TEXTS)
    expected = model.adaptors[name].encode_text(tokens)
    data = pickle.dumps(model)
    assert abs(len(data) - size) < 100
    assert torch.equal(pickle.loads(data).adaptors[name].encode_text(tokens), expected)


# -- what is refused ----------------------------------------------------------------------------------------------


def test_adaptors_without_text_have_none():
    adaptor = radio_fast.load(golden_source("vit_h16"), adaptor_names=["sam"]).adaptors["sam"]
    assert not hasattr(adaptor, "tokenizer") and not hasattr(adaptor, "encode_text")


@pytest.mark.parametrize(
    "tokens",
    ["cat", torch.zeros(12, dtype=torch.int64), torch.zeros(1, 12), torch.zeros(1, 12, dtype=torch.bool)],
    ids=["text", "one", "float", "bool"],
)
def test_tokens_of_another_kind(model, tokens):
    with pytest.raises(ValueError, match=r"tokens must be the \(B, length\) integers that \.tokenizer makes"):
        model.adaptors["clip"].encode_text(tokens)


def test_tokens_of_another_adaptor(model):
    tokens = model.adaptors["clip"].tokenizer("cat")
    with pytest.raises(ValueError, match=r"tokens must be 16 a text, .* got 12"):
        model.adaptors["siglip"].encode_text(tokens)
    for wrong in (300, -1):
        with pytest.raises(ValueError, match=r"tokens must lie in 0…299"):
            model.adaptors["siglip"].encode_text(torch.full((1, 16), wrong))


@pytest.mark.parametrize("texts", [[], [1], ["cat", None]])
def test_no_texts(model, texts):
    with pytest.raises(ValueError, match="texts must be a string or a list of at least one string"):
        model.adaptors["clip"].tokenizer(texts)


@pytest.mark.parametrize("name", ["hf-hub:someone/model", "local-dir:/tmp", "ViT-Z-99", None, 3])
def test_a_checkpoint_cannot_name_a_repository(with_teacher, name):
    adaptor = with_teacher("clip", model=name).adaptors["clip"]
    for use in (lambda: adaptor.tokenizer("cat"), lambda: adaptor.encode_text(torch.zeros(1, 12, dtype=torch.int64))):
        with pytest.raises(radio_fast.CheckpointError, match=r"has no model .*list_models"):
            use()


def test_weights_that_open_clip_does_not_have(with_teacher):
    for pretrained in ("nowhere", None, 5):
        adaptor = with_teacher("clip", model="ViT-B-32", pretrained=pretrained).adaptors["clip"]
        with pytest.raises(
            radio_fast.CheckpointError, match=rf"no weights {pretrained!r} for ViT-B-32; it has 'openai'"
        ):
            adaptor.encode_text(torch.zeros(1, 77, dtype=torch.int64))


@pytest.mark.parametrize("name", ["someone/model", ["siglip2-g-384"], None])
def test_siglip2_models_are_known_by_name(with_teacher, name):
    adaptor = with_teacher("siglip2-g", model=name).adaptors["siglip2-g"]
    with pytest.raises(radio_fast.CheckpointError, match="there are 'siglip2-g-384', 'siglip2-so400m'"):
        adaptor.tokenizer("cat")


class Payload:
    def __reduce__(self):
        return print, ("executed",)


def test_open_clips_pickles_are_read_as_tensors_only(with_teacher, tiny, tmp_path, capsys):
    state = torch.load(tiny.files[towers.CLIP], weights_only=True)
    torch.save({"state_dict": state, "more": Payload()}, tmp_path / "evil.bin")
    adaptor = with_teacher("clip", pretrained=str(tmp_path / "evil.bin")).adaptors["clip"]
    with pytest.raises(radio_fast.CheckpointError, match=r"open_clip tiny-clip, .*evil\.bin.* can't be read"):
        adaptor.encode_text(adaptor.tokenizer("cat"))
    assert "executed" not in capsys.readouterr().out


def test_damaged_open_clip_file(with_teacher, tiny, tmp_path):
    (tmp_path / "cut.bin").write_bytes(tiny.files[towers.CLIP].read_bytes()[:5000])
    adaptor = with_teacher("clip", pretrained=str(tmp_path / "cut.bin")).adaptors["clip"]
    with pytest.raises(radio_fast.CheckpointError, match="can't be read"):
        adaptor.encode_text(adaptor.tokenizer("cat"))


@pytest.fixture
def own_cache(tiny, tmp_path, monkeypatch):
    """A copy of Hugging Face's cache, to break: the snapshot of the giant SigLIP 2 in it."""
    import huggingface_hub.constants as constants

    shutil.copytree(tiny.hub, tmp_path / "hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub" / tiny.repos[towers.GIANT].relative_to(tiny.hub)


def test_siglip2_with_a_tensor_missing(model, own_cache):
    from safetensors.torch import load_file, save_file

    state = load_file(own_cache / "model.safetensors")
    del state["text_model.head.weight"]
    save_file(state, own_cache / "model.safetensors", metadata={"format": "pt"})
    adaptor = model.adaptors["siglip2-g"]
    with pytest.raises(radio_fast.CheckpointError, match=r"text_model\.head\.weight is missing"):
        adaptor.encode_text(adaptor.tokenizer("cat"))


def test_siglip2_damaged(model, own_cache):
    file = own_cache / "model.safetensors"
    file.write_bytes(file.read_bytes()[:3000])
    adaptor = model.adaptors["siglip2-g"]
    with pytest.raises(radio_fast.CheckpointError, match=r"siglip2-giant.* can't be read"):
        adaptor.encode_text(adaptor.tokenizer("cat"))


def test_siglip2_pickles_are_not_read(model, own_cache):
    torch.save(Payload(), own_cache / "pytorch_model.bin")
    (own_cache / "model.safetensors").unlink()
    with pytest.raises(radio_fast.DownloadError, match=r"has no \*\.safetensors"):
        model.adaptors["siglip2-g"].encode_text(model.adaptors["siglip2-g"].tokenizer("cat"))


def test_siglip2_runs_no_code_of_the_repository(model, own_cache, tmp_path):
    (own_cache / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Config: pass\n")
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((own_cache / name).read_text())
        content["auto_map"] = {
            "AutoConfig": "evil.Config",
            "AutoModel": "evil.Config",
            "AutoTokenizer": ["evil.Config", None],
        }
        if name == "config.json":
            content["model_type"] = "unheard_of"
        (own_cache / name).write_text(json.dumps(content))
    adaptor = model.adaptors["siglip2-g"]
    with pytest.raises(radio_fast.CheckpointError, match="can't be read"):
        adaptor.encode_text(torch.zeros(1, 64, dtype=torch.int64))
    adaptor.tokenizer("cat")  # of the class it names beside, Transformers' own
    assert not (tmp_path / "executed").exists()


def test_siglip2_of_another_kind(model, own_cache):
    content = json.loads((own_cache / "config.json").read_text())
    content["model_type"] = "clip"
    (own_cache / "config.json").write_text(json.dumps(content))
    with pytest.raises(radio_fast.CheckpointError, match="of type 'clip', not one of 'siglip', 'siglip2'"):
        model.adaptors["siglip2-g"].encode_text(torch.zeros(1, 64, dtype=torch.int64))
