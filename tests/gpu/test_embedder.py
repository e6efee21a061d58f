"""An embedder on a GPU: images of several sizes, two batches under way at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import radio_fast
from radio_fast import Embedder
from tests.numerics import assert_tokens
from tests.serve.models import TIMEOUT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="an embedder on a GPU; this machine has none"),
]
SIZES = [(224, 224), (160, 320), (16, 16), (224, 224), (48, 80), (432, 272)]


def test_each_image_as_the_model_alone():
    model = radio_fast.load("radio_v2.5-b", random_init=True, dtype="bfloat16", device="cuda")
    truth = radio_fast.load("radio_v2.5-b", random_init=True, dtype="float32", device="cuda", backend="reference")
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (*SIZES[i % len(SIZES)], 3), np.uint8) for i in range(24)]
    with Embedder(model, resolution="native", max_tokens=500) as embedder:
        runner, under_way, most = embedder._engine._runner, [], []
        start = runner.start

        def counted(*args):
            finish = start(*args)
            under_way.append(finish)
            most.append(len(under_way))
            return lambda: (under_way.remove(finish), finish())[1]

        runner.start = counted
        futures = [embedder.submit(image, features=i % 3 > 0) for i, image in enumerate(images)]
        found = [future.result(TIMEOUT) for future in futures]
    assert max(most) == 2
    for i, (image, ours) in enumerate(zip(images, found, strict=True)):
        x = torch.from_numpy(image).permute(2, 0, 1)[None].cuda().float() / 255
        with torch.inference_mode():
            alone = truth(x)
        assert_tokens(ours.summary.view(-1, model.embed_dim), alone.summary[0].view(-1, model.embed_dim).cpu())
        assert ours.features is None if i % 3 == 0 else assert_tokens(ours.features, alone.features[0].cpu()) is None
