"""Compile every kernel in every shipped configuration for every architecture, without a GPU, and say what came out.

`python -m bench.compile_report [--json FILE] [--markdown FILE] [--sm 80 90] [--op attention] [--all]`: registers,
spills, shared memory against the limit, tensor-core instructions and their share of the work asked for, and an estimate
of the blocks per SM. Two processes compile; Triton's own cache (by source hash) makes a second run short. Of each
configuration the case with the most products and pointers is compiled; `--all` takes every combination of flags.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from radio_fast.arch import ARCHS

MODULES = ("attention", "blend", "layer_norm", "linear", "patch_embed", "pos_embed", "window_attention")
ROW_WISE = ("blend", "layer_norm", "pos_embed")
TARGETS = (80, 86, 89, 90, 100, 120)
OLD_TARGETS = (70, 75)  # row-wise kernels only: Triton's dot has no tensor cores there
REGISTERS_PER_SM = 65536
# Most threads of a whole SM, where they are not 2048 (CUDA C++ programming guide, compute capabilities).
THREADS_PER_SM = {75: 1024, 86: 1536, 89: 1536, 120: 1536}


def modules_for(sm: int) -> tuple[str, ...]:
    return ROW_WISE if sm in OLD_TARGETS else MODULES


def cases_of(module: str, sm: int) -> list:
    return importlib.import_module(f"radio_fast.kernels.{module}").compile_cases(sm)


# What makes two cases the same configuration; they then differ in flags (bias, activation, window, …) alone.
TILES = re.compile(r"BLOCK|SPLIT$|N[123]$|D[12]$|PRECISION$|USE_TMA$|ONLINE$")


def configuration(case) -> tuple:
    tiles = tuple(sorted((name, str(value)) for name, value in case.constexprs.items() if TILES.match(name)))
    return case.op, tiles, case.num_warps, case.num_stages


def selected(cases: list, every_flag: bool) -> list[int]:
    """The numbers of the cases to compile: all, or of each configuration the one with most pointers and products."""
    if every_flag:
        return list(range(len(cases)))
    heaviest: dict[tuple, int] = {}
    for index, case in enumerate(cases):
        weight = (case.dot_macs, sum(kind.startswith("*") for kind in case.signature.values()))
        known = heaviest.get(configuration(case))
        if known is None or weight > (
            cases[known].dot_macs,
            sum(kind.startswith("*") for kind in cases[known].signature.values()),
        ):
            heaviest[configuration(case)] = index
    return sorted(heaviest.values())


def tensor_core_work(sass: str) -> tuple[int, int, int]:
    """(instructions, multiply-adds that HMMAs do per warp, multiply-adds that HGMMAs do per warp group)."""
    count = per_warp = per_group = 0
    for line in sass.splitlines():
        if match := re.search(r"\bHGMMA\.(\d+)x(\d+)x(\d+)\b", line):
            m, n, k = map(int, match.groups())
            count, per_group = count + 1, per_group + m * n * k
        elif match := re.search(r"\bHMMA\.(16816|1688|1684)\b", line):
            k = int(match[1][3:]) if match[1].startswith("168") else 0
            count, per_warp = count + 1, per_warp + 16 * 8 * k
        elif re.search(r"\bUTC\w*MMA\b", line):
            count += 1
    return count, per_warp, per_group


def blocks_per_sm(sm: int, registers: int, shared: int, num_warps: int) -> int:
    """How many blocks of the kernel one SM holds at a time, by registers, shared memory and threads."""
    arch = ARCHS[sm]
    by_registers = REGISTERS_PER_SM // max(-(-registers // 8) * 8 * 32 * num_warps, 1)
    by_shared = (arch.shared_memory + 1024) // (shared + 1024)  # the system keeps 1 KiB a block
    by_threads = THREADS_PER_SM.get(sm, 2048) // (32 * num_warps)
    return min(by_registers, by_shared, by_threads, 32)


def attributes(fn, signature: dict[str, str]) -> dict:
    """Divisibility by 16 as at run time: of pointers, as torch allocates them, and of RADIO's strides."""
    aligned = {}
    for i, (name, kind) in enumerate(signature.items()):
        stride = name.startswith("stride_") and kind.startswith("i") and not fn.params[i].do_not_specialize
        if kind.startswith("*") or stride:
            aligned[(i,)] = [["tt.divisibility", 16]]
    return aligned


