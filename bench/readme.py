"""README.md's performance section, from what lies under bench/results: `python -m bench.readme [--check]`.

It is the text between the two `performance` comments. `--check` writes nothing and fails if the section is not what the
results say. No number in it is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from bench.cpu_table import OURS, best_peer, lead
from bench.report import CHARTS, by_model, load, machine, number, ratio, table, targets_table
from bench.targets import measured, speedups, value_of
from bench.workload import LARGE_BATCH

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"
BEGIN = "<!-- performance: begin (python -m bench.readme writes this; do not edit) -->"
END = "<!-- performance: end -->"
NO_GPU = """\
**No GPU figure has been published yet.** `bash bench/gpu.sh` measures them: radio_fast against Transformers' model
(eager, and under torch.compile) and the official recipe, on the same weights in one process."""


def gpu_section(folder: Path, data: dict) -> list[str]:
    """One GPU: the targets, and images per second of large batches and latency of one image, with the leads."""
    run = data["runs"][-1]
    where = folder.relative_to(ROOT).as_posix() if folder.is_relative_to(ROOT) else folder.name
    lines = [f"### {run['gpu']}", "", f"{machine(run)}. Random weights, bfloat16, medians;", f"[all of it]({where})."]
    lines += ["", *targets_table(data), ""]
    over_compiled = speedups(data, "compiled", "compiled", lambda _: True)
    rows = []
    for case, result in by_model(measured(data, "cases", lambda r: r["batch"] in (1, LARGE_BATCH))):
        keys = ("latency", "ms") if result["batch"] == 1 else ("ms",)
        ours, *others = (value_of(result, name, *keys) for name in ("radio_fast", "eager", "official"))
        leads = [ratio(None if ours is None or other is None else other / ours) for other in others]
        rate = number(value_of(result, "radio_fast", "images_per_s"), 4)
        rows.append((case, rate, number(ours), *leads, ratio(over_compiled.get(case))))
    header = ("case", "images/s", "ms", "× eager", "× float32 under autocast", "× torch.compile max-autotune")
    lines += [*table(header, rows), ""]
    return lines + [f"![{title}]({where}/{name})" for name, title in CHARTS.items() if (folder / name).exists()]


def cpu_section(folder: Path) -> list[str]:
    """The results in pytest-benchmark's form that were taken on a CPU."""
    lines = []
    for file in sorted(folder.glob("*.json")):
        report = json.loads(file.read_text(encoding="utf-8"))
        if "benchmarks" not in report:  # of another script, with a table of its own
            continue
        cpu, commit = report["machine_info"]["cpu"], report["commit_info"]["id"][:12]
        where = file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else file.name
        rows = []
        for result in report["benchmarks"]:
            name, info = result["name"].removeprefix("test_"), result["extra_info"]
            if "cosine" in info:  # bench_cpu.py's: its own table has every contender
                ours = {dtype: info["times_ms"][who] for dtype, who in OURS.items() if who in info["times_ms"]}
                best = {"float32": best_peer(info, ("float32",)), "bfloat16": best_peer(info)}
                leads = [
                    f"{kind} {ratio(lead(info, kind, who))} × {who[0]}'s speed" for kind, who in best.items() if who
                ]
                times = ", ".join(f"{dtype} {number(ms)}" for dtype, ms in ours.items())
                rows.append((name, f"radio_fast {times} ms", ", ".join(leads)))
            elif "times_ms" in info:
                times = "; ".join(f"{contender}: {number(ms)}" for contender, ms in info["times_ms"].items())
                rows.append((name, f"{times} ms", f"{ratio(info['speedup_over_best_rival'])} × the best rival's speed"))
            elif "memory" in info:
                peaks = "; ".join(f"{who}: {number(m['peak'] / 1e6)}" for who, m in info["memory"].items())
                rows.append((name, f"peak {peaks} MB", f"{ratio(info['peak_ratio'])} of the official recipe's"))
            elif "ratio" in info:
                rows.append(
                    (name, f"peak {number(info['peak'] / 1e6)} MB", f"{ratio(info['ratio'])} of the model's own")
                )
        if rows:
            lines += ["", f"[{file.stem}]({where}): {cpu['name']}, {cpu['cores']} cores, torch "]
            lines[-1] += f"{report['machine_info']['torch']}, commit {commit}."
            lines += ["", *table(("case", "measured", ""), rows)]
            if file.with_suffix(".png").exists():
                lines += ["", f"![{file.stem}]({where.removesuffix('.json')}.png)"]
    return lines


def section(results: Path = RESULTS) -> str:
    """What the README says of speed, given what has been measured."""
    lines = ["## Performance", ""]
    found = [(path.parent, load(path.parent)) for path in sorted(results.glob("*/results.json"))]
    found = [(folder, data) for folder, data in found if not data["runs"][-1]["tiny"]]
    if not found:
        lines.append(NO_GPU)
    for folder, data in found:
        lines += [*gpu_section(folder, data), ""]
    cpu = cpu_section(results / "cpu")
    lines += ["", "### On a CPU", *cpu] if cpu else []
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def updated(readme: str, text: str) -> str:
    """The README with `text` between its markers.

    Raises:
        ValueError: the markers are not there, once each.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"README.md must have one line {BEGIN!r} and one {END!r}")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if the section is not up to date")
    options = parser.parse_args(arguments)
    before = README.read_text(encoding="utf-8")
    after = updated(before, section())
    if options.check:
        if before != after:
            print("README.md's performance section is out of date: python -m bench.readme", file=sys.stderr)
        return int(before != after)
    README.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
