"""What a run leaves behind, and what happens at sizes of zero, after a failure, and with masks of another kind."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dcache.decode import decode
from dcache.engine import Engine
from dcache.engine import engine as engine_module
from dcache.engine.aside import Aside
from dcache.engine.layer import Layer
from dcache.engine.packet import Packet
from dcache.errors import NumericsError, PolicyError, UnmaskerError
from dcache.kernels import attention_drift, attention_probs, backend, noise
from dcache.plugins import make_policy, make_unmasker
from dcache.policy import CachePolicy, Plan
from dcache.state import State
from dcache.testing.models import random_model
from dcache.testing.recorder import Recorder
from dcache.unmasking.base import Ask
from dcache.unmasking.confidence import LowConfidence

MODEL = random_model(1)


def go(policy: CachePolicy, *gens: int, unmask: str = "low-confidence", **more: Any) -> list[Any]:
    state = State(MODEL.spec, [[1, 2, 3]] * len(gens), list(gens))
    return decode(Engine(MODEL, policy, make_unmasker(unmask), **more), state)


class Everything(CachePolicy):
    """All rows; subclasses change a plan, or what a layer does beside its work."""

    def plan(self, state: State) -> Plan:
        return Plan(state.valid, visible=self.visible(state))

    def visible(self, state: State) -> Any:
        return None

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        rows, h = at.compute(rows, h)
        self.beside(at, rows)
        return rows, h

    def beside(self, at: Layer, rows: Tensor) -> None:
        pass


# -- no rows ----------------------------------------------------------------------------------------------------------


def test_no_kernel_is_launched_for_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "ENABLED", True)
    with torch.no_grad():
        assert backend.use_triton(SimpleNamespace(is_cuda=True, numel=lambda: 1))  # type: ignore[arg-type]
        assert not backend.use_triton(SimpleNamespace(is_cuda=True, numel=lambda: 0))  # type: ignore[arg-type]


def test_twins_take_no_rows() -> None:
    q, k = torch.zeros(2, 4, 0, 8), torch.zeros(2, 2, 5, 8)
    assert attention_probs.products(q, k).shape == (2, 0, 6)
    assert attention_probs.probs(q, k).shape == (2, 4, 0, 6)
    assert attention_probs.head_mean(q, k).shape == (2, 0, 6)
    assert torch.equal(attention_probs.received(q, k, torch.zeros(2, 0)), torch.zeros(2, 6))


def test_a_step_in_which_nothing_may_be_committed_has_no_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """``idle_steps`` asks for no rows in some steps, so that `elastic` has an empty set to make statistics of."""
    if torch.cuda.is_available():
        pytest.skip("a CUDA device takes the place of the interpreter")
    unmask = "random-order(steps=16,schedule=linear,idle_steps=true)"
    expected = go(make_policy("elastic"), 4, unmask=unmask)
    for ops in (attention_probs, attention_drift):
        monkeypatch.setattr(ops, "use_triton", lambda x: x.numel() > 0)
    found = go(make_policy("elastic"), 4, unmask=unmask)
    assert len(expected) == 16
    assert [step.commit.nonzero()[1].tolist() for step in found] == [s.commit.nonzero()[1].tolist() for s in expected]


# -- masks on the device ----------------------------------------------------------------------------------------------


class Masked(Everything):
    def __init__(self, make: Callable[[State], Any]):
        super().__init__()
        self.make = make

    def visible(self, state: State) -> Any:
        return self.make(state)

    def beside(self, at: Layer, rows: Tensor) -> None:
        assert at.visible is not None
        assert at.visible.is_contiguous()


def test_a_mask_on_the_device_is_read_from_memory_of_the_engine() -> None:
    turned = go(Masked(lambda state: torch.from_numpy(state.valid).T.contiguous().T), 3, 2)
    plain = go(Masked(lambda state: torch.from_numpy(state.valid)), 3, 2)
    assert all((step.commit == other.commit).all() for step, other in zip(turned, plain, strict=True))


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        (lambda state: torch.from_numpy(state.valid).to(torch.uint8), r"visible has dtype torch.uint8, expected bool"),
        (lambda state: torch.from_numpy(state.valid).float(), r"visible has dtype torch.float32, expected bool"),
        (lambda state: torch.from_numpy(state.valid).to("meta"), r"visible is a tensor on meta"),
    ],
)
def test_a_mask_of_another_kind_is_refused_before_a_layer_reads_it(mask: Callable[[State], Any], told: str) -> None:
    with pytest.raises(PolicyError, match=told):
        go(Masked(mask), 3)


# -- what is left of earlier steps and batches ------------------------------------------------------------------------


class Reporting(Everything):
    """Reports a number in the steps of `when`: of layer 1 alone, or of every layer."""

    def __init__(self, when: tuple[int, ...], number: float, second: bool = False):
        super().__init__()
        self.when, self.number, self.second = when, number, second

    def stores(self, spec: Any) -> dict[str, int]:
        return {"H": spec.d_model}

    def plan(self, state: State) -> Plan:
        self.first = True
        return Plan(state.valid, kind=("told" if int(state.step.max()) in self.when and not self.second else "silent"))

    def review(self, state: State, plan: Plan, seen: Any) -> Plan | None:
        if not self.second or int(state.step.max()) not in self.when:
            return None
        start = np.full(state.batch, state.spec.n_layers)
        start[-1] = 2
        return Plan(state.valid & (np.arange(state.batch) == state.batch - 1)[:, None], kind="told", start=start)

    def beside(self, at: Layer, rows: Tensor) -> None:
        if at.kind != "told":
            return
        x = torch.full((len(rows),), self.number)
        if self.second:
            at.report("x", x)
        elif at.index == 1:
            at.report("x", x)
            at.report("whole", x, per_layer=False)


@pytest.mark.parametrize("buckets", [(), (16,)])
def test_a_report_holds_nothing_of_an_earlier_batch(buckets: tuple[int, ...]) -> None:
    policy = Reporting((0,), 1000.0)
    engine = Engine(MODEL, policy, make_unmasker("low-confidence"), buckets=buckets)
    decode(engine, State(MODEL.spec, [[1, 2]] * 4, 3))
    policy.when, policy.number = (2,), 2.0
    trace = decode(engine, State(MODEL.spec, [[1, 2, 3, 4]] + [[1, 2]] * 3, [1, 3, 3, 3]))
    x = trace[2].reports["x"]  # (layers, batch): sequence 0 has ended, and layer 1 alone reports
    assert trace[2].active.tolist() == [False, True, True, True]
    assert x[1].tolist() == [0, 2, 2, 2]
    assert not np.delete(x, 1, axis=0).any()
    assert trace[2].reports["whole"].tolist() == [0, 2, 2, 2]


def test_a_report_of_a_second_pass_holds_nothing_of_what_that_did_not_run() -> None:
    policy = Reporting((0,), 1000.0)
    engine = Engine(MODEL, policy, make_unmasker("low-confidence"), buckets=(16,))
    decode(engine, State(MODEL.spec, [[1, 2]] * 2, 3))
    policy.when, policy.number, policy.second = (1,), 2.0, True
    x = decode(engine, State(MODEL.spec, [[1, 2]] * 2, 3))[1].reports["x"]
    assert not x[:, 0].any()
    assert not x[:2, 1].any()  # layer 1 reported in the batch before
    assert (x[2:, 1] == 2).all()


def test_a_buffer_of_another_shape_makes_what_was_prepared_void() -> None:
    unmask = "klass(threshold=0.01,history=1)"
    engine = Engine(MODEL, make_policy("none"), make_unmasker(unmask), buckets=(16,))
    decode(engine, State(MODEL.spec, [[1, 2, 3, 4]], 8))
    prepared = list(engine._prepared.values())
    wider = State(MODEL.spec, [[1, 2, 3, 4, 5, 6]], 6)
    again = decode(engine, wider)
    assert not any(mine is old for mine in engine._prepared.values() for old in prepared)
    alone = State(MODEL.spec, [[1, 2, 3, 4, 5, 6]], 6)
    fresh = decode(Engine(MODEL, make_policy("none"), make_unmasker(unmask), buckets=(16,)), alone)
    assert (wider.tokens == alone.tokens).all()
    assert len(again) == len(fresh)


def test_buffers_of_the_same_shape_keep_what_was_prepared() -> None:
    engine = Engine(MODEL, make_policy("none"), make_unmasker("klass"), buckets=(16,))
    decode(engine, State(MODEL.spec, [[1, 2, 3, 4]], 8))
    prepared = dict(engine._prepared)
    decode(engine, State(MODEL.spec, [[1, 2, 3, 4]], 8))
    assert all(engine._prepared[key] is old for key, old in prepared.items())


class Kinds(Everything):
    """Steps of kinds 0 and 1 by turns, then of a kind of their own each."""

    def plan(self, state: State) -> Plan:
        step = int(state.step.max())
        return Plan(state.valid, kind=step % 2 if step < 4 else step)


def test_of_too_many_keys_the_oldest_goes_with_its_buffers_and_its_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = go(Everything(), 8)
    monkeypatch.setattr(engine_module, "MOST_GRAPHS", 3)
    engine = Engine(MODEL, Kinds(), make_unmasker("low-confidence"), buckets=(16,), executor=(tapes := Recorder()))
    forgotten: list[object] = []
    forget = tapes.forget
    monkeypatch.setattr(tapes, "forget", lambda key=None: (forgotten.append(key and key[0]), forget(key)))
    found = decode(engine, State(MODEL.spec, [[1, 2, 3]], 8))
    assert [key[0] for key in engine._prepared] == [5, 6, 7]  # type: ignore[index]
    assert forgotten == [None, 0, 1, 4]  # all when the first batch made its buffers
    assert tapes.recorded == 2
    assert all((a.commit == b.commit).all() for a, b in zip(expected, found, strict=True))


def test_work_aside_is_done_before_the_workspace_of_freed_keys_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[int] = []
    monkeypatch.setattr(Aside, "join", lambda self: joined.append(1))
    go(make_policy("sparse-dllm(compact=true)"), 3)
    compact = len(joined)
    joined.clear()
    go(make_policy("sparse-dllm"), 3)
    assert compact - len(joined) == 3 * MODEL.spec.n_layers


# -- after a failure --------------------------------------------------------------------------------------------------


class Failing(Everything):
    def beside(self, at: Layer, rows: Tensor) -> None:
        raise ZeroDivisionError("a tile of no rows")


def test_what_a_layer_raises_names_the_policy_and_leaves_the_engine_as_it_was() -> None:
    engine = Engine(MODEL, Failing(), make_unmasker("low-confidence"), debug=True)
    with pytest.raises(PolicyError, match="layer 0 raised ZeroDivisionError: a tile of no rows"):
        decode(engine, State(MODEL.spec, [[1, 2, 3]], 3))
    assert engine._inspect is False


class Broken(Everything):
    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        rows, h = at.compute(rows, h)
        return rows, h * float("nan") if at.index == 1 else h


def test_looking_for_the_layer_at_fault_gives_a_policy_its_own_layer_back() -> None:
    policy = Broken()
    mine = policy.layer
    vars(policy)["layer"] = mine
    with pytest.raises(NumericsError, match="first in layer 1"):
        go(policy, 3)
    assert vars(policy)["layer"] is mine


class Unwritten(Everything):
    """Shows a key that no pass has written."""

    def plan(self, state: State) -> Plan:
        return Plan(state.valid & (np.arange(state.slots) > 0), visible=state.valid)


def test_a_pass_has_ended_when_a_check_fails_that_ran_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []
    monkeypatch.setattr(Packet, "wait", lambda self: waits.append(1))
    with pytest.raises(PolicyError, match="attends to position 0"):
        go(Unwritten(), 3)
    assert waits == [1]


# -- what does not go to the host, or to the device -------------------------------------------------------------------


class Bytes(Everything):
    def beside(self, at: Layer, rows: Tensor) -> None:
        at.report("x", torch.zeros(len(rows), dtype=torch.uint8))


def test_a_report_of_another_dtype_is_named() -> None:
    with pytest.raises(PolicyError, match=r"report 'x' has dtype torch\.uint8, which does not go to the host"):
        go(Bytes(), 3)


class Asking(LowConfidence):
    """Asks for something beside the window."""

    def __init__(self, **more: Any):
        super().__init__()
        self.more = more

    def ask(self, state: State) -> Ask:
        return Ask(state.masked, **self.more)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"flags": {"odd": np.zeros(1, dtype=np.uint8)}}, r"Ask\.flags\['odd'\] has dtype uint8"),
        ({"flags": {"odd": 3}}, r"Ask\.flags\['odd'\] has type int"),
        ({"shadow": np.zeros((1, 5), dtype=bool)}, r"Ask\.shadow has shape \(1, 5\)"),
        ({"order": np.zeros((1, 6))}, r"Ask\.order has shape \(1, 6\) and dtype float64"),
        ({"commits": np.zeros((1, 6), dtype=bool)}, r"Ask\.commits has shape \(1, 6\)"),
    ],
)
def test_what_an_unmasker_asks_for_by_mistake_is_named(more: dict[str, Any], told: str) -> None:
    engine = Engine(MODEL, make_policy("none"), Asking(**more))
    with pytest.raises(UnmaskerError, match=told):
        decode(engine, State(MODEL.spec, [[1, 2, 3]], 3))


def test_no_uniform_number_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "mix", lambda x: torch.full_like(x, -1))  # all bits set
    assert noise.uniform(torch.zeros(1, dtype=torch.int64)).item() == 1 - 2**-53
