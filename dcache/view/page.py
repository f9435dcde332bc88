"""The report: one HTML file that holds everything it needs, and lets nothing else in.

Texts from outside (prompts, generations, names) are escaped by the template. Figures are JSON in script elements of a
type that no browser runs. The content security policy allows the page's two scripts by their hashes and no other, and
no connection to anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import dcache
from dcache import report
from dcache.errors import UsageError
from dcache.report import Column, Standing
from dcache.text import printable
from dcache.view import data, figures
from dcache.view.data import Chapter, Side
from dcache.view.figures import Figure, Palette, plotly

FILE = "report.html"
MOST_SIDES = 100  # problems whose texts are shown
MOST_OPEN = 2  # of them, opened at the beginning


@dataclass(frozen=True)
class Shown:
    """A chapter as the template reads it.

    Args:
        chapter: the comparison.
        palette: of the whole page.
    """

    chapter: Chapter
    palette: Palette

    @property
    def number(self) -> int:
        """From 0."""
        return self.chapter.number

    @property
    def name(self) -> str:
        """For the list of comparisons."""
        conditions = self.chapter.conditions
        return printable(f"{conditions.model}, {conditions.task} ({self.chapter.folder.name})")

    @property
    def heading(self) -> list[str]:
        """The conditions."""
        return report.heading(self.chapter.conditions)

    @cached_property
    def standings(self) -> list[Standing]:
        """One row of the table per policy."""
        return self.chapter.comparison.standings

    @property
    def summary(self) -> str:
        """The sentence below the table in a terminal."""
        return report.summary(self.chapter.conditions, self.standings)

    @property
    def warnings(self) -> list[str]:
        """What to keep in mind."""
        return report.warnings(self.chapter.conditions, self.standings)

    @property
    def columns(self) -> list[Column]:
        """Of the table."""
        return report.columns(self.standings)

    @property
    def region_columns(self) -> list[Column]:
        """Of the second table; none where no prompt has an image."""
        return report.region_columns(self.standings) if report.with_images(self.standings) else []

    @property
    def colours(self) -> dict[str, int]:
        """Number of the colour of each policy."""
        return {entrant.policy: self.palette.index(entrant.name) for entrant in self.chapter.conditions.policies}

    @property
    def figures(self) -> list[Figure]:
        """Those that there is something for."""
        return figures.all_figures(self.chapter, self.palette)

    @property
    def recorded(self) -> bool:
        """Whether there are maps."""
        return bool(self.chapter.recordings)

    @property
    def strayed(self) -> list[str]:
        """Recordings whose tokens are not the measured ones."""
        found = (r for r in self.chapter.recordings.values() if not r.same)
        return [printable(f"{recording.policy} on {recording.problem}") for recording in found]

    @property
    def reference(self) -> str:
        """Its name."""
        return printable(self.chapter.conditions.reference)

    @cached_property
    def _sides(self) -> list[Side]:
        return data.sides(self.chapter)

    @property
    def sides(self) -> list[Side]:
        """Problems with their texts."""
        return self._sides[:MOST_SIDES]

    @property
    def left_out(self) -> int:
        """Problems that are not shown."""
        return len(self._sides) - len(self.sides)

    @property
    def open(self) -> int:
        """How many problems are open at the beginning."""
        return min(MOST_OPEN, len(self.chapter.problems) or 1)


def render(folders: Sequence[Path]) -> str:
    """The page of one comparison, or of several; UsageError for folders without results, and without plotly."""
    plotly()
    chapters = [Chapter.read(number, folder) for number, folder in enumerate(folders)]
    return page(chapters)


def page(chapters: Sequence[Chapter]) -> str:
    """The page of chapters that have been read."""
    import jinja2
    import plotly.offline  # type: ignore[import-untyped]
    from markupsafe import Markup

    palette = Palette(chapters)
    shown = [Shown(chapter, palette) for chapter in chapters]
    shared = [figures.tradeoff(chapters, palette, "all-tradeoff")] if len(chapters) > 1 else []
    scripts = {"plotly": script(plotly.offline.get_plotlyjs()), "js": script(asset("page.js"))}
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"printable": printable, "embedded": embedded}
    return environment.from_string(asset("page.html.jinja")).render(
        policy=security_policy(scripts.values()),
        version=dcache.__version__,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        title=_title(chapters),
        chapters=shown,
        differences=data.differences(chapters),
        shared=[figure for figure in shared if figure is not None],
        css=Markup(asset("page.css")),
        **{name: Markup(text) for name, text in scripts.items()},
    )


def _title(chapters: Sequence[Chapter]) -> str:
    models = dict.fromkeys(chapter.conditions.model for chapter in chapters)
    others = dict.fromkeys(e.name for chapter in chapters for e in chapter.conditions.policies[1:])
    names = ", ".join(others) or chapters[0].conditions.reference
    return printable(f"{names} on {', '.join(models)}")


def asset(name: str) -> str:
    """A file of the page."""
    return files("dcache.view").joinpath("assets", name).read_text(encoding="utf-8")


def script(code: str) -> str:
    """Code for a script element, which no string in it can end."""
    return re.sub(r"<(?=/script|!--)", r"\\x3c", code.replace("\r\n", "\n"), flags=re.IGNORECASE)


def embedded(value: Any) -> Any:
    """JSON for a script element: it holds no character that HTML gives a meaning to."""
    from markupsafe import Markup

    text = json.dumps(value, separators=(",", ":"), allow_nan=False)  # ASCII alone
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


def security_policy(scripts: Any) -> str:
    """Nothing is loaded from anywhere, and no script runs but these."""
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts)
    allowed = " ".join(f"'sha256-{each}'" for each in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def write(folders: Sequence[Path], out: Path) -> Path:
    """Write the page of some folders, whole or not at all; returns the file.

    Raises:
        UsageError: for folders without results, without plotly, and if the file cannot be written.
    """
    text = render(folders)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
                stream.write(text)
            os.chmod(name, 0o644)
            os.replace(name, out)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UsageError(f"the report cannot be written to {out}: {error.strerror}") from error
    return out
