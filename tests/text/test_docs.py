"""docs/text.md does what it says, and docs/migrating.md names nothing that is not there."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

import radio_fast
from tests.conftest import golden_source

DOCS = Path(__file__).parents[2] / "docs"


def snippets(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_text_snippets_run(tiny, monkeypatch):
    """In order, in one namespace, as a reader types them; on tiny models in the released ones' place."""
    load, versions = radio_fast.load, []

    def tiny_load(version, **options):
        versions.append(version)
        return load(tiny.checkpoint, **options)

    monkeypatch.setattr(radio_fast, "load", tiny_load)
    namespace: dict = {}
    code = snippets("text.md")
    assert len(code) == 3
    for snippet in code:
        # The position table of the tiny model is for 256 pixels, and 512 would only take longer.
        exec(snippet.replace("512, 512", "64, 64"), namespace)
    assert set(versions) == {"c-radio_v3-h"} <= set(radio_fast.versions())
    assert namespace["probabilities"].shape == (2, 2)
    assert namespace["similarity"].shape == (2, 2) and namespace["similarity"].abs().max() <= 1


def table_rows() -> list[tuple[str, str]]:
    """(official, ours) of every row of the migration tables."""
    rows = []
    for line in (DOCS / "migrating.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 3 and set(cells[0]) - set("-") and cells[0] != "official":
            rows.append((cells[0], cells[1]))
    return rows


@pytest.mark.parametrize(("official", "ours"), table_rows(), ids=lambda cell: cell[:40])
def test_migration_names_what_is_there(official, ours):
    cells = f"{ours} {official}" if ours.startswith("the same") else ours
    vit = radio_fast.load(golden_source("vit_h16"), adaptor_names=["clip"])
    eradio = radio_fast.load(golden_source("eradio_small"))
    named = 0
    for path in re.findall(r"\bmodel\.((?:\w+\.)*\w+)", re.sub(r'\["clip"\]', ".clip", cells)):
        target = eradio if "E-RADIO" in official else vit
        for part in path.split("."):
            assert hasattr(target, part), f"there is no model.{path}"
            target = getattr(target, part)
        named += 1
    for name in re.findall(r"radio_fast\.(\w+)", ours):
        assert hasattr(radio_fast, name), f"there is no radio_fast.{name}"
        named += 1
    options = re.findall(r"load\([^)]*?(\w+)=", ours)
    options += re.findall(r"^`(\w+)=", official) if ours.startswith("the same") else []
    for name in options:
        assert name in inspect.signature(radio_fast.load).parameters, f"load has no {name}"
        named += 1
    assert named or "model(x" in cells or "model)" in cells or "cache folder" in ours, f"a row without a name: {ours}"


def test_the_tables_are_found():
    assert len(table_rows()) > 20


def test_what_migrating_says_of_weights():
    """No gradients, folded LayerScale, biases in float32."""
    model = radio_fast.load(golden_source("vit_l16_mixed_heads")).bfloat16()
    assert not any(p.requires_grad for p in model.parameters())
    assert not [key for key in model.state_dict() if "gamma" in key or "grandma" in key]
    kinds = {key.rpartition(".")[2]: p.dtype for key, p in model.model.blocks.named_parameters() if "qkv" in key}
    assert kinds == {"weight": torch.bfloat16, "bias": torch.float32}
    assert model.input_conditioner.norm_mean.dtype == torch.float32
