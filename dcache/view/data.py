"""From results and recordings to what a figure shows; nothing here knows how it is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dcache import report
from dcache.compare import Comparison
from dcache.errors import UsageError
from dcache.report import Standing
from dcache.results import FILE as RESULTS
from dcache.results import Conditions, Entrant, Result
from dcache.view.drift import MEASURES, WHERE
from dcache.view.recording import FILE, Recording, read_recordings
from dcache.view.watch import NAMES

QUANTILES = 401  # points that stand for a distribution of step times


@dataclass(frozen=True)
class Axis:
    """A quantity that policies are placed by.

    Attributes:
        key: field of `Standing`.
        title: with its unit.
        best: 1 if more is better, -1 if less is.
        percent: whether it is shown in percent.
    """

    key: str
    title: str
    best: int
    percent: bool = False


SPEEDS = (
    Axis("tok_s", "tok/s", 1),
    Axis("row_share", "rows computed", -1, percent=True),
    Axis("nfe", "forward calls per text", -1),
)
QUALITIES = (Axis("accuracy", "accuracy", 1, percent=True), Axis("agreement", "agreement with the reference", 1))


@dataclass(frozen=True)
class Point:
    """A policy in a chart of quality against speed.

    Attributes:
        run: number of the comparison.
        entrant: the policy.
        values: by `Axis.key`.
        errors: half the length of an error bar, by `Axis.key`, where there is one.
    """

    run: int
    entrant: Entrant
    values: dict[str, float]
    errors: dict[str, float]

    def at(self, axis: Axis) -> float:
        """Its place on an axis."""
        return self.values[axis.key]


@dataclass(frozen=True)
class Curve:
    """Policies that differ in one numeric knob.

    Attributes:
        name: of the policy.
        knob: of its configuration.
        fixed: knobs that tell this curve from others of the same policy and knob, as written.
        points: by ascending value of the knob.
    """

    name: str
    knob: str
    fixed: str
    points: list[Point]

    @property
    def title(self) -> str:
        """How a legend calls it."""
        return f"{self.name} ({self.knob}{', ' if self.fixed else ''}{self.fixed})"

    def values(self) -> list[float]:
        """Of the knob."""
        return [point.entrant.knobs[self.knob] for point in self.points]


@dataclass(frozen=True)
class Chapter:
    """One comparison and what was recorded of it.

    Attributes:
        number: from 0.
        folder: where it was read from.
        comparison: conditions and results.
        recordings: by (problem, policy).
    """

    number: int
    folder: Path
    comparison: Comparison
    recordings: dict[tuple[str, str], Recording] = field(default_factory=dict)

    @staticmethod
    def read(number: int, folder: Path) -> Chapter:
        """Read the results and recordings of a folder; UsageError if they do not belong together."""
        comparison, file = Comparison.load(folder), folder / FILE
        if not file.exists():
            return Chapter(number, folder, comparison)
        conditions, recordings, _ = read_recordings(file)
        found = None if conditions is None else comparison.conditions.difference(conditions)
        if found is not None:
            name, mine, other = found
            raise UsageError(
                f"{file} does not belong to {RESULTS} beside it: {name} is {other!r} in one and {mine!r} in the other; "
                f"delete {FILE}"
            )
        return Chapter(number, folder, comparison, recordings)

    @property
    def conditions(self) -> Conditions:
        """Of the comparison."""
        return self.comparison.conditions

    @property
    def policies(self) -> list[str]:
        """In the order of the table."""
        return [entrant.policy for entrant in self.conditions.policies]

    @property
    def problems(self) -> list[str]:
        """Those that were recorded, in the order of the results."""
        recorded = {problem for problem, _ in self.recordings}
        return [p for p in dict.fromkeys(r.problem for r in self.comparison.results) if p in recorded]

    def recorded(self, problem: str) -> list[Recording]:
        """The recordings of a problem, in the order of the table."""
        found = (self.recordings.get((problem, policy)) for policy in self.policies)
        return [recording for recording in found if recording is not None]

    def step_ms(self, recording: Recording) -> list[float]:
        """Measured wall times of the steps of a recording; those of the recording if it went another way."""
        for result in self.comparison.results:
            if (result.problem, result.policy) == recording.key and len(result.step_ms) == recording.n_steps:
                return result.step_ms
        return recording.step_ms


# Quality against speed


def points(chapter: Chapter) -> list[Point]:
    """One per policy, in the order of the table; empty if no problem was finished by all of them."""
    entrants = {entrant.policy: entrant for entrant in chapter.conditions.policies}
    return [_point(chapter, entrants[row.policy], row) for row in chapter.comparison.standings]


def _point(chapter: Chapter, entrant: Entrant, row: Standing) -> Point:
    known = {axis.key: getattr(row, axis.key) for axis in (*SPEEDS, *QUALITIES)}
    errors = {
        "tok_s": row.tok_s_std,
        "accuracy": _binomial(row),
        "agreement": _agreement_error(chapter, entrant.policy),
    }
    return Point(
        run=chapter.number,
        entrant=entrant,
        values={key: float(value) for key, value in known.items() if value is not None},
        errors={key: error for key, error in errors.items() if error},
    )


def _binomial(row: Standing) -> float | None:
    """Standard error of an accuracy. Repeats of a problem are no further problems."""
    if row.accuracy is None or not row.n_scored:
        return None
    return math.sqrt(row.accuracy * (1 - row.accuracy) / row.n_scored)


def _agreement_error(chapter: Chapter, policy: str) -> float | None:
    """Standard error of the mean over problems."""
    by_key = {result.key: result for result in chapter.comparison.results}
    shares: dict[str, list[float]] = {}
    for (repeat, problem, name), result in by_key.items():
        base = by_key.get((repeat, problem, chapter.conditions.reference))
        if name == policy and base is not None:
            shares.setdefault(problem, []).append(report.agreement(result, base))
    means = [float(np.mean(each)) for each in shares.values()]
    return float(np.std(means, ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else None


def front(found: Iterable[Point], x: Axis, y: Axis) -> list[Point]:
    """The points that no other beats in one axis without losing in the other, from the slowest on."""
    placed = [point for point in found if x.key in point.values and y.key in point.values]
    ordered = sorted(placed, key=lambda p: (-x.best * p.at(x), -y.best * p.at(y)))  # the fastest first
    best: list[Point] = []
    for point in ordered:
        if not best or y.best * point.at(y) > y.best * best[-1].at(y):
            best.append(point)
    return best[::-1]


def curves(found: Sequence[Point]) -> list[Curve]:
    """Of each policy and comparison, the points that differ in one numeric knob and nothing else.

    If several knobs differ, the one with most values runs along the curves, and each combination of the others has one.
    """
    groups: dict[tuple[int, str], list[Point]] = {}
    for point in found:
        groups.setdefault((point.run, point.entrant.name), []).append(point)
    return [curve for (_, name), group in groups.items() for curve in _curves(name, group)]


def _curves(name: str, group: list[Point]) -> list[Curve]:
    differing = {k for point in group for k in point.entrant.knobs if len({_known(p, k) for p in group}) > 1}
    numeric = [k for k in sorted(differing) if sum(_is_number(p.entrant.knobs.get(k)) for p in group) > 1]
    if not numeric:
        return []
    knob = max(numeric, key=lambda k: len({_known(p, k) for p in group}))
    lines: dict[tuple[str, ...], list[Point]] = {}
    for point in group:
        if _is_number(point.entrant.knobs.get(knob)):
            rest = [f"{k}={point.entrant.knobs.get(k)}" for k in sorted(differing - {knob})]
            lines.setdefault((*rest, point.entrant.unmask), []).append(point)
    return [
        Curve(name, knob, ", ".join(rest), sorted(line, key=lambda p: float(p.entrant.knobs[knob])))
        for (*rest, _), line in lines.items()
        if len(line) > 1
    ]


def _known(point: Point, knob: str) -> str:
    return repr(point.entrant.knobs.get(knob))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# Times


def step_times(chapter: Chapter, policy: str) -> np.ndarray:
    """Wall times of all steps of a policy in ms; where they are very many, quantiles that stand for them."""
    times = [ms for result in chapter.comparison.results if result.policy == policy for ms in result.step_ms]
    if len(times) <= QUANTILES:
        return np.sort(np.array(times, dtype=float))
    return np.asarray(np.quantile(times, np.linspace(0, 1, QUANTILES)))


def split(chapter: Chapter, policy: str) -> dict[str, float]:
    """Mean ms per step by part, over the recorded texts; empty without any."""
    mine = [recording for (_, name), recording in chapter.recordings.items() if name == policy]
    n = sum(recording.n_steps for recording in mine)
    if not n:
        return {}
    found = {"begin": sum(recording.begin_ms for recording in mine) / n}
    return found | {part: sum(sum(r.split_ms.get(part, ())) for r in mine) / n for part in NAMES}


# Texts


@dataclass(frozen=True)
class Text:
    """What a policy made of a problem, beside the reference.

    Attributes:
        policy: the policy.
        correct: None if the problem has no answer.
        agreement: with the reference; None without one.
        differs: number of the first token that differs from the reference's, from 0; None if none does.
        before, token, after: the text, cut around that token; all of it is `before` if none differs. Where token ends
            are not known, the cut is at the first character that differs, and `token` is that character.
        by_token: whether they are known.
    """

    policy: str
    correct: bool | None
    agreement: float | None
    differs: int | None
    before: str
    token: str
    after: str
    by_token: bool


@dataclass(frozen=True)
class Side:
    """A problem and the texts of all policies.

    Attributes:
        problem: its id.
        question: None if it was not recorded.
        answer: None if there is none, or it was not recorded.
        texts: in the order of the table.
    """

    problem: str
    question: str | None
    answer: str | None
    texts: list[Text]

    @property
    def changed(self) -> int:
        """Policies whose text differs from that of the reference."""
        return sum(text.differs is not None for text in self.texts)


def sides(chapter: Chapter) -> list[Side]:
    """The problems that the reference has finished, as first repeated."""
    first = {(r.problem, r.policy): r for r in chapter.comparison.results if r.repeat == 0}
    found = []
    for problem in dict.fromkeys(problem for problem, _ in first):
        base = first.get((problem, chapter.conditions.reference))
        if base is None:
            continue
        texts = [
            _text(result, base, chapter.recordings.get((problem, policy)))
            for policy in chapter.policies
            if (result := first.get((problem, policy))) is not None
        ]
        recorded = chapter.recorded(problem)
        question, answer = (recorded[0].question, recorded[0].answer) if recorded else (None, None)
        found.append(Side(problem, question, answer, texts))
    return found


def _text(result: Result, base: Result, recording: Recording | None) -> Text:
    text, other = result.text or "", base.text or ""
    at = first_difference(result.tokens, base.tokens)
    ends = recording.ends if recording is not None and recording.same and recording.text == text else []
    if at is None:
        cut = (text, "", "")
    elif ends:
        begin, end = ([0, *ends][min(at, len(ends))], [*ends, len(text)][min(at, len(ends))])
        cut = text[:begin], text[begin:end], text[end:]
    else:
        begin = first_difference(text, other) or 0
        cut = text[:begin], text[begin : begin + 1], text[begin + 1 :]
    return Text(result.policy, result.correct, report.agreement(result, base), at, *cut, by_token=bool(ends))


def first_difference(a: Sequence[object], b: Sequence[object]) -> int | None:
    """Index of the first entry in which two sequences differ, the end of the shorter one included; None if equal."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b)) if len(a) != len(b) else None


