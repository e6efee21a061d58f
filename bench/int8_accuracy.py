"""How far int8 is from float32, beside bfloat16: python -m bench.int8_accuracy writes results/cpu/int8_accuracy.json.

On weights made like trained ones (`realistic`), there being none to download everywhere. The worst token of all images
counts.
"""

from __future__ import annotations

import json
import math
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import radio_fast
from bench.workload import MODELS
from radio_fast import RADIOModel
from radio_fast.models import int8

RESULT = Path(__file__).parent / "results" / "cpu" / "int8_accuracy.json"
CASES = (("ViT-B", 224), ("ViT-B", 512), ("ViT-L", 224), ("ViT-L", 512))
SEEDS, IMAGES = (0,), 2


def realistic(model: RADIOModel, seed: int) -> RADIOModel:
    """Give a float32 ViT of random weights what makes trained ones hard to quantise, in place.

    Weights are Student-t of 5 degrees of freedom, such that a block adds about a third of its input's size. LayerNorm
    weights are log-normal (σ 0.4), six channels of each 8 times larger; four channels of each bias are 2 larger. Four
    other channels of the residual stream are outliers: proj and fc2 write 4 times as much there and biases 10 times,
    positions are 4.5 larger. The prefix tokens begin with 20 times the usual values in these channels. fc1's bias is
    −0.5 in the mean, so that most hidden values are small and a few large.
    """
    generator = torch.Generator().manual_seed(seed)
    network = model.model
    D = network.embed_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def heavy(*shape: int) -> Tensor:
        return normal(*shape) / torch.sqrt(sum(normal(*shape) ** 2 for _ in range(5)) / 3)

    def some(count: int) -> Tensor:
        return torch.randperm(D, generator=generator)[:count]

    outliers = some(4)
    others = torch.ones(D, dtype=torch.bool).index_fill(0, outliers, False).nonzero().squeeze(1)
    for block in network.blocks:
        for norm in (block.norm1, block.norm2):
            norm.weight.data = torch.exp(0.4 * normal(D))
            norm.weight.data[others[torch.randperm(len(others), generator=generator)[:6]]] *= 8
            norm.bias.data = 0.2 * normal(D)
            norm.bias.data[some(4)] += 2
        for layer, std in (
            (block.attn.qkv, 0.03),
            (block.attn.proj, 0.015),
            (block.mlp.fc1, 0.03),
            (block.mlp.fc2, 0.015),
        ):
            layer.weight.data = std * heavy(*layer.weight.shape)
            layer.bias.data = 0.1 * heavy(*layer.bias.shape)
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.data[outliers] *= 4
            layer.bias.data[outliers] *= 10
        block.mlp.fc1.bias.data -= 0.5
    patches = network.patch_generator
    patches.embedder.weight.data *= 3
    patches.pos_embed.data = 0.5 * normal(*patches.pos_embed.shape)
    patches.pos_embed.data[..., outliers] += 4.5
    patches.cls_token.token.data = normal(*patches.cls_token.token.shape)
    patches.cls_token.token.data[:, outliers] *= 20
    return model


def images(count: int, side: int, seed: int) -> Tensor:
    """(count, 3, side, side) in [0, 1]: noise of all scales, the coarse ones strongest, as in photographs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(count, 3, side, side)
    for i, cells in enumerate((4, 16, 64, side)):
        noise = torch.rand(count, 3, cells, cells, generator=generator)
        x += F.interpolate(noise, size=(side, side), mode="bicubic") / math.sqrt(i + 1)
    return (x - x.min()) / (x.max() - x.min())


def compare(actual: Tensor, truth: Tensor) -> dict[str, float]:
    actual, truth = actual.double(), truth.double()
    return {
        "min_cosine": F.cosine_similarity(actual, truth, dim=-1).min().item(),
        "relative_error": ((actual - truth).norm(dim=-1) / truth.norm(dim=-1)).max().item(),
        "max_error": ((actual - truth).abs().max() / truth.abs().max()).item(),
    }


def in_dtype(model: RADIOModel, dtype: str) -> RADIOModel:
    """The float32 model as `load(…, dtype)` would have made it of its weights."""
    state = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    made = radio_fast.load(model.version.name, random_init=True, dtype="bfloat16")
    if dtype == "bfloat16":
        made.model.load_state_dict(state)
    else:
        int8.fill_int8(made.model, state)
    return made


def measure(name: str, side: int, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    model = realistic(radio_fast.load(MODELS[name], random_init=True, dtype="float32"), seed)
    x = images(IMAGES, side, seed)
    found = {}
    with torch.inference_mode():
        truth = model(x)
    for dtype in ("bfloat16", "int8"):
        with torch.no_grad():
            made = in_dtype(model, dtype)
            out = made(x.bfloat16())
        found[dtype] = {part: compare(getattr(out, part), getattr(truth, part)) for part in out._fields}
    return found


def main() -> None:
    results = []
    for name, side in CASES:
        for seed in SEEDS:
            found = measure(name, side, seed)
            results.append({"model": name, "pixels": side, "images": IMAGES, "seed": seed, **found})
            print(name, side, seed, {d: {p: round(v["min_cosine"], 5) for p, v in r.items()} for d, r in found.items()})
    cpu = next(line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    machine = {"cpu": cpu, "python": platform.python_version(), "torch": torch.__version__}
    document = {"machine": machine, "weights": realistic.__doc__, "results": results}
    RESULT.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    RESULT.with_suffix(".md").write_text(table(results, machine), encoding="utf-8")


def table(results: list[dict], machine: dict[str, str]) -> str:
    """The worst of all seeds of each size, as Markdown."""
    lines = [
        "# int8 and bfloat16 against float32",
        "",
        f"{machine['cpu']}, torch {machine['torch']}; {len(SEEDS)} network(s) of each size, {IMAGES} images each, by "
        "bench/int8_accuracy.py, whose `realistic` says how the weights were made.",
        "",
        "| model | pixels | least cosine of a token: bfloat16 | int8 | of a summary: bfloat16 | int8 "
        "| relative error of a token: bfloat16 | int8 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, side in CASES:
        of_size = [r for r in results if (r["model"], r["pixels"]) == (name, side)]

        def cosine(dtype: str, part: str, of_size: list[dict] = of_size) -> str:
            return f"{min(r[dtype][part]['min_cosine'] for r in of_size):.5f}"

        def error(dtype: str, of_size: list[dict] = of_size) -> str:
            return f"{max(r[dtype]['features']['relative_error'] for r in of_size):.3f}"

        cosines = [cosine(dtype, part) for part in ("features", "summary") for dtype in ("bfloat16", "int8")]
        lines.append(f"| {' | '.join([name, str(side), *cosines, error('bfloat16'), error('int8')])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
