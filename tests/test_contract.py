"""The contract and the engine that keeps it: one small policy per way of using it, and what is refused.

Each policy has a configuration in which it must commit what no cache (or its inner policy) does. They are smaller than
the published methods that use the contract so, and `Deep` stands for a method that is not built;
``docs/explanation/contract.md`` walks through it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dcache import (
    CachePolicy,
    DCacheError,
    Filter,
    Plan,
    PolicyConfig,
    PolicyError,
    Sampling,
    Seen,
    State,
    UnmaskerError,
    UsageError,
)
from dcache.arrays import leftmost
from dcache.decode import decode
from dcache.engine import Engine
from dcache.engine.layer import Layer
from dcache.engine.network import Network
from dcache.errors import NumericsError
from dcache.kernels.rows import put, take
from dcache.kernels.select import find, lowest
from dcache.models.transformer import ModelSpec, Transformer
from dcache.plugins import plugins
from dcache.policies.d2 import D2Cache
from dcache.policies.dkv import DKVCache
from dcache.policies.elastic import ElasticCache
from dcache.policies.none import NoCache
from dcache.policies.suffix import Suffix
from dcache.testing.models import random_model
from dcache.testing.recorder import Recorder, SyncError
from dcache.unmasking.base import Ask, Picks, Unmasker, Update
from dcache.unmasking.confidence import LowConfidence, Threshold

MODEL = random_model(1, n_layers=4)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6, 5, 3]]


def start(model: Transformer = MODEL, gen: int = 8, block_length: int | None = None) -> State:
    return State(model.spec, PROMPTS, gen, block_length)


def run(policy: CachePolicy, unmasker: Unmasker | None = None, **engine: Any) -> tuple[list[Any], Engine]:
    made = Engine(MODEL, policy, unmasker or LowConfidence(), debug=True, **engine)
    return decode(made, start()), made


def commits(trace: list[Any]) -> list[Any]:
    return [[(int(b), int(p), int(s.tokens[b, p])) for b, p in zip(*np.nonzero(s.commit), strict=True)] for s in trace]


REFERENCE = commits(run(NoCache())[0])


class Chosen(CachePolicy):
    """K and V of the whole stream, queries where values moved, stored increments elsewhere."""

    class Config(PolicyConfig):
        share: float = 1.0

    def stores(self, spec: ModelSpec) -> dict[str, int]:
        return {"C": spec.d_model, "F": spec.d_model}

    def plan(self, state: State) -> Plan:
        first = bool((state.step[state.active] == 0).any())
        most = state.slots if first else max(1, int(self.config.share * state.slots))
        count = np.full(state.batch, most, dtype=np.int64)
        return Plan(state.valid, kind=("first" if first else "later", most), flags={"count": count})

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        _, bound = at.kind  # type: ignore[misc]
        q, k, v = at.project(rows, h)
        moved = torch.cosine_similarity(v, at.stored("V", rows), dim=-1).mean(1).nan_to_num(-1.0)  # (batch, n)
        moved = moved.masked_fill(rows == at.dump, 2.0)
        at.write(rows, k, v)
        index, real = lowest(moved, at.flags["count"], min(bound, rows.shape[1]))
        picked = torch.where(real, take(rows[..., None], index)[..., 0], at.dump)
        order = picked.sort(dim=1)
        picked, index = order.values, index.gather(1, order.indices)
        c = at.output(at.attend(picked, take(q, index)))
        at.store("C", picked, c)
        f = at.ffn(take(h, index) + c)
        at.store("F", picked, f)
        return rows, h + at.stored("C", rows) + at.stored("F", rows)


class Evict(Filter):
    """After the first step of a block, hide the keys that its queries attend to least."""

    class Config(PolicyConfig):
        keep: float = 1.0

    def begin(self, net: Network, state: State) -> None:
        super().begin(net, state)
        shape = (net.spec.n_layers, net.batch, 1, net.slots)
        self.shown = net.buffer("shown", shape, torch.bool).fill_(True)

    def restrict(self, state: State, plan: Plan) -> Plan:
        scoring = bool((state.block_step[state.active] == 1).all())
        return replace(
            plan, marks={**plan.marks, "evict": scoring}, visible=None if (state.step <= 1).all() else self.shown
        )

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        out = self.inner.layer(at, rows, h)
        if at.marks["evict"]:
            assert at.q is not None
            score = at.received(at.q, (rows < at.dump).float())[:, :-1]
            n = score.shape[1]
            index, _ = lowest(-score, n, max(1, round(self.config.keep * n)))
            kept = torch.zeros_like(score, dtype=torch.bool).scatter_(1, index, True)
            self.shown[at.index].index_copy_(0, at.lanes, kept[:, None])  # this pass may run some sequences only
        return out


class Deep(CachePolicy):
    """DeepCache: stored increments stand in for the middle layers; changed rows go through them on the side."""

    class Config(PolicyConfig):
        interval: int = 1

    def stores(self, spec: ModelSpec) -> dict[str, int]:
        return {"D": spec.d_model}

    def begin(self, net: Network, state: State) -> None:
        self.since = np.zeros_like(state.valid)
        self.scratch = net.buffer("scratch", (net.batch, net.slots + 1, net.spec.d_model), net.dtype)

    def plan(self, state: State) -> Plan:
        full = int(state.step.max()) % self.config.interval == 0
        self.since = np.zeros_like(state.valid) if full else self.since | state.changed
        return Plan(state.valid, "full" if full else "cheap", sets={"side": self.since})

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        first, last = 1, at.spec.n_layers - 2  # the middle
        if not first <= at.index <= last:
            return at.compute(rows, h)
        if at.index == first:
            self.entry = h
        if at.kind == "full":
            rows, h = at.compute(rows, h)
            if at.index == last:
                at.store("D", rows, h - self.entry)
                self.total = at  # the layer that holds D
            return rows, h
        if at.sets["side"].shape[1]:
            side = at.sets["side"]
            if at.index == first:
                self.side = take(h, find(rows, side))
            _, self.side = at.compute(side, self.side)
        if at.index < last:
            return rows, h
        put(self.scratch, rows, self.entry + at.stored("D", rows), at.lanes)
        if at.sets["side"].shape[1]:
            put(self.scratch, at.sets["side"], self.side, at.lanes)
        return rows, take(self.scratch, rows, at.lanes)


class Halving(CachePolicy):
    """The stream narrows on the way up, to the half of it that a norm of the values likes best; and to
    budgets per layer that arrive as a (batch, layers) flag."""

    class Config(PolicyConfig):
        share: float = 1.0

    def begin(self, net: Network, state: State) -> None:
        width = net.weight(1, "v").norm()  # weights are there for policies that prepare something from them
        self.scale = net.buffer("scale", (1,), net.dtype).copy_(width.reshape(1))

    def plan(self, state: State) -> Plan:
        first = (state.step == 0).all()  # every layer needs every key once, so the first pass does not narrow
        rows = state.valid if first else state.needed | state.changed
        count = np.ceil(rows.sum(1) * (1.0 if first else self.config.share)).astype(np.int64)
        budget = np.repeat(count[:, None], state.spec.n_layers, axis=1)
        return Plan(rows, sets={"needed": state.needed}, flags={"budget": budget})

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        rows, h = at.compute(rows, h)
        if at.index != 1:
            return rows, h
        score = at.stored("V", rows).norm(dim=-1).sum(1) / self.scale
        wanted = (rows[..., None] == at.sets["needed"][:, None]).any(-1) & (rows < at.dump)
        score = score.masked_fill(wanted, 1e6).masked_fill(rows == at.dump, -1e6)
        index, real = lowest(-score, at.flags["budget"][:, at.index], rows.shape[1])
        kept = torch.where(real, take(rows[..., None], index)[..., 0], at.dump).sort(dim=1)
        return kept.values, take(h, index.gather(1, kept.indices))


class Reuse(CachePolicy):
    """Keys and values of a prompt span come from an earlier request; only a share of them is recomputed."""

    class Config(PolicyConfig):
        anchors: int = 0

    def __init__(self, memory: Mapping[int, tuple[Tensor, Tensor]] | None = None, **knobs: Any):
        super().__init__(**knobs)
        self.memory = memory

    def begin(self, net: Network, state: State) -> None:
        self.span = np.zeros_like(state.valid)
        if self.memory is not None:
            self.span[:, :3] = True
            for index, (k, v) in self.memory.items():
                net.preload(index, self.span, k, v)
            self.span[:, : self.config.anchors] = False

    def plan(self, state: State) -> Plan:
        return Plan(state.valid & ~self.span)


def test_a_report_of_the_whole_pass_has_no_axis_of_layers() -> None:
    def layer(at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        if at.last:
            at.report("rows", (rows < at.dump).sum(1), per_layer=False)
        return at.compute(rows, h)

    trace, _ = run(layering(layer))
    assert trace[0].reports["rows"].tolist() == [15, 11]


def test_queries_and_keys_are_counted_apart_when_they_differ() -> None:
    exact, _ = run(Chosen(share=1.0))
    assert commits(exact) == REFERENCE
    trace, _ = run(Chosen(share=0.4))
    valid = np.array([[15], [11]])
    for step in trace[1:]:
        assert (step.kv_row_layers == (valid * step.active[:, None]).T).all()
        assert (step.row_layers == 6 * step.active).all()


def test_a_filter_that_keeps_every_key_equals_its_inner_policy() -> None:
    for inner in (DKVCache(interval=4), ElasticCache(gamma=0.9)):
        plain, _ = run(type(inner)(inner.config))
        trace, _ = run(Evict(inner, keep=1.0))
        assert commits(trace) == commits(plain)
        assert [s.start is None for s in trace] == [s.start is None for s in plain]


@pytest.mark.parametrize("inner", [DKVCache, 5, None])
def test_a_filter_refuses_what_is_no_policy(inner: Any) -> None:
    with pytest.raises(UsageError, match=r"wraps another policy.* give inner as an instance"):
        Evict(inner)


def test_a_filter_makes_its_inner_policy_from_text() -> None:
    assert isinstance(Suffix("dkv(interval=4)").inner, DKVCache)
    assert isinstance(Suffix(inner=DKVCache()).inner, DKVCache)


def test_a_filter_that_hides_keys_changes_confidences() -> None:
    trace, plain = run(Evict(NoCache(), keep=0.5))[0], run(NoCache())[0]
    later = [abs(a.confidence[a.commit] - b.confidence[a.commit]).max() for a, b in zip(trace, plain, strict=False)]
    assert max(later[:2]) < 1e-6 < max(later[2:])


def test_skipped_middle_layers_are_exact_when_every_step_is_full() -> None:
    assert commits(run(Deep(interval=1))[0]) == REFERENCE
    trace, _ = run(Deep(interval=3))
    assert trace[1].row_layers[1:-1].sum() < trace[0].row_layers[1:-1].sum()


def test_a_stream_that_narrows_computes_fewer_rows_above() -> None:
    whole, half = run(Halving(share=1.0))[0], run(Halving(share=0.6))[0]
    assert all((s.row_layers == s.row_layers[0]).all() for s in whole)
    assert (half[0].row_layers == whole[0].row_layers).all()
    for step in half[1:]:
        assert (step.row_layers[:2] == step.rows.sum(1)).all()
        assert (step.row_layers[2:] == np.ceil(0.6 * step.row_layers[:1])).all()


def test_a_preloaded_span_of_the_same_request_is_exact_while_it_would_not_change() -> None:
    """One layer: the keys of a prompt depend on its tokens alone, so those of an earlier request are exact."""
    model = random_model(4, n_layers=1)
    first = Engine(model, NoCache(), LowConfidence())
    reference = decode(first, State(model.spec, PROMPTS, 8))
    memory = {0: tuple(first.stores.tensors[n][0][:, :, :3].clone() for n in "KV")}
    trace = decode(Engine(model, Reuse(memory), LowConfidence(), debug=True), State(model.spec, PROMPTS, 8))
    assert commits(trace) == commits(reference)
    assert not any(s.rows[:, :3].any() for s in trace)


PATTERNS = [
    lambda: Chosen(share=0.4),
    lambda: Evict(ElasticCache(gamma=0.95), keep=0.7),
    lambda: Deep(interval=3),
    lambda: Halving(share=0.6),
]


@pytest.mark.parametrize("make", PATTERNS, ids=["chosen", "evict", "deep", "halving"])
def test_every_pattern_can_be_captured(make: Any) -> None:
    eager, _ = run(make(), buckets=(8, 64))
    recorder = Recorder()
    engine = Engine(MODEL, make(), LowConfidence(), buckets=(8, 64), executor=recorder, debug=True)
    for _ in range(3):
        trace = decode(engine, start())
        assert commits(trace) == commits(eager)
    assert recorder.replayed > recorder.recorded > 0


# -- the recorder finds what would break under capture ----------------------------------------------------------------


class Peeks(CachePolicy):
    def plan(self, state: State) -> Plan:
        return Plan.all(state)

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        if float(h.sum()) == 1.5:
            return rows, h
        return at.compute(rows, h)


class Counts(CachePolicy):
    """Reads a Python number that changes from step to step: frozen at capture."""

    def plan(self, state: State) -> Plan:
        self.scale = 1.0 + int(state.step.max())
        return Plan.all(state)

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return at.compute(rows, h + self.scale if at.last else h)


def test_a_sync_inside_a_layer_is_refused_by_the_recorder() -> None:
    with pytest.raises(SyncError, match="_local_scalar_dense"):
        run(Peeks(), executor=Recorder(), buckets=(8, 64))


def test_a_python_value_that_changes_is_frozen_by_the_recorder() -> None:
    eager, _ = run(Counts(), buckets=(8, 64))
    frozen, _ = run(Counts(), buckets=(8, 64), executor=Recorder())
    pairs = zip(eager[2:], frozen[2:], strict=True)
    assert not all(np.array_equal(a.confidence, b.confidence) for a, b in pairs)


@pytest.mark.parametrize(
    "call",
    [
        lambda h: h.tolist(),
        lambda h: h.numpy(),
        lambda h: h.cpu(),
        lambda h: torch.tensor([1.0]),
        lambda h: torch.as_tensor([1.0]),
        lambda h: torch.rand_like(h),
        lambda h: torch.randperm(3),
        lambda h: torch.nn.functional.dropout(h),
        lambda h: h.clone().random_(),
        lambda h: h[h > 0],
        lambda h: h.nonzero(),
        lambda h: h.flatten().unique(),
        lambda h: bool(h.sum() > 0),
    ],
)
def test_what_needs_the_host_or_a_generator_is_refused_by_the_recorder(call: Any) -> None:
    policy = layering(lambda at, rows, h: (call(h), at.compute(rows, h))[1])
    with pytest.raises(SyncError):
        run(policy, executor=Recorder(), buckets=(8, 64))


def test_a_report_in_half_precision_arrives_as_float32() -> None:
    trace, _ = run(layering(lambda at, rows, h: (at.report("x", h[:, 0].bfloat16()), at.compute(rows, h))[1]))
    assert trace[0].reports["x"].dtype == np.float32


def test_an_engine_forgets_its_recordings_when_the_shape_of_the_batch_changes() -> None:
    """A recording is bound to the buffers it was made on; coming back to a shape finds new ones."""
    for policy in (NoCache(), DKVCache(interval=4), ElasticCache()):
        engine = Engine(MODEL, policy, LowConfidence(), executor=Recorder(), buckets=(8, 64))
        results = []
        for gen in (8, 8, 12, 8, 8, 8):
            results.append(commits(decode(engine, start(gen=gen))))
        plain = Engine(MODEL, policy, LowConfidence())
        assert results == [commits(decode(plain, start(gen=gen))) for gen in (8, 8, 12, 8, 8, 8)]


def test_a_subclass_does_not_pass_for_what_its_parent_is_registered_as() -> None:
    plugins()  # registers the built-ins under their names
    mine = type("Mine", (ElasticCache,), {})()
    assert (mine.name, mine.label, ElasticCache.name) == ("", "", "elastic")


# -- a policy that breaks the contract is named, with step, expected and found ----------------------------------------


def planning(make: Any, **more: Any) -> CachePolicy:
    return type("Broken", (CachePolicy,), {"plan": lambda self, state: make(state), **more})()


def layering(layer: Any) -> CachePolicy:
    return planning(Plan.all, layer=lambda self, at, rows, h: layer(at, rows, h))


BROKEN: dict[str, tuple[CachePolicy, str]] = {
    "no batch axis": (planning(lambda s: Plan(s.valid[0])), r"row_mask has shape \(15,\).*add a batch axis"),
    "wrong dtype": (planning(lambda s: Plan(s.valid.astype(np.int64))), "row_mask has dtype int64, expected bool"),
    "a tensor": (planning(lambda s: Plan(torch.from_numpy(s.valid))), "row_mask is a Tensor, expected a numpy"),
    "a set": (planning(lambda s: Plan(s.valid, sets={"x": s.valid[:, :3]})), r"sets\['x'\] has shape \(2, 3\)"),
    "a flag": (planning(lambda s: Plan(s.valid, flags={"x": np.ones((3, 3))})), r"flags\['x'\] is \(3, 3\)"),
    "flags of a kind": (
        planning(lambda s: Plan(s.valid, flags={"x": np.ones(2) if s.step.max() else np.ones(2, bool)})),
        "but were .* in an earlier step",
    ),
    "start without H": (planning(lambda s: Plan(s.valid, start=np.full(2, 1))), 'starts from the store "H"'),
    "start out of range": (planning(lambda s: Plan(s.valid, start=np.full(2, 9))), r"start is \[9, 9\].*0\.\.4"),
    "start without a pass": (
        planning(lambda s: Plan(s.valid, start=np.full(2, 1)), stores=lambda self, spec: {"H": spec.d_model}),
        "not all of its rows have had a pass yet",
    ),
    "visible": (planning(lambda s: Plan(s.valid, visible=s.valid[:, :3])), r"visible has shape \(2, 3\)"),
    "no plan": (planning(lambda s: s.valid), "plan returned a ndarray, expected a Plan"),
    "kind": (planning(lambda s: Plan(s.valid, kind=[1])), "kind .* cannot be part of a key: unhashable type"),  # type: ignore[arg-type]
    "start as a list": (planning(lambda s: Plan(s.valid, start=[0, 0])), "start is a list"),
    "visible as a list": (planning(lambda s: Plan(s.valid, visible=[1])), "visible is a list"),
    "dtype of a flag": (
        planning(lambda s: Plan(s.valid, flags={"x": np.ones(2, np.uint8)})),
        r"flags\['x'\] has dtype uint8, expected bool, int64 or float32",
    ),
    "width of H": (planning(Plan.all, stores=lambda self, spec: {"H": 3}), "'H' of width 3; .* layer input, 32"),
    "no stream": (layering(lambda at, rows, h: None), "layer 0 returned NoneType, expected a pair of tensors"),
    "rows out of order": (layering(lambda at, rows, h: (rows.flip(1), h)), "expected ascending positions in 0..14"),
    "rows out of range": (layering(lambda at, rows, h: at.compute(rows + 90, h)), "layer 0 raised"),
    "unknown set": (layering(lambda at, rows, h: (at.sets["x"], h)), "layer 0 raised KeyError: 'x'"),
    "width of a store": (
        planning(
            Plan.all,
            stores=lambda self, spec: {"X": 3},
            layer=lambda self, at, rows, h: (at.store("X", rows, h), at.compute(rows, h))[1],
        ),
        "layer 0 raised ValueError: values of shape .* do not fit a store",
    ),
    "shape of a report": (
        layering(lambda at, rows, h: (at.report("x", h[:, 0, : at.index + 1]), at.compute(rows, h))[1]),
        "layer 1 raised ValueError: report 'x' has shape",
    ),
    "unwritten keys": (planning(lambda s: Plan(s.needed)), "attends to position 0, whose key and value nobody"),
    "rows of a layer": (layering(lambda at, rows, h: (rows.float(), h)), "layer 0 returned rows"),
    "h of a layer": (layering(lambda at, rows, h: (rows, h[:, :2])), r"layer 0 returned h \(2, 2, 32\)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plan_is_refused_by_name_step_and_value(name: str) -> None:
    policy, message = BROKEN[name]
    with pytest.raises(PolicyError, match=message) as caught:
        run(policy)
    assert str(caught.value).startswith("policy 'Broken'")


def wide(s: State) -> np.ndarray:
    return np.ones((s.batch, s.slots + 3), dtype=bool)


# A good plan, one that breaks like it, and whether their keys are the same, so that the pass runs while it is checked
LATER: dict[str, tuple[Any, Any, str, bool]] = {
    "wrong dtype": (Plan.all, lambda s: Plan(s.valid.astype(np.int64)), "row_mask has dtype int64", True),
    "a tensor": (Plan.all, lambda s: Plan(torch.from_numpy(s.valid)), "row_mask is a Tensor", True),
    "dtype of watch": (
        lambda s: Plan(s.valid, watch=s.valid),
        lambda s: Plan(s.valid, watch=s.valid.astype(np.int64)),
        "watch has dtype int64",
        True,
    ),
    "no batch axis": (Plan.all, lambda s: Plan(s.valid[0]), "add a batch axis", False),
    "too wide": (Plan.all, lambda s: Plan(wide(s)), r"row_mask has shape \(2, 18\)", False),
    "too wide a set": (
        lambda s: Plan(s.valid, sets={"x": s.valid}),
        lambda s: Plan(s.valid, sets={"x": wide(s)}),
        r"sets\['x'\] has shape \(2, 18\)",
        False,
    ),
    "another device": (
        lambda s: Plan(s.valid, visible=torch.from_numpy(s.valid)),
        lambda s: Plan(s.valid, visible=torch.empty(s.valid.shape, dtype=torch.bool, device="meta")),
        "visible is a tensor on meta",
        False,
    ),
    "dtype of a flag": (
        lambda s: Plan(s.valid, flags={"x": np.ones(2, np.int64)}),
        lambda s: Plan(s.valid, flags={"x": np.ones(2, np.uint8)}),
        r"flags\['x'\] has dtype uint8",
        False,
    ),
    "flags of a kind": (
        lambda s: Plan(s.valid, flags={"x": np.ones(2, bool)}),
        lambda s: Plan(s.valid, flags={"x": np.ones(2)}),
        "but were .* in an earlier step",
        False,
    ),
    "no plan": (Plan.all, lambda s: s.valid, "plan returned a ndarray", False),
    "kind": (Plan.all, lambda s: Plan(s.valid, kind=[1]), "cannot be part of a key", False),  # type: ignore[arg-type]
    "start without H": (Plan.all, lambda s: Plan(s.valid, start=np.full(2, 1)), 'starts from the store "H"', False),
}


@pytest.mark.parametrize("name", LATER)
def test_a_plan_that_is_broken_after_good_ones_is_refused_before_anything_is_committed(name: str) -> None:
    good, broken, message, same = LATER[name]
    policy = planning(lambda s: broken(s) if s.step.max() == 3 else good(s))
    engine = Engine(MODEL, policy, LowConfidence(), buckets=(16,))
    passes: list[int] = []
    inner = engine.executor.__call__

    class Counting(type(engine.executor)):  # type: ignore[misc]
        def __call__(self, key: Any, work: Any) -> None:
            passes.append(int(state.step.max()))
            inner(key, work)

    engine.executor = Counting()
    state = State(MODEL.spec, [[3, 1, 4, 1, 5, 9, 2], [2, 7, 1, 8, 2, 8, 1]], 8)
    with pytest.raises(PolicyError, match=message) as caught:
        decode(engine, state)
    assert str(caught.value).startswith("policy 'Broken', step 3")
    assert state.step.tolist() == [3, 3]
    assert state.masked.sum() == 10
    assert (3 in passes) == same


def test_a_sequence_that_never_computes_its_window_stops_the_run_and_names_the_rows() -> None:
    policy = planning(lambda s: Plan(s.valid if s.step.max() == 0 else s.prompt))
    with pytest.raises(PolicyError, match=r"committed nothing for 8 steps; of its window, positions \[7,"):
        run(policy)


def test_a_layer_that_makes_nan_is_named() -> None:
    policy = layering(lambda at, rows, h: at.compute(rows, h * (float("nan") if at.index == 2 else 1)))
    with pytest.raises(NumericsError, match="first in layer 2"):
        run(policy)


def test_a_review_of_a_finished_sequence_is_refused() -> None:
    class Late(NoCache):
        def stores(self, spec: ModelSpec) -> dict[str, int]:
            return {"H": spec.d_model}

        def review(self, state: State, plan: Plan, seen: Seen) -> Plan | None:
            return None if state.active.all() else Plan(state.valid, "again", start=np.zeros(2, dtype=np.int64))

    engine = Engine(MODEL, Late(), LowConfidence())
    with pytest.raises(PolicyError, match="review returned rows for sequence 1, which is finished"):
        decode(engine, State(MODEL.spec, PROMPTS, [8, 4]))


def test_a_canvas_that_is_narrower_than_its_sequences_is_refused() -> None:
    with pytest.raises(UsageError, match="slots is 5, but the longest sequence has 15 positions"):
        State(MODEL.spec, PROMPTS, 8, slots=5)


def test_slots_behind_the_longest_sequence_change_nothing() -> None:
    for policy in (NoCache(), DKVCache(interval=4), ElasticCache()):
        trace = decode(Engine(MODEL, policy, LowConfidence(), debug=True), State(MODEL.spec, PROMPTS, 8, slots=64))
        assert commits(trace) == commits(run(policy)[0])


def test_a_review_that_returns_no_plan_is_refused() -> None:
    with pytest.raises(PolicyError, match="review returned a bool, expected a Plan"):
        run(planning(Plan.all, review=lambda self, state, plan, seen: True))


class Greedy(Threshold):
    """Commits everything that was predicted, its window or not."""

    def ask(self, state: State) -> Ask:
        return replace(super().ask(state), window=state.masked & (np.arange(state.slots) < 8), read=state.masked)

    def pick(self, logits: Tensor, at: Any) -> Picks:
        picks = super().pick(logits, at)
        return replace(picks, commit=at.predicted)


class Masker(Threshold):
    def pick(self, logits: Tensor, at: Any) -> Picks:
        picks = super().pick(logits, at)
        return replace(picks, tokens=torch.full_like(picks.tokens, at.mask_id))


def test_an_unmasker_that_commits_outside_its_window_is_refused() -> None:
    with pytest.raises(UnmaskerError, match="outside the window"):
        run(NoCache(), Greedy())


class Overreaching(Threshold):
    """Asks for the whole canvas, in the second step or in the first."""

    def __init__(self, since: int):
        super().__init__()
        self.since = since

    def ask(self, state: State) -> Ask:
        ask = super().ask(state)
        return replace(ask, window=state.valid) if state.step.max() >= self.since else ask


@pytest.mark.parametrize("since", [0, 1])
def test_an_unmasker_whose_window_holds_what_is_not_masked_is_refused(since: int) -> None:
    for policy in (NoCache(), DKVCache(), ElasticCache(), D2Cache()):
        with pytest.raises(UnmaskerError, match="the window of sequence 0 holds position 0, which is not masked"):
            run(policy, Overreaching(since))


class Blind(CachePolicy):
    """Computes one row of the window alone."""

    def plan(self, state: State) -> Plan:
        return Plan(state.valid & ~state.masked | leftmost(state.window, 1), visible=state.valid & ~state.masked)


class Guesser(Threshold):
    """Commits its whole window, predicted or not."""

    def pick(self, logits: Tensor, at: Any) -> Picks:
        picks = super().pick(logits, at)
        return replace(picks, commit=torch.ones_like(picks.commit))


class Filler(Guesser):
    """The same, with tokens of its own where there is no candidate."""

    def settle(self, state: State, seen: Seen) -> Update:
        update = super().settle(state, seen)
        return replace(update, tokens=np.maximum(update.tokens, 0))


def test_an_unmasker_that_commits_what_was_not_predicted_is_refused() -> None:
    with pytest.raises(UnmaskerError, match=r"token -1 was committed at position .*was not predicted"):
        run(Blind(), Guesser())
    with pytest.raises(UnmaskerError, match=r"position \d+ was picked and committed, but not predicted"):
        run(Blind(), Filler())
    assert commits(run(NoCache(), Filler())[0]) == commits(run(NoCache(), Guesser())[0])


def test_an_unmasker_that_commits_the_mask_is_refused() -> None:
    with pytest.raises(UnmaskerError, match="the mask token was committed at position"):
        run(NoCache(), Masker())


def test_a_re_masking_unmasker_decodes_again_what_it_took_back() -> None:
    class Twice(LowConfidence):
        """Takes its first commit back once, in step 2."""

        def ask(self, state: State) -> Ask:
            return replace(
                super().ask(state),
                read=state.valid & ~state.prompt,
                flags={
                    "quota": np.ones(state.batch, dtype=np.int64),
                    "back": np.where((state.step == 2)[:, None], state.changed, False),
                },
            )

        def pick(self, logits: Tensor, at: Any) -> Picks:
            return replace(super().pick(logits, at), remask=at.flags["back"])

    for policy in (NoCache(), DKVCache(interval=4), ElasticCache()):
        trace, engine = run(policy, Twice())
        assert sum(int(s.remask.sum()) for s in trace) == 2
        assert not engine.state.masked.any()
        assert (engine.state.tokens[engine.state.valid] != MODEL.spec.mask_id).all()


def test_every_error_is_a_dcache_error() -> None:
    for kind in (PolicyError, UnmaskerError, NumericsError):
        assert issubclass(kind, DCacheError)


def test_sampling_depends_on_the_sequence_and_not_on_the_batch() -> None:
    sampling = Sampling(temperature=1.0, seed=3)
    both = decode(Engine(MODEL, NoCache(), LowConfidence(sampling=sampling)), start())
    state = State(MODEL.spec, PROMPTS[1:], 8, ids=[1])
    alone = decode(Engine(MODEL, NoCache(), LowConfidence(sampling=sampling)), state)
    for a, b in zip(both, alone, strict=True):
        assert (a.tokens[1, :11] == b.tokens[0]).all()
    twins = State(MODEL.spec, [PROMPTS[0]] * 2, 8)  # equal prompts, other numbers: other noise
    trace = decode(Engine(MODEL, NoCache(), LowConfidence(sampling=sampling)), twins)
    assert any((s.tokens[0] != s.tokens[1]).any() for s in trace[:1])
    other = decode(Engine(MODEL, NoCache(), LowConfidence(sampling=Sampling(temperature=1.0, seed=4))), start())
    assert commits(other) != commits(both)
