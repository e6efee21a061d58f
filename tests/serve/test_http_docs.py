"""The snippets of docs/serving.md on HTTP run as they stand, against a server with a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import radio_fast
from radio_fast.models.registry import ARCHS, VERSIONS
from radio_fast.serve.embedder import Embedder
from radio_fast.serve.server import ERRORS
from tests.conftest import golden_source
from tests.serve.live import picture, serving

TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
SECTION = re.search(r"^## Over HTTP$.*?(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)[0]
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)


def test_snippets(tmp_path, monkeypatch, capsys):
    for name, kind in (("photo.jpg", "JPEG"), ("a.jpg", "JPEG"), ("b.png", "PNG")):
        (tmp_path / name).write_bytes(picture(kind=kind))
    monkeypatch.chdir(tmp_path)
    model, made = radio_fast.load(golden_source("vit_h16")), []
    monkeypatch.setattr(radio_fast, "load", lambda version, **options: made.append(version) or model)
    assert len(SNIPPETS) == 3
    embedder = Embedder(model, max_tokens=1024, resolution=64)
    with embedder, serving(embedder, model_name="c-radio_v4-h") as running:
        for snippet in SNIPPETS:
            names: dict = {}
            exec(snippet.replace("http://127.0.0.1:8000", running.url), names)
            if "embedding" in names:
                assert len(names["embedding"]) == model.summary_dim
    assert capsys.readouterr().out == f"({model.summary_dim},) (32, 32, {model.embed_dim})\n"
    assert not made
    assert names["app"].state.service.model_name == "c-radio_v4-h"
    names["load"]().close()
    assert made == ["c-radio_v4-h"]


def test_the_table_of_statuses():
    table = {int(status) for row in re.findall(r"^\| ([\d, ]+) \|", SECTION, re.MULTILINE) for status in row.split(",")}
    assert table == {200, 405, *ERRORS}


def test_the_numbers_are_the_models_own():
    version = VERSIONS["c-radio_v4-h"]
    width = ARCHS[version.arch].embed_dim
    summary = len(version.prefix[2]) * width
    assert f"# {summary} numbers" in SECTION and f"# ({summary},) (32, 32, {width})" in SECTION
