"""Statistics of all layers at once are those of each layer."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dcache.decode import decode
from dcache.engine import Engine, across
from dcache.engine import layer as layer_module
from dcache.engine.layer import Layer
from dcache.errors import PolicyError
from dcache.kernels import attention_drift
from dcache.kernels.attend import attend_lse_ref
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
            at.report("mean", at.head_mean(q).nan_to_num().sum(1))
        if at.last:
            with at.aside():
                every = at.across
                q = every.stored("Q", some)
                every.report("mean*", every.head_mean(q).nan_to_num().sum(1))
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


class Again(CachePolicy):
    """Asks about queries of the pass before its layers run and after them; `then` says what else the layers do.

    Attributes:
        real: of each time it asked, which queries are no padding: (layers * batch, n) bool.
    """

    def __init__(self, then: str = "nothing", visible: str = "all"):
        super().__init__()
        self.then, self.visible = then, visible
        self.real: list[Tensor] = []

    def stores(self, spec: Any) -> dict[str, int]:
        return {"Q": spec.q_width, "H": spec.d_model}

    def plan(self, state: State) -> Plan:
        some = state.needed | state.changed
        return Plan(some | (state.step == 0)[:, None], sets={"some": some}, visible=Both(self.visible)._shown(state))

    def review(self, state: State, plan: Plan, seen: Any) -> Plan | None:
        if self.then != "run again":
            return None
        rows = state.valid & state.active[:, None]
        return replace(plan, row_mask=rows, kind="again", start=np.ones(state.batch, dtype=np.int64))

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        some = at.sets["some"]
        if at.index == 0:
            self.ask(at, some)
        q = at.refresh(rows, h)
        o = at.attend(rows.clone() if (self.then, at.index) == ("attend elsewhere", 1) else rows, q)
        if (self.then, at.index) == ("write", 1):
            at.write(some, k=at.stored("K", some))
        if at.last:
            self.ask(at, some)
        return rows, at.finish(h, o)

    def ask(self, at: Layer, some: Tensor) -> None:
        every, real = at.across, some < at.dump
        q = every.stored("Q", some)
        every.report("received", every.received(q, every.each(real), of=some))
        every.report("similarity", every.similarity(every.probs(q, of=some), every.probs(-q), some, "heads"))
        self.real.append(every.each(real).clone())


Given = list[tuple[Tensor | None, Tensor]]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention finds log-sum-exps on a CPU too, as kernels do."""
    monkeypatch.setattr(layer_module, "finds_lse", lambda *given: True)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch, found: None) -> Given:
    """The log-sum-exps (layers * batch, heads, n) that ops were given, each with that of the formula."""
    heard: Given = []

    def listening(op: Any, first: int) -> Any:
        def heard_op(q: Tensor, k: Tensor, *more: Any) -> Tensor:
            visible, lanes, lse = more[first : first + 3]
            heard.append((lse, attend_lse_ref(q, k, k, visible, lanes)[1]))
            return op(q, k, *more)

        return heard_op

    for name, first in (("probs", 0), ("received", 1)):
        monkeypatch.setattr(across, name, listening(getattr(across, name), first))
    return heard


@pytest.mark.parametrize("visible", ["all", "mask", "by layer"])
@pytest.mark.parametrize("buckets", [(), (8, 64)])
def test_what_attention_found_is_given_to_statistics_of_its_rows(
    visible: str, buckets: tuple[int, ...], given: Given
) -> None:
    policy = Again(visible=visible)
    go(policy, buckets=buckets)
    calls = iter(given)
    for i, real in enumerate(policy.real):
        received, probs, others = next(calls), next(calls), next(calls)
        assert others[0] is None
        if i % 2 == 0:  # before the layers: what the last pass found is outdated
            assert (received[0], probs[0]) == (None, None)
            continue
        for lse, expected in (received, probs):
            assert lse is not None
            assert lse.isfinite().all()
            mine = real[:, None].expand_as(expected)
            torch.testing.assert_close(lse[mine], expected[mine], atol=1e-5, rtol=1e-5)
    assert next(calls, None) is None


