"""results.json: what was measured on one machine, by which code; written anew after each step, so nothing is lost.

{"runs": [environment and ceilings of each], "results": {kind: {case: {…, "run": index}}}, "not_measured": {step: why}}
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from bench.conftest import cpu_name

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("radio_fast", "kernels", "csrc")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, cwd=ROOT)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def sources_digest() -> str:
    """A hash of the library's sources: says what was measured also where there is no git."""
    files = {path for folder in SOURCES for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cu", ".cuh")}
    files |= {path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cc")}
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def environment() -> dict:
    """The machine and the versions: no date, host name or path. RADIO_FAST_COMMIT stands in where git is missing."""
    dirty = _output("git", "status", "--porcelain", "--untracked-files=no")
    out = {
        "gpu": None,
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "commit": _output("git", "rev-parse", "HEAD") or os.environ.get("RADIO_FAST_COMMIT"),
        "dirty": None if dirty is None else bool(dirty),
        "sources": sources_digest(),
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        out |= {"gpu": gpu.name, "sm": 10 * gpu.major + gpu.minor, "memory_gib": round(gpu.total_memory / 2**30)}
        out |= {"driver": driver, "cudnn": torch.backends.cudnn.version()}
    return out


def slug(gpu: str) -> str:
    """The folder for a GPU's results: "NVIDIA H200" → nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def brief(error: BaseException, longest: int = 240) -> str:
    """An error as one line without paths."""
    text = " ".join(str(error).split()) or "no message"
    text = re.sub(r"(?<![\w.])(?:/[\w.+-]+){2,}", lambda path: "…/" + path[0].rsplit("/", 1)[-1], text)
    return f"{type(error).__name__}: {text}"[:longest]


class Record:
    """The results in a file. `keep`: go on with what the file has, if it is of the same GPU."""

    def __init__(self, path: Path, run: dict, keep: bool = False):
        self.path = path
        self.data: dict = {"runs": [], "results": {}, "not_measured": {}}
        if keep and path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            if before["runs"] and before["runs"][-1]["gpu"] == run["gpu"]:
                self.data = before | {"not_measured": {}}
        self.data["runs"].append(run)
        self.save()

    def has(self, kind: str, case: str) -> bool:
        """Whether it was measured, with these very sources and without an error."""
        found = self.data["results"].get(kind, {}).get(case)
        if found is None or "error" in found:
            return False
        runs = self.data["runs"]
        return runs[found["run"]]["sources"] == runs[-1]["sources"]

    def put(self, kind: str, case: str, result: dict) -> None:
        results = self.data["results"].setdefault(kind, {})
        results[case] = result | {"run": len(self.data["runs"]) - 1}
        self.save()

    def save(self) -> None:
        """Written beside and moved over: a killed run leaves the file before or the file after."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(self.path)
