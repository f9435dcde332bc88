"""The figure of `tradeoff.py`: accuracy and agreement against rows computed, one curve per policy and knob.

Accuracy stands as the difference from no cache under the same settings of the run, since a line may sweep one of them.
The bars are one standard error of the policy's accuracy. Both decode the same problems, so the error of the difference
is smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter

if TYPE_CHECKING:
    from tradeoff import Point

# A method has a colour, a line of it a marker and a dash: told apart without colour too.
COLOURS = {"elastic": "#0b5394", "dkv": "#b45309", "fast-dllm": "#15803d", "d2": "#7e22ce"}
MARKERS = "osD^vP*X<>hdp"
DASHES = ("-", "--", ":", "-.")
LOOKS = {
    "svg.hashsalt": "dcache",  # the same points give the same file
    "svg.fonttype": "none",  # words stay words
    "font.size": 9,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(points: Sequence[Point], caption: str, path: Path) -> None:
    """Write ``path.svg`` and ``path.png``."""
    lines = list(dict.fromkeys(point.line for point in points if point.line))
    with plt.rc_context(LOOKS):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), sharex=True)
        for reference in (point for point in points if not point.line):
            _reference(left, right, reference)
        for number, line in enumerate(lines):
            look = _look(line, lines[:number], number)
            mine = [point for point in points if point.line == line]
            rows, lost = [p.rows for p in mine], [100 * (p.accuracy - p.base) for p in mine]
            left.errorbar(rows, lost, [100 * p.error for p in mine], capsize=2, elinewidth=0.7, label=line, **look)
            right.plot(rows, [p.agreement for p in mine], **look)
            _name_ends(right, mine, str(look["color"]))
        left.set_ylabel("accuracy less that of no cache, percentage points")
        right.set_ylabel("agreement with no cache")
        for axes in (left, right):
            axes.set_xlabel("row-layers computed, of those without a cache")
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.set_xlim(left=0)
        handles, names = left.get_legend_handles_labels()
        figure.legend(handles, names, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        figure.suptitle(caption, fontsize=8, x=0.01, ha="left", wrap=True)
        figure.tight_layout()
        figure.savefig(path.with_suffix(".svg"), bbox_inches="tight", metadata={"Date": None, "Creator": None})
        figure.savefig(path.with_suffix(".png"), bbox_inches="tight", dpi=160, metadata={"Software": None})
        plt.close(figure)


def _reference(left: Any, right: Any, point: Point) -> None:
    """No cache: a level with a band of one standard error."""
    left.axhline(0, color="#444", linewidth=1, label=f"none: {100 * point.accuracy:.1f} %")
    left.axhspan(-100 * point.error, 100 * point.error, color="#444", alpha=0.08, linewidth=0)
    right.axhline(1.0, color="#444", linewidth=1)


def _look(line: str, before: Sequence[str], number: int) -> dict[str, Any]:
    method = line.split(",")[0].split()[0]
    nth = sum(other.split(",")[0].split()[0] == method for other in before)
    return {
        "color": COLOURS.get(method, "#333333"),
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": DASHES[nth % len(DASHES)],
        "linewidth": 1.2,
        "markersize": 4.5,
        "markerfacecolor": "white" if nth % 2 else COLOURS.get(method, "#333333"),
    }


def _name_ends(axes: Any, points: Sequence[Point], colour: str) -> None:
    """The knob's value beside the first and the last point of a line."""
    for point in {points[0].policy: points[0], points[-1].policy: points[-1]}.values():
        axes.annotate(
            str(point.value),
            (point.rows, point.agreement),
            xytext=(4, -8),
            textcoords="offset points",
            fontsize=7,
            color=colour,
        )