# Steps


@dataclass(frozen=True)
class Steps:
    """What a recompute map shows, all of one text under one policy.

    Attributes:
        recording: where it is from.
        layers: (steps, length) int64, layers that computed the row.
        shares: (layers, steps) float64, rows that the layer computed, of all rows.
        labels: of each position, what it is: "prompt 3", "image row 17", "generated 5, block 1".
    """

    recording: Recording
    layers: np.ndarray
    shares: np.ndarray
    labels: list[str]

    @staticmethod
    def of(recording: Recording) -> Steps:
        """From a recording; UsageError if its maps cannot be unpacked."""
        rows = unpacked(recording, lambda: recording.rows.mask())
        labels = [_label(recording, p) for p in range(recording.length)]
        return Steps(recording, rows.sum(1), rows.mean(2).T, labels)

    @property
    def borders(self) -> list[int]:
        """Positions at which the generation and each of its blocks after the first begin."""
        recording = self.recording
        size = recording.block_length or len(recording.canvas) or 1
        return list(range(recording.n_prompt, recording.length, size))

    @property
    def commits(self) -> list[tuple[int, int]]:
        """Step and position of every commit."""
        return [(step, p) for step, found in enumerate(self.recording.commits) for p in found]


def unpacked(recording: Recording, unpack: Callable[[], np.ndarray]) -> np.ndarray:
    """What a packed array holds; UsageError naming the recording if it is damaged."""
    try:
        return unpack()
    except ValueError as error:
        raise UsageError(
            f"the recording of problem {recording.problem!r} under {recording.policy!r} has {error}; "
            f"delete {FILE} and record again"
        ) from error


