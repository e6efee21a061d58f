"""House rules that a reader could otherwise only hope for."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "radio_fast"

# Imports go from a higher rank to a lower or equal one.
RANKS = {
    "errors": 0, "version": 0, "arch": 0, "paths": 0, "kernels": 0, "native": 0, "native_cpu": 0,
    "ops": 1, "layers": 2, "models": 3, "model": 4,
    "runtime": 5, "graphs": 5, "download": 5, "checkpoint": 5, "folder": 6, "api": 7, "adopt": 7, "export": 7,
    "zeroshot": 7, "__init__": 8, "images": 8, "hf": 8, "doctor": 8, "tune": 8, "cli_common": 8, "cli_export": 8,
    "serve": 8, "cli_ops": 9, "cli_serve": 9, "cli": 9,
}  # fmt: skip


def top(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports_of(path: Path) -> list[str]:
    """The parts of radio_fast that a file imports."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] == "radio_fast"]
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "radio_fast":
            if node.module == "radio_fast":
                found += [f"radio_fast.{a.name}" if (PACKAGE / a.name).exists() or
                          (PACKAGE / f"{a.name}.py").exists() else "radio_fast" for a in node.names]  # fmt: skip
            else:
                found.append(node.module)
    return [top(name) for name in found]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for imported in imports_of(path):
        assert RANKS[imported] <= RANKS[own], f"{path.name} ({own}) imports {imported}, which stands above it"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_readable(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_kernels_is_no_top_level_package():
    """Transformers imports a package of that name; ours must never be found in its place."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_ptx_is_in_one_file():
    """Every instruction is wrapped once, where the host emulation can take its place."""
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cu", ".cuh", ".cc", ".cpp", ".h")]
    assert {path.name for path in sources if re.search(r"\basm\b", path.read_text(encoding="utf-8"))} == {"mma.cuh"}
    assert all(len(path.read_text(encoding="utf-8").splitlines()) <= 600 for path in sources)
    assert not any("torch" in line for path in sources for line in path.read_text().splitlines() if "#include" in line)


def test_import_has_no_side_effects():
    """Importing changes no torch setting, starts no CUDA context and needs none of the extras."""
    code = """
import sys, torch
before = (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
          torch.backends.cuda.matmul.allow_tf32, torch.random.get_rng_state().sum())
import radio_fast
after = (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
         torch.backends.cuda.matmul.allow_tf32, torch.random.get_rng_state().sum())
assert before == after, (before, after)
assert not torch.cuda.is_initialized()
extras = {"typer", "rich", "PIL", "transformers", "open_clip", "onnx", "onnxscript", "onnxruntime",
          "fastapi", "uvicorn", "prometheus_client", "ray"}
loaded = extras & set(sys.modules)
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)
