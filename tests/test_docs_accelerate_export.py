"""The snippets of docs/accelerate.md, export.md and int8.md, run as they stand, with a small model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import radio_fast
from tests.conftest import golden_source

DOCS = Path(__file__).parent.parent / "docs"


def snippets(page: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.findall(r"(<!-- not run: .*? -->\n)?```python\n(.*?)```", text, re.DOTALL)
    return [code for skipped, code in found if not skipped]


@pytest.mark.parametrize(
    ("page", "count", "needs"),
    [("accelerate.md", 2, "transformers"), ("export.md", 3, "onnx"), ("int8.md", 1, "torch")],
)
def test_snippets(page, count, needs, tmp_path, monkeypatch):
    pytest.importorskip(needs)
    load = radio_fast.load

    def small(version, **options):
        assert version in radio_fast.versions()
        return load(golden_source("vit_h16"), **options)

    monkeypatch.setattr(radio_fast, "load", small)
    monkeypatch.chdir(tmp_path)
    codes = snippets(page)
    assert len(codes) == count
    names: dict[str, object] = {}
    for code in codes:
        exec(compile(code, page, "exec"), names)
