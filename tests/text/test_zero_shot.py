"""Zero-shot classification: against open_clip's own classifier, and against its parts put together by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import radio_fast
from radio_fast import zeroshot
from tests.conftest import golden_source
from tests.numerics import assert_relative

LABELS = ["cat", "dog", "dolphin"]
TEMPLATES = ("a photo of a {}.", "the head of a {}", "{}")
SCALE = torch.tensor(2.5, dtype=torch.float64).exp().item()


@pytest.fixture
def images():
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_as_open_clip_classifies(model, tiny, images):
    teacher = tiny.teachers["clip"]
    rival = tiny.open_clip.create_model(teacher["model"], teacher["pretrained"]).eval()
    with torch.no_grad():
        classifier = tiny.open_clip.build_zero_shot_classifier(
            rival, tiny.open_clip.get_tokenizer(teacher["model"]), LABELS, [t.format for t in TEMPLATES]
        )
    expected = SCALE * F.normalize(model(images)["clip"].summary, dim=-1) @ classifier
    probabilities, logits = radio_fast.zero_shot(model, images, LABELS, TEMPLATES)
    assert_relative(logits, expected)
    assert_relative(probabilities, expected.softmax(-1))
    assert probabilities.shape == (3, 3)


@pytest.mark.parametrize(("adaptor", "bias"), [("clip", 0.0), ("siglip", -1.5), ("siglip2-g", -1.5)])
def test_by_hand(model, images, adaptor, bias):
    """One template, the default one: images and texts by the adaptor's own two halves."""
    head = model.adaptors[adaptor]
    t = head.encode_text(head.tokenizer([f"a photo of a {label}." for label in LABELS]), normalize=True)
    expected = SCALE * F.normalize(model(images)[adaptor].summary, dim=-1) @ t.T + bias
    result = radio_fast.zero_shot(model, images, LABELS, adaptor=adaptor)
    assert_relative(result.logits, expected)
    assert_relative(result.probabilities, expected.softmax(-1))
    if bias:
        result = radio_fast.zero_shot(model, images, LABELS, adaptor=adaptor, activation="sigmoid")
        assert_relative(result.probabilities, expected.sigmoid())


def test_autocast_is_for_the_model_alone(model, images):
    """Logits are the float32 product of what the model gave, not autocast's."""
    with torch.autocast("cpu", torch.bfloat16):
        summary = model(images)["clip"].summary
        probabilities, logits = radio_fast.zero_shot(model, images, LABELS)
    texts = next(reversed(model.adaptors["clip"].text.cache.values()))
    assert logits.dtype == probabilities.dtype == torch.float32
    assert_relative(logits, SCALE * F.normalize(summary.float(), dim=-1) @ texts.T)


def test_labels_in_use_stay_cached(model, images):
    cache = model.adaptors["clip"].text.cache
    cache.clear()
    for n in range(zeroshot.MAX_CACHED):
        radio_fast.zero_shot(model, images[:1], [f"label {n}"])
    kept = next(iter(cache.values()))
    radio_fast.zero_shot(model, images[:1], ["label 0"])
    radio_fast.zero_shot(model, images[:1], ["another"])
    assert any(value is kept for value in cache.values()), "the least recently used goes first"


def test_batches_change_nothing(model, images):
    expected = radio_fast.zero_shot(model, images, LABELS, TEMPLATES).logits
    for batch_size in (1, 2, 100):
        model.adaptors["clip"].text.cache.clear()
        assert_relative(radio_fast.zero_shot(model, images, LABELS, TEMPLATES, batch_size=batch_size).logits, expected)
    assert radio_fast.zero_shot(model, images[:0], LABELS).probabilities.shape == (0, 3)


@pytest.fixture
def encoded(model, monkeypatch):
    """How many texts each call of encode_text got."""
    counts, encode_text = [], type(model.adaptors["clip"]).encode_text

    def counting(self, tokens, normalize=False):
        counts.append(len(tokens))
        return encode_text(self, tokens, normalize)

    monkeypatch.setattr(type(model.adaptors["clip"]), "encode_text", counting)
    return counts


