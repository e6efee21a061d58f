"""What the compiler made of the CUDA extension's kernels, for every architecture in its library; no GPU is needed.

`python -m bench.cuda_report [--json FILE] [--markdown FILE]` reads what the build left in build/csrc: ptxas's own words
on registers, stack and spills, and the tensor-core instructions in the disassembly.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.compile_report import blocks_per_sm
from radio_fast.arch import ARCHS

BUILD = Path(__file__).parent.parent / "build" / "csrc"
TARGETS = (70, 75, 80, 86, 89, 90, 100, 120)
THREADS, ROWS, WINDOW = 128, 64, 16  # of a block; E-RADIO's largest window
NO_DISASSEMBLY = (70, 72)  # CUDA 13's tools can't read their code
# m8n8k4 is there for sm_70; sm_80 and newer do it without tensor cores, where only RADIO_FAST_ARCH=70 asks for it.
SLOW_THERE = {"sm70": 80}


def shared_memory(source: str, dim: int) -> int:
    """Bytes a block asks for with a window of 16 × 16, as csrc/attention/params.h has it."""
    if source == "plain":
        return 4 * 96 * THREADS // 32 + 8 * WINDOW**2
    pitch = dim + 8
    queries = max(pitch, ROWS + 8) if source == "sm70" else pitch
    return 2 * ROWS * (queries + 2 * pitch) + 8 * WINDOW**2


def kernels_of(log: str) -> dict[str, dict]:
    """{kernel: registers, stack, spills} from ptxas -v."""
    found = {}
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    for name, stack, stores, loads, registers in re.findall(pattern, log, re.DOTALL):
        found[name] = {"registers": int(registers), "stack": int(stack), "spills": int(stores) + int(loads)}
    return found


def tensor_core_instructions(cubin: Path) -> dict[str, int]:
    """{kernel: HMMA instructions}; an m8n8k4 product is several of them."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    env = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"}
    done = subprocess.run([tools / "cuobjdump", "-sass", cubin], capture_output=True, text=True, env=env, check=True)
    counts, name = {}, ""
    for line in done.stdout.splitlines():
        if match := re.search(r"Function : (\w+)", line):
            name = match[1]
            counts[name] = 0
        elif re.search(r"\bHMMA\b", line):
            counts[name] += 1
    return counts


def rows_of(log: Path) -> list[dict]:
    sm, source = int(log.parent.name), log.stem
    counts = {} if sm in NO_DISASSEMBLY else tensor_core_instructions(log.with_suffix(".cubin"))
    rows = []
    for kernel, facts in kernels_of(log.read_text()).items():
        dim = int(match[1]) if (match := re.search(r"_(\d+)$", kernel)) else 0
        shared = shared_memory(source, dim)
        rows.append({
            "kernel": kernel, "sm": sm, "source": source, **facts, "shared": shared,
            "shared_limit": ARCHS[sm].shared_memory, "tensor_core": counts.get(kernel),
            "blocks_per_sm": blocks_per_sm(sm, facts["registers"], shared, THREADS // 32),
        })  # fmt: skip
    return rows


def problems(row: dict) -> list[str]:
    found = []
    if row["spills"] or row["stack"]:
        found.append(f"{row['spills']} bytes of spills, {row['stack']} of stack")
    if row["shared"] > row["shared_limit"]:
        found.append(f"{row['shared']} bytes of shared memory, limit {row['shared_limit']}")
    slow_from = SLOW_THERE.get(row["source"], 1 << 31)
    if row["source"] != "plain" and row["tensor_core"] == 0 and row["sm"] < slow_from:
        found.append("no tensor-core instruction")
    return found


def report(build: Path = BUILD) -> list[dict]:
    logs = sorted(build.glob("*/*.log"), key=lambda log: (int(log.parent.name), log.stem))
    with ThreadPoolExecutor(2) as pool:
        return [row for rows in pool.map(rows_of, logs) for row in rows]


def markdown(rows: list[dict]) -> str:
    bad = sum(bool(problems(row)) for row in rows)
    lines = [
        "# The CUDA extension's kernels, compiled",
        "",
        "By `python -m bench.cuda_report --markdown bench/results/cuda_report.md`, from the build's logs and cubins. A",
        "kernel's name says its path, dtype and head dimension (72 takes 80's). Spills and stack in bytes, by ptxas.",
        "Shared memory is that of a 16 × 16 window. Tensor-core instructions are HMMA in the disassembly, which there",
        "is no tool for on sm_70 (on sm_75 its path has them). That path is compiled for newer GPUs too, to be tested",
        "there by RADIO_FAST_ARCH=70; sm_80 and newer have no tensor-core form of its instruction, and are slow at it.",
        "Blocks per SM is an estimate.",
        "",
        f"{len(rows)} kernels, {bad} with a problem.",
        "",
        "| kernel | sm | registers | spills | stack | shared memory | tensor-core instructions | blocks per SM |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shared = f"{row['shared'] / 1024:.0f} of {row['shared_limit'] // 1024} KiB"
        count = "" if row["tensor_core"] is None else row["tensor_core"]
        cells = (row["kernel"], row["sm"], row["registers"], row["spills"], row["stack"], shared, count)
        lines.append(f"| {' | '.join(map(str, cells))} | {row['blocks_per_sm']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    options = parser.parse_args()
    rows = report()
    if not rows:
        sys.exit(f"cuda_report: nothing is built in {BUILD}; `python csrc/build.py` does")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(rows))
    else:
        print(markdown(rows))
    bad = [f"{row['kernel']} sm_{row['sm']}: {', '.join(found)}" for row in rows if (found := problems(row))]
    sys.exit("\n".join(bad) if bad else 0)


if __name__ == "__main__":
    main()
