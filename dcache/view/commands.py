"""``dcache report``, and what ``dcache compare --report`` does beyond comparing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from dcache.compare import Run
from dcache.errors import UsageError

TEXTS = 2
Note = Callable[[str], None]

ReportFolder = Annotated[
    Path | None, typer.Option("--report", help="like --out, and an HTML report in the same folder", metavar="DIR")
]
ReportTexts = Annotated[
    int,
    typer.Option("--report-texts", min=0, help="problems whose steps are recorded for the report", metavar="INTEGER"),
]
MeasureDrift = Annotated[
    bool, typer.Option("--measure-drift", help="in the report, compare the cache with a full recompute; slow")
]


def report(
    runs: Annotated[list[Path], typer.Argument(help="folders with results.jsonl", metavar="RUN...")],
    out: Annotated[
        Path | None, typer.Option("--out", help="the file; report.html in the first folder unless given")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option("--figures", help="also write each figure as SVG and PNG into this folder")
    ] = None,
) -> None:
    """Write an HTML report of one comparison, or of several side by side."""
    from dcache.view import page

    print(page.write(runs, runs[0] / page.FILE if out is None else out))
    if figures is not None:
        from dcache.view.papers import write

        for file in write(runs, figures):
            print(file)


def folder_of(out: Path | None, wanted: Path | None, drift: bool) -> Path | None:
    """Where results go: --out, or --report, which then needs what a report is made of."""
    if wanted is None:
        if drift:
            raise UsageError("--measure-drift is about the report; give --report DIR too")
        return out
    if out is not None and out.resolve() != wanted.resolve():
        raise UsageError(f"--report {wanted} holds the results too; leave --out {out} out")
    from dcache.view.figures import plotly

    plotly()  # before hours are spent
    return wanted


def finish(run: Run, folder: Path, texts: int, drift: bool, note: Note) -> None:
    """Record what is missing, and write the page of a comparison."""
    from dcache.view import page
    from dcache.view.recording import Recorder

    recorder = Recorder(run, folder, texts, drift)
    if missing := recorder.missing:
        n = recorder.texts
        note(f"recording {n} text{'s' * (n != 1)} of each policy for the report, which is not measured")
        try:
            for number, name in enumerate(recorder, start=1):
                note(f"recorded {name}, {number} of {len(missing)}")
        except KeyboardInterrupt:
            note(
                f"interrupted. The results are complete; to record the rest, repeat the command with --report {folder}"
            )
            raise
    note(f"report: {page.write([folder], folder / page.FILE)}")
