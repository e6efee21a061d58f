"""Benchmarks' JSON as a Markdown table beside it: the rivals' times of each case, and ours over the best of them.

`python -m bench.table FILE.json`; `python -m bench.table --merge ALL.json FILE.json…` makes one of several first.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def merge(reports: list[dict]) -> dict:
    """One pytest-benchmark report of several that the same machine wrote one after the other.

    A later result takes the place of an earlier one of its name; of another commit than the first report's it says so.
    """
    first = reports[0]["commit_info"]["id"]
    results = {}
    for report in reports:
        commit = report["commit_info"]["id"]
        for result in report["benchmarks"]:
            known = {} if commit == first else {"commit": commit}
            results[result.get("fullname", result["name"])] = result | {
                "extra_info": result.get("extra_info", {}) | known
            }
    return reports[0] | {"benchmarks": list(results.values())}


def table(report: dict, title: str) -> str:
    machine = report["machine_info"]
    where = machine["gpu"] or f"{machine['cpu']['name']}, {machine['cpu']['cores']} cores"
    cases = {result["name"].removeprefix("test_"): result["extra_info"] for result in report["benchmarks"]}
    lines = [
        f"# {title}",
        "",
        f"{where}, torch {machine['torch']}, commit {report['commit_info']['id'][:12]}; medians of interleaved rounds.",
    ]
    timed = {name: info for name, info in cases.items() if "ours_tflops" in info}
    if timed:
        rivals = list(dict.fromkeys(rival for info in timed.values() for rival in info["times_ms"]))
        lines += ["", f"| case | {' | '.join(f'{r}, ms' for r in rivals)} | best rival / ours | TFLOP/s |"]
        lines.append("|---" * (len(rivals) + 3) + "|")
        for name, info in timed.items():
            times = [f"{info['times_ms'][rival]:.4g}" if rival in info["times_ms"] else "" for rival in rivals]
            ratio, rate = info["speedup_over_best_rival"], info["ours_tflops"]
            lines.append(f"| {name} | {' | '.join(times)} | {ratio:.2f} | {rate:.3g} |")
    measured = {name: info["memory"] for name, info in cases.items() if "memory" in info}
    if measured:
        rivals = list(next(iter(measured.values())))
        lines += ["", f"| case | {' | '.join(f'{r}: weights, peak, MB' for r in rivals)} |"]
        lines.append("|---" * (len(rivals) + 1) + "|")
        for name, memory in measured.items():
            cells = [f"{memory[r]['weights'] / 1e6:.0f}, {memory[r]['peak'] / 1e6:.0f}" for r in rivals]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--merge", type=Path, metavar="ALL.json", help="write the files' results here, then its table")
    options = parser.parse_args()
    files = options.files
    if options.merge:
        reports = [json.loads(path.read_text()) for path in files]
        options.merge.write_text(json.dumps(merge(reports), indent=1) + "\n")
        files = [options.merge]
    for path in files:
        text = table(json.loads(path.read_text()), path.stem)
        path.with_suffix(".md").write_text(text)
        print(text)
