"""What is measured: models, image sides in pixels, batches; in which order; and how much arithmetic each needs."""

from __future__ import annotations

from typing import NamedTuple

SIDES = (224, 432, 512, 1024)
ERADIO_SIDES = (224, 512)
SCALING_SIDES = (224, 320, 432, 512, 768, 1024, 1536, 2048)  # how time grows, ViT-L
BATCHES = (1, 8, 64)
LARGE_BATCH = 64  # from here on throughput counts, and issue 6's targets for it
LARGEST = (224, 256)  # side and batch: one more batch at the smallest side
ATTENTION_BATCH = 32

MODELS = {
    "ViT-B": "c-radio_v3-b",
    "ViT-L": "c-radio_v3-l",
    "ViT-H": "c-radio_v4-h",
    "E-RADIO": "e-radio_v2",
}
CONTENDERS = {
    "radio_fast": "radio_fast",
    "eager": "eager bf16",
    "official": "float32 under autocast",
    "compiled": "torch.compile max-autotune",
}
VITS = tuple(name for name in MODELS if name != "E-RADIO")


class Case(NamedTuple):
    """A model, the side of its square images in pixels, and how many of them are in one call."""

    model: str
    pixels: int
    batch: int

    @property
    def id(self) -> str:
        return f"{self.model}-{self.pixels}px-b{self.batch}"


class Step(NamedTuple):
    """One thing to measure. `kind` is the part of the results that it goes into:

    cases: time, rate and latency of the rivals that need no compiling; compiled: the same with torch.compile's
    max-autotune; ops: where the time of one forward pass goes; attention: that op alone against SDPA; memory: peaks.
    """

    kind: str
    case: Case

    @property
    def id(self) -> str:
        return f"{self.kind}/{self.case.id}"


def grid() -> list[Case]:
    """Every case that issue 6's targets speak of."""
    out = [Case(model, side, batch) for model in VITS for side in SIDES for batch in BATCHES]
    out += [Case(model, *LARGEST) for model in VITS]
    return out + [Case("E-RADIO", side, batch) for side in ERADIO_SIDES for batch in BATCHES]


def scaling() -> list[Case]:
    return [Case("ViT-L", side, 1) for side in SCALING_SIDES]


def in_order(cases: list[Case]) -> list[Case]:
    """What most people run first: 224 pixels, batches of 64, then 1; large images last, they take the longest."""
    sides, batches = (224, 512, 432, 1024), (64, 1, 8, 256)
    models = ("ViT-H", "ViT-L", "E-RADIO", "ViT-B")
    return sorted(cases, key=lambda c: (sides.index(c.pixels), batches.index(c.batch), models.index(c.model)))


def plan(mode: str) -> list[Step]:
    """The steps of a run, the most important ones first: a budget cuts off the end.

    "default": everything, with torch.compile (minutes a case) where the targets need it most; "quick": the same without
    torch.compile; "compiled": torch.compile on every other case.
    """
    cases = in_order(grid())
    if mode == "compiled":
        large = [case for case in cases if case.batch >= LARGE_BATCH or case.model == "E-RADIO"]
        return [Step("compiled", case) for case in dict.fromkeys(large + cases)]
    steps = [Step("cases", case) for case in cases]
    first = [step for step in steps if step.case.pixels == 224 and step.case.batch in (64, 1)]
    first += [Step("ops", Case("ViT-H", 224, batch)) for batch in (LARGE_BATCH, 1)]
    first += [Step("attention", Case("ViT-H", side, ATTENTION_BATCH)) for side in SIDES[:3]]
    first += [Step("memory", Case("ViT-H", 224, LARGE_BATCH))]
    first += [Step("compiled", Case("ViT-H", 224, LARGE_BATCH))]
    first += [Step("cases", case) for case in scaling()]
    first += [step for step in steps if step.case.pixels < 1024 and step.case.batch in (64, 1)]
    first += [Step("ops", Case(model, 224, LARGE_BATCH)) for model in ("ViT-L", "ViT-B", "E-RADIO")]
    first += [Step("ops", Case("ViT-H", 512, LARGE_BATCH)), Step("memory", Case("E-RADIO", 224, LARGE_BATCH))]
    first += [Step("compiled", Case(model, 224, LARGE_BATCH)) for model in ("E-RADIO", "ViT-L", "ViT-B")]
    first += [Step("memory", Case("ViT-L", 224, LARGE_BATCH))]
    return [step for step in dict.fromkeys(first + steps) if mode == "default" or step.kind != "compiled"]


