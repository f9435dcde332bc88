"""What a filter makes of its inner policy, heard from both sides of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import Tensor

from dcache.engine.layer import Layer
from dcache.policy import Filter, Plan
from dcache.state import State
from dcache.testing.runs import Canvas, Run

CALLS = ("prepare", "begin", "plan", "review", "layer")
REASON = "the inner policy has a reason of its own"


class Inner:
    """Listens at a filter and at its inner policy.

    Args:
        policy: the filter, before anything is decoded with it.

    Attributes:
        faults: what the filter does not keep, each a sentence; no two alike.
    """

    def __init__(self, policy: Filter):
        self.policy, self.calls = policy, Counter[str]()
        self._faults: dict[str, None] = {}
        self._said: dict[str, Plan | None] = {}  # by the inner policy, until the filter has answered
        self._plan: Plan | None = None  # of the inner policy, for the pass that runs
        for name in CALLS:
            vars(policy)[name] = self._heard(name, getattr(policy, name), outer=True)
            vars(policy.inner)[name] = self._heard(name, getattr(policy.inner, name), outer=False)

    @property
    def faults(self) -> list[str]:
        """In the order in which they were found."""
        return list(self._faults)

    def _fault(self, message: str) -> None:
        self._faults[message] = None

    def _heard(self, name: str, call: Callable[..., Any], outer: bool) -> Callable[..., Any]:
        def heard(*args: Any) -> Any:
            self.calls["outer " * outer + name] += 1
            if name == "layer" and not outer:
                self._same_kind(args[0])
            out = call(*args)
            if name in ("plan", "review"):
                if outer:
                    self._keeps(args[0], name, self._said.pop(name, None), out)
                else:
                    self._said[name] = out
            return out

        return heard

    def decode(self, canvas: Canvas) -> None:
        """Decode a canvas, and compare who was called how often."""
        Run(lambda: self.policy, canvas).go()
        for name in CALLS:
            due, often = self.calls[f"outer {name}"], self.calls[name]
            if often != due:
                self._fault(f"{name} of the filter was called {due} times, and that of its inner policy {often} times")

    def _same_kind(self, at: Layer) -> None:
        if self._plan is not None and at.kind != self._plan.kind:
            self._fault(
                f"layer {at.index} of the inner policy runs with kind {at.kind!r}, but it planned {self._plan.kind!r}; "
                "a filter adds what it branches on to Plan.marks"
            )

    def _keeps(self, state: State, name: str, inner: Plan | None, outer: Plan | None) -> None:
        """A plan of the filter against that of its inner policy."""
        if inner is None:
            return
        self._plan, place = inner, f"step {int(state.step.max())}: {name} of the inner policy"
        if outer is None:
            self._fault(f"{place} returned a plan, and the filter none")
            return
        for lost in lost_in(inner, outer):
            self._fault(f"{place} returned {lost}, which the filter does not hand on")
        if inner.visible is not None and outer.visible is not None:
            shown = by_layer(outer.visible) & ~by_layer(inner.visible) & state.valid[:, None]
            for _, b, _, p in np.argwhere(shown)[:1]:
                self._fault(f"{place} hides position {p} of sequence {b}, and the filter shows it")

    def ask(self, canvas: Canvas) -> None:
        """Whether what only the inner policy needs, refuses and does not claim arrives."""
        inner, spec = self.policy.inner, canvas.model.spec
        vars(inner).update(
            stores=lambda spec: {"X": 3}, refuses=lambda spec, unmasker: REASON, exempt=lambda: {"x": REASON}
        )
        if self.policy.stores(spec).get("X") != 3:
            self._fault('stores of the inner policy asked for {"X": 3}, and those of the filter do not have it')
        if self.policy.refuses(spec, canvas.unmasker()) is None:
            self._fault("refuses of the inner policy returned a reason, and that of the filter None")
        if "x" not in self.policy.exempt():
            self._fault("exempt of the inner policy named a claim, and that of the filter does not")


def lost_in(inner: Plan, outer: Plan) -> Iterator[str]:
    """Parts of a plan that another one, made from it, does not have."""
    if outer.kind != inner.kind:
        yield f"kind {inner.kind!r}"
    for name in ("start", "visible", "watch"):
        if getattr(inner, name) is not None and getattr(outer, name) is None:
            yield f"`{name}`"
    for name in ("sets", "flags", "marks"):
        if lost := getattr(inner, name).keys() - getattr(outer, name).keys():
            yield f"{name} {sorted(lost)}"


def by_layer(visible: np.ndarray | Tensor) -> np.ndarray:
    """`Plan.visible` as (layers or 1, batch, heads or 1, slots)."""
    array = visible.numpy() if isinstance(visible, Tensor) else visible
    return array[None, :, None] if array.ndim == 2 else array
