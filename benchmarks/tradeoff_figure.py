"""The figure of `tradeoff.py`: accuracy and agreement against rows computed, one curve per policy and knob.

Each kind of policy has a row of panels of its own, with the points of all others in grey.

Accuracy stands as the difference from no cache under the same settings of the run, since a line may sweep one of them.
The bars are one standard error of the policy's accuracy. Both decode the same problems, so the error of the difference
is smaller. Points of more than 20 points of accuracy lost, or an agreement below 0.9, lie below the panels.
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
COLOURS = {
    "elastic": "#0b5394",
    "dkv": "#b45309",
    "fast-dllm": "#15803d",
    "d2": "#7e22ce",
    "freecache": "#be123c",
    "dllm-cache": "#0b5394",
    "spa": "#b45309",
    "es-dllm": "#7e22ce",
    "sparse-dllm": "#15803d",
    "suffix": "#be123c",
}
GROUPS = {
    "by schedule": ("dkv", "fast-dllm", "freecache"),
    "by attention": ("elastic", "d2"),
    "rows per layer": ("dllm-cache", "spa", "es-dllm"),
    "keys hidden": ("sparse-dllm", "suffix"),
}
MARKERS = "osD^vP*X<>hdp"
DASHES = ("-", "--", ":", "-.")
LOWEST, FARTHEST = -20, 0.9  # accuracy lost, agreement: what falls further is cut off, and stands in the table
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
    groups = _groups(points)
    with plt.rc_context(LOOKS):
        size = (11, 0.6 + 2.9 * len(groups))
        figure, panels = plt.subplots(
            len(groups), 2, figsize=size, sharex=True, sharey="col", squeeze=False, layout="constrained"
        )
        for (left, right), (group, lines) in zip(panels, groups.items(), strict=True):
            _panels(left, right, points, lines)
            left.set_title(group, loc="left", fontsize=9, fontweight="bold")
            left.set_ylabel("accuracy - no cache, points")
            right.set_ylabel("agreement with no cache")
            right.legend(*left.get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        for axes, lowest in zip(panels[0], (LOWEST, FARTHEST), strict=True):
            axes.set_ylim(bottom=max(axes.get_ylim()[0], lowest))
        panels[0][1].set_ylim(top=1 + 0.04 * (1 - panels[0][1].get_ylim()[0]))
        for axes in panels[-1]:
            axes.set_xlabel("row-layers computed, of those without a cache")
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.set_xlim(left=0)
        figure.suptitle(caption, fontsize=8, x=0.01, ha="left", wrap=True)
        figure.savefig(path.with_suffix(".svg"), bbox_inches="tight", metadata={"Date": None, "Creator": None})
        figure.savefig(path.with_suffix(".png"), bbox_inches="tight", dpi=160, metadata={"Software": None})
        plt.close(figure)


def _groups(points: Sequence[Point]) -> dict[str, list[str]]:
    """Lines by kind of policy; what belongs to none comes last."""
    lines = list(dict.fromkeys(point.line for point in points if point.line))
    found = {group: [n for n in lines if _method(n) in methods] for group, methods in GROUPS.items()}
    found["others"] = [n for n in lines if not any(n in mine for mine in found.values())]
    return {group: mine for group, mine in found.items() if mine} or {"": []}


def _panels(left: Any, right: Any, points: Sequence[Point], lines: Sequence[str]) -> None:
    """The lines of one kind, before all points."""
    for reference in (point for point in points if not point.line):
        _reference(left, right, reference)
    others = [p for p in points if p.line and p.line not in lines]
    grey = {"color": "#d4d4d4", "s": 14, "linewidth": 0, "zorder": 1}
    left.scatter([p.rows for p in others], [100 * (p.accuracy - p.base) for p in others], **grey)
    right.scatter([p.rows for p in others], [p.agreement for p in others], **grey)
    for number, line in enumerate(lines):
        look = _look(line, lines[:number], number)
        mine = [point for point in points if point.line == line]
        rows, lost = [p.rows for p in mine], [100 * (p.accuracy - p.base) for p in mine]
        left.errorbar(rows, lost, [100 * p.error for p in mine], capsize=2, elinewidth=0.5, label=line, **look)
        right.plot(rows, [p.agreement for p in mine], **look)
        _name_ends(right, mine, str(look["color"]))


def _method(line: str) -> str:
    """The policy of a line."""
    return line.split(",")[0].split()[0]


def _reference(left: Any, right: Any, point: Point) -> None:
    """No cache: a level with a band of one standard error."""
    left.axhline(0, color="#444", linewidth=1, label=f"none: {100 * point.accuracy:.1f} %")
    left.axhspan(-100 * point.error, 100 * point.error, color="#444", alpha=0.08, linewidth=0)
    right.axhline(1.0, color="#444", linewidth=1)


def _look(line: str, before: Sequence[str], number: int) -> dict[str, Any]:
    method = _method(line)
    nth = sum(_method(other) == method for other in before)
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
