"""The snippets of docs/serving.md's part on the embedder run as they stand, with a small model for the named one."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import radio_fast
from radio_fast.images import ImageError
from tests.conftest import golden_source

ROOT = Path(__file__).resolve().parents[2]


def test_snippets_in_process(tmp_path, monkeypatch, capsys):
    load = radio_fast.load

    def small(version, **options):
        assert version in radio_fast.versions()
        model = load(golden_source("vit_h16"), **options)
        model.set_resolutions(None, (64, 64))
        return model

    monkeypatch.setattr(radio_fast, "load", small)
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "examples" / "images" / "coffee.jpg", "photo.jpg")
    Path("broken.jpg").write_bytes(Path("photo.jpg").read_bytes()[:3000])
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    part = re.search(r"^## In process$(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)[1]
    codes = re.findall(r"```python\n(.*?)```", part, re.DOTALL)
    assert len(codes) == part.count("```python") == 5
    names: dict[str, object] = {}
    for code in codes:
        exec(compile(code, "serving.md", "exec"), names)
    said = capsys.readouterr().out
    assert (
        "torch.Size([16, 160]) (4, 4) Timings(" in said and "broken.jpg: " in said and "9 8 {'image': 1} {} 0" in said
    )
    assert names["embedder"].closed and issubclass(ImageError, ValueError)


def test_readme_names_the_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "(docs/serving.md)" in readme and "radio_fast.Embedder(" in readme
