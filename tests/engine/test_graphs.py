"""What recording means for an engine, as far as a CPU can show it; ``tests/test_gpu.py`` replays real graphs."""

import gc
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dcache
from dcache import CachePolicy, Plan, State, UsageError
from dcache.decode import decode
from dcache.engine import Engine, graphs
from dcache.engine.graphs import Graphs
from dcache.engine.layer import Layer
from dcache.generate import Runner, settings_from
from dcache.plugins import make_policy, make_unmasker
from dcache.testing.models import random_model
from dcache.trace import Step

MODEL = random_model(1)
CPU = torch.device("cpu")


def engine_of(policy: str | CachePolicy = "none", **more: Any) -> Engine:
    made = make_policy(policy) if isinstance(policy, str) else policy
    return Engine(MODEL, made, make_unmasker("low-confidence"), **more)


def start(gens: tuple[int, int] = (9, 6)) -> State:
    return State(MODEL.spec, [[1, 2, 3], [4, 5]], list(gens))


def assert_same(one: list[Step], two: list[Step]) -> None:
    for a, b in zip(one, two, strict=True):
        for name in ("tokens", "confidence", "region_row_layers", "region_kv_row_layers", "refreshed"):
            assert np.array_equal(getattr(a, name), getattr(b, name)), name


# -- an engine on a CPU -----------------------------------------------------------------------------------------------


def test_graphs_without_a_cuda_device_are_refused() -> None:
    with pytest.raises(UsageError, match="CUDA graphs need a CUDA device, and the model is on cpu; leave graphs out"):
        engine_of(graphs=True)


def test_a_cpu_records_nothing() -> None:
    engine = engine_of("elastic")
    trace = decode(engine, start())
    assert (engine.graphs, engine.captured, engine.recording) == (False, 0, 0.0)
    assert {step.recording for step in trace} == {0.0}


def test_a_canvas_on_a_cpu_is_as_wide_as_its_longest_sequence() -> None:
    runner = Runner(dcache.load_model("tiny-llada", device="cpu"), "none", settings_from(gen_length=8))
    runner.reserve([[1] * 40])
    assert runner.state([[1, 2, 3], [4]]).slots == 11


@pytest.mark.parametrize("limit", [0, 1, 4])
def test_a_limit_ends_the_loop_and_leaves_the_steps_before_it_alone(limit: int) -> None:
    state = start()
    trace = decode(engine_of("elastic"), state, limit)
    assert len(trace) == limit
    assert state.active.all()
    assert_same(trace, decode(engine_of("elastic"), start())[:limit])


def test_a_limit_that_is_not_reached_changes_nothing() -> None:
    assert_same(decode(engine_of(), start(), 99), decode(engine_of(), start()))


def test_what_is_put_off_is_done_once_in_order_and_not_before() -> None:
    engine, done = engine_of(), []

    def again(value: str) -> None:
        done.append(value)
        engine.later(lambda: "from within", done.append)

    engine.later(lambda: done.append("made") or "first", again)
    engine.later(lambda: "second", done.append)
    assert done == []
    engine.catch_up()
    assert done == ["made", "first", "second"]
    engine.catch_up()
    engine.catch_up()
    assert done == ["made", "first", "second", "from within"]


def test_steps_are_recorded_in_order_and_all_of_them_by_the_end() -> None:
    trace = decode(engine_of("elastic"), start())
    assert [int(step.step.max()) for step in trace] == list(range(9))
    assert all(step.row_layers.any() for step in trace)


def test_what_a_failed_decode_put_off_is_not_done_in_the_next_one() -> None:
    class Fails(CachePolicy):
        fails = True

        def plan(self, state: State) -> Plan:
            if self.fails and state.step.max() == 2:
                raise RuntimeError("in the middle")
            return Plan.all(state)

    engine = engine_of(Fails())
    with pytest.raises(RuntimeError, match="in the middle"):
        decode(engine, start())
    engine.policy.fails = False  # type: ignore[attr-defined]
    shorter = State(MODEL.spec, [[7]], [4])  # a batch of another shape
    assert [int(step.row_layers.sum()) for step in decode(engine, shorter)] == [5 * MODEL.spec.n_layers] * 4


# -- work beside the main line ----------------------------------------------------------------------------------------


class Beside(CachePolicy):
    """Reports how likely keys were before and after the write, and writes a store of its own; beside, or not."""

    def __init__(self, beside: bool):
        super().__init__()
        self.beside = beside

    def stores(self, spec: Any) -> dict[str, int]:
        return {"mine": spec.d_model}

    def plan(self, state: State) -> Plan:
        return Plan(state.valid if int(state.step.max()) % 3 == 0 else state.needed | state.changed)

    @contextmanager
    def aside(self, at: Layer) -> Iterator[None]:
        if self.beside:
            with at.aside():
                yield
        else:
            yield

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        with self.aside(at):
            before = at.probs(at.project(rows, h, "q")[0])
            at.store("mine", rows, h)
        q = at.refresh(rows, h)
        with self.aside(at):
            after = at.probs(q)
            at.report("moved", (after - before)[..., :-1].abs().nan_to_num(0).amax((1, 2, 3)))
            at.report("stored", (at.stored("mine", rows) - h).abs().amax((1, 2)))
        return rows, at.finish(h, at.attend(rows, q))


