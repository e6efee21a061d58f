"""A results.json as Markdown: `python -m bench.report FOLDER` writes FOLDER/README.md; `--summary` prints a short one.

Every number is computed from the file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Iterable
from pathlib import Path

from bench.targets import (
    TARGETS,
    Outcome,
    Target,
    best_sdpa,
    evaluate,
    measured,
    share_of_matmul,
    speedups,
    value_of,
)
from bench.workload import CONTENDERS, MODELS, SCALING_SIDES

CHARTS = {
    "throughput.png": "Images per second, by model and size",
    "latency.png": "Latency of one image",
    "scaling.png": "Time against image side",
}


METHOD = (
    "Random weights, the same for all; medians of interleaved rounds, by device events; every contender was held "
    "against float32 first (every token's cosine ≥ 0.999). E-RADIO's rival is the same network in plain modules, the "
    "others' is Transformers' RadioModel with SDPA."
)


def load(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    header = list(header)
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return [*lines, *(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows)]


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits, no exponent; a dash for what is not there."""
    if value is None:
        return "–"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:.0f}"
    text = f"{value:#.{digits}g}"
    return f"{float(text):f}".rstrip("0") if "e" in text else text


def ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def machine(run: dict) -> str:
    """One line: the machine, the versions, the code."""
    where = f"{run['gpu']} ({run['memory_gib']} GiB, driver {run['driver']})" if run["gpu"] else run["cpu"]
    versions = [f"torch {run['torch']}", f"Triton {run['triton']}", f"Transformers {run['transformers']}"]
    versions += [f"CUDA {run['cuda']}"] if run["cuda"] else []
    commit = f"commit {run['commit'][:12]}" if run["commit"] else "no commit known"
    changed = " with uncommitted changes" if run["dirty"] else ""
    return f"{where}, {', '.join(versions)}, {commit}{changed}, sources {run['sources']}"


def by_model(cases: Iterable[tuple[str, dict]]) -> list[tuple[str, dict]]:
    return sorted(cases, key=lambda item: (list(MODELS).index(item[1]["model"]), item[1]["pixels"], item[1]["batch"]))


# -- sections ---------------------------------------------------------------------------------------------------


def shown(outcome: Outcome, value: float | None) -> str:
    unit = f" {outcome.target.unit}".rstrip()
    return "failed" if value is None else f"{value:.{outcome.target.digits}f}{unit}"


def targets_table(data: dict, targets: tuple[Target, ...] = TARGETS) -> list[str]:
    rows = []
    for outcome in evaluate(data, targets):
        target = outcome.target
        need = f"{'≤' if target.at_most else '≥'} {target.needed:g} {target.unit}".rstrip()
        if outcome.status == "not measured":
            rows.append((target.text, need, "not measured", "", ""))
            continue
        case, value = outcome.worst
        by = ""
        if outcome.status == "missed" and value is not None:
            by = f", {abs(target.needed - value) / target.needed:.0%} short" if not target.at_most else ""
            by = by or f", {value / target.needed - 1:.0%} over"
        many = f"{outcome.met} of {len(outcome.values)}"
        if len(outcome.values) < target.cases:
            many += f" ({target.cases} are asked for)"
        rows.append((target.text, need, f"**{outcome.status}**", many, f"{shown(outcome, value)} ({case}){by}"))
    return table(("target", "needed", "outcome", "cases that meet it", "furthest from it"), rows)


def throughput_table(data: dict, cases: list[tuple[str, dict]]) -> list[str]:
    names = ("radio_fast", "eager", "official")
    header = ["case", *(f"{CONTENDERS[name]}, images/s" for name in names)]
    header += ["ms (quartiles)", "× eager", "× autocast", "TFLOP/s", "of the matmul rate"]
    rows = []
    for case, result in cases:
        ours = result["contenders"]["radio_fast"]
        spread = "failed" if "error" in ours else f"{number(ours['ms'])} ({number(ours['q1'])}–{number(ours['q3'])})"
        rates = [number(value_of(result, name, "images_per_s"), 4) for name in names]
        faster = [ratio(_times(result, name)) for name in names[1:]]
        share = share_of_matmul(data, result)
        rate = number(value_of(result, "radio_fast", "tflops"))
        rows.append((case, *rates, spread, *faster, rate, "–" if share is None else f"{share:.0%}"))
    return table(header, rows)