@pytest.mark.parametrize("then", ["attend elsewhere", "write", "run again", "attend by a library"])
def test_what_attention_found_is_not_given_where_it_may_not_hold(
    then: str, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    if then == "attend by a library":
        monkeypatch.setattr(layer_module, "finds_lse", lambda *given: False)
    trace = go(Again(then))
    twice = then == "run again"
    found = [lse is not None for lse, _ in given]
    assert len(found) == len(trace) * (9 if twice else 6)  # the second pass has no layer 0
    assert found[3:5] == [twice, twice]
    assert sum(found) == 2 * twice * len(trace)  # all of them in first passes


class Rolls(Again):
    """Reports a rollout of all layers at once where there is one, and that of one layer after the other.

    Attributes:
        rolled: for each pass, whether there was one.
    """

    def __init__(self, then: str = "nothing", visible: str = "all"):
        super().__init__(then, visible)
        self.rolled: list[bool] = []

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        q = at.refresh(rows, h)
        o = at.attend(rows.clone() if (self.then, at.index) == ("attend elsewhere", 1) else rows, q)
        if (self.then, at.index) == ("write", 1):
            at.write(rows, k=at.stored("K", rows))
        first = at.index == at.now.first
        self.passed = [*(() if first else self.passed), (at, q)]
        if at.last:
            self.rolled.append(at.across.rolls(rows))
            with at.aside():
                expected = self.one_by_one(rows)
                every = at.across.rollout([q for _, q in self.passed], rows) if self.rolled[-1] else expected
                at.report("rollout", every, per_layer=False)
                at.report("expected", expected, per_layer=False)
        return rows, at.finish(h, o)

    def one_by_one(self, rows: Tensor) -> Tensor:
        at, _ = self.passed[0]
        sums = torch.ones(len(rows), at.dump + 1)
        for at, q in reversed(self.passed):
            sums = sums.scatter(1, rows, sums.gather(1, rows) / 2 * (rows < at.dump))
            sums = sums + at.received(q, sums.gather(1, rows)) / q.shape[1]
        return sums[:, :-1]


@pytest.fixture
def as_with_kernels(monkeypatch: pytest.MonkeyPatch, found: None) -> None:
    """A rollout of all layers is to be had on a CPU too."""
    monkeypatch.setattr(across, "use_triton", lambda rows: True)


@pytest.mark.usefixtures("as_with_kernels")
@pytest.mark.parametrize("visible", ["all", "mask", "by layer"])
@pytest.mark.parametrize("buckets", [(), (8, 64)])
def test_a_rollout_of_all_layers_is_that_of_one_after_the_other(visible: str, buckets: tuple[int, ...]) -> None:
    policy = Rolls(visible=visible)
    trace = go(policy, buckets=buckets)
    assert all(policy.rolled)
    for step in trace:
        found, expected = (step.reports[name][step.active] for name in ("rollout", "expected"))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        if visible == "all":
            np.testing.assert_allclose(found.sum(1), found.shape[1], rtol=1e-5)


@pytest.mark.usefixtures("as_with_kernels")
@pytest.mark.parametrize("twice", [False, True])
def test_queries_that_are_asked_for_together_are_made_in_one_place(
    twice: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[bool] = []
    inner = across.head_mean

    def noting(q: Tensor, *more: Any, **how: Any) -> Tensor:
        copied.append(q.data_ptr() != policy.passed[0][1].data_ptr())
        return inner(q, *more, **how)

    class Asks(Rolls):
        def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            if twice:  # what it returned must not be written over
                first = at.refresh(rows, -h)
                before = first.clone()
            result = super().layer(at, rows, h)
            assert not twice or torch.equal(first, before)
            return result

    monkeypatch.setattr(across, "head_mean", noting)
    policy = Asks()
    trace = go(policy, buckets=(8, 64))
    assert all(policy.rolled)
    for step in trace:
        np.testing.assert_allclose(*(step.reports[name][step.active] for name in ("rollout", "expected")), rtol=1e-5)
    assert copied[0]  # nobody knew yet
    assert all(copied) if twice else not all(copied[1:])


def test_without_kernels_there_is_no_rollout_of_all_layers() -> None:
    policy = Rolls()
    go(policy)
    assert not any(policy.rolled)


@pytest.mark.usefixtures("as_with_kernels")
@pytest.mark.parametrize("then", ["attend elsewhere", "write", "run again", "attend by a library", "few rows at most"])
def test_there_is_no_rollout_of_all_layers_where_it_may_not_hold(then: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if then == "attend by a library":
        monkeypatch.setattr(layer_module, "finds_lse", lambda *given: False)
    if then == "few rows at most":
        monkeypatch.setattr(across, "MOST", 3)
    policy = Rolls(then)
    trace = go(policy)
    rows = [step.rows.sum(1).max() for step in trace]
    expected = {"run again": [True, False] * len(trace), "few rows at most": [n <= 3 for n in rows]}
    assert policy.rolled == expected.get(then, [False] * len(trace))


class Drifts(CachePolicy):
    """Reports how attention of some rows drifted, of all layers at once and of each by itself.

    Args:
        then: another write of a layer, to other rows than those of the pass.
    """

    def __init__(self, visible: str = "all", over: str = "heads", then: str = "nothing"):
        super().__init__()
        self.visible, self.over, self.then = visible, over, then

    def stores(self, spec: Any) -> dict[str, int]:
        return {"Q": spec.q_width}

    def plan(self, state: State) -> Plan:
        some = state.needed | state.changed
        shown = Both(self.visible)._shown(state)
        return Plan(some | (state.step == 0)[:, None], sets={"some": some & (state.step > 0)[:, None]}, visible=shown)

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        some = at.sets["some"]
        if at.index == 0:
            with at.aside():
                self.past = at.across.remember(at.across.stored("Q", some), rows)
        before = at.probs(at.stored("Q", some))
        q = at.refresh(rows, h)
        if (self.then, at.index) == ("write", 1):
            at.write(some, k=at.stored("K", some))
        at.report("similarity", at.similarity(before, at.probs(at.stored("Q", some)), some, self.over))
        h = at.finish(h, at.attend(rows, q))
        if at.last:
            with at.aside():
                every = at.across
                every.report("similarity*", every.drift(self.past, every.stored("Q", some), some, self.over))
        return rows, h


@pytest.mark.parametrize(
    ("visible", "over"), [("all", "heads"), ("mask", "rows"), ("by layer", "heads"), ("all", "flat")]
)
@pytest.mark.parametrize(("buckets", "kernels"), [((), False), ((8, 64), False), ((8, 64), True)])
def test_the_drift_of_all_layers_is_that_of_each(
    visible: str, over: str, buckets: tuple[int, ...], kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels and torch.cuda.is_available():
        pytest.skip("a CUDA device takes the place of the interpreter")
    if kernels:  # with lanes and a single sequence too
        monkeypatch.setattr(attention_drift, "use_triton", lambda q: q.numel() > 0)
        monkeypatch.setattr(layer_module, "finds_lse", lambda *given: True)
    trace = go(Drifts(visible, over), buckets=buckets)
    assert {len(step.active.nonzero()[0]) for step in trace} == {1, 2, 3}
    for step in trace:
        each, every = step.reports["similarity"][:, step.active], step.reports["similarity*"][:, step.active]
        np.testing.assert_allclose(every, each, atol=1e-6)
        first = step.step[step.active] == 0
        assert (np.isnan(every) == first).all()
        assert (every[:, ~first] < 1 - 1e-4).any() or first.all()


def test_keys_written_elsewhere_than_remembered_are_refused() -> None:
    with pytest.raises(PolicyError, match="layer 1 wrote keys at other rows"):
        go(Drifts(then="write"))


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


@pytest.mark.usefixtures("found")
def test_what_attention_found_serves_later_layers_while_the_queries_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rollout in the last layer asks every layer about its own queries."""
    known: list[bool] = []
    inner = layer_module.received

    def noting(q: Tensor, k: Tensor, weight: Tensor, *more: Any) -> Tensor:
        known.append(more[-1] is not None)
        return inner(q, k, weight, *more)

    monkeypatch.setattr(layer_module, "received", noting)

    class Rolls(CachePolicy):
        keeps = True

        def plan(self, state: State) -> Plan:
            return Plan.all(state)

        def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            rows, h = at.compute(rows, h)
            self.passed = [*(self.passed if at.index else ()), (at, at.q if self.keeps else at.q.clone())]
            if at.last:
                for layer, q in self.passed:
                    layer.received(q, rows < at.dump)
            return rows, h

    policy = Rolls()
    go(policy)
    assert known
    assert all(known)
    known.clear()
    policy.keeps = False  # other tensors, if with the same numbers
    go(policy)
    assert not any(known)