def _label(recording: Recording, p: int) -> str:
    if any(begin <= p < end for begin, end in recording.images):
        return f"image row {p}"
    if p < recording.n_prompt:
        return f"prompt token {p}"
    at = p - recording.n_prompt
    block = f", block {at // recording.block_length + 1}" if recording.block_length else ""
    return f"generated token {at}{block}"


def drift_of(values: np.ndarray, measure: str, where: str = "all") -> np.ndarray:
    """(steps, layers) float32 of a measure in (measures, steps, layers, where); 0 means no drift, for a cosine too."""
    found = values[MEASURES.index(measure), :, :, WHERE.index(where)]
    return (1 - found if "cosine" in measure else found).astype(np.float32)


def highest(values: Iterable[np.ndarray]) -> float:
    """The largest number of some arrays, for the end of their scale; 1 if there is none above 0."""
    finite = [x[np.isfinite(x)] for x in values]
    return float(max((x.max() for x in finite if x.size), default=0.0)) or 1.0


def drift_title(measure: str) -> str:
    """What `drift_of` gives."""
    return f"1 − {measure}" if "cosine" in measure else measure


def committed_at(recording: Recording) -> list[tuple[int, int]]:
    """Step and position of the last commit of each generated row that had one, by position."""
    last: dict[int, int] = {}
    for step, found in enumerate(recording.commits):
        last |= dict.fromkeys(found, step)
    return [(step, p) for p, step in sorted(last.items())]


def confidence_at(recording: Recording, step: int, position: int) -> float | None:
    """Of the candidate of a position in a step; None where nothing was predicted."""
    seen = recording.candidates[step]
    found = dict(zip(seen.at, seen.confidence, strict=True))
    return found.get(position)


# Several comparisons


def differences(chapters: Sequence[Chapter]) -> list[tuple[str, list[str]]]:
    """Conditions in which comparisons differ: the name, and the value in each."""
    facts = [_facts(chapter.conditions) for chapter in chapters]
    names = dict.fromkeys(name for each in facts for name in each)
    table = [(name, [str(each.get(name, "-")) for each in facts]) for name in names]
    return [(name, values) for name, values in table if len(set(values)) > 1]


def _facts(conditions: Conditions) -> dict[str, Any]:
    facts = conditions.model_dump(mode="json", exclude={"kind", "started", "settings", "policies", "weights"})
    return facts | conditions.settings
