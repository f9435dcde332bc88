"""The figures of a report for a paper: each as SVG, whose words stay words, and as PNG."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dcache.errors import UsageError
from dcache.text import printable
from dcache.view import data
from dcache.view.data import QUALITIES, SPEEDS, Axis, Chapter, Point, Steps
from dcache.view.drift import MEASURES
from dcache.view.figures import REFERENCE, Palette
from dcache.view.recording import Recording
from dcache.view.watch import NAMES

MARKERS = "oDs^P*vpX"  # as those of the page
GREY = "#6b7280"
LOOKS: Any = {
    "svg.hashsalt": "dcache",  # the same results give the same file
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e5e5",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "text.parse_math": False,  # a dollar in a prompt is a dollar
}
Draw = Callable[[Any], None]


def write(folders: Sequence[Path], out: Path) -> list[Path]:
    """Write every figure of some comparisons into a folder; returns the files.

    Raises:
        UsageError: without matplotlib, for folders without results, and if a file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise UsageError("figures for papers need matplotlib: pip install 'dcache[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chapters = [Chapter.read(number, folder) for number, folder in enumerate(folders)]
    written = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, size, draw in drawings(chapters):
            with plt.rc_context(LOOKS):
                figure, axes = plt.subplots(figsize=size, layout="constrained")
                draw(axes)
                for ending, more in ((".svg", {"Date": None, "Creator": None}), (".png", {"Software": None})):
                    file = out / f"{slug(name)}{ending}"
                    figure.savefig(file, metadata=more, dpi=200)
                    figure.set_layout_engine("none")  # it has found its places, which takes a third of the time
                    written.append(file)
                plt.close(figure)
    except OSError as error:
        raise UsageError(f"figures cannot be written to {out}: {error.strerror}") from error
    return written


def slug(name: str) -> str:
    """A name as a file may have it."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[:120]


def drawings(chapters: Sequence[Chapter]) -> Iterator[tuple[str, tuple[float, float], Draw]]:
    """Name, size in inches, and how it is drawn, of every figure."""
    looks = Looks(Palette(chapters))
    found = [point for chapter in chapters for point in data.points(chapter)]
    for y in (axis for axis in QUALITIES if any(axis.key in p.values for p in found)):
        for x in SPEEDS:
            yield f"{y.key}-against-{x.key}", (5.2, 3.6), partial(looks.tradeoff, found=found, x=x, y=y)
    for chapter in chapters:
        at = f"run{chapter.number + 1}-" if len(chapters) > 1 else ""
        for name, size, draw in _of_chapter(chapter, looks):
            yield at + name, size, draw


def _of_chapter(chapter: Chapter, looks: Looks) -> Iterator[tuple[str, tuple[float, float], Draw]]:
    n = len(chapter.policies)
    found = data.points(chapter)
    for curve in data.curves(found):
        for y in (axis for axis in (*QUALITIES, *SPEEDS) if axis.key in curve.points[0].values):
            name = f"sweep-{curve.title}-{y.key}"
            yield name, (4.2, 3.0), partial(looks.sweep, curve=curve, reference=found[0], y=y)
    for (problem, policy), recording in chapter.recordings.items():
        steps = Steps.of(recording)
        size = (6.5, min(7.0, 1.2 + 0.06 * recording.n_steps))
        yield f"map-{policy}-{problem}", size, partial(positions, steps=steps)
        yield f"layers-{policy}-{problem}", (5.2, 2.6), partial(layers, steps=steps)
        for measure in MEASURES[:2] if recording.drift is not None else ():
            name = f"drift-{measure}-{policy}-{problem}"
            yield name, (5.2, 2.6), partial(drift, recording=recording, measure=measure)
    for problem in chapter.problems:
        recorded = chapter.recorded(problem)
        yield f"commits-{problem}", (5.2, 3.4), partial(looks.commits, chapter=chapter, recorded=recorded)
    if found:
        yield "step-times", (5.2, 0.8 + 0.45 * n), partial(looks.step_times, chapter=chapter)
    if chapter.recordings:
        yield "time-split", (5.2, 1.0 + 0.35 * n), partial(time_split, chapter=chapter)


class Looks:
    """Colours and markers of policies, the same in all figures; and the figures that need them."""

    def __init__(self, palette: Palette):
        self._palette = palette

    def _of(self, name: str) -> dict[str, Any]:
        index = self._palette.index(name)
        colour = GREY if index == REFERENCE else f"C{index % 10}"
        return {"color": colour, "marker": MARKERS[(index + 1) % len(MARKERS)]}

    def tradeoff(self, axes: Any, found: Sequence[Point], x: Axis, y: Axis) -> None:
        """Quality against speed, with the front and the curves of sweeps."""
        shown = [p for p in found if y.key in p.values]
        best = data.front(shown, x, y)
        axes.plot(*_places(best, x, y), linestyle=":", color=GREY, linewidth=1, label="Pareto front")
        joined = data.curves(shown)
        alone = [p for p in shown if not any(p in curve.points for curve in joined)]
        lines = [(curve.title, curve.points, "-") for curve in joined]
        for name, points, style in [*lines, *((p.entrant.policy, [p], "") for p in alone)]:
            bars = {f"{a}err": [p.errors.get(axis.key, 0.0) for p in points] for a, axis in (("x", x), ("y", y))}
            looks = self._of(points[0].entrant.name) | {"linestyle": style, "label": printable(name)}
            axes.errorbar(*_places(points, x, y), **bars, **looks, linewidth=1.2, markersize=5, elinewidth=0.7)
        _name(axes, x, y)
        if x.best < 0:
            axes.invert_xaxis()
        axes.legend()

    def sweep(self, axes: Any, curve: data.Curve, reference: Point, y: Axis) -> None:
        """A quantity over the values of a knob."""
        points = [p for p in curve.points if y.key in p.values]
        errors = [p.errors.get(y.key, 0.0) for p in points]
        looks = self._of(curve.name) | {"label": printable(curve.title)}
        axes.errorbar(curve.values(), [p.at(y) for p in points], yerr=errors, **looks, linewidth=1.2, markersize=5)
        if y.key in reference.values:
            axes.axhline(reference.at(y), color=GREY, linestyle=":", label=printable(reference.entrant.policy))
        axes.set(xlabel=printable(f"{curve.name}.{curve.knob}"), ylabel=y.title)
        _percent(axes.yaxis, y)
        axes.legend()

    def commits(self, axes: Any, chapter: Chapter, recorded: Sequence[Recording]) -> None:
        """In which step each position was committed."""
        names = {entrant.policy: entrant.name for entrant in chapter.conditions.policies}
        for recording in recorded:
            found = data.committed_at(recording)
            x, y = [p - recording.n_prompt for _, p in found], [step for step, _ in found]
            looks = self._of(names[recording.policy]) | {"label": printable(recording.policy)}
            axes.scatter(x, y, s=14, alpha=0.8, linewidths=0, **looks)
        axes.set(xlabel="generated token", ylabel="step of its commit")
        axes.invert_yaxis()
        axes.legend()

    def step_times(self, axes: Any, chapter: Chapter) -> None:
        """How long steps took."""
        entrants = [e for e in chapter.conditions.policies if len(data.step_times(chapter, e.policy))]
        found = axes.boxplot(
            [data.step_times(chapter, e.policy) for e in entrants], orientation="horizontal", whis=(5, 95),
            showfliers=False, widths=0.5, patch_artist=True, medianprops={"color": "black"},
        )  # fmt: skip
        for box, entrant in zip(found["boxes"], entrants, strict=True):
            box.set(facecolor=self._of(entrant.name)["color"], alpha=0.5)
        axes.set_yticks(range(1, len(entrants) + 1), [printable(e.policy) for e in entrants])
        axes.set(xlabel="ms per denoising step (whiskers: 5 to 95 %)", xlim=(0, None))
        axes.invert_yaxis()


def _places(points: Sequence[Point], x: Axis, y: Axis) -> tuple[list[float], list[float]]:
    return [p.at(x) for p in points], [p.at(y) for p in points]


def _name(axes: Any, x: Axis, y: Axis) -> None:
    axes.set(xlabel=x.title, ylabel=y.title)
    _percent(axes.xaxis, x)
    _percent(axes.yaxis, y)


def _percent(axis: Any, quantity: Axis) -> None:
    from matplotlib.ticker import PercentFormatter

    if quantity.percent:
        axis.set_major_formatter(PercentFormatter(1.0))


def _map(axes: Any, values: np.ndarray, highest: float, title: str, **more: Any) -> None:
    image = axes.imshow(
        values, cmap="Blues", vmin=0, vmax=highest, aspect="auto", interpolation="none", rasterized=True, **more
    )
    axes.grid(False)
    axes.figure.colorbar(image, ax=axes, label=title, pad=0.02)


def positions(axes: Any, steps: Steps) -> None:
    """The recompute map by position."""
    _map(axes, steps.layers / steps.recording.n_layers, 1.0, "share of layers computed")
    if steps.commits:
        at, where = zip(*steps.commits, strict=True)
        axes.scatter(where, at, s=5, color="#f07d00", linewidths=0)
    begin, *blocks = steps.borders
    axes.axvline(begin - 0.5, color="black", linewidth=0.8)
    for p in blocks:
        axes.axvline(p - 0.5, color="black", linewidth=0.6, linestyle="--")
    axes.set(xlabel="position", ylabel="denoising step")


def layers(axes: Any, steps: Steps) -> None:
    """The recompute map by layer."""
    _map(axes, steps.shares, 1.0, "share of rows computed", origin="lower")
    axes.set(xlabel="denoising step", ylabel="layer")


def drift(axes: Any, recording: Recording, measure: str) -> None:
    """Drift by layer and step."""
    assert recording.drift is not None
    values = data.drift_of(data.unpacked(recording, recording.drift.values), measure)
    _map(axes, values.T, data.highest([values]), data.drift_title(measure), origin="lower")
    axes.set(xlabel="denoising step", ylabel="layer")


def time_split(axes: Any, chapter: Chapter) -> None:
    """Where the time of a step goes."""
    known = {policy: found for policy in chapter.policies if (found := data.split(chapter, policy))}
    names, left = [printable(policy) for policy in known], np.zeros(len(known))
    for part in (*NAMES, "begin"):
        ms = np.array([found[part] for found in known.values()])
        if ms.any():
            axes.barh(names, ms, left=left, label=part, height=0.6)
            left += ms
    axes.set(xlabel="ms per denoising step")
    axes.invert_yaxis()
    axes.legend(ncols=len(NAMES) + 1, loc="lower left", bbox_to_anchor=(0, 1))
