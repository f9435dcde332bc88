"""What a launcher runs in another process: a worker, which loads the model, makes the experiment anew, and decodes."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import dcache
from dcache.errors import UsageError
from dcache.launch import Recipe, Unit
from dcache.models.loading import Source
from dcache.plugins import load
from dcache.results import Conditions, Result

if TYPE_CHECKING:
    from dcache.compare import Decoder

HOME = Path(dcache.__file__).resolve().parents[1]
"""Where dcache is imported from."""


@dataclass(frozen=True)
class Found:
    """What a worker found when it had loaded the model.

    Attributes:
        conditions, marks: as of `Launcher`.
        reads_images: the model does.
        host: its machine.
        pid: its process.
    """

    conditions: Conditions
    marks: list[str]
    reads_images: bool
    host: str
    pid: int

    def __str__(self) -> str:
        return f"{self.host}, process {self.pid}"

    def check(self, other: Found) -> None:
        """Results of two workers go into one table only if all that they depend on is the same; else UsageError."""
        found = self.conditions.difference(other.conditions)
        if found is None and self.marks != other.marks:
            pairs = enumerate(zip(self.marks, other.marks, strict=True), start=1)
            found = next((f"prompt {n}", mine, theirs) for n, (mine, theirs) in pairs if mine != theirs)
        if found is not None:
            name, mine, theirs = found
            raise UsageError(
                f"workers differ: {name} is {mine!r} on {self} and {theirs!r} on {other}, so their results do not go "
                "into one table; use machines of one kind, with the same versions and files"
            )


class Worker:
    """A process with one model on one device.

    Args:
        path: where the process that compares looks for modules.
        folder: its working directory.
        threads: of torch.
    """

    def __init__(self, path: Sequence[str], folder: str, threads: int):
        sys.path[:] = [*path, *(entry for entry in sys.path if entry not in path and Path(entry) != HOME)]
        with suppress(OSError):  # another machine may not have it
            os.chdir(folder)
        torch.set_num_threads(threads)

    def load(self, recipe: Recipe, source: Source) -> Found:
        """Load the model and make the experiment; raises what `Decoder` raises."""
        from dcache.compare import Decoder, Experiment  # here, because compare chooses among launchers

        experiment = Experiment([*recipe.policies.values()], recipe.task, **recipe.settings)
        model = load(source)
        self.decoder: Decoder = Decoder(experiment, model)
        return Found(
            self.decoder.conditions, self.decoder.marks, model.vision is not None, platform.node(), os.getpid()
        )

    def decode(self, unit: Unit) -> list[Result]:
        """Decode one batch under one policy."""
        return self.decoder.decode(unit)
