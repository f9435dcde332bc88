"""Where the batches of a comparison are decoded: the contract of a launcher, and the one that stays in this process.

A launcher is given units, each one batch under one policy, and yields their results as they arrive. What a unit is does
not depend on the launcher, and neither does any token.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from dcache.calls import Call, parse_call
from dcache.errors import UsageError
from dcache.policy import CachePolicy, Filter
from dcache.results import Conditions, Result
from dcache.tasks.base import Task

if TYPE_CHECKING:
    from dcache.compare import Decoder, Experiment


@dataclass(frozen=True)
class Unit:
    """One batch of problems under one policy.

    Attributes:
        repeat: from 0.
        batch: number of the batch among those of a repeat.
        policy: as the table calls it.
        indices: of the batch's problems.
    """

    repeat: int
    batch: int
    policy: str
    indices: tuple[int, ...]

    @property
    def round(self) -> tuple[int, int]:
        """Units of a round are the same problems under all policies."""
        return self.repeat, self.batch


@dataclass(frozen=True)
class Recipe:
    """What makes an equal experiment in another process.

    Attributes:
        policies: as they were given, by the name in the table.
        task: as it was given.
        settings: as they were given.
    """

    policies: Mapping[str, str | Call | CachePolicy]
    task: str | Task | None
    settings: Mapping[str, Any]


class Launcher(ABC):
    """Decodes units somewhere.

    Attributes:
        conditions: under which it decodes.
        marks: fingerprint of each prompt with its answer.
        experiment: on the task that is decoded.
    """

    conditions: Conditions
    marks: list[str]
    experiment: Experiment

    @abstractmethod
    def run(self, policies: Iterable[str], units: Iterable[Unit]) -> Iterator[list[Result]]:
        """Decode `units`, taken one by one as they are needed; yields the results of one at a time, in any order.

        Args:
            policies: those that have a unit.
            units: the units of a round stand together.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of what it holds; a second call does nothing."""


class Local(Launcher):
    """One unit after the other in this process, all policies warmed up before."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.conditions, self.marks, self.experiment = decoder.conditions, decoder.marks, decoder.experiment

    def run(self, policies: Iterable[str], units: Iterable[Unit]) -> Iterator[list[Result]]:
        """In the order of `units`."""
        for policy in policies:
            self.decoder.warm_up(policy)
        for unit in units:
            yield self.decoder.decode(unit)

    def close(self) -> None:
        """Nothing is held."""


def refuse_what_cannot_be_spread(experiment: Experiment) -> None:
    """Raise UsageError for what is not the same, or is not there, in another process."""
    for name, policy in experiment.policies.items():
        if any(_remembers(part) for part in _parts(policy)):
            raise UsageError(
                f"policy {name!r} remembers earlier requests, so its tokens would depend on which worker decodes what; "
                "use the launcher local"
            )
    recipe = experiment.recipe
    for given in [*recipe.policies.values(), recipe.task]:
        for part in _parts(given):
            _refuse_what_cannot_be_imported(type(part))


def _parts(given: object) -> Iterator[object]:
    """A policy that was given as an instance and all that it wraps; a task; nothing for a text."""
    if isinstance(given, CachePolicy | Task):
        yield given
    if isinstance(given, Filter):
        yield from _parts(given.inner)


def _remembers(policy: object) -> bool:
    """Whether a policy has the knobs with which it declares that it remembers."""
    if not isinstance(policy, CachePolicy) or policy.remembers is None:
        return False
    knobs = parse_call(f"policy({policy.remembers})").knobs
    return all(getattr(policy.config, knob) == value for knob, value in knobs.items())


def _refuse_what_cannot_be_imported(kind: type) -> None:
    """Another process finds a class by its module and name."""
    found: object = sys.modules.get(kind.__module__)
    for part in kind.__qualname__.split("."):
        found = getattr(found, part, None)
    if kind.__module__ == "__main__" or found is not kind:
        raise UsageError(
            f"workers cannot import {kind.__qualname__} from {kind.__module__!r}, of which an instance was given; "
            "define the class in a module of its own, or install it as a plugin and give it as text"
        )


class Schedule:
    """Which worker decodes what. A round stays on one worker, so that policies are compared on one device.

    Only when no round is left is the work of others taken over, from the end: then no worker waits for another's round.

    Args:
        units: the units of a round stand together; taken as they are needed.
    """

    def __init__(self, units: Iterable[Unit]):
        self._rounds: Iterator[deque[Unit]] = (deque(group) for _, group in groupby(units, lambda unit: unit.round))
        self._waiting: deque[deque[Unit]] = deque()
        self._queues: dict[int, deque[Unit]] = {}

    def take(self, worker: int) -> Unit | None:
        """What a worker decodes next; None if nothing is left."""
        if not self._queues.get(worker):
            if self._left():
                self._queues[worker] = self._waiting.popleft()
            else:
                return self._take_over()
        return self._queues[worker].popleft()

    def give_back(self, worker: int, unit: Unit | None) -> None:
        """A worker is lost, with the unit that it was at: both that and the rest of its round are for others."""
        rest = self._queues.pop(worker, deque[Unit]())
        if unit is not None:
            rest.appendleft(unit)
        if rest:
            self._waiting.appendleft(rest)

    def __bool__(self) -> bool:
        """Whether anything is left to take."""
        return any(self._queues.values()) or self._left()

    def _left(self) -> bool:
        """Whether a round waits; the next one is looked up if none does."""
        if not self._waiting and (following := next(self._rounds, None)) is not None:
            self._waiting.append(following)
        return bool(self._waiting)

    def _take_over(self) -> Unit | None:
        longest = max(self._queues.values(), key=len, default=deque[Unit]())
        return longest.pop() if longest else None
