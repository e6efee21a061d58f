"""The CPU benchmark's JSON as a Markdown table and a chart beside it: `python -m bench.cpu_table FILE.json`.

Every number is computed from the file; the targets are held against it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench.report import number, ratio, table, targets_table
from bench.targets import Target, Value
from bench.workload import Case
from tests.numerics import MIN_COSINE

CELLS = tuple(Case(model, side, batch) for model in ("ViT-B", "ViT-L") for side in (224, 512) for batch in (1, 8))
CELLS += tuple(Case("E-RADIO", side, 1) for side in (224, 512))
MORE_CELLS = tuple(Case("E-RADIO", side, 8) for side in (224, 512))
# Contenders by the precision that they compute in.
OURS = {"float32": "radio_fast float32", "bfloat16": "radio_fast bfloat16", "int8": "radio_fast int8"}
PEERS = {
    "float32": ("official float32", "torch.compile float32", "OpenVINO f32", "onnxruntime f32"),
    "bfloat16": ("official autocast", "torch.compile autocast", "OpenVINO bf16"),
}
CONTENDERS = (*OURS.values(), *PEERS["bfloat16"], *PEERS["float32"])
INT8_COSINE = 0.995
RSS_FACTOR = 1.3
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


# -- what the results say -------------------------------------------------------------------------------------


def cases(report: dict, key: str) -> dict[str, dict]:
    """{case: what was measured} of the benchmarks that have `key`: "times_ms" or "rss"."""
    infos = [result["extra_info"] for result in report["benchmarks"] if key in result.get("extra_info", {})]
    return {Case(i["model"], i["pixels"], i["batch"]).id + (f"-{i['dtype']}" if key == "rss" else ""): i for i in infos}


def right(info: dict, contender: str) -> bool:
    """Whether its numbers are: the worst token's cosine with official float32."""
    needed = INT8_COSINE if contender == OURS["int8"] else MIN_COSINE
    return info["cosine"].get(contender, 0.0) >= needed


def time_of(info: dict, contender: str) -> Value:
    """Milliseconds; None where it was left out or its numbers are wrong."""
    return info["times_ms"].get(contender) if right(info, contender) else None


def best_peer(info: dict, precisions: tuple[str, ...] = tuple(PEERS)) -> tuple[str, float] | None:
    """(name, ms) of the fastest peer that computes in one of the precisions and is right."""
    names = [name for precision in precisions for name in PEERS[precision]]
    found = [(name, ms) for name in names if (ms := time_of(info, name)) is not None]
    return min(found, key=lambda item: item[1], default=None)


def lead(info: dict, dtype: str, other: tuple[str, float] | None) -> Value:
    ours = time_of(info, OURS[dtype])
    return None if ours is None or other is None else other[1] / ours


def floor_ms(info: dict, dtype: str) -> float:
    """FLOP of a call / the rate of a large torch.mm in that dtype, timed in the same rounds."""
    return info["flop"] / info["matmul_tflops"][dtype] / 1e9


def rss_bound(info: dict) -> float:
    """Bytes: weights in the dtype, and 1.3 × `workload.activations`."""
    return info["rss"]["values"] * BYTES[info["dtype"]] + RSS_FACTOR * info["rss"]["activations"]


def _leads(report: dict, dtype: str, other: Callable[[dict], tuple[str, float] | None]) -> dict[str, Value]:
    """Cells in which load() refuses the dtype do not count, nor those without another to compare; a failure is None."""
    out = {}
    for name, info in cases(report, "times_ms").items():
        refused = info["left_out"].get(OURS[dtype], "").startswith("ValueError: dtype")
        if not refused and other(info) is not None:
            out[name] = lead(info, dtype, other(info))
    return out


def _contender(name: str, info: dict) -> tuple[str, float] | None:
    return (name, ms) if (ms := time_of(info, name)) is not None else None


def _cosines(report: dict) -> dict[str, Value]:
    found = {name: info["cosine"].get(OURS["int8"]) for name, info in cases(report, "times_ms").items()}
    return {name: cosine for name, cosine in found.items() if cosine is not None}


def _rss(report: dict) -> dict[str, Value]:
    return {name: info["rss"]["peak"] / rss_bound(info) for name, info in cases(report, "rss").items()}


TARGETS = (
    Target("bfloat16: speed over the best peer", 1.2, len(CELLS), lambda r: _leads(r, "bfloat16", best_peer)),
    Target("bfloat16: speed over official float32", 4.5, len(CELLS),
           lambda r: _leads(r, "bfloat16", partial(_contender, "official float32"))),
    Target("float32: speed over the best float32 peer", 1.1, len(CELLS),
           lambda r: _leads(r, "float32", lambda info: best_peer(info, ("float32",)))),
    Target("int8: speed over our bfloat16", 1.5, len(CELLS),
           lambda r: _leads(r, "int8", partial(_contender, OURS["bfloat16"]))),
    Target("int8: cosine of the worst token", INT8_COSINE, len(CELLS), _cosines, unit="", digits=4),
    Target(f"peak resident memory over weights + {RSS_FACTOR} × activations", 1.0, len(BYTES) * len(CELLS), _rss,
           at_most=True),
)  # fmt: skip


# -- as text --------------------------------------------------------------------------------------------------


def times_table(cells: dict[str, dict]) -> list[str]:
    rows = []
    for name, info in cells.items():
        row = []
        for contender in CONTENDERS:
            ms = info["times_ms"].get(contender)
            row.append("–" if ms is None else number(ms) + ("" if right(info, contender) else " †"))
        fewest, most = min(info["calls"].values()), max(info["calls"].values())
        rows.append((name, *row, f"{fewest}…{most}" if fewest < most else most))
    return table(("cell", *(f"{name}, ms" for name in CONTENDERS), "calls timed"), rows)


