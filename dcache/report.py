"""What a comparison says: one line per policy, a summary, and warnings that propose the next step.

========================  ==============================================================================================
accuracy                  share of the problems with an answer that the text gets right
agreement                 share of generated tokens equal to those of the reference, up to the end of the longer of the
                          two texts; mean over problems
tok/s                     tokens up to the first end-of-text, all problems, divided by their wall time
speedup                   tok/s divided by that of the reference
NFE                       forward calls; mean over problems
tokens/forward            tokens up to the first end-of-text, divided by forward calls
rows computed             row-layers that ran a query, as a share of as many steps without a cache
refreshes                 steps that computed every row in the last layer; mean over problems
image, text, generated    rows and refreshes of image rows, of other prompt rows and of generated rows: row-layers as a
                          share of those of the region without a cache, and of all that the policy computed; steps that
                          computed every row of the region in the last layer
========================  ==============================================================================================

± is one standard deviation over repeats, carried through the ratio. A comparison that was interrupted is judged by the
problems that all of its policies have finished.
"""

from __future__ import annotations

import csv
import io
import json
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dcache.calls import write_value
from dcache.config import DecodeSettings
from dcache.regions import REGIONS, Region
from dcache.results import Conditions, Entrant, Result
from dcache.text import printable

WIDTH = 100
NAME_WIDTH = 32  # a longer name of a policy takes a line of its own, so that one does not push all numbers aside
FEW_PROBLEMS = 30
LOW_ACCURACY = 0.2
NOTHING = "No problem was finished by all policies yet."
Z = 2  # standard errors that a difference must exceed


@dataclass(frozen=True)
class Part:
    """What fell on one region, over the problems that have rows there; shares are 0 to 1, or above.

    Attributes:
        row_share: row-layers computed, of those of the region without a cache; None if no problem has such rows.
        of_rows: row-layers computed, of those that the policy computed in all regions.
        refreshed_share: row-layers refreshed, of those of the region without a cache; None if no problem has such rows.
        of_refreshed: row-layers refreshed, of those that the policy refreshed in all regions.
        refreshes: steps whose last layer refreshed the region; mean over problems; None if none has such rows.
    """

    row_share: float | None
    of_rows: float
    refreshed_share: float | None
    of_refreshed: float
    refreshes: float | None


@dataclass(frozen=True)
class Standing:
    """How a policy did, over the problems that all policies have finished; shares are 0 to 1.

    Attributes:
        policy: as the table calls it.
        n_results: texts, over all repeats.
        n_problems: problems.
        n_scored: of those, the ones with an answer.
        accuracy: None without answers.
        agreement: with the reference.
        tok_s: mean over repeats.
        tok_s_std: None with one repeat.
        speedup: None if the reference generated nothing.
        speedup_std: None with one repeat, and for the reference.
        nfe: mean over problems.
        tokens_per_forward: up to the first end-of-text.
        row_share: row-layers computed.
        refreshes: mean over problems.
        step_p50_ms, step_p95_ms: wall time of a step.
        cache_bytes: most held by stores.
        peak_bytes: most GPU memory; None on a CPU.
        regions: by name; None if a result is of an earlier version, which did not keep them apart.
    """

    policy: str
    n_results: int
    n_problems: int
    n_scored: int
    accuracy: float | None
    agreement: float
    tok_s: float
    tok_s_std: float | None
    speedup: float | None
    speedup_std: float | None
    nfe: float
    tokens_per_forward: float
    row_share: float
    refreshes: float
    step_p50_ms: float
    step_p95_ms: float
    cache_bytes: int
    peak_bytes: int | None
    regions: dict[str, Part] | None

    @property
    def flat(self) -> dict[str, Any]:
        """The fields; those of a region as ``image_row_share``, ..., None where results do not say."""
        whole = {field: getattr(self, field) for field in Standing.__dataclass_fields__ if field != "regions"}
        parts = {name: None if self.regions is None else self.regions[name] for name in REGIONS}
        return whole | {
            f"{name}_{field}": None if part is None else getattr(part, field)
            for name, part in parts.items()
            for field in Part.__dataclass_fields__
        }