def test_on_a_cpu_work_beside_the_main_line_runs_in_its_place() -> None:
    aside, inline = (decode(engine_of(Beside(beside)), start()) for beside in (True, False))
    assert_same(aside, inline)
    for a, b in zip(aside, inline, strict=True):
        assert np.array_equal(a.reports["moved"], b.reports["moved"])
        assert not a.reports["stored"][:, a.active].any()
    assert any(step.reports["moved"].any() for step in aside)


# -- the engine and its executor --------------------------------------------------------------------------------------


class Ledger:
    """An executor that notes what it is asked for, and runs the work as it stands."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Hashable]] = []

    def ready(self, key: Hashable) -> bool:
        return ("record", key) in self.calls

    def record(self, key: Hashable, work: Callable[[], None]) -> None:
        self.calls.append(("record", key))

    def __call__(self, key: Hashable, work: Callable[[], None]) -> None:
        self.calls.append(("run", key))
        work()

    def forget(self, key: Hashable = None) -> None:
        self.calls = [] if key is None else [call for call in self.calls if call[1] != key]


def test_the_first_pass_of_a_key_is_eager_the_second_is_recorded_and_run_and_no_other_recorded() -> None:
    ledger = Ledger()
    engine = engine_of(executor=ledger, buckets=(64,))
    trace = decode(engine, start((9, 9)))
    (key,) = {key for _, key in ledger.calls}
    assert ledger.calls == [("record", key)] + [("run", key)] * (len(trace) - 1)
    assert_same(trace, decode(engine_of(buckets=(64,)), start((9, 9))))


def test_the_time_of_recording_stands_at_the_step_that_recorded() -> None:
    engine = engine_of(executor=Ledger(), buckets=(64,))
    trace = decode(engine, start((9, 9)))
    assert [step.recording > 0 for step in trace] == [False, True] + [False] * 7
    assert sum(step.recording for step in trace) == pytest.approx(engine.recording)


# -- the books of `Graphs`, with a device that is not there -----------------------------------------------------------


class Tape:
    """In place of a CUDA graph."""

    pools: list[object]
    open = 0

    def __init__(self) -> None:
        self.ended = self.replays = 0

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        Tape.pools.append(pool)
        Tape.open += 1

    def capture_end(self) -> None:
        Tape.open -= 1
        self.ended += 1

    def replay(self) -> None:
        assert self.ended == 1
        self.replays += 1


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough of torch.cuda for graphs of nothing."""

    @contextmanager
    def stream(_: object) -> Iterator[None]:
        yield

    Tape.pools, Tape.open = [], 0
    line = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(graphs, "stream_of", lambda device, purpose: line)
    for name, stub in {
        "CUDAGraph": Tape,
        "graph_pool_handle": object,
        "synchronize": lambda device: None,
        "current_stream": lambda device: line,
        "stream": stream,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stub)


@pytest.mark.usefixtures("no_device")
def test_graphs_of_one_engine_share_a_pool_until_they_are_forgotten() -> None:
    made = Graphs(CPU)
    for key in "ab":
        made.record(key, lambda: None)
    made.forget()
    assert not made.ready("a")
    made.record("a", lambda: None)
    assert Tape.pools[0] is Tape.pools[1] is not Tape.pools[2]
    assert (made.captured, made.keys) == (3, {"a": 1})


@pytest.mark.usefixtures("no_device")
def test_the_graph_of_one_key_can_be_forgotten_alone() -> None:
    made = Graphs(CPU)
    for key in "abc":
        made.record(key, lambda: None)
    made.forget("b")
    assert [made.ready(key) for key in "abc"] == [True, False, True]
    made.record("b", lambda: None)
    assert made.keys == {"a": 1, "b": 2, "c": 1}
    assert len({id(pool) for pool in Tape.pools}) == 1


@pytest.mark.usefixtures("no_device")
def test_a_replay_runs_the_graph_and_not_the_work() -> None:
    made = Graphs(CPU)
    made.record("a", lambda: None)
    made("a", lambda: pytest.fail("the work ran"))
    made("a", lambda: pytest.fail("the work ran"))
    assert (made.captured, made.replayed) == (1, 2)


@pytest.mark.usefixtures("no_device")
def test_a_failure_inside_a_capture_ends_it_is_shown_and_leaves_no_graph() -> None:
    made = Graphs(CPU)
    with pytest.raises(ZeroDivisionError):
        made.record("a", lambda: 1 // 0 and None)
    assert (Tape.open, made.captured, made.ready("a"), gc.isenabled()) == (0, 0, False, True)


@pytest.mark.usefixtures("no_device")
def test_garbage_is_not_collected_during_a_capture() -> None:
    during = []
    Graphs(CPU).record("a", lambda: during.append(gc.isenabled()))
    assert (during, gc.isenabled()) == ([False], True)