def test_texts_are_embedded_once(model, images, encoded):
    first = radio_fast.zero_shot(model, images, LABELS, TEMPLATES, batch_size=2).logits
    assert encoded == [2, 2, 2, 1, 1, 1]
    assert torch.equal(radio_fast.zero_shot(model, images, tuple(LABELS), list(TEMPLATES), batch_size=2).logits, first)
    assert len(encoded) == 6
    other = radio_fast.zero_shot(model, images, LABELS, TEMPLATES[:1]).logits
    assert encoded[6:] == [3] and not torch.allclose(other, first)
    radio_fast.zero_shot(model, images, LABELS[:2], TEMPLATES)
    radio_fast.zero_shot(model, images, LABELS, TEMPLATES, adaptor="siglip")
    assert encoded[7:] == [2, 2, 2, 3, 3, 3]


def test_few_sets_of_labels_are_kept(model, images, encoded):
    for i in range(20):
        radio_fast.zero_shot(model, images[:1], [str(i)])
    assert len(model.adaptors["clip"].text.cache) == zeroshot.MAX_CACHED
    radio_fast.zero_shot(model, images[:1], ["19"])
    assert len(encoded) == 20


def test_a_moved_model_embeds_anew(model, images, encoded):
    truth = radio_fast.zero_shot(model, images, LABELS)
    model.bfloat16()
    result = radio_fast.zero_shot(model, images, LABELS)
    assert len(encoded) == 2 and result.logits.dtype == torch.float32
    assert not torch.equal(result.logits, truth.logits)
    assert_relative(result.logits, truth.logits, 0.1)


def test_gradients_and_modes(model, images):
    """What inference mode or autocast has left in the cache must serve a later backward, and exactly."""
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        radio_fast.zero_shot(model, images, LABELS)
    kept = next(iter(model.adaptors["clip"].text.cache.values()))
    x = images.clone().requires_grad_()
    radio_fast.zero_shot(model, x, LABELS).probabilities[:, 0].sum().backward()
    assert x.grad.abs().max() > 0
    model.adaptors["clip"].text.cache.clear()
    radio_fast.zero_shot(model, images, LABELS)
    assert torch.equal(next(iter(model.adaptors["clip"].text.cache.values())), kept)


def test_braces_are_text(model, images):
    """str.format would trip over both."""
    result = radio_fast.zero_shot(model, images, ["{cat}", "{0}"], "{x} {}")
    head = model.adaptors["clip"]
    t = head.encode_text(head.tokenizer(["{x} {cat}", "{x} {0}"]), normalize=True)
    assert_relative(result.logits, SCALE * F.normalize(model(images)["clip"].summary, dim=-1) @ t.T)


@pytest.mark.parametrize("adaptors", [None, ["sam"]])
def test_a_model_without_text(images, adaptors):
    model = radio_fast.load(golden_source("vit_h16"), adaptor_names=adaptors)
    with pytest.raises(ValueError, match="no adaptor with text: load it with adaptor_names= one of clip, siglip"):
        radio_fast.zero_shot(model, images, LABELS)


def test_the_first_adaptor_with_text_is_taken(tiny, images):
    model = radio_fast.load(tiny.checkpoint, adaptor_names=["siglip", "clip"])
    result = radio_fast.zero_shot(model, images, LABELS).logits
    assert torch.equal(result, radio_fast.zero_shot(model, images, LABELS, adaptor="siglip").logits)
    assert not torch.allclose(result, radio_fast.zero_shot(model, images, LABELS, adaptor="clip").logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adaptor": "sam"}, "adaptor must be one with text, 'clip' or 'siglip' or .*, got 'sam'"),
        ({"labels": []}, "labels must be a list of at least one text"),
        ({"labels": "cat"}, "labels must be a list of at least one text"),
        ({"labels": ["cat", " "]}, "labels must be a list of at least one text, none of them empty"),
        ({"labels": ["cat", 3]}, "labels must be a list"),
        ({"templates": []}, "templates must be a list of at least one text"),
        ({"templates": ["a photo"]}, r"each template must have \{\} in the place of the label, got 'a photo'"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"activation": "relu"}, "activation must be one of 'softmax', 'sigmoid', got 'relu'"),
        ({"activation": "sigmoid"}, "adaptor 'clip' was trained for softmax"),
        ({"images": torch.zeros(3, 64, 64)}, "x must have 4 dimensions"),
        ({"images": "photo.jpg"}, "x must be a tensor"),
    ],
)
def test_wrong_arguments(model, images, options, message):
    with pytest.raises(ValueError, match=message):
        radio_fast.zero_shot(model, **{"images": images, "labels": LABELS, **options})