def flat_names() -> list[str]:
    """The names in `Standing.flat`, in their order."""
    whole = [field for field in Standing.__dataclass_fields__ if field != "regions"]
    return whole + [f"{name}_{field}" for name in REGIONS for field in Part.__dataclass_fields__]


# From results to standings


def agreement(result: Result, reference: Result) -> float:
    """Share of equal tokens, up to the end of the longer of the two texts; 1 if both are empty."""
    n = max(result.n_tokens, reference.n_tokens)
    same = sum(a == b for a, b in zip(result.canvas[:n], reference.canvas[:n], strict=True))
    return same / n if n else 1.0


def standings(conditions: Conditions, results: Sequence[Result]) -> list[Standing]:
    """One per policy in the order of the conditions; empty if no problem was finished by all of them."""
    names = [entrant.policy for entrant in conditions.policies]
    found = {result.key: result for result in results}
    done = [
        (repeat, problem)
        for repeat, problem in dict.fromkeys((r.repeat, r.problem) for r in results)
        if all((repeat, problem, name) in found for name in names)
    ]
    if not done:
        return []
    table: list[Standing] = []
    for name in names:
        mine = [found[repeat, problem, name] for repeat, problem in done]
        base = [found[repeat, problem, conditions.reference] for repeat, problem in done]
        table.append(_standing(name, mine, base, table[0] if table else None))
    return table


def _standing(name: str, mine: list[Result], base: list[Result], reference: Standing | None) -> Standing:
    tok_s, tok_s_std = _tok_s(mine)
    speedup, speedup_std = (1.0 if tok_s else None), None
    if reference is not None:
        speedup, speedup_std = _ratio(tok_s, tok_s_std, reference.tok_s, reference.tok_s_std)
    scores = [result.correct for result in mine if result.correct is not None]
    step_ms = [ms for result in mine for ms in result.step_ms]
    full = sum(result.full_row_layers for result in mine)
    nfe = sum(result.nfe for result in mine)
    peaks = [result.peak_bytes for result in mine if result.peak_bytes is not None]
    return Standing(
        policy=name,
        n_results=len(mine),
        n_problems=len({result.problem for result in mine}),
        n_scored=len({result.problem for result in mine if result.correct is not None}),
        accuracy=sum(scores) / len(scores) if scores else None,
        agreement=sum(agreement(a, b) for a, b in zip(mine, base, strict=True)) / len(mine),
        tok_s=tok_s,
        tok_s_std=tok_s_std,
        speedup=speedup,
        speedup_std=speedup_std,
        nfe=nfe / len(mine),
        tokens_per_forward=sum(result.n_tokens for result in mine) / nfe if nfe else 0.0,
        row_share=sum(result.row_layers for result in mine) / full if full else 0.0,
        refreshes=sum(result.refreshes for result in mine) / len(mine),
        step_p50_ms=float(np.percentile(step_ms, 50)) if step_ms else 0.0,
        step_p95_ms=float(np.percentile(step_ms, 95)) if step_ms else 0.0,
        cache_bytes=max(result.cache_bytes for result in mine),
        peak_bytes=max(peaks) if peaks else None,
        regions=_parts(mine),
    )


def _parts(results: list[Result]) -> dict[str, Part] | None:
    """What fell on each region; None if a result does not say."""
    known = [result.regions for result in results if result.regions is not None]
    if len(known) < len(results):
        return None
    found = {name: [regions[name] for regions in known] for name in REGIONS}
    everything = [part for parts in found.values() for part in parts]
    return {name: _part([part for part in parts if part.rows], everything) for name, parts in found.items()}


