"""Engines that are watched while they decode: how long each part of a step takes, and what its stores hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any, cast

from dcache.engine import Engine
from dcache.policy import Plan
from dcache.state import Seen
from dcache.unmasking.base import Ask

PARTS: dict[str, str] = {
    "run": "pass",
    "rerun": "second pass",
    "plan": "plan",
    "review": "plan",
    "ask": "unmask",
    "settle": "unmask",
}
"""What decoding calls, and the part of a step that its time belongs to."""

NAMES = (*dict.fromkeys(PARTS.values()), "other")
"""The parts of a step; "other" is what the loop does between the calls."""


class _Timed:
    """A thing, some of whose methods are timed."""

    def __init__(self, thing: object, lap: Callable[[str, float], None], more: Mapping[str, object] | None = None):
        self._thing, self._lap, self._more = thing, lap, more or {}

    def __getattr__(self, name: str) -> Any:
        if name in self._more:
            return self._more[name]
        found = getattr(self._thing, name)
        if name not in PARTS and name != "begin":
            return found

        def timed(*given: object) -> object:
            began = perf_counter()
            try:
                return found(*given)
            finally:
                self._lap(name, perf_counter() - began)

        return timed


class Stopwatch:
    """Times what `decode` calls.

    Args:
        engine: whose decoding is timed.

    Attributes:
        engine: the same, to be given to `decode`.
        begin: seconds before the first step.
        steps: of each step a dict from part to seconds, as far as it made such calls.
    """

    def __init__(self, engine: Engine):
        self.begin, self.steps = 0.0, list[dict[str, float]]()
        parts = {"policy": _Timed(engine.policy, self._lap), "unmasker": _Timed(engine.unmasker, self._lap)}
        self.engine = cast(Engine, _Timed(engine, self._lap, parts))

    def _lap(self, name: str, seconds: float) -> None:
        if name == "begin":
            self.begin += seconds  # that of policy and unmasker is called by the engine, and part of it
            return
        if name == "ask":
            self.steps.append({})
        part, step = PARTS[name], self.steps[-1]
        step[part] = step.get(part, 0.0) + seconds


class Watched:
    """An engine that shows each pass to a spectator before its step is applied.

    Args:
        engine: the engine.
        after: called with the engine, the plan, and whether the pass is the second of its step.
    """

    def __init__(self, engine: Engine, after: Callable[[Engine, Plan, bool], None]):
        self._engine, self._after = engine, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def run(self, plan: Plan, ask: Ask) -> Seen:
        """The pass of a step."""
        seen = self._engine.run(plan, ask)
        self._after(self._engine, plan, False)
        return seen

    def rerun(self, plan: Plan, ask: Ask, seen: Seen) -> Seen:
        """The second pass of a step."""
        seen = self._engine.rerun(plan, ask, seen)
        self._after(self._engine, plan, True)
        return seen
