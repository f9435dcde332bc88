"""How far a long command is, on stderr: a bar with the time left on a terminal, a line now and then elsewhere.

The bar is drawn when something is finished and at no other time, so that it takes nothing from what is measured.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING

from dcache.text import printable

if TYPE_CHECKING:
    from rich.progress import Progress

LINE_EVERY_S = 30.0  # where there is no terminal: at the least so long from line to line,
LINE_SHARE = 0.05  # and so much of the whole,
LINE_AFTER_S = 600.0  # unless nothing was said for so long


def is_live() -> bool:
    """Whether stderr is a terminal on which a line can be written over."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def note(text: str) -> None:
    """A line on stderr."""
    print(printable(text), file=sys.stderr, flush=True)


class Meter:
    """Counts what is finished, and says how long the rest will take if it goes on like this.

    Args:
        total: how many things there are.
        unit: one of them; a plural ends in s.
        done: finished before; they took no time.
        clock: seconds.
    """

    def __init__(self, total: int, unit: str, done: int = 0, clock: Callable[[], float] = monotonic):
        self.total, self.unit, self.begun, self.done, self.clock = total, unit, done, done, clock
        self.began = clock()

    def advance(self, n: int = 1) -> None:
        """Some more are finished."""
        self.done += n

    @property
    def left_s(self) -> float | None:
        """Seconds, by the mean of what was finished since the start; None before anything was."""
        if self.done == self.begun:
            return None
        return (self.clock() - self.began) / (self.done - self.begun) * max(self.total - self.done, 0)

    def __str__(self) -> str:
        """The count and the time left."""
        left = self.left_s
        rest = "" if left is None or self.done >= self.total else f", about {duration(left)} left"
        return f"{self.done} of {self.total} {self.unit}{'s' * (self.total != 1)}{rest}"


class Lines(Meter):
    """A meter that writes a line from time to time, and none at the end."""

    def __init__(self, total: int, unit: str, done: int = 0, clock: Callable[[], float] = monotonic):
        super().__init__(total, unit, done, clock)
        self.told, self.told_at = done, self.began

    def advance(self, n: int = 1) -> None:
        """Some more are finished."""
        super().advance(n)
        passed, share = self.clock() - self.told_at, (self.done - self.told) / self.total
        if self.done < self.total and passed > LINE_EVERY_S and (share >= LINE_SHARE or passed > LINE_AFTER_S):
            self.told, self.told_at = self.done, self.clock()
            note(str(self))


class Bar(Meter):
    """A meter that shows itself as a bar.

    Args:
        what: what goes on, before the bar.
    """

    def __init__(self, progress: Progress, what: str, total: int, unit: str, done: int = 0):
        super().__init__(total, unit, done)
        self.progress = progress
        self.task = progress.add_task(printable(what), total=total, completed=done, told=str(self))

    def advance(self, n: int = 1) -> None:
        """Some more are finished."""
        super().advance(n)
        self.progress.update(self.task, completed=self.done, told=str(self), refresh=True)


@contextmanager
def meter(what: str, total: int, unit: str, done: int = 0, *, lines: bool = True) -> Iterator[Meter]:
    """A bar on a terminal; elsewhere lines, or nothing with ``lines=False``.

    What is printed meanwhile appears above the bar.
    """
    if not is_live():
        yield (Lines if lines else Meter)(total, unit, done)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[told]}", markup=False),
    )
    shared = sys.stdout.isatty()  # else what is printed there is meant for a file or a program
    with Progress(
        *columns, console=Console(stderr=True), auto_refresh=False, transient=True, redirect_stdout=shared
    ) as progress:
        bar = Bar(progress, what, total, unit, done)
        progress.refresh()
        yield bar


def duration(seconds: float) -> str:
    """Two units at the most: "40 s", "5 min", "3 h 20 min", "2 days"."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours / 24:.0f} days"
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"