def _part(mine: list[Region], everything: list[Region]) -> Part:
    full = sum(part.full_row_layers for part in mine)
    rows, all_rows = (sum(part.row_layers for part in parts) for parts in (mine, everything))
    refreshed, all_refreshed = (sum(part.refreshed_row_layers for part in parts) for parts in (mine, everything))
    return Part(
        row_share=rows / full if full else None,
        of_rows=rows / all_rows if all_rows else 0.0,
        refreshed_share=refreshed / full if full else None,
        of_refreshed=refreshed / all_refreshed if all_refreshed else 0.0,
        refreshes=sum(part.refreshes for part in mine) / len(mine) if mine else None,
    )


def _tok_s(results: list[Result]) -> tuple[float, float | None]:
    """Mean and standard deviation over repeats; no deviation with one."""
    totals: dict[int, tuple[int, float]] = {}
    for result in results:
        n_tokens, seconds = totals.get(result.repeat, (0, 0.0))
        totals[result.repeat] = n_tokens + result.n_tokens, seconds + result.seconds
    rates = [n_tokens / seconds if seconds else 0.0 for n_tokens, seconds in totals.values()]
    return float(np.mean(rates)), float(np.std(rates, ddof=1)) if len(rates) > 1 else None


def _ratio(a: float, a_std: float | None, b: float, b_std: float | None) -> tuple[float | None, float | None]:
    """a / b with its deviation, to first order: relative deviations add as squares."""
    if not b:
        return None, None
    if a_std is None or b_std is None or not a:
        return a / b, None
    return a / b, a / b * math.hypot(a_std / a, b_std / b)


# The table


@dataclass(frozen=True)
class Column:
    """A column of the table: two lines of heading, and how a standing fills it."""

    title: str
    unit: str
    cell: Callable[[Standing], str]


def columns(table: Sequence[Standing]) -> list[Column]:
    """Those that have something to show."""
    scored = sorted({row.n_scored for row in table})
    accuracy = Column("accuracy", f"of {scored[-1]}" if scored else "", _accuracy)
    peak = Column("peak", "GiB", lambda s: "-" if s.peak_bytes is None else f"{s.peak_bytes / 2**30:.1f}")
    return [
        Column("policy", "", lambda s: printable(s.policy)),
        *([accuracy] if any(row.accuracy is not None for row in table) else []),
        Column("agreement", "", lambda s: f"{s.agreement:.3f}"),
        Column("tok/s", "", lambda s: _spread(s.tok_s, s.tok_s_std, digits=1)),
        Column("speedup", "", lambda s: "-" if s.speedup is None else _spread(s.speedup, s.speedup_std, digits=2)),
        Column("NFE", "", lambda s: _short(s.nfe)),
        Column("tokens/", "forward", lambda s: f"{s.tokens_per_forward:.2f}"),
        Column("rows", "", lambda s: _percent(s.row_share)),
        Column("refreshes", "", lambda s: _short(s.refreshes)),
        Column("step ms", "p50 / p95", lambda s: f"{_three(s.step_p50_ms)} / {_three(s.step_p95_ms)}"),
        Column("cache", "MiB", lambda s: _three(s.cache_bytes / 2**20)),
        *([peak] if any(row.peak_bytes is not None for row in table) else []),
    ]


def region_columns(table: Sequence[Standing]) -> list[Column]:
    """Those of the regions in which any row of a prompt or a generation lies."""
    parts = [row.regions for row in table if row.regions is not None]
    here = [name for name in REGIONS if any(regions[name].row_share is not None for regions in parts)]
    named = Column("policy", "", lambda s: printable(s.policy))
    return [named, *(column for name in here for column in _columns_of(name))]


def _columns_of(name: str) -> list[Column]:
    """The columns of one region."""

    def filled(cell: Callable[[Part], str]) -> Callable[[Standing], str]:
        return lambda standing: "-" if standing.regions is None else cell(standing.regions[name])

    return [
        Column(name, "rows", filled(lambda part: _percent(part.row_share))),
        Column(name, "of all", filled(lambda part: _percent(part.of_rows))),
        Column(name, "refreshes", filled(lambda part: "-" if part.refreshes is None else _short(part.refreshes))),
    ]


