"""Charts of FOLDER/results.json: `python -m bench.charts FOLDER` writes throughput, latency and scaling.png there."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from bench.report import load, number
from bench.targets import matmul_rate, measured, value_of
from bench.workload import CONTENDERS, LARGE_BATCH, MODELS

COLOURS = {"radio_fast": "#4c9a00", "compiled": "#c2703d", "eager": "#7a8ea8", "official": "#b9c3cf"}
plt.rcParams.update({
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.titlesize": 9.5, "axes.titleweight": "bold", "figure.dpi": 130, "legend.frameon": False,
})  # fmt: skip


def caption(data: dict) -> str:
    run = data["runs"][-1]
    tiny = "REHEARSAL WITH TINY MODELS: TIMES MEAN NOTHING. " if run["tiny"] else ""
    commit = f", commit {run['commit'][:12]}" if run["commit"] else f", sources {run['sources']}"
    versions = f"torch {run['torch']}, Triton {run['triton']}, Transformers {run['transformers']}"
    return f"{tiny}{run['gpu'] or run['cpu']}, {versions}{commit}"


def best_result(data: dict, model: str, pixels: int, batch: int) -> dict | None:
    """The case with torch.compile in it, if there is one: all its contenders were timed in turn."""
    for kind in ("compiled", "cases"):
        result = data["results"].get(kind, {}).get(f"{model}-{pixels}px-b{batch}")
        if result is not None and value_of(result, "radio_fast", "ms") is not None:
            return result
    return None


def bars(axes: Axes, result: dict, values: dict[str, float], higher_is_better: bool) -> None:
    """One contender a bar, above ours its lead over the best rival."""
    above = {"textcoords": "offset points", "ha": "center", "va": "bottom"}
    for place, (name, value) in enumerate(values.items()):
        axes.bar(place, value, 0.82, color=COLOURS[name], label=CONTENDERS[name])
        axes.annotate(number(value), (place, value), (0, 2), fontsize=7.5, **above)
    ours = values["radio_fast"]
    if rivals := [value for name, value in values.items() if name != "radio_fast"]:
        lead = ours / max(rivals) if higher_is_better else min(rivals) / ours
        style = {"fontsize": 9, "weight": "bold", "color": COLOURS["radio_fast"]}
        axes.annotate(f"{lead:.2f}×", (0, ours), (0, 11), **style, **above)
    axes.set_xticks([])
    axes.margins(y=0.26)
    axes.tick_params(axis="y", labelsize=7.5)
    axes.set_title(f"{result['model']}, {result['pixels']} px")


def grid_of(data: dict, batch: int) -> tuple[list[str], list[int]]:
    """The models (rows) and sides (columns) that were measured with this batch."""
    found = [r for _, r in measured(data, "cases", lambda r: r["batch"] == batch)]
    models = [model for model in MODELS if any(r["model"] == model for r in found)]
    sides = {model: {r["pixels"] for r in found if r["model"] == model} for model in models}
    # ViT-L has more sides than the others at batch 1: those are for the chart of growth.
    shared = [side for model in models if model != "ViT-L" for side in sides[model]] or list(*sides.values())
    return models, sorted(set(shared))


def grouped_bars(
    data: dict, batch: int, title: str, unit: str, keys: tuple[str, ...], higher_is_better: bool
) -> Figure:
    """A panel for each model and side, each with an axis of its own: rates differ by two orders of magnitude."""
    models, sides = grid_of(data, batch)
    figure, panels = plt.subplots(
        len(models), len(sides), figsize=(max(6.4, 2.1 + 2.2 * len(sides)), 1.6 + 1.75 * len(models)), squeeze=False
    )
    legend: dict[str, object] = {}
    for row, model in enumerate(models):
        for column, side in enumerate(sides):
            axes, result = panels[row][column], best_result(data, model, side, batch)
            values = {name: value_of(result, name, *keys) for name in COLOURS} if result else {}
            values = {name: value for name, value in values.items() if value is not None}
            if "radio_fast" not in values:
                axes.axis("off")
                continue
            bars(axes, result, values, higher_is_better)
            legend |= {label: bar for bar, label in zip(*axes.get_legend_handles_labels(), strict=True)}
            axes.set_ylabel(unit if not column else "")
    figure.suptitle(title, fontsize=12, weight="bold")
    top = 1 - 0.32 / figure.get_figheight()
    figure.legend(legend.values(), legend.keys(), loc="upper center", bbox_to_anchor=(0.5, top), ncols=4)
    note = "In green: radio_fast's lead over the best of the others in its panel. "
    return finished(figure, data, note, legend_inches=0.3)


def finished(figure: Figure, data: dict, note: str = "", legend_inches: float = 0.0) -> Figure:
    """Lay it out, with room for a legend below the title, and the small print at the bottom."""
    text = textwrap.fill(note + caption(data), int(figure.get_figwidth() * 18))
    inch = 1 / figure.get_figheight()
    figure.tight_layout(rect=(0, (0.18 + 0.13 * len(text.splitlines())) * inch, 1, 1 - legend_inches * inch))
    figure.text(0.01, 0.06 * inch, text, fontsize=7, color="#555555", va="bottom")
    return figure


def throughput(data: dict) -> Figure | None:
    batches = [result["batch"] for _, result in measured(data, "cases") if result["batch"] > 1]
    if not batches:
        return None
    batch = LARGE_BATCH if LARGE_BATCH in batches else max(batches, key=batches.count)
    return grouped_bars(data, batch, f"Images per second, batch {batch}", "images/s", ("images_per_s",), True)


def latency(data: dict) -> Figure | None:
    if not any(measured(data, "cases", lambda result: result["batch"] == 1)):
        return None
    title = "Latency of one image (batch 1, median of calls waited for)"
    return grouped_bars(data, 1, title, "ms", ("latency", "ms"), False)


def scaling(data: dict, model: str = "ViT-L") -> Figure | None:
    """Time of one image against its side, both logarithmic, and what the matmul rate alone would allow."""
    found = {r["pixels"]: r for _, r in measured(data, "cases", lambda r: r["model"] == model and r["batch"] == 1)}
    if len(found) < 2:
        return None
    sides = sorted(found)
    figure, axes = plt.subplots(figsize=(7.2, 4.8))
    for name, colour in COLOURS.items():
        points = [(side, ms) for side in sides if (ms := value_of(found[side], name, "ms")) is not None]
        if points:
            width = 2.4 if name == "radio_fast" else 1.5
            axes.plot(*zip(*points, strict=True), marker="o", ms=4, lw=width, color=colour, label=CONTENDERS[name])
    floor = [(s, found[s]["flop"] / rate / 1e9) for s in sides if (rate := matmul_rate(data, found[s])) is not None]
    if floor:
        axes.plot(*zip(*floor, strict=True), ls=":", color="black", label="FLOP / measured matmul rate")
    axes.set(xscale="log", yscale="log", xlabel="image side, pixels", ylabel="ms per image")
    axes.xaxis.set_major_locator(FixedLocator(sides))
    axes.xaxis.set_minor_locator(NullLocator())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left")
    figure.suptitle(f"{model}, batch 1: time against image side", fontsize=12, weight="bold")
    return finished(figure, data)


def draw(folder: Path) -> list[Path]:
    """Write what can be drawn of FOLDER/results.json; the files written."""
    data, written = load(folder), []
    for name, chart in {"throughput": throughput, "latency": latency, "scaling": scaling}.items():
        figure = chart(data)
        if figure is not None:
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1])
            plt.close(figure)
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where results.json is")
    for path in draw(parser.parse_args().folder):
        print(path.name)