def _times(result: dict, rival: str, *keys: str) -> float | None:
    ours, theirs = (value_of(result, name, *(keys or ("ms",))) for name in ("radio_fast", rival))
    return None if ours is None or theirs is None else theirs / ours


def latency_table(cases: list[tuple[str, dict]]) -> list[str]:
    names = ("radio_fast", "eager", "official")
    rows = []
    for case, result in cases:
        both = [[value_of(result, name, "latency", key) for key in ("ms", "p99")] for name in names]
        cells = ["–" if ms is None else f"{number(ms)}, {number(p99)}" for ms, p99 in both]
        rows.append((case, *cells, *(ratio(_times(result, name, "latency", "ms")) for name in names[1:])))
    return table(("case", *(f"{CONTENDERS[n]}: median, p99, ms" for n in names), "× eager", "× autocast"), rows)


def compiled_table(data: dict) -> list[str]:
    rows = []
    for case, result in by_model(measured(data, "compiled")):
        ms = [number(value_of(result, name, "ms")) for name in ("radio_fast", "compiled", "eager")]
        first = value_of(result, "compiled", "first_s")
        rows.append((case, *ms, ratio(_times(result, "compiled")), number(first, 2)))
    return table(("case", "radio_fast, ms", "max-autotune, ms", "eager, ms", "× max-autotune", "compiling, s"), rows)


def memory_table(data: dict) -> list[str]:
    names = ("radio_fast", "eager", "official")
    ratios = speedups(data, "memory", "official", lambda _: True, "peak")
    rows = []
    for case, result in measured(data, "memory"):
        cells = []
        for name in names:
            weights, peak = (value_of(result, name, key) for key in ("weights", "peak"))
            cells.append("–" if peak is None else f"{weights / 1e6:.0f}, {peak / 1e6:.0f}")
        times = ratios.get(case)
        rows.append((case, *cells, "–" if times is None else f"{1 / times:.2f}"))
    return table(("case", *(f"{CONTENDERS[n]}: weights, peak, MB" for n in names), "peak / autocast's"), rows)


def attention_table(data: dict) -> list[str]:
    rows = []
    for case, result in measured(data, "attention"):
        best = best_sdpa(result)
        ours = value_of(result, "radio_fast", "ms")
        speed = None if best is None or ours is None else best[1] / ours
        others = ", ".join(
            f"{name} {number(found['ms'] * 1e3) if 'ms' in found else 'failed'}"
            for name, found in result["contenders"].items()
            if name != "radio_fast"
        )
        us = None if ours is None else ours * 1e3
        rate = number(value_of(result, "radio_fast", "tflops"))
        shape = f"{result['tokens']} tokens, {result['heads']} × {result['head_dim']}"
        rows.append((case, shape, number(us), rate, others, ratio(speed)))
    return table(("case", "shape", "radio_fast, µs", "TFLOP/s", "SDPA, µs", "× the best"), rows)


def ops_table(data: dict, result: dict) -> list[str]:
    """By op: a block's (E-RADIO: the whole pass's) launches and µs, the floor, and how many times it that is."""
    ceilings = data["runs"][result["run"]].get("ceilings")
    depth = result["depth"] or 1
    rows = []
    for op, found in result["ops"].items():
        us, floor = found["us"] / depth, None
        if "flop" in found and ceilings:
            by_rate = found["flop"] / ceilings["matmul_tflops"] / 1e6
            floor = max(by_rate, found["bytes"] / ceilings["copy_tbps"] / 1e6) / depth
        above = None if not floor else us / floor
        share = found["us"] / result["kernel_us"]
        rows.append((op, number(found["launches"] / depth), number(us), f"{share:.0%}", number(floor), ratio(above)))
    each = "a block" if result["depth"] else "the pass"
    return table(("op", f"launches, {each}", f"µs, {each}", "of the time", "floor, µs", "× the floor"), rows)


def growth_table(data: dict) -> list[str]:
    names = ("radio_fast", "eager", "official")
    found = {r["pixels"]: r for _, r in measured(data, "cases", lambda r: r["model"] == "ViT-L" and r["batch"] == 1)}
    rows = []
    for side in sorted(found):
        times = [number(value_of(found[side], name, "ms")) for name in names]
        rows.append((side, *times, ratio(_times(found[side], "eager"))))
    return table(("side, pixels", *(f"{CONTENDERS[name]}, ms" for name in names), "× eager"), rows)