def compile_case(task: tuple[str, int, int]) -> dict:
    """Compile the case number `index` of a module for one architecture; return its row of the report."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, sm, index = task
    case = cases_of(module, sm)[index]
    signature = {name: "constexpr" if name in case.constexprs else case.signature[name] for name in case.fn.arg_names}
    source = ASTSource(
        fn=case.fn,
        signature=signature,
        constexprs={(case.fn.arg_names.index(name),): value for name, value in case.constexprs.items()},
        attrs=attributes(case.fn, signature),
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    registers, stack, sass = disassemble(kernel.asm["cubin"], sm)
    count, per_warp, per_group = tensor_core_work(sass)
    # float32 by tf32x3 takes three products for one.
    wanted = case.dot_macs * (3 if case.constexprs.get("PRECISION") == "tf32x3" else 1)
    done = per_warp * case.num_warps + per_group * (case.num_warps // 4)
    return {
        "op": case.op,
        "case": case.label,
        "sm": sm,
        "warps": case.num_warps,
        "stages": case.num_stages,
        "registers": registers,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)) or stack,
        "stack": stack,
        "shared": kernel.metadata.shared,
        "shared_limit": ARCHS[sm].shared_memory,
        "dot": bool(case.dot_macs),
        "tensor_core": count,
        "share": round(wanted / done, 3) if done and wanted else None,
        "blocks_per_sm": blocks_per_sm(sm, registers, kernel.metadata.shared, case.num_warps),
    }


def disassemble(cubin: bytes, sm: int) -> tuple[int, int, str]:
    """(registers a thread, bytes of stack a thread, SASS) of a compiled kernel, by the tools in Triton's package.

    CUDA 13's tools can't disassemble sm_70; a spill shows there as stack.
    """
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    env = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        command = [tools / "cuobjdump", "-res-usage", *(["-sass"] if sm >= 75 else []), file.name]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"cuobjdump failed: {done.stderr.strip()}")
    registers, stack = (int(re.search(rf"{name}:(\d+)", done.stdout)[1]) for name in ("REG", "STACK"))
    return registers, stack, done.stdout


def problems(row: dict) -> list[str]:
    """What is wrong with a row, in words: a spill, too much shared memory, a matrix product off the tensor cores."""
    found = []
    if row["spills"]:
        found.append(f"{row['spills']} spills")
    if row["shared"] > row["shared_limit"]:
        found.append(f"{row['shared']} bytes of shared memory, limit {row['shared_limit']}")
    if row["dot"] and not row["tensor_core"]:
        found.append("no tensor-core instruction")
    return found


def report(targets: list[int], ops: list[str] | None = None, every_flag: bool = False) -> list[dict]:
    tasks = []
    for sm in targets:
        for module in modules_for(sm):
            cases = cases_of(module, sm)
            tasks += [(module, sm, i) for i in selected(cases, every_flag) if not ops or cases[i].op in ops]
    rows = []
    with ProcessPoolExecutor(max_workers=2) as pool:
        for i, row in enumerate(pool.map(compile_case, tasks)):
            rows.append(row)
            if sys.stderr.isatty():
                print(f"\r{i + 1}/{len(tasks)} compiled", end="", file=sys.stderr)
    return rows


def markdown(rows: list[dict]) -> str:
    import triton

    columns = {
        "op": "op", "case": "case", "sm": "sm", "warps": "warps", "stages": "stages", "registers": "registers",
        "spills": "spills", "shared": "shared memory", "tensor_core": "tensor-core instructions",
        "share": "share of work", "blocks_per_sm": "blocks per SM",
    }  # fmt: skip
    lines = [
        "# Compile report",
        "",
        f"Every kernel in every shipped configuration, compiled with Triton {triton.__version__} and no GPU, by",
        "`python -m bench.compile_report --markdown bench/results/compile_report.md`; of the flags (bias, activation,",
        "windows, …) the heaviest set for each configuration. Spills are LDL and STL instructions (sm_70: bytes of",
        "stack). Tensor-core instructions are counted in the disassembly (HMMA, HGMMA, UTC…MMA); the share of work",
        "is the multiply-adds that the kernel's products ask for, over those that its instructions do: below 1",
        "something is there twice, in a peeled iteration or as padding. tcgen05 instructions (sm_100) do not show",
        "their shape. Blocks per SM is an estimate.",
        "",
    ]
    worst = collections.Counter(problem for row in rows for problem in problems(row))
    lines += [f"{len(rows)} compilations, {sum(worst.values())} problems.", ""]
    lines += ["| " + " | ".join(columns.values()) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = dict(row)
        cells["shared"] = f"{row['shared'] / 1024:.0f} of {row['shared_limit'] // 1024} KiB"
        cells["share"] = "" if row["share"] is None else f"{row['share']:.2f}"
        lines.append("| " + " | ".join(str(cells[name]) for name in columns) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", type=int, nargs="+", choices=TARGETS + OLD_TARGETS, default=list(TARGETS + OLD_TARGETS))
    parser.add_argument("--op", nargs="+", help="only these ops")
    parser.add_argument("--all", action="store_true", help="every combination of flags, not the heaviest alone")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    options = parser.parse_args()
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # 3.9's default; unset it warns once a process
    if os.environ.pop("TRITON_INTERPRET", None) and "triton" in sys.modules:
        sys.exit("compile_report: unset TRITON_INTERPRET, interpreted kernels can't be compiled")
    rows = report(options.sm, options.op, options.all)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    text = markdown(rows)
    if options.markdown:
        options.markdown.write_text(text)
    else:
        print(text)
    bad = [(row, found) for row in rows if (found := problems(row))]
    for row, found in bad:
        print(f"{row['op']} {row['case']} sm_{row['sm']}: {', '.join(found)}", file=sys.stderr)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
