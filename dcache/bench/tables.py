"""Reports as tables: for a screen, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from dcache.bench.activity import GROUPS
from dcache.bench.reports import (
    STAGES,
    Conditions,
    EndToEndReport,
    FloorReport,
    Gaps,
    ImageReport,
    KernelReport,
    Latency,
    PolicyResult,
    Report,
    RequestResult,
    StageResult,
    Times,
)
from dcache.text import printable

DISTURBED = 1.3  # how much slower than at best a host may be for a time that says something of the engine
Cells = list[str]


@dataclass(frozen=True)
class Table:
    """A heading, titles, rows and notes. The first column is text, the others are numbers."""

    heading: str
    titles: Cells
    rows: list[Cells]
    notes: Cells

    def markdown(self) -> str:
        """For a file."""
        lines = [self.titles, ["---", *["---:"] * (len(self.titles) - 1)], *self.rows]
        grid = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
        notes = [line for note in self.notes for line in ("", note)]
        return printable("\n".join([self.heading, "", *grid, *notes, ""]))

    def plain(self) -> str:
        """For a pipe."""
        lines = [self.titles, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.titles))]
        grid = [
            "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in lines
        ]
        return printable("\n".join([self.heading, *(line.rstrip() for line in grid), *self.notes]))


def show(table: Table) -> None:
    """Print it: with colours and lines on a terminal, plain elsewhere."""
    from rich.console import Console
    from rich.table import Table as Drawn
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        print(table.plain(), flush=True)
        return
    drawn = Drawn(title=Text(printable(table.heading)), title_justify="left")
    for i, title in enumerate(table.titles):
        drawn.add_column(title, justify="right" if i else "left")
    for row in table.rows:
        drawn.add_row(*(Text(printable(cell)) for cell in row))
    console.print(drawn)
    for note in table.notes:
        console.print(Text(printable(note)))


def tables(report: Report) -> list[Table]:
    """The tables of a report."""
    if isinstance(report, KernelReport):
        return [_kernels(report)]
    if isinstance(report, FloorReport):
        return [_floor(report)]
    if isinstance(report, ImageReport):
        return [_stages(report), *_requests(report)]
    return [_end_to_end(report), *_splits(report), *_gaps(report)]


def heading(c: Conditions) -> str:
    """The conditions in one line."""
    where = c.device_name if c.threads is None else f"{c.device_name}, {c.threads} threads"
    driver = f" (driver {c.driver})" if c.driver else ""
    model = f"{c.model}, " if c.model else ""
    triton = f", triton {c.triton}" if c.triton else ""
    commit = f" ({c.commit})" if c.commit else ""
    return f"{model}{c.dtype}, {where}{driver}, torch {c.torch}{triton}, dcache {c.dcache}{commit}, {c.started}"


def _kernels(report: KernelReport) -> Table:
    rows = []
    for r in report.results:
        times = [_number(r.us), _number(r.twin_us), _number(None if not (r.us and r.twin_us) else r.twin_us / r.us)]
        share = "-" if r.share is None else f"{100 * r.share:.0f} %"
        rates = ["-", "-"] if not r.us else [_number(r.n_bytes / r.us / 1e6), _number(r.n_flops / r.us / 1e6)]
        state = r.failure or ("warm" if r.cached else "")
        rows.append([f"{r.op}, {r.size}", r.model, *times, *rates, share, r.bound, f"{r.error or 0:.1g}", state])
    ceilings = report.ceilings
    notes = [
        f"Measured ceilings: copy {ceilings.copy_tb_s} TB/s (read and write counted), product of 8192 x 8192 "
        f"matrices {ceilings.product_tflop_s} TFLOP/s. Share: of the ceiling named beside it.",
        "warm: all input sets together fit in the L2 cache, so the time is that of inputs that are already there.",
    ]
    titles = ["op", "model", "us", "twin us", "twin / us", "TB/s", "TFLOP/s", "share", "of", "error", ""]
    return Table(heading(report.conditions), titles, rows, notes)


def _floor(report: FloorReport) -> Table:
    rows = [[str(p.rows), str(p.head_rows), _number(p.ms), _number(p.tflop_s), _number(p.tb_s)] for p in report.results]
    return Table(heading(report.conditions), ["rows", "head rows", "ms", "TFLOP/s", "TB/s"], rows, [])


def _end_to_end(report: EndToEndReport) -> Table:
    s = report.settings
    block = f"block {s.block}" if s.block else "one block"
    shown = f"{s.images} x {s.image_size} pixels ({report.image_rows} rows), " if s.images else ""
    what = f"prompt {s.prompt}, {shown}gen {s.gen}, {block}, {s.repeats} repeats"
    titles = [
        *("policy", "batch", "tokens", "p50 ms", "p5", "p95", "mean", "floor", "efficiency", "one pass: p50", "eff."),
        *("two: n", "p50", "eff.", "tok/s", "rows", "head", "NFE", "peak GiB", "store GiB", "graphs", "steps"),
    ]
    notes = ["floor: mean of the linear layers alone for the same rows; efficiency: floor / measured time."]
    notes += [f"{_name(r)}: {r.failure}" for r in report.results if r.failure]
    notes += [f"{_name(r)}: no profile: {r.unprofiled}" for r in report.results if r.unprofiled]
    notes += [
        f"{_name(r)}: stopped after {r.steps} steps of each decode, so the means are those of its beginning."
        for r in report.results
        if r.cut
    ]
    return Table(f"{heading(report.conditions)}; {what}", titles, [_line(r) for r in report.results], notes)


def _name(r: PolicyResult) -> str:
    return f"{r.policy}, batch {r.batch}, {r.tokens_per_step} a step"


def _line(r: PolicyResult) -> Cells:
    def part(times: Times | None, *names: str) -> Cells:
        if times is None:
            return ["-"] * len(names)
        found = {**times.model_dump(), "efficiency": f"{100 * times.efficiency:.0f} %", "n": str(times.n)}
        return [x if isinstance(x := found[name], str) else _number(x) for name in names]

    gib = ["-" if n is None else _number(n / 2**30) for n in (r.peak_bytes, r.store_bytes)]
    counts = [_number(r.rows), _number(r.head_rows), _number(r.nfe)]
    return [
        *(r.policy, str(r.batch), str(r.tokens_per_step)),
        *part(r.all, "p50", "p5", "p95", "mean", "floor", "efficiency"),
        *part(r.one_pass, "p50", "efficiency"),
        *part(r.two_passes, "n", "p50", "efficiency"),
        *(_number(r.tok_s), *counts, *gib, str(r.captured) if r.graphs else "off", f"{r.repeats} x {r.steps}"),
    ]


def _splits(report: EndToEndReport) -> list[Table]:
    rows = [
        [
            _name(r),
            str(s.passes),
            str(s.steps),
            _number(s.wall),
            *(_number(s.groups.get(g, 0.0)) for g in GROUPS),
            _number(s.host),
        ]
        for r in report.results
        for s in r.split
    ]
    titles = ["ms of a step", "passes", "steps", "wall", *GROUPS, "host"]
    note = "From a profile of a few steps, which slows the host. host: time in which the device had no work."
    return [Table("Where the time goes", titles, rows, [note])] if rows else []


def _gaps(report: EndToEndReport) -> list[Table]:
    traced = [(_name(r), r.gaps) for r in report.results if r.gaps is not None]
    best = min((probe for _, g in traced for probe in g.idle_probes), default=0.0)
    rows = [
        [
            *(name, *map(str, (g.steps, g.second_passes, g.syncs, g.most_syncs)), _number(g.largest_gap_us)),
            *(_percent(g.idle), _spread(g.idle_decodes), _percent(g.idle_mean), _undisturbed(g, best)),
        ]
        for name, g in traced
    ]
    titles = [
        "trace",
        "steps",
        "with two passes",
        "syncs a step",
        "most",
        "largest gap us",
        "idle between passes: median",
        "of decodes",
        "mean",
        "undisturbed",
    ]
    note = (
        f"undisturbed: median of the decodes beside which a fixed piece of Python took at most {DISTURBED} times the "
        f"{_number(best)} us of its best moment here, of all decodes. It takes twice as long while others use the core."
    )
    return [Table("What the device waits for", titles, rows, [note] if best else [])] if rows else []


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def _spread(shares: Sequence[float]) -> str:
    """The least and the most of some shares."""
    return f"{100 * min(shares):.2f} to {100 * max(shares):.2f} %" if shares else "-"


def _undisturbed(g: Gaps, best: float) -> str:
    """The idle share of the decodes beside which the host was about as fast as ever, and how many they are."""
    both = zip(g.idle_decodes, g.idle_probes, strict=False)  # older reports have no probes
    shares = [share for share, probe in both if probe <= DISTURBED * best]
    return f"{_percent(median(shares))} ({len(shares)} of {len(g.idle_decodes)})" if shares else "-"


def _stages(report: ImageReport) -> Table:
    found = [r for r in report.results if isinstance(r, StageResult)]
    rows = [
        [f"{r.size} x {r.size}", _count(r.tiles), _count(r.rows), *map(_number, r.times), _number(r.sum_ms)]
        for r in found
    ]
    titles = ["image", "tiles", "rows", *(f"{name} ms" for name in STAGES), "sum"]
    notes = [
        "Medians, with a wait for the device behind each stage. cut: fit and tile, on the CPU; key: hash of pixels; "
        "tower: with the copy of the tiles to the device; splice: merge the tiles, place their rows in the prompt.",
        *(f"{r.size} x {r.size}: {r.failure}" for r in found if r.failure),
    ]
    what = f"host {report.host}; {report.settings.repeats} images"
    return Table(f"{heading(report.conditions)}, {what}", titles, rows, notes)


def _requests(report: ImageReport) -> list[Table]:
    s, found = report.settings, [r for r in report.results if isinstance(r, RequestResult)]
    rows = [
        [
            *(r.policy, f"{r.size} x {r.size}", *map(_count, (r.image_rows, r.canvas))),
            *_latency(r.new),
            *_latency(r.again),
            _number(r.new.p50 / r.again.p50 if r.new and r.again else None),
        ]
        for r in found
    ]
    kind = ("least", "most", "passes", "rows")
    titles = [
        "first commit",
        "image",
        "its rows",
        "canvas",
        "new: p50 ms",
        *kind,
        "again: p50 ms",
        *kind,
        "new / again",
    ]
    notes = [
        "From an image in memory and token ids to the first committed token. new: an image never seen; again: that of "
        "the request before, with another text. passes, rows: of the first step.",
        *(f"{_asked(r)}: {r.failure}" for r in found if r.failure),
        *(f"{_asked(r)}: {r.recorded} graphs were recorded among the measured requests." for r in found if r.recorded),
    ]
    block = f"block {s.block}" if s.block else "one block"
    graphs = "" if s.graphs else ", no graphs"
    what = f"Time to first commit; prompt {s.prompt}, gen {s.gen}, {block}, {s.repeats} of each{graphs}"
    return [Table(what, titles, rows, notes)] if rows else []


def _asked(r: RequestResult) -> str:
    return f"{r.policy}, {r.size} x {r.size}"


def _latency(found: Latency | None) -> Cells:
    if found is None:
        return ["-"] * 5
    return list(map(_number, (found.p50, found.least, found.most, found.passes, found.rows)))


def _count(n: int) -> str:
    return str(n) if n else "-"


def _number(value: float | None) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return "-"
    if value == 0 or value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def combined(parts: Sequence[Table]) -> str:
    """All tables of a report as one Markdown page."""
    return "\n".join(table.markdown() for table in parts)
