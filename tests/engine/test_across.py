"""Statistics of all layers at once are those of each layer."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dcache.decode import decode
from dcache.engine import Engine
from dcache.engine.layer import Layer
from dcache.errors import PolicyError
from dcache.plugins import make_unmasker
from dcache.policy import CachePolicy, Plan
from dcache.state import State
from dcache.testing.models import random_model
from dcache.testing.recorder import Recorder
from dcache.unmasking.base import Sampling

MODEL = random_model(1, n_layers=3)


class Both(CachePolicy):
    """Reports statistics of each layer, and the same at once in the last one; some keys are hidden."""

    def __init__(self, visible: str = "all"):
        super().__init__()
        self.visible = visible

    def stores(self, spec: Any) -> dict[str, int]:
        return {"Q": spec.q_width, "H": spec.d_model}

    def plan(self, state: State) -> Plan:
        first = (state.step == 0)[:, None]
        some = state.needed & ~first
        return Plan(some | state.changed | first, sets={"some": state.needed}, visible=self._shown(state))

    def _shown(self, state: State) -> Any:
        shape = {"all": None, "mask": state.valid.shape, "by layer": (3, state.batch, 1, state.slots)}[self.visible]
        if shape is None:
            return None
        shown = np.random.default_rng(0).random(shape) > 0.3
        shown[..., 0] = True
        return shown

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        some = at.sets["some"]
        rows, h = at.compute(rows, h)
        with at.aside():
            q, weight = at.stored("Q", some), some < at.dump
            at.report("received", at.received(q, weight))
            at.report("similarity", at.similarity(at.probs(q), at.probs(-q), some, "heads"))
            at.report("kept", at.stored("H", some).sum((1, 2)))
        if at.last:
            with at.aside():
                every = at.across
                q = every.stored("Q", some)
                every.report("received*", every.received(q, every.each(weight)))
                every.report("similarity*", every.similarity(every.probs(q), every.probs(-q), some, "heads"))
                every.report("kept*", every.stored("H", some).sum((1, 2)))
        return rows, h


def go(policy: CachePolicy, **more: Any) -> list[Any]:
    unmasker = make_unmasker("low-confidence", Sampling(after_end="decode"))
    engine = Engine(MODEL, policy, unmasker, debug=True, **more)
    return decode(engine, State(MODEL.spec, [[3, 1, 4], [1, 5, 9, 2, 6], [5]], [4, 6, 9]))


@pytest.mark.parametrize("visible", ["all", "mask", "by layer"])
@pytest.mark.parametrize("buckets", [(), (8, 64)])
def test_all_layers_at_once_report_what_each_layer_does(visible: str, buckets: tuple[int, ...]) -> None:
    trace = go(Both(visible), buckets=buckets)
    assert {len(step.active.nonzero()[0]) for step in trace} == {1, 2, 3}  # with lanes that are not the whole batch
    for step in trace:
        for name in ("received", "similarity", "kept"):
            each, every = step.reports[name], step.reports[f"{name}*"]
            assert each.shape == every.shape
            np.testing.assert_allclose(every[:, step.active], each[:, step.active], atol=1e-6)
        assert (step.reports["received"][:, step.active].sum(-1) > 0).all()


def test_they_can_be_recorded() -> None:
    plain, recorded = go(Both(), buckets=(8, 64)), go(Both(), buckets=(8, 64), executor=Recorder())
    for a, b in zip(plain, recorded, strict=True):
        assert all(np.array_equal(x, b.reports[name]) for name, x in a.reports.items())


def test_freed_keys_of_other_layers_are_refused() -> None:
    class Freeing(Both):
        def capacity(self, state: State) -> int | None:
            return 4

    with pytest.raises(PolicyError, match="keys of other layers are freed"):
        go(Freeing())


def test_a_report_of_all_layers_has_one_shape_per_name() -> None:
    class Changing(Both):
        def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            at.report("x", torch.zeros(len(rows), 2))
            if at.last:
                at.across.report("x", torch.zeros(3 * len(rows)))
            return at.compute(rows, h)

    with pytest.raises(PolicyError, match="a report has one shape per name"):
        go(Changing())