# -- arithmetic -----------------------------------------------------------------------------------------------


def tokens(spec, pixels: int) -> int:
    """N = P + (side / p)² of a ViT."""
    return spec.num_prefix + (pixels // spec.patch_size) ** 2


def vit_flop(spec, pixels: int) -> tuple[int, int]:
    """(matrix products, attention) of one image, in FLOP, a multiply-add counted as two.

    2·T·3p²·D + L·N·2·(3D² + D² + 2·D·hidden), and L·4·N²·D; element-wise work is not counted.
    """
    N, D = tokens(spec, pixels), spec.embed_dim
    patches = 2 * (N - spec.num_prefix) * 3 * spec.patch_size**2 * D
    block = 2 * N * (4 * D * D + 2 * D * spec.mlp_hidden)
    return patches + spec.depth * block, spec.depth * 4 * N * N * D


def vit_activations(spec, pixels: int) -> int:
    """Values of one image's tokens that must be in memory at once, N·max(5·D, 2·D + hidden).

    In attention: the residual stream, q, k and v, the result. In the MLP: the stream, the hidden values, and first what
    they are made of, then what is made of them.
    """
    D = spec.embed_dim
    return tokens(spec, pixels) * max(5 * D, 2 * D + spec.mlp_hidden)


def eradio_activations(spec, pixels: int) -> int:
    """The same of E-RADIO's maps: the largest of its parts, each with the maps that the neck waits for.

    Stem: what its two convolutions give. C2f of n bottlenecks, width c, at T positions: T·2·(2 + n)·c, the parts and
    the map they are put together in. Attention: T·(3·D + hidden), a block's input, its residual stream, normed and
    hidden values. Neck, at T positions: T·(2·D + F), a map repeated and convolved, and the sum so far.
    """
    first, second = (conv.out_channels for conv in spec.stem)
    largest, kept = (pixels // 2) ** 2 * first + (pixels // 4) ** 2 * second, 0
    for i, level in enumerate(spec.levels):
        positions = (pixels // (4 << i)) ** 2
        wide = [3 * block.dim + block.mlp_hidden for chain in level.chains for block in chain]
        width = 2 * (2 + len(level.c2f)) * level.c2f_width if level.c2f_width else max(wide, default=2 * level.dim)
        largest = max(largest, kept + positions * width)
        if i >= len(spec.levels) - len(spec.neck_dims):
            kept += positions * level.dim
    positions = (pixels // spec.patch_size) ** 2
    return max(largest, kept + positions * (2 * max(spec.neck_dims) + spec.embed_dim))


def activations(spec, case: Case, dtype: str) -> int:
    """Bytes of activations that a call needs at once: its float32 images, and of each what the two above say.

    In int8 only what goes into a product is quantised; what is kept between the ops is bfloat16.
    """
    values = eradio_activations(spec, case.pixels) if hasattr(spec, "levels") else vit_activations(spec, case.pixels)
    return case.batch * (4 * 3 * case.pixels**2 + (4 if dtype == "float32" else 2) * values)


class Floor(NamedTuple):
    """The least that one op of a ViT block has to do: FLOP, and bytes read or written once each."""

    flop: int
    moved: int


def block_floors(spec, case: Case, bytes_per_value: int = 2) -> dict[str, Floor]:
    """{op: floor} of one block at this case.

    Weights and activations of `bytes_per_value`. Two norms, of which the second adds the residual too; proj and fc2 add
    theirs in the same pass: what seven launches a block come to.
    """
    N = tokens(spec, case.pixels)
    D, hidden, rows = spec.embed_dim, spec.mlp_hidden, case.batch * N
    products = {"qkv": (D, 3 * D, 0), "proj": (D, D, 0), "fc1": (D, hidden, 0), "fc2": (hidden, D, D)}
    floors = {
        name: Floor(2 * rows * inner * out, bytes_per_value * (rows * (inner + out + added) + inner * out))
        for name, (inner, out, added) in products.items()
    }
    floors["attention"] = Floor(4 * case.batch * N * N * D, bytes_per_value * 4 * rows * D)
    floors["norm"] = Floor(0, bytes_per_value * 6 * rows * D)
    return floors


def tiny(steps: list[Step]) -> list[Step]:
    """The same steps at a size for the CPU, each once."""
    batches = {1: 1, 8: 2, 32: 3, 64: 4, 256: 5}
    small = [
        Step(kind, Case(model, max(32, pixels // 128 * 32), batches[batch])) for kind, (model, pixels, batch) in steps
    ]
    return list(dict.fromkeys(small))
