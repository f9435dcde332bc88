"""The figure of ``dcache bench plot``: time of every step against the rows that it computed, over the floor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dcache.bench.reports import (
    EndToEndReport,
    FloorPoint,
    FloorReport,
    ImageReport,
    KernelReport,
    PolicyResult,
    Report,
)
from dcache.bench.tables import heading
from dcache.errors import UsageError

MARKERS = "osD^vP*X<>hdp"
LOOKS: Any = {
    "svg.hashsalt": "dcache",  # the same points give the same file
    "svg.fonttype": "none",  # words stay words
    "font.size": 9,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(reports: Sequence[Report], path: Path) -> list[Path]:
    """Write ``path.svg`` and ``path.png``; returns them.

    Raises:
        UsageError: without matplotlib, and for reports without rows.
    """
    if other := next((report for report in reports if isinstance(report, KernelReport | ImageReport)), None):
        raise UsageError(
            f"a report of `bench {other.kind}` has no steps to draw; give those of `bench e2e` and `bench floor`"
        )
    try:
        import matplotlib
    except ImportError:
        raise UsageError("drawing needs matplotlib: pip install 'dcache[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    with plt.rc_context(LOOKS):
        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        _floors(axes, reports)
        _policies(axes, [r for report in reports if isinstance(report, EndToEndReport) for r in report.results])
        axes.set(xscale="log", yscale="log", xlabel="rows of a layer, all sequences", ylabel="ms per step")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        axes.legend(frameon=False, fontsize=8)
        figure.suptitle(heading(reports[0].conditions), fontsize=7, x=0.01, ha="left", wrap=True)
        files = [path.with_name(path.name + end) for end in (".svg", ".png")]
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(files[0], metadata={"Date": None, "Creator": None})
        figure.savefig(files[1], dpi=160, metadata={"Software": None})
        plt.close(figure)
    return files


def _floors(axes: Any, reports: Sequence[Report]) -> None:
    """The floor that steps are compared with: without a head, since every step has another."""
    points: dict[int, FloorPoint] = {}
    for report in reports:
        found = report.floor if isinstance(report, EndToEndReport) else []
        found = report.results if isinstance(report, FloorReport) else found
        points |= {p.rows: p for p in found if p.rows}
    line = sorted((p.rows, p.ms) for p in points.values())
    if line:
        axes.plot(*zip(*line, strict=True), color="#444", linewidth=1.2, label="floor: linear layers alone")


def _policies(axes: Any, results: Sequence[PolicyResult]) -> None:
    """A dot per step; steps with a second pass are hollow."""
    drawn = [result for result in results if result.trace_ms]
    for number, result in enumerate(drawn):
        colour, marker = f"C{number % 10}", MARKERS[number % len(MARKERS)]
        several = len({(r.batch, r.tokens_per_step) for r in drawn}) > 1
        label = f"{result.policy}, batch {result.batch}, {result.tokens_per_step} a step" if several else result.policy
        for passes, face in ((1, colour), (2, "none")):
            at = [i for i, n in enumerate(result.trace_passes) if n == passes and result.trace_rows[i] > 0]
            if at:
                x, y = [result.trace_rows[i] for i in at], [result.trace_ms[i] for i in at]
                name = label if passes == 1 else f"{label}, two passes"
                axes.scatter(x, y, s=16, alpha=0.5, marker=marker, edgecolors=colour, facecolors=face, label=name)