def failures(data: dict) -> list[str]:
    out = []
    for kind, cases in data["results"].items():
        for case, result in cases.items():
            for name, found in ({"": result} | result.get("contenders", {})).items():
                if "error" in found:
                    out.append(f"- {kind}/{case}{': ' * bool(name)}{name}: {found['error']}")
    return out


def markdown(data: dict, charts: Collection[str] = ()) -> str:
    """The whole report; `charts`: the files of CHARTS that lie beside it."""
    runs = data["runs"]
    lines = [f"# {runs[-1]['gpu'] or 'A rehearsal on the CPU'}", ""]
    if runs[-1]["tiny"]:
        lines += ["Small models, to show that the script works: **these times mean nothing.**", ""]
    for number_, run in enumerate(runs, 1):
        rates = run.get("ceilings")
        measured_rates = ""
        if rates:
            measured_rates = (
                f". Its own rates: {rates['matmul_tflops']:.3g} TFLOP/s ({rates['matmul_side']}³, bf16), "
                f"copies {rates['copy_tbps']:.3g} TB/s"
            )
        lines.append(f"{number_}. Run “{run['mode']}”: {machine(run)}{measured_rates}.")
    lines += ["", METHOD]
    lines += ["", "## Targets", "", *targets_table(data), ""]
    lines += [f"![{title}]({name})" for name, title in CHARTS.items() if name in charts]
    batches = sorted({r["batch"] for _, r in measured(data, "cases")}, reverse=True)
    for batch in batches:
        cases = by_model(measured(data, "cases", lambda r, batch=batch: r["batch"] == batch))
        lines += ["", f"## Throughput, batch {batch}", "", *throughput_table(data, cases)]
    single = by_model(measured(data, "cases", lambda r: r["batch"] == 1))
    sections = {
        "Latency, batch 1 (each call waited for)": latency_table(single) if single else [],
        "Against torch.compile": compiled_table(data),
        "How time grows: ViT-L, batch 1": growth_table(data),
        "Peak memory": memory_table(data),
        "Attention alone": attention_table(data),
    }
    for title, rows in sections.items():
        if len(rows) > 2:
            lines += ["", f"## {title}", "", *rows]
    for case, result in measured(data, "ops"):
        blocks = f", {result['launches_per_block']:.2f} launches a block" if "launches_per_block" in result else ""
        lines += ["", f"## Where the time goes: {case}", ""]
        lines.append(
            f"{result['kernel_us'] / 1e3:.4g} ms of kernels within {result['span_us'] / 1e3:.4g} ms, "
            f"{result['launches']} launches{blocks}. A floor is FLOP over the measured matmul rate or bytes over the "
            f"measured copy rate, whichever takes longer."
        )
        lines += ["", *ops_table(data, result)]
    if failed := failures(data):
        lines += ["", "## Failed", "", *failed]
    if missing := data["not_measured"]:
        lines += ["", "## Not measured", ""]
        for why in dict.fromkeys(missing.values()):
            lines.append(f"- {why}: {', '.join(step for step, reason in missing.items() if reason == why)}")
    return "\n".join(lines) + "\n"


def summary(data: dict) -> str:
    """The targets, and images per second at 224 pixels: what fits a terminal."""
    lines = [machine(data["runs"][-1]), ""]
    for outcome in evaluate(data):
        worst = f"worst {shown(outcome, outcome.worst[1])} {outcome.worst[0]}" if outcome.values else ""
        lines.append(f"{outcome.status:<13} {outcome.target.text:<66} {worst}")
    lines.append("")
    for case, result in by_model(measured(data, "cases", lambda r: r["pixels"] <= SCALING_SIDES[0])):
        names = ("radio_fast", "eager", "official")
        rates = ", ".join(f"{name} {number(value_of(result, name, 'images_per_s'), 4)}" for name in names)
        lines.append(f"{case:<22} images/s: {rates}; {ratio(_times(result, 'eager'))} × eager")
    lines += [f"failed: {line[2:]}" for line in failures(data)]
    lines.append(f"{len(data['not_measured'])} steps not measured")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where results.json is")
    parser.add_argument("--summary", action="store_true", help="print a short table, write nothing")
    options = parser.parse_args()
    data = load(options.folder)
    if options.summary:
        print(summary(data))
    else:
        charts = [name for name in CHARTS if (options.folder / name).exists()]
        (options.folder / "README.md").write_text(markdown(data, charts), encoding="utf-8")


if __name__ == "__main__":
    main()
