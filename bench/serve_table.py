"""The serving benchmark's JSON as a Markdown table beside it: `python -m bench.serve_table FILE.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def table(report: dict) -> str:
    machine = report["machine_info"]
    rows = {result["name"].removeprefix("test_"): result["extra_info"] for result in report["benchmarks"]}
    where = f"{machine['gpu'] or machine['cpu']['name']}, {machine['cpu']['cores']} cores"
    lines = [
        "# The Embedder and the HTTP server under load",
        "",
        f"{where}, torch {machine['torch']}, commit {report['commit_info']['id'][:12]}. Server, callers and bare model "
        "share the cores; JPEGs of one size, bfloat16, medians of interleaved rounds.",
        "",
    ]
    loads = {name: info for name, info in rows.items() if "loads" in info}
    if loads:
        lines += [
            "| model | model alone, images/s | Embedder | of it | HTTP, closed loop | of it |",
            "|---|---|---|---|---|---|",
        ]
    for name, info in loads.items():
        rate, share = info["images_per_s"], info["of_the_model"]
        cells = [f"{rate[who]:.1f} | {share[who]:.2f}" for who in ("Embedder", "HTTP")]
        lines.append(f"| {name} | {rate['model alone']:.1f} | {' | '.join(cells)} |")
    if loads:
        lines += [
            "",
            "Open loop, images arriving at random moments, at so many times the closed loop's rate; latencies of those",
            "that were taken:",
            "",
            "| model | load | images/s | p50, ms | p99, ms | answered 429 | p99 at 3 × / at 0.5 × |",
            "|---|---|---|---|---|---|---|",
        ]
    for name, info in loads.items():
        for share, seen in info["loads"].items():
            answers = seen["statuses"]
            refused = answers.get("429", 0) / sum(answers.values())
            last = f"{info['p99_at_3_over_at_half']:.2f}" if share == "3.0" else ""
            times = f"{seen['p50_ms']:.0f} | {seen['p99_ms']:.0f}"
            lines.append(f"| {name} | {share} × | {seen['images_per_s']:.1f} | {times} | {refused:.0%} | {last} |")
    soaks = {name: info for name, info in rows.items() if "growth" in info}
    if soaks:
        lines += [
            "",
            "Steady load of mixed sizes at 0.8 × the capacity; resident memory of the server:",
            "",
            "| model | seconds | images/s | after a fifth, MB | peak after it, MB | last / first tenth of that |",
            "|---|---|---|---|---|---|",
        ]
    for name, info in soaks.items():
        memory = f"{info['rss_settled'] / 1e6:.0f} | {info['rss_peak'] / 1e6:.0f} | {info['growth']:.3f}"
        lines.append(f"| {name} | {info['seconds']:.0f} | {info['images_per_s']:.1f} | {memory} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    text = table(json.loads(path.read_text()))
    path.with_suffix(".md").write_text(text)
    print(text)
