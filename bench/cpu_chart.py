"""The CPU benchmark's chart: every contender's time in each cell, over that of radio_fast in bfloat16."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from bench.cpu_table import CELLS, CONTENDERS, MORE_CELLS, OURS, best_peer, cases, right, where
from bench.report import number

COLOURS = dict(zip(CONTENDERS, ("#a3cc7a", "#4c9a00", "#2f6000", "#7a8ea8", "#c2703d", "#8a6fb0",
                                "#b9c3cf", "#e3b795", "#c9bcdc", "#d8c65a"), strict=True))  # fmt: skip
STYLE = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.titlesize": 9.5, "axes.titleweight": "bold", "figure.dpi": 130, "legend.frameon": False,
}  # fmt: skip


def panel(axes: Axes, name: str, info: dict) -> None:
    """A bar a contender with its milliseconds, ours on top; our lead over the best peer in the title."""
    shown = [contender for contender in CONTENDERS if contender in info["times_ms"]]
    for place, contender in enumerate(shown):
        ms, wrong = info["times_ms"][contender], not right(info, contender)
        axes.barh(place, ms, 0.8, color=COLOURS[contender], hatch="///" if wrong else None)
        text = number(ms) + (" †" if wrong else "")
        axes.annotate(text, (ms, place), (3, 0), textcoords="offset points", va="center", fontsize=7.5)
    axes.set_yticks(range(len(shown)), shown, fontsize=7.5)
    for label, contender in zip(axes.get_yticklabels(), shown, strict=True):
        label.set_color("#2f6000" if contender in OURS.values() else "black")
    axes.invert_yaxis()
    axes.margins(x=0.16)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(axis="x", labelsize=7.5)
    best, ours = best_peer(info), info["times_ms"].get(OURS["bfloat16"])
    lead = f": {best[1] / ours:.2f}×" if best and ours and right(info, OURS["bfloat16"]) else ""
    axes.set_title(f"{name}{lead}", fontsize=9.5, loc="left")


def draw(report: dict, path: Path) -> bool:
    """Write the chart; False if no cell was measured."""
    found = cases(report, "times_ms")
    cells = [(case.id, found[case.id]) for case in (*CELLS, *MORE_CELLS) if case.id in found]
    if not cells:
        return False
    columns = min(4, len(cells))
    rows = -(-len(cells) // columns)
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(rows, columns, figsize=(max(6.4, 4.2 * columns), 0.9 + 2.5 * rows), squeeze=False)
        for axes, (name, info) in zip(panels.flat, cells, strict=False):
            panel(axes, name, info)
        for axes in panels.flat[len(cells) :]:
            axes.axis("off")
        for axes in panels[-1]:
            axes.set_xlabel("ms a call", fontsize=8)
        figure.suptitle("Whole models on a CPU: milliseconds a call, shorter is better", fontsize=12, weight="bold")
        note = "In the titles: the best peer's time, of any precision, over that of radio_fast bfloat16. "
        if any(not right(info, contender) for _, info in cells for contender in info["times_ms"]):
            note += "† and hatched: wrong numbers, counts as no peer. "
        text = textwrap.fill(note + where(report), int(figure.get_figwidth() * 18))
        inch = 1 / figure.get_figheight()
        low = (0.18 + 0.13 * len(text.splitlines())) * inch
        figure.tight_layout(rect=(0, low, 1, 1 - 0.05 * inch), w_pad=2.5)
        figure.text(0.01, 0.06 * inch, text, fontsize=7, color="#555555", va="bottom")
        figure.savefig(path)
        plt.close(figure)
    return True