def leads_table(cells: dict[str, dict]) -> list[str]:
    rows = []
    for name, info in cells.items():
        best, best32 = best_peer(info), best_peer(info, ("float32",))
        over = [lead(info, "bfloat16", best), lead(info, "bfloat16", _contender("official float32", info))]
        over += [lead(info, "float32", best32), lead(info, "int8", _contender(OURS["bfloat16"], info))]
        names = [found[0] if found else "–" for found in (best, best32)]
        rows.append((name, names[0], *map(ratio, over[:2]), names[1], *map(ratio, over[2:])))
    header = ("cell", "best peer", "bfloat16 over it", "bfloat16 over official float32", "best float32 peer")
    return table((*header, "float32 over it", "int8 over our bfloat16"), rows)


def floors_table(cells: dict[str, dict]) -> list[str]:
    rows = []
    for name, info in cells.items():
        row: list[str] = []
        for dtype, contender in OURS.items():
            ms, floor = time_of(info, contender), floor_ms(info, dtype)
            rate = f"{info['matmul_tflops'][dtype]:.2f}"
            row += [rate, number(floor), "–" if ms is None else f"{ms / floor:.2f}"]
        rows.append((name, number(info["flop"] / 1e9), *row))
    header = [text for dtype in OURS for text in (f"torch.mm {dtype}, TFLOP/s", "floor, ms", "ours / floor")]
    return table(("cell", "GFLOP", *header), rows)


def alone_table(cells: dict[str, dict]) -> list[str]:
    rows = []
    for name, info in cells.items():
        if info["alone_ms"]:
            found = {c: info["times_ms"][c] / ms for c, ms in info["alone_ms"].items() if c in info["times_ms"]}
            rows.append((name, *(ratio(found.get(contender)) for contender in CONTENDERS)))
    return table(("cell", *CONTENDERS), rows) if rows else []


def rss_table(found: dict[str, dict]) -> list[str]:
    rows = []
    for name, info in found.items():
        seen, weights = info["rss"], info["rss"]["values"] * BYTES[info["dtype"]]
        sizes = (weights, seen["activations"], seen["peak"], seen["peak"] - weights)
        rows.append((name, *(number(size / 1e6) for size in sizes), ratio(seen["peak"] / rss_bound(info))))
    limit = f"peak / (weights + {RSS_FACTOR} × activations)"
    return table(("case", "weights, MB", "activations, MB", "peak, MB", "peak − weights, MB", limit), rows)


def notes(cells: dict[str, dict], report: dict) -> list[str]:
    """What is missing, and whose numbers are wrong."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, info in cells.items():
        for contender, reason in info["left_out"].items():
            reasons.setdefault((contender, reason), []).append(name)
        for contender in info["times_ms"]:
            if not right(info, contender):
                wrong = f"† its worst token has cosine {info['cosine'][contender]:.4f}; it counts as no peer"
                reasons.setdefault((contender, wrong), []).append(name)
    for result in report["benchmarks"]:
        if reason := result.get("extra_info", {}).get("no_rss"):
            reasons.setdefault(("peak memory", reason), []).append(result["name"].partition("[")[2].rstrip("]"))
    missing = [case.id for case in CELLS if case.id not in cells]
    lines = [f"- {who} ({', '.join(names)}): {reason}" for (who, reason), names in reasons.items()]
    return lines + ([f"- Not measured: {', '.join(missing)}"] if missing else [])


def where(report: dict) -> str:
    machine = report["machine_info"]
    later = {
        result["extra_info"]["commit"]: result["name"].removeprefix("test_").partition("[")[0]
        for result in report["benchmarks"]
        if "commit" in result.get("extra_info", {})
    }
    return (
        f"{machine['cpu']['name']}, {machine['cpu']['cores']} cores, torch {machine['torch']}, "
        f"commit {report['commit_info']['id'][:12]}"
    ) + "".join(f", {what} {commit[:12]}" for commit, what in later.items())


def markdown(report: dict, chart: str | None = None) -> str:
    cells, memory = cases(report, "times_ms"), cases(report, "rss")
    lines = [
        "# Whole models on a CPU",
        "",
        f"{where(report)}. Random weights, medians of interleaved rounds, a process a",
    ]
    lines += ["cell; every output held against official float32 before it is timed.", ""]
    lines += [f"![milliseconds a call]({chart})", ""] if chart else []
    lines += ["## Targets", "", *targets_table(report, TARGETS)]
    if cells:
        lines += ["", "## Times", "", *times_table(cells), "", *leads_table(cells)]
        lines += ["", "## Floors", "", "FLOP of a call / the rate of a large matrix product in the same rounds.", ""]
        lines += floors_table(cells)
    if rows := alone_table(cells):
        lines += [
            "",
            "## In turn against alone",
            "",
            "Times above / those of the same calls in a row, nobody else's between",
        ]
        lines += ["them: 1 where contenders do not disturb each other.", "", *rows]
    if memory:
        lines += [
            "",
            "## Peak memory of radio_fast",
            "",
            "Resident, in a process of its own, over what there was before the",
        ]
        lines += [
            "model; three calls. Activations: the least that must be in memory at once, by `bench/workload.py`.",
            "",
        ]
        lines += rss_table(memory)
    if rest := notes(cells, report):
        lines += ["", "## Left out, and wrong", "", *rest]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    from bench.cpu_chart import draw

    path = Path(sys.argv[1])
    report = json.loads(path.read_text(encoding="utf-8"))
    drawn = draw(report, path.with_suffix(".png"))
    text = markdown(report, path.with_suffix(".png").name if drawn else None)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
