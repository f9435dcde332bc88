"""The figures of the page, as plotly draws them.

A figure has one or several variants, between which the reader chooses. Colours are given by role, in `meta`, and filled
in by the page, which knows whether it is light or dark:

    {"role": "series", "index": 2}    the colour of a policy; -1 is the reference
    {"role": "part", "index": 0}      the colour of a part of a step
    {"role": "front"}                 a line in the background
    {"role": "commit"}                the dots on a map
    {"role": "scale"}                 a map whose colours run from nothing to all

Texts from outside are escaped, because plotly reads simple HTML in labels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from dcache.errors import UsageError
from dcache.results import Entrant
from dcache.text import printable
from dcache.view import data
from dcache.view.data import QUALITIES, SPEEDS, Axis, Chapter, Curve, Point, Steps
from dcache.view.drift import MEASURES, WHERE
from dcache.view.recording import Recording
from dcache.view.watch import NAMES

if TYPE_CHECKING:
    import plotly.graph_objects as go  # type: ignore[import-untyped]

REFERENCE = -1
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star", "triangle-down", "pentagon", "x")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
MASK = "[MASK]"
CELLS = {"showgrid": False, "zeroline": False}
MOST_TICKS = 12
MOST_BLOCKS = 12  # whose numbers are written above a map
LEAST_SHARE = 0.1  # that an axis of shares spans
Variant = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """What the reader may choose: a label and its options, the first one at the beginning."""

    label: str
    options: list[str]

    @property
    def several(self) -> bool:
        """Whether there is anything to choose."""
        return len(self.options) > 1


@dataclass(frozen=True)
class Figure:
    """One figure of the page.

    Attributes:
        name: unique on the page, of letters, digits and dashes.
        title: its heading.
        caption: how to read it.
        variants: by the numbers of the chosen options, "0-2"; each has data and layout, and for maps a `tip`.
        choices: what the keys of `variants` stand for.
    """

    name: str
    title: str
    caption: str
    variants: dict[str, Variant]
    choices: list[Choice] = field(default_factory=list)


def plotly() -> Any:
    """``plotly.graph_objects``; UsageError if plotly is not installed."""
    try:
        import plotly.graph_objects
    except ImportError:
        raise UsageError("a report needs plotly: pip install 'dcache[report]'") from None
    return plotly.graph_objects


class Palette:
    """Which colour and which symbol a policy has, the same all over the page.

    Args:
        chapters: whose policies share them.
    """

    def __init__(self, chapters: Sequence[Chapter]):
        references = {chapter.conditions.policies[0].name for chapter in chapters}
        names = [entrant.name for chapter in chapters for entrant in chapter.conditions.policies]
        others = [name for name in dict.fromkeys(names) if name not in references]
        self._index = dict.fromkeys(references, REFERENCE) | {name: i for i, name in enumerate(others)}
        self._turn: dict[str, int] = {}
        for chapter in chapters:
            seen: dict[str, int] = {}
            for entrant in chapter.conditions.policies:
                self._turn[entrant.policy] = seen.get(entrant.name, 0)
                seen[entrant.name] = self._turn[entrant.policy] + 1

    def role(self, name: str) -> dict[str, Any]:
        """The `meta` of a trace of the policy of that registered name."""
        return {"role": "series", "index": self._index[name]}

    def symbol(self, name: str) -> str:
        """Its marker."""
        return SYMBOLS[(self._index[name] + 1) % len(SYMBOLS)]

    def index(self, name: str) -> int:
        """Its number; that of the reference is -1."""
        return self._index[name]

    def own_symbol(self, entrant: Entrant) -> str:
        """A marker that tells configurations of one policy apart, where they are not joined to a curve."""
        return SYMBOLS[(self._index[entrant.name] + 1 + self._turn[entrant.policy]) % len(SYMBOLS)]

    def dash(self, entrant: Entrant) -> str:
        """Likewise the dashes of a line."""
        return DASHES[self._turn[entrant.policy] % len(DASHES)]


def label(text: str) -> str:
    """A text from outside for plotly, which reads simple HTML."""
    return escape(printable(text), quote=False)


def variant(figure: go.Figure, height: int, **more: Any) -> Variant:
    """A plotly figure as JSON has it, without the template: the page has its own looks."""
    found: Variant = json.loads(figure.to_json())
    found["layout"].pop("template", None)
    found["layout"]["height"] = height
    return found | more


def several(options: Sequence[Sequence[Any]], make: Any) -> dict[str, Variant]:
    """A variant for each combination of options, by their numbers; those that `make` gives as None are left out."""
    found = {}
    for chosen in product(*(range(len(each)) for each in options)):
        made = make(*(each[i] for each, i in zip(options, chosen, strict=True)))
        if made is not None:
            found["-".join(map(str, chosen))] = made
    return found


def reference_last(policies: Sequence[str]) -> list[str]:
    """Where one policy is shown at a time, the first is one that has something to show."""
    return [*policies[1:], *policies[:1]]


# Quality against speed


def tradeoff(chapters: Sequence[Chapter], palette: Palette, name: str) -> Figure | None:
    """All policies by speed and quality; None if there is nothing to show."""
    found = [point for chapter in chapters for point in data.points(chapter)]
    qualities = [axis for axis in QUALITIES if any(axis.key in point.values for point in found)]
    if not found or not qualities:
        return None
    return Figure(
        name,
        "Quality against speed",
        "Up and to the right is better; towards fewer rows or calls the axis runs backwards, so right stays better. "
        "The dotted line is the Pareto front: no policy beats one on it in one axis without losing in the other. "
        "Bars: one standard error of accuracy (binomial) and agreement (over problems), one standard deviation of "
        "tok/s over repeats. Points that differ in one knob are joined.",
        several([qualities, SPEEDS], lambda y, x: _tradeoff(found, x, y, palette, len(chapters) > 1)),
        [Choice("quality", [axis.title for axis in qualities]), Choice("speed", [axis.title for axis in SPEEDS])],
    )


def _tradeoff(found: Sequence[Point], x: Axis, y: Axis, palette: Palette, runs: bool) -> Variant:
    go = plotly()
    shown = [point for point in found if y.key in point.values]
    best = data.front(shown, x, y)
    figure = go.Figure()
    figure.add_scatter(
        x=[p.at(x) for p in best], y=[p.at(y) for p in best], mode="lines", name="Pareto front", line={"dash": "dot"},
        hoverinfo="skip", meta={"role": "front"}, showlegend=len(best) > 1,
    )  # fmt: skip
    joined = data.curves(shown)
    alone = [p for p in shown if not any(p in curve.points for curve in joined)]
    for curve in joined:
        title = curve.title + (f", run {curve.points[0].run + 1}" if runs else "")
        figure.add_scatter(**_scatter(curve.points, x, y, title, palette, curve.knob), mode="lines+markers")
    for point in alone:
        title = point.entrant.policy + (f", run {point.run + 1}" if runs else "")
        figure.add_scatter(**_scatter([point], x, y, title, palette), mode="markers")
    towards = {"autorange": "reversed"} if x.best < 0 else {"rangemode": "tozero"}
    figure.update_layout(xaxis=_axis(x) | towards, yaxis=_axis(y) | {"range": _range(shown, y)})
    return variant(figure, 460)


def _range(points: Sequence[Point], axis: Axis) -> list[float]:
    """Of a share: all points with their bars, and no less than a tenth, so that equal points are not torn apart."""
    spans = [(p.at(axis) - p.errors.get(axis.key, 0.0), p.at(axis) + p.errors.get(axis.key, 0.0)) for p in points]
    whole = max(1.0, *(p.at(axis) for p in points))  # a bar does not lead beyond what there is; rows may exceed 1
    low, high = min(low for low, _ in spans), min(whole, max(high for _, high in spans))
    room = max(high - low, LEAST_SHARE)
    return [max(min(low, high - room) - 0.1 * room, -0.02), min(high + 0.1 * room, whole + 0.02)]


def _axis(axis: Axis) -> dict[str, Any]:
    return {"title": {"text": axis.title}} | ({"tickformat": ".0%"} if axis.percent else {})


def _scatter(
    points: Sequence[Point], x: Axis, y: Axis, title: str, palette: Palette, knob: str | None = None
) -> dict[str, Any]:
    name = points[0].entrant.name
    return {
        "x": [p.at(x) for p in points],
        "y": [p.at(y) for p in points],
        "error_x": _bars(points, x),
        "error_y": _bars(points, y),
        "name": label(title),
        "text": [_told(p, knob) for p in points],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {"symbol": palette.symbol(name), "size": 10},
        "meta": palette.role(name),
    }


def _bars(points: Sequence[Point], axis: Axis) -> dict[str, Any]:
    errors = [p.errors.get(axis.key, 0.0) for p in points]
    return {"array": errors, "thickness": 1.2, "width": 3, "visible": any(errors)}


def _told(point: Point, knob: str | None) -> str:
    """The label of a point: its name, the knob of its curve, then every quantity."""
    lines = [f"<b>{label(point.entrant.policy)}</b>"]
    lines += [] if knob is None else [label(f"{knob}: {point.entrant.knobs[knob]}")]
    for axis in (*QUALITIES, *SPEEDS):
        if axis.key in point.values:
            lines.append(f"{axis.title}: {quantity(point, axis)}")
    return "<br>".join([*lines, f"unmasker: {label(point.entrant.unmask)}"])


def quantity(point: Point, axis: Axis) -> str:
    """A value with its error, as a reader wants it."""
    value, error = point.at(axis), point.errors.get(axis.key)
    if axis.percent:
        return f"{100 * value:.1f} %" + (f" ± {100 * error:.1f}" if error else "")
    digits = 3 if axis.key == "agreement" else 1
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error else "")


def sweeps(chapter: Chapter, palette: Palette, name: str) -> Figure | None:
    """Each quantity over the values of a knob; None without a sweep."""
    found = data.points(chapter)
    joined = data.curves(found)
    if not joined:
        return None
    axes = [axis for axis in (*QUALITIES, *SPEEDS) if any(axis.key in point.values for point in found)]
    return Figure(
        name,
        "Sweeps",
        "A quantity over the values of a knob. The dotted line is the reference.",
        several([joined, axes], lambda curve, y: _sweep(curve, found[0], y, palette)),
        [Choice("sweep", [curve.title for curve in joined]), Choice("quantity", [axis.title for axis in axes])],
    )


def _sweep(curve: Curve, reference: Point, y: Axis, palette: Palette) -> Variant | None:
    points = [p for p in curve.points if y.key in p.values]
    if not points:
        return None
    go, values = plotly(), curve.values()
    figure = go.Figure()
    if y.key in reference.values:
        figure.add_scatter(
            x=[values[0], values[-1]], y=[reference.at(y)] * 2, mode="lines", line={"dash": "dot"},
            name=label(reference.entrant.policy), hoverinfo="skip", meta={"role": "front"},
        )  # fmt: skip
    lines = _scatter(points, y, y, curve.title, palette, curve.knob) | {"x": values, "error_x": {"visible": False}}
    figure.add_scatter(**lines, mode="lines+markers")
    figure.update_layout(xaxis={"title": {"text": label(f"{curve.name}.{curve.knob}")}}, yaxis=_axis(y))
    if y.percent or y in QUALITIES:
        figure.update_yaxes(range=_range([*points, *([reference] if y.key in reference.values else [])], y))
    return variant(figure, 380)


# Maps


def maps(chapter: Chapter, name: str) -> Figure | None:
    """What each policy recomputed, by position and by layer; None if nothing was recorded."""
    if not chapter.recordings:
        return None
    views = {"position": _positions, "layer": _layers}
    known = {key: Steps.of(recording) for key, recording in chapter.recordings.items()}

    def make(policy: str, problem: str, view: str) -> Variant | None:
        steps = known.get((problem, policy))
        return None if steps is None else views[view](chapter, steps)

    policies = reference_last(chapter.policies)
    options = [policies, chapter.problems, list(views)]
    return Figure(
        name,
        "What is recomputed",
        "Each line is a denoising step, from top to bottom. By position: the darker a cell, the more layers computed "
        "that row in that step; what is blank was reused. Dots are commits, the solid line is where generation begins, "
        "dashed lines are blocks. By layer: the share of all rows that a layer computed.",
        several(options, make),
        [
            Choice("policy", policies),
            Choice("text", chapter.problems),
            Choice("view", ["step × position", "layer × step"]),
        ],
    )


def _height(n: int) -> int:
    """Of a map with so many lines, in pixels."""
    return min(720, max(300, 130 + 7 * n))


def _positions(chapter: Chapter, steps: Steps) -> Variant:
    go = plotly()
    n, length = steps.layers.shape
    layers = steps.recording.n_layers
    kind = np.uint8 if layers < 256 else np.int32
    figure = go.Figure()
    figure.add_heatmap(
        z=steps.layers.astype(kind), zmin=0, zmax=layers, hoverinfo="none", meta={"role": "scale"},
        colorbar=_bar([0, layers / 2, layers], "layers computed"),
    )  # fmt: skip
    at, where = zip(*steps.commits, strict=True) if steps.commits else ((), ())
    figure.add_scatter(
        x=list(where), y=list(at), mode="markers", marker={"size": 4}, hoverinfo="skip", meta={"role": "commit"},
        showlegend=False,
    )  # fmt: skip
    begin, *blocks = steps.borders
    figure.update_layout(
        xaxis={"title": {"text": "position"}, "range": [-0.5, length - 0.5]} | CELLS,
        yaxis=_counted("denoising step", n) | CELLS,
        shapes=[_border(begin, "solid"), *(_border(p, "dash") for p in blocks)],
        annotations=_spans(steps),
    )  # fmt: skip
    return variant(figure, _height(n), tip=tip(chapter, steps))


def _counted(title: str, n: int, down: bool = True) -> dict[str, Any]:
    """An axis of whole numbers from 0, from top to bottom unless told otherwise."""
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, n) if step * MOST_TICKS >= n)
    return {"title": {"text": title}, "range": [n - 0.5, -0.5] if down else [-0.5, n - 0.5], "tick0": 0, "dtick": every}


def _border(p: int, dash: str) -> dict[str, Any]:
    place = {"type": "line", "xref": "x", "yref": "paper", "x0": p - 0.5, "x1": p - 0.5, "y0": 0, "y1": 1}
    return place | {"line": {"width": 1, "dash": dash}}


def _spans(steps: Steps) -> list[dict[str, Any]]:
    """What the parts of the canvas are, above them; no block is named where they are very many."""
    begin, *blocks = steps.borders
    ends = [begin, *blocks, steps.recording.length]
    names = ["prompt", "block 1" if blocks else "generation", *map(str, range(2, len(blocks) + 2))]
    spans = zip(names, [0, *ends[:-1]], ends, strict=True)
    shown = list(spans)[: None if len(blocks) < MOST_BLOCKS else 1]
    place = {"yref": "paper", "y": 1, "yanchor": "bottom", "showarrow": False, "font": {"size": 11}}
    return [{"text": name, "x": (left + right - 1) / 2, **place} for name, left, right in shown]


def _bar(ticks: Sequence[float], title: str) -> dict[str, Any]:
    """A colour bar from nothing to all."""
    return {
        "tickvals": list(ticks), "ticktext": ["0 %", "50 %", "100 %"], "title": {"text": title, "side": "right"},
        "thickness": 10, "outlinewidth": 0, "len": 0.9,
    }  # fmt: skip


def _layers(chapter: Chapter, steps: Steps) -> Variant:
    go = plotly()
    n_layers, n = steps.shares.shape
    figure = go.Figure()
    figure.add_heatmap(
        z=steps.shares.astype(np.float32), zmin=0, zmax=1, meta={"role": "scale"},
        colorbar=_bar([0, 0.5, 1], "rows computed"),
        hovertemplate="step %{x}<br>layer %{y}<br>%{z:.1%} of the rows<extra></extra>",
    )  # fmt: skip
    figure.update_layout(
        xaxis=_counted("denoising step", n, down=False) | CELLS,
        yaxis=_counted("layer", n_layers, down=False) | CELLS,
    )  # fmt: skip
    return variant(figure, min(560, max(260, 150 + 16 * n_layers)))


def tip(chapter: Chapter, steps: Steps) -> dict[str, Any]:
    """What the page tells of a cell of a map, as data: it looks the cell up and shows texts as texts.

    ``prompt`` has the token of each prompt position; ``events`` for each generated position the steps that wrote it,
    with the token, or the mask; ``seen`` for each step what it predicted where, and how surely.
    """
    recording = steps.recording
    written: dict[int, list[tuple[int, str]]] = {}
    last: dict[int, str] = {}
    for step in range(recording.n_steps):
        tokens = dict(zip(recording.candidates[step].at, recording.candidates[step].tokens, strict=True))
        for p in recording.commits[step]:
            final = recording.canvas[p - recording.n_prompt]
            last[p] = recording.piece(tokens.get(p, final))
            written.setdefault(p, []).append((step, last[p]))
        for p in recording.remasks[step]:
            written.setdefault(p, []).append((step, MASK))
    image = {p for begin, end in recording.images for p in range(begin, end)}
    return {
        "labels": steps.labels,
        "layers": recording.n_layers,
        "length": recording.length,
        "prompt": ["" if p in image else recording.piece(i) for p, i in enumerate(recording.prompt_ids)],
        "events": {p: [list(each) for each in found] for p, found in written.items()},
        "seen": [
            {p: [recording.piece(i), sure] for p, i, sure in zip(each.at, each.tokens, each.confidence, strict=True)}
            for each in recording.candidates
        ],
        "rows": [round(n / recording.n_layers, 1) for n in recording.row_layers],
        "refresh": recording.refresh,
        "again": _second_passes(recording),
        "ms": chapter.step_ms(recording),
    }


def _second_passes(recording: Recording) -> list[bool]:
    if recording.again is None:
        return [False] * recording.n_steps
    again = recording.again
    return [bool(step.any()) for step in data.unpacked(recording, again.mask)]


def commit_order(chapter: Chapter, palette: Palette, name: str) -> Figure | None:
    """In which step each position was committed; None if nothing was recorded."""
    if not chapter.recordings:
        return None
    entrants = {entrant.policy: entrant for entrant in chapter.conditions.policies}

    def make(problem: str) -> Variant:
        go = plotly()
        figure = go.Figure()
        for recording in chapter.recorded(problem):
            found = data.committed_at(recording)
            entrant = entrants[recording.policy]
            figure.add_scatter(
                x=[p - recording.n_prompt for _, p in found], y=[step for step, _ in found], mode="markers",
                name=label(recording.policy), text=[_commit(recording, step, p) for step, p in found],
                hovertemplate="%{text}<extra></extra>", meta=palette.role(entrant.name),
                marker={"size": 6, "symbol": palette.own_symbol(entrant), "opacity": 0.8},
            )  # fmt: skip
        figure.update_layout(
            xaxis={"title": {"text": "generated token"}},
            yaxis=_counted("step of its commit", max(recording.n_steps for recording in chapter.recorded(problem))),
        )
        return variant(figure, 420)

    return Figure(
        name,
        "Commit order",
        "Where policies commit the same token in the same step, their markers cover each other. "
        "A click on a name in the legend hides it.",
        several([chapter.problems], make),
        [Choice("text", chapter.problems)],
    )


def _commit(recording: Recording, step: int, p: int) -> str:
    sure = data.confidence_at(recording, step, p)
    token = recording.piece(recording.canvas[p - recording.n_prompt])
    told = "by rule" if sure is None else f"confidence {sure:.3f}"
    return (
        f"<b>{label(recording.policy)}</b><br>step {step}, token {p - recording.n_prompt}<br>{_quoted(token)}, {told}"
    )


def _quoted(token: str) -> str:
    """A token in quotes, with spaces and newlines that can be seen."""
    return label(f"“{token}”".replace("\n", "↵").replace(" ", "␣"))


# Drift


def drift(chapter: Chapter, name: str) -> Figure | None:
    """Drift of keys and values by layer and step; None if it was not measured."""
    known = _drifts(chapter)
    if not known:
        return None

    def make(measure: str, policy: str, problem: str) -> Variant | None:
        shown = {key: data.drift_of(x, measure).T for key, x in known.items()}
        highest = data.highest(shown.values())  # one scale for all, so that colours compare
        return None if (problem, policy) not in shown else _drift(shown[problem, policy], measure, highest)

    policies = [policy for policy in reference_last(chapter.policies) if any(policy == name for _, name in known)]
    return Figure(
        name,
        "KV drift by layer",
        "How far the stored keys and values are from those of a full recompute of the same canvas: relative distance "
        "|stored − fresh| / |fresh|, or cosine, mean over the rows that could be attended to. Before the commits of "
        "the step; a policy that computes every row has none.",
        several([MEASURES, policies, chapter.problems], make),
        [Choice("measure", list(MEASURES)), Choice("policy", policies), Choice("text", chapter.problems)],
    )


def _drifts(chapter: Chapter) -> dict[tuple[str, str], np.ndarray]:
    return {
        key: data.unpacked(recording, recording.drift.values)
        for key, recording in chapter.recordings.items()
        if recording.drift is not None
    }


def _drift(shown: np.ndarray, measure: str, highest: float) -> Variant:
    go, title = plotly(), data.drift_title(measure)
    figure = go.Figure()
    figure.add_heatmap(
        z=shown, zmin=0, zmax=highest, meta={"role": "scale"},
        colorbar={"title": {"text": title, "side": "right"}, "thickness": 10, "outlinewidth": 0, "len": 0.9},
        hovertemplate="step %{x}<br>layer %{y}<br>" + title + " %{z:.4f}<extra></extra>",
    )  # fmt: skip
    figure.update_layout(
        xaxis=_counted("denoising step", shown.shape[1], down=False) | CELLS,
        yaxis=_counted("layer", len(shown), down=False) | CELLS,
    )
    return variant(figure, min(560, max(260, 150 + 16 * len(shown))))


def drift_over_steps(chapter: Chapter, palette: Palette, name: str) -> Figure | None:
    """Mean drift over all layers, of each policy, by region; None if it was not measured."""
    known = _drifts(chapter)
    regions = [where for i, where in enumerate(WHERE) if any(np.isfinite(x[..., i]).any() for x in known.values())]
    if not known or not regions:
        return None
    entrants = {entrant.policy: entrant for entrant in chapter.conditions.policies}

    def make(measure: str, where: str, problem: str) -> Variant:
        go = plotly()
        figure = go.Figure()
        for policy in chapter.policies:
            if (values := known.get((problem, policy))) is None:
                continue
            figure.add_scatter(
                y=data.drift_of(values, measure, where).mean(1), mode="lines", name=label(policy),
                meta=palette.role(entrants[policy].name), line={"width": 2, "dash": palette.dash(entrants[policy])},
                hovertemplate=f"<b>{label(policy)}</b><br>step %{{x}}: %{{y:.4f}}<extra></extra>",
            )  # fmt: skip
        figure.update_layout(
            xaxis={"title": {"text": "denoising step"}},
            yaxis={"title": {"text": f"{data.drift_title(measure)}, mean over layers"}, "rangemode": "tozero"},
        )
        return variant(figure, 380)

    return Figure(
        name,
        "KV drift over steps",
        "The same, mean over all layers, for all rows or those of a region.",
        several([MEASURES, regions, chapter.problems], make),
        [Choice("measure", list(MEASURES)), Choice("rows", regions), Choice("text", chapter.problems)],
    )


# Times


def step_times(chapter: Chapter, palette: Palette, name: str) -> Figure | None:
    """How long steps took; None without results."""
    known = {entrant.policy: data.step_times(chapter, entrant.policy) for entrant in chapter.conditions.policies}
    shown = [entrant for entrant in chapter.conditions.policies if len(known[entrant.policy])]
    if not shown:
        return None
    go = plotly()
    figure = go.Figure()
    for entrant in reversed(shown):
        ms = known[entrant.policy]
        p5, p50, p95 = np.percentile(ms, [5, 50, 95])
        told = f"<b>{label(entrant.policy)}</b><br>median {p50:.3g} ms<br>5 to 95 %: {p5:.3g} to {p95:.3g} ms"
        figure.add_violin(
            x=ms, y=[label(entrant.policy)] * len(ms), orientation="h", points=False, spanmode="hard", width=0.9,
            box={"visible": True, "width": 0.18}, meta=palette.role(entrant.name), hoverinfo="skip", showlegend=False,
        )  # fmt: skip
        figure.add_scatter(
            x=[p50], y=[label(entrant.policy)], mode="markers", marker={"size": 9, "symbol": "line-ns-open"},
            text=[told], hovertemplate="%{text}<extra></extra>", showlegend=False, meta=palette.role(entrant.name),
        )  # fmt: skip
    figure.update_layout(
        xaxis={"title": {"text": "ms per denoising step"}, "rangemode": "tozero"}, yaxis={"automargin": True},
        violingap=0.1,
    )  # fmt: skip
    caption = "Wall time of every step of every text, its wait for the device included. The box is the middle half."
    return Figure(name, "Step times", caption, {"": variant(figure, 130 + 70 * len(shown))})


def time_split(chapter: Chapter, name: str) -> Figure | None:
    """Where the time of a step goes; None if nothing was recorded."""
    known = {policy: data.split(chapter, policy) for policy in chapter.policies}
    shown = [policy for policy in chapter.policies if known[policy]]
    if not shown:
        return None
    go = plotly()
    figure = go.Figure()
    for number, part in enumerate((*NAMES, "begin")):
        if not any(known[policy][part] for policy in shown):
            continue
        ms = [known[policy][part] for policy in shown]
        shares = [x / (sum(known[policy].values()) or 1.0) for x, policy in zip(ms, shown, strict=True)]
        figure.add_bar(
            x=ms, y=[label(policy) for policy in shown], orientation="h", name=part, customdata=shares,
            meta={"role": "part", "index": number},
            hovertemplate=f"<b>%{{y}}</b><br>{part}: %{{x:.3f}} ms, %{{customdata:.1%}}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(
        barmode="stack", xaxis={"title": {"text": "ms per denoising step"}},
        yaxis={"automargin": True, "autorange": "reversed"}, legend={"traceorder": "normal"},
    )  # fmt: skip
    caption = (
        "Mean over the recorded texts, by a stopwatch in the loop. pass: launching the pass and waiting for it; second "
        "pass: a step that was reviewed and run again; plan: the policy on the host; unmask: the unmasker on the host; "
        "begin: before the first step, divided among the steps; other: the rest of the loop."
    )
    return Figure(name, "Where the time goes", caption, {"": variant(figure, 150 + 44 * len(shown))})


def all_figures(chapter: Chapter, palette: Palette) -> list[Figure]:
    """The figures of a chapter, in the order of the page."""
    at = f"run{chapter.number + 1}"
    found: Iterable[Figure | None] = (
        tradeoff([chapter], palette, f"{at}-tradeoff"),
        sweeps(chapter, palette, f"{at}-sweeps"),
        maps(chapter, f"{at}-maps"),
        commit_order(chapter, palette, f"{at}-commits"),
        drift(chapter, f"{at}-drift"),
        drift_over_steps(chapter, palette, f"{at}-drift-steps"),
        step_times(chapter, palette, f"{at}-step-times"),
        time_split(chapter, f"{at}-split"),
    )
    return [figure for figure in found if figure is not None]
