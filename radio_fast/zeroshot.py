"""Zero-shot classification with an adaptor's two halves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from radio_fast.model import RADIOModel, check_choice
from radio_fast.models.adaptors import TextAdaptor
from radio_fast.models.text import normalized

MAX_CACHED = 8  # sets of labels an adaptor remembers


class ZeroShot(NamedTuple):
    """(B, L) each: B images, L labels."""

    probabilities: Tensor
    logits: Tensor


def zero_shot(
    model: RADIOModel,
    images: Tensor,
    labels: Sequence[str],
    templates: str | Sequence[str] = ("a photo of a {}.",),
    adaptor: str | None = None,
    batch_size: int = 64,
    activation: str = "softmax",
) -> ZeroShot:
    """How well each label fits each image (Radford et al., 2021).

    logits = s·(x/|x|)·t + b, x the adaptor's summary, t a label's text embedding, s and b the text tower's logit scale
    and bias (0 where it has none). t is the mean of the normalised embeddings of the label in all templates, itself
    normalised. All in float32. The t of the latest sets of labels and templates are kept.

    Args:
        model: loaded with at least one adaptor that has text: clip, siglip or siglip2-g.
        images: (B, 3, H, W), as the model takes them.
        labels: L names, such as ["cat", "dog"].
        templates: one or more texts with {} in the place of the label.
        adaptor: its name; the model's first one that has text if None.
        batch_size: how many images, and how many texts, are computed at once.
        activation: what makes probabilities of the logits. "softmax": one label of those given is right, whatever the
            tower; "sigmoid": each label is right or wrong by itself, for towers trained so (SigLIP).

    Raises:
        ValueError: an argument is off; the message names what is legal.
        ImportError, DownloadError, CheckpointError: as for `TextAdaptor.tokenizer`.
    """
    name, head = _text_adaptor(model, adaptor)
    labels = _texts("labels", labels)
    templates = _texts("templates", [templates] if isinstance(templates, str) else templates)
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"each template must have {{}} in the place of the label, got {template!r}")
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
    check_choice("activation", activation, ("softmax", "sigmoid"))
    if not isinstance(images, Tensor) or images.ndim != 4:
        model._check_image(images)

    own = next(head.head_mlp.parameters())
    tower = head.text.load(own.device, own.dtype)
    if activation == "sigmoid" and tower.logit_bias is None:
        raise ValueError(f"adaptor {name!r} was trained for softmax: activation='sigmoid' needs siglip or siglip2-g")
    texts = _label_embeddings(head, labels, templates, batch_size)
    # An empty batch is one too.
    summary = torch.cat([model(part)[name].summary for part in images.split(batch_size)])
    with torch.autocast(summary.device.type, enabled=False):
        logits = tower.logit_scale * normalized(summary.float()) @ texts.to(summary.device).T
        logits = logits + (tower.logit_bias or 0.0)
    return ZeroShot(logits.softmax(dim=-1) if activation == "softmax" else logits.sigmoid(), logits)


def _text_adaptor(model: RADIOModel, adaptor: str | None) -> tuple[str, TextAdaptor]:
    having = {name: head for name, head in model.adaptors.items() if isinstance(head, TextAdaptor)}
    if not having:
        raise ValueError(
            "the model has no adaptor with text: load it with adaptor_names= one of clip, siglip and siglip2-g, as far "
            "as the version has them"
        )
    name = next(iter(having)) if adaptor is None else adaptor
    if name not in having:
        raise ValueError(f"adaptor must be one with text, {' or '.join(map(repr, having))}, got {adaptor!r}")
    return name, having[name]


def _texts(name: str, texts: Sequence[str]) -> tuple[str, ...]:
    given = None if isinstance(texts, str) else tuple(texts)
    if not given or not all(isinstance(text, str) and text.strip() for text in given):
        raise ValueError(f"{name} must be a list of at least one text, none of them empty, got {texts!r}")
    return given


def _label_embeddings(
    head: TextAdaptor, labels: tuple[str, ...], templates: tuple[str, ...], batch_size: int
) -> Tensor:
    """(L, S), float32, normalised."""
    cache, key = head.text.cache, (labels, templates)
    found = cache.get(key)
    if found is None:
        device = next(head.head_mlp.parameters()).device
        # What is kept must not depend on the modes of the call that happened to be first.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            parts = []
            for start in range(0, len(labels), batch_size):
                part = labels[start : start + batch_size]
                means = sum(
                    head.encode_text(head.tokenizer([template.replace("{}", label) for label in part]), normalize=True)
                    for template in templates
                )
                parts.append(normalized(means / len(templates)))
            found = torch.cat(parts)
        cache[key] = found
        while len(cache) > MAX_CACHED:
            cache.popitem(last=False)
    else:
        cache.move_to_end(key)
    return found
