"""The load benchmark's JSON as a Markdown table beside it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path


def table(report: dict) -> str:
    """One row a file: medians of the times, peak memory over the model's own bytes."""
    rows: dict[str, dict] = {}
    for result in report["benchmarks"]:
        file = re.search(r"\[(ViT-\S+?-float\d+)", result["name"])[1]
        row = rows.setdefault(file, {})
        if "ratio" in result["extra_info"]:
            row["ratio"] = result["extra_info"]["ratio"]
        else:
            row["torch" if "torch.load" in result["name"] else "ours"] = result["stats"]["median"]
        row["bytes"] = result["extra_info"]["file_bytes"]
    machine = report["machine_info"]
    lines = [
        "# Cold load of a checkpoint file",
        "",
        f"{machine['cpu']['name']}, {machine['cpu']['cores']} cores, torch {machine['torch']}, commit "
        f"{report['commit_info']['id'][:12]}; medians of 5 rounds, the file dropped from the page cache before each.",
        "",
        "| file | MB | radio_fast.load, s | torch.load alone, s | ratio | peak memory / model |",
        "|---|---|---|---|---|---|",
    ]
    for file, row in rows.items():
        model, stored = file.rsplit("-", 1)
        lines.append(
            f"| {model}, stored as {stored} | {row['bytes'] / 1e6:.0f} | {row['ours']:.2f} | {row['torch']:.2f} "
            f"| {row['ours'] / row['torch']:.2f} | {row['ratio']:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    text = table(json.loads(path.read_text()))
    path.with_suffix(".md").write_text(text)
    print(text)