def _accuracy(row: Standing) -> str:
    """One decimal where a single problem is less than half a percent."""
    digits = 1 if row.n_scored > 200 else 0
    return "-" if row.accuracy is None else f"{100 * row.accuracy:.{digits}f} %"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _spread(value: float, std: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" if std is None else f"{value:.{digits}f} ± {std:.{digits}f}"


def _short(value: float) -> str:
    return f"{value:.0f}" if value == round(value) else f"{value:.1f}"


def _three(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def heading(conditions: Conditions) -> list[str]:
    """The conditions in two lines: what ran, and on what."""
    c, run = conditions, conditions.settings
    threads = "" if c.threads is None else f", {c.threads} thread{'s' * (c.threads != 1)}"
    workers = f", {c.workers} workers" if c.workers > 1 else ""
    place = f"{c.device.upper() if c.device == 'cpu' else 'GPU'} {c.device_name}{threads}{workers}"
    size = c.n_parameters
    weights = f"{size / 1e9:.1f}B" if size >= 1e9 else f"{size / 1e6:.1f}M" if size >= 1e6 else f"{size / 1e3:.0f}k"
    blocks = not all("window=" in entrant.unmask for entrant in c.policies)  # a sliding window knows none
    block = [f"block {run['block_length']}" if run["block_length"] else "one block"] * blocks
    problems = f"{c.n_problems} problem{'s' * (c.n_problems != 1)}"
    extras = [f"batch {run['batch_size']}"] * (run["batch_size"] > 1)
    extras += [f"temperature {run['temperature']:g}"] * (run["temperature"] > 0)
    extras += _sampling(run)
    extras += ["end-of-text forbidden"] * bool(run["forbid_eos"])
    extras += [f"eos-last {run['eos_last']}"] * (run["eos_last"] != "off")
    extras += [f"after-end {run['after_end']}"] * (run["after_end"] != DecodeSettings.model_fields["after_end"].default)
    every = run.get("fill_every", 1)  # results of earlier versions do not say
    extras += [f"every {every} steps"] * (every > 1)
    unmask = _unmask(c)
    parts = [
        f"{c.task} {c.split}" if c.split else c.task,
        problems,
        f"gen {run['gen_length']}",
        *block,
        unmask,
        *extras,
    ]
    repeats = [f"{c.repeats} repeats"] * (c.repeats > 1)
    first = f"{c.model} ({weights}), {c.dtype}, {place}, torch {c.torch.partition('+')[0]}, dcache {c.dcache};"
    return [printable(first), printable(", ".join([*parts, f"seed {c.seed}", *repeats]))]


def _sampling(run: Mapping[str, Any]) -> list[str]:
    """What is not usual in how tokens are drawn; results of an earlier version state less."""
    rule, top_p, top_k = run.get("confidence", "plain"), run.get("top_p"), run.get("top_k")
    guidance = run.get("guidance", 0.0)
    found = [] if rule == "plain" else [f"confidence {rule}"]
    found += [] if top_p is None else [f"top-p {top_p:g}"]
    found += [] if top_k is None else [f"top-k {top_k}"]
    return found + ([f"guidance {guidance:g}"] if guidance > 0 else [])


def _unmask(conditions: Conditions) -> str:
    kinds = list(dict.fromkeys(entrant.unmask for entrant in conditions.policies))
    return kinds[0] if len(kinds) == 1 else "paired unmaskers"


def table(conditions: Conditions, rows: Sequence[Standing]) -> str:
    """Conditions, one line per policy and the summary, as plain text with a final newline."""
    lines = heading(conditions)
    if not rows:
        return "\n".join([*lines, "", NOTHING, ""])
    lines += _grid(columns(rows), rows)
    if with_images(rows):
        lines += ["", *by_region(rows)]
    text = summary(conditions, rows).replace(" %", "\N{NO-BREAK SPACE}%")
    return "\n".join([*lines, "", textwrap.fill(text, WIDTH).replace("\N{NO-BREAK SPACE}", " "), ""])


def by_region(rows: Sequence[Standing]) -> list[str]:
    """Rows and refreshes by region, one line per policy; nothing if no result says."""
    return _grid(region_columns(rows), rows) if any(row.regions is not None for row in rows) else []


def with_images(rows: Sequence[Standing]) -> bool:
    """Whether any prompt has an image, so that a table by region says something."""
    return any(row.regions is not None and row.regions["image"].row_share is not None for row in rows)


def _grid(cols: Sequence[Column], rows: Sequence[Standing]) -> list[str]:
    """Two lines of heading and one per policy, or two where its name is long."""
    cells = [[c.title for c in cols], [c.unit for c in cols]]
    for row in rows:
        name, *numbers = (c.cell(row) for c in cols)
        cells += [[name, *numbers]] if len(name) <= NAME_WIDTH else [[name], ["", *numbers]]
    widths = [max(len(line[i]) for line in cells if len(line) > 1) for i in range(len(cols))]
    lines = []
    for line in cells:
        rest = [text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=False)]
        lines.append("  ".join([line[0].ljust(widths[0]), *rest]).rstrip())
    return lines


def summary(conditions: Conditions, rows: Sequence[Standing]) -> str:
    """Which policy was fastest, by how much, and at what quality."""
    reference, *others = rows
    raced = [row for row in others if row.speedup is not None]
    if not raced:
        return "There is nothing to compare: " + (
            f"only {reference.policy} was run." if not others else f"{reference.policy} generated no token."
        )
    best = max(raced, key=lambda row: row.speedup or 0.0)
    times = _spread(best.speedup or 0.0, best.speedup_std, digits=2)
    quality = f"agreement {best.agreement:.3f}"
    if best.accuracy is not None:
        quality = f"accuracy {_accuracy(best)} ({reference.policy}: {_accuracy(reference)}), {quality}"
    name = printable(best.policy)
    if (best.speedup or 0.0) <= 1:
        return (
            f"No policy was faster than {reference.policy}; {name} came closest, at {times} times its tok/s; {quality}."
        )
    mixed = len({entrant.unmask for entrant in conditions.policies}) > 1
    why = " The unmaskers differ, so this is not the cache alone." if mixed else ""
    return f"{name} was fastest, at {times} times the tok/s of {reference.policy}; {quality}.{why}"


# Warnings: a closed list


def warnings(conditions: Conditions, rows: Sequence[Standing]) -> list[str]:
    """What to keep in mind, most serious first; each says what to do."""
    if not rows:
        return []
    checks = (_unfinished, _unequal_unmaskers, _poor_reference, _useless, _noise, _few, _cpu)
    return [printable(text) for check in checks for text in check(conditions, rows)]


def _unfinished(conditions: Conditions, rows: Sequence[Standing]) -> list[str]:
    whole = conditions.n_problems * conditions.repeats
    if rows[0].n_results == whole:
        return []
    return [
        f"only {rows[0].n_results} of {whole} texts per policy are finished, and the table is about those. "
        "Finish the comparison before drawing conclusions."
    ]


def _unequal_unmaskers(conditions: Conditions, rows: Sequence[Standing]) -> list[str]:
    kinds = {entrant.unmask for entrant in conditions.policies}
    if len(kinds) == 1:
        return []
    used = ", ".join(f"{entrant.policy} with {entrant.unmask}" for entrant in conditions.policies)
    return [
        f"the unmaskers differ: {used}. Differences come from them as well as from the cache; leave --unmask paired "
        "out to compare caches alone."
    ]


def _poor_reference(conditions: Conditions, rows: Sequence[Standing]) -> list[str]:
    reference = rows[0]
    if reference.accuracy is None or reference.accuracy >= LOW_ACCURACY:
        return []
    return [
        f"{reference.policy} itself answers only {_percent(reference.accuracy)} of the problems, so accuracy cannot "
        "show what a policy loses. Judge by agreement, or take a model that can do the task."
    ]


def _useless(conditions: Conditions, rows: Sequence[Standing]) -> list[str]:
    entrants = {entrant.policy: entrant for entrant in conditions.policies}
    found = []
    for row in rows[1:]:
        if row.row_share < 1 and row.refreshes < row.nfe:
            continue
        if row.refreshes >= row.nfe and row.row_share <= 1:
            what = "refreshed at every step, so it saved nothing"
        else:
            what = f"computed {_percent(row.row_share)} of the row-layers of no cache, so it saved nothing"
        found.append(f"{row.policy} {what}. {_knobs(entrants[row.policy])}")
    return found


def _knobs(entrant: Entrant) -> str:
    if not entrant.knobs:
        return "It has no knobs; leave it out."
    knobs = ", ".join(f"{name}={write_value(value)}" for name, value in entrant.knobs.items())
    return f"Try other knobs with --set {entrant.name}.KNOB=VALUE; it ran with {knobs}."


def _noise(conditions: Conditions, rows: Sequence[Standing]) -> list[str]:
    """Accuracies that differ, but by less than the noise of so few problems."""
    p = rows[0].accuracy
    if p is None:
        return []
    doubtful = []
    for row in rows[1:]:
        q = row.accuracy
        if q is None or q == p:
            continue
        variance = p * (1 - p) + q * (1 - q)
        if abs(p - q) <= Z * math.sqrt(variance / row.n_scored):
            doubtful.append((row.policy, abs(p - q), math.ceil(variance * (Z / (p - q)) ** 2)))
    if not doubtful:
        return []
    gaps = ", ".join(f"{name} by {100 * gap:.{1 if gap < 0.02 else 0}f} points" for name, gap, _ in doubtful)
    return [
        f"accuracy differs from that of {rows[0].policy} ({gaps}), but on {rows[0].n_scored} problems that is within "
        f"noise. About {max(need for *_, need in doubtful)} would show a difference of this size: raise --limit."
    ]


def _few(conditions: Conditions, rows: Sequence[Standing]) -> list[str]:
    n = rows[0].n_scored
    if not 0 < n < FEW_PROBLEMS or _noise(conditions, rows):
        return []
    return [
        f"with {n} problem{'s' * (n != 1)} an accuracy is uncertain by up to "
        f"{100 * Z * math.sqrt(0.25 / n):.0f} points. Raise --limit to 100 or more before quoting it."
    ]


def _cpu(conditions: Conditions, rows: Sequence[Standing]) -> list[str]:
    if conditions.device != "cpu":
        return []
    return [
        "times on a CPU say little about a GPU, where few rows cost as much as one. Rows and NFE carry over, tok/s "
        "does not: measure with --device cuda."
    ]


# Other formats


def markdown(conditions: Conditions, rows: Sequence[Standing]) -> str:
    """The table for a README or an issue."""
    grid = _pipes(columns(rows), rows)
    grid += ["", *_pipes(region_columns(rows), rows)] if with_images(rows) else []
    body = [*grid, "", summary(conditions, rows)] if rows else [NOTHING]
    return "\n".join([" ".join(heading(conditions)), "", *body, ""])


def _pipes(cols: Sequence[Column], rows: Sequence[Standing]) -> list[str]:
    """A table of markdown."""
    titles = [f"{c.title}{c.unit}" if c.title.endswith("/") else f"{c.title} {c.unit}".strip() for c in cols]
    lines = [titles, ["---", *["---:"] * (len(cols) - 1)], *([c.cell(row) for c in cols] for row in rows)]
    return ["| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines]


def as_json(conditions: Conditions, rows: Sequence[Standing]) -> str:
    """Conditions, standings and warnings as one JSON object."""
    value = {
        "conditions": conditions.model_dump(mode="json"),
        "policies": [asdict(row) for row in rows],
        "warnings": warnings(conditions, rows),
    }
    return json.dumps(value, indent=2) + "\n"


def as_csv(conditions: Conditions, rows: Sequence[Standing]) -> str:
    """The standings, one line per policy, numbers in the units that their names end in."""
    out = io.StringIO()
    writer = csv.DictWriter(out, flat_names(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.flat for row in rows)
    return out.getvalue()
