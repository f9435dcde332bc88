"""The standings of a comparison in every form that they are wanted in: for a screen, a program, a paper, a notebook."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence

from dcache import report
from dcache.errors import UsageError
from dcache.report import Column, Standing
from dcache.results import Conditions
from dcache.text import printable

LATEX = {
    "\\": r"\textbackslash{}",
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "²": r"\textsuperscript{2}",
    "\n": " ",
}


def latex(conditions: Conditions, rows: Sequence[Standing]) -> str:
    """A tabular for a paper, which needs the package booktabs; conditions and summary stand above it as comments."""
    said = [*report.heading(conditions), *([report.summary(conditions, rows)] if rows else [report.NOTHING])]
    lines = ["% " + " ".join(text.split()) for text in said]
    if rows:
        lines += _tabular(report.columns(rows), rows)
        lines += ["", *_tabular(report.region_columns(rows), rows)] if report.with_images(rows) else []
    return "\n".join([*lines, ""])


def _tabular(cols: Sequence[Column], rows: Sequence[Standing]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "  " + " & ".join(map(latex_text, cells)) + r" \\"

    return [
        rf"\begin{{tabular}}{{l{'r' * (len(cols) - 1)}}}",
        r"  \toprule",
        line([c.title for c in cols]),
        line([c.unit for c in cols]),
        r"  \midrule",
        *(line([c.cell(row) for c in cols]) for row in rows),
        r"  \bottomrule",
        r"\end{tabular}",
    ]


def latex_text(text: str) -> str:
    """Text that LaTeX sets as it stands; a number stays with its percent sign."""
    escaped = "".join(LATEX.get(char, char) for char in printable(text))
    return re.sub(r"(?<=\d) (?=\\%)", r"\\,", escaped)


def page(conditions: Conditions, rows: Sequence[Standing], warnings: Sequence[str]) -> str:
    """A piece of HTML for a notebook, in its colours; everything in it is escaped."""
    parts = [f"<p>{' '.join(map(html.escape, report.heading(conditions)))}</p>"]
    parts += [_grid(report.columns(rows), rows)] if rows else []
    parts += [_grid(report.region_columns(rows), rows)] if rows and report.with_images(rows) else []
    parts.append(f"<p>{html.escape(report.summary(conditions, rows) if rows else report.NOTHING)}</p>")
    if warnings:
        listed = "".join(f"<li>{html.escape(text)}</li>" for text in warnings)
        parts.append(f"<details><summary>Warnings ({len(warnings)})</summary><ul>{listed}</ul></details>")
    return f"<div>{''.join(parts)}</div>"


def _grid(cols: Sequence[Column], rows: Sequence[Standing]) -> str:
    def cells(tag: str, texts: Sequence[str]) -> str:
        sides = ["left", *["right"] * (len(texts) - 1)]
        drawn = [f'<{tag} style="text-align:{side}">{text}</{tag}>' for side, text in zip(sides, texts, strict=True)]
        return f"<tr>{''.join(drawn)}</tr>"

    titles = [f"{html.escape(c.title)}<br><small>{html.escape(c.unit)}</small>" for c in cols]
    body = "".join(cells("td", [html.escape(c.cell(row)) for c in cols]) for row in rows)
    return f"<table><thead>{cells('th', titles)}</thead><tbody>{body}</tbody></table>"


FORMATS: dict[str, Callable[[Conditions, Sequence[Standing]], str]] = {
    "table": report.table,
    "json": report.as_json,
    "csv": report.as_csv,
    "markdown": report.markdown,
    "latex": latex,
}


def check_format(name: str) -> None:
    """Raise UsageError for a format that there is none."""
    if name not in FORMATS:
        raise UsageError(f"unknown format {name!r}; choose one of {', '.join(FORMATS)}")


def formatted(name: str, conditions: Conditions, rows: Sequence[Standing]) -> str:
    """The standings in one of `FORMATS`, with a final newline; raises UsageError for another."""
    check_format(name)
    return FORMATS[name](conditions, rows)
