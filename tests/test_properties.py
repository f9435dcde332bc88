"""Claims about every policy, each with a name that can be false. All in float32, on small random models."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcache import CachePolicy, Sampling, State, Unmasker
from dcache.decode import decode
from dcache.engine import Engine
from dcache.engine.layer import Layer
from dcache.models.transformer import Transformer
from dcache.plugins import make_policy, make_unmasker
from dcache.testing.models import random_model
from dcache.testing.recorder import Recorder
from dcache.trace import Step, Trace

POLICIES = ["none", "elastic", "elastic(gamma=0.99,track_num=3)", "elastic(block_caching=false)", "dkv(interval=4)"]
POLICIES += ["elastic(variant=paper,window=6)", "dkv(interval=100)", "dkv(variant=pd,interval=3,cacheable=un_right)"]
POLICIES += ["dkv(variant=prefill)", "fast-dllm", "fast-dllm(mode=prefix)"]
POLICIES += ["d2(current_k=3,inflate_w=2)"]
POLICIES += ["d2(current_k=5,rollout_p=0.3,confidence=latest,search=blocks,nucleus=above)"]
UNMASKERS = ["low-confidence", "low-confidence(tokens_per_step=2)", "threshold(threshold=0.3)", "random"]
UNMASKERS += ["threshold(threshold=0.5,window=5)"]
MODELS = {(seed, shift): random_model(seed, shift=shift) for seed in range(3) for shift in (0, 1)}

canvases = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2),
        "shift": st.sampled_from([0, 1]),
        "lengths": st.lists(
            st.tuples(st.integers(1, 9), st.sampled_from([4, 8, 12])), min_size=1, max_size=3
        ),  # prompt, generation
        "block_length": st.sampled_from([None, 4]),
        "unmask": st.sampled_from(UNMASKERS),
        "after_end": st.sampled_from(["decode", "drop", "drop-once"]),
    }
)


class Run:
    """One decoding run of a drawn canvas."""

    def __init__(self, canvas: dict[str, Any], policy: str | CachePolicy, only: int | None = None, **engine: Any):
        self.model: Transformer = engine.pop("model", None) or MODELS[canvas["seed"], canvas["shift"]]
        spec = self.model.spec
        draw = np.random.default_rng(canvas["seed"])
        prompts = [draw.integers(0, spec.vocab_size - 2, size=p).tolist() for p, _ in canvas["lengths"]]
        gens = [g for _, g in canvas["lengths"]]
        ids = list(range(len(prompts)))
        if only is not None:
            prompts, gens, ids = [prompts[only]], [gens[only]], [only]
        self.state = State(spec, prompts, gens, canvas["block_length"], ids=ids)
        sampling = Sampling(seed=canvas["seed"], after_end=canvas["after_end"])
        self.unmasker: Unmasker = make_unmasker(canvas["unmask"], sampling)
        self.policy = make_policy(policy)
        self.engine = Engine(self.model, self.policy, self.unmasker, debug=True, **engine)
        self.trace: list[Step] = []

    def go(self) -> "Run":
        self.trace = decode(self.engine, self.state)
        return self

    def commits(self, b: int = 0) -> list[list[tuple[int, int]]]:
        return [[(int(p), int(s.tokens[b, p])) for p in np.flatnonzero(s.commit[b])] for s in self.trace if s.active[b]]

    def rows(self, b: int = 0) -> list[list[int]]:
        return [np.flatnonzero(s.rows[b]).tolist() for s in self.trace if s.active[b]]


def of_one_layer(canvas: dict[str, Any]) -> Transformer:
    return random_model(canvas["seed"], n_layers=1, shift=canvas["shift"])


# -- exact configurations ---------------------------------------------------------------------------------------------


@given(canvas=canvases)
def test_elastic_that_always_refreshes_equals_no_cache(canvas: dict[str, Any]) -> None:
    reference, run = Run(canvas, "none").go(), Run(canvas, "elastic(refresh=always)").go()
    for b in range(run.state.batch):
        assert run.commits(b) == reference.commits(b)


@given(canvas=canvases, gamma=st.floats(0, 1.1), track_num=st.integers(0, 3))
def test_elastic_on_one_layer_equals_no_cache(canvas: dict[str, Any], gamma: float, track_num: int) -> None:
    model = of_one_layer(canvas)
    reference = Run(canvas, "none", model=model).go()
    run = Run(canvas, f"elastic(gamma={gamma:.3f},track_num={track_num})", model=model).go()
    for b in range(run.state.batch):
        assert run.commits(b) == reference.commits(b)


@given(canvas=canvases)
def test_d2_that_computes_everything_equals_no_cache(canvas: dict[str, Any]) -> None:
    reference, run = Run(canvas, "none").go(), Run(canvas, "d2(refresh=always)").go()
    for b in range(run.state.batch):
        assert run.commits(b) == reference.commits(b)


@given(canvas=canvases, rollout_p=st.sampled_from([0.0, 0.1, 0.6]), inflate_w=st.integers(0, 3))
def test_d2_on_one_layer_with_every_mask_predicted_equals_no_cache(
    canvas: dict[str, Any], rollout_p: float, inflate_w: int
) -> None:
    """Keys of one layer depend on the tokens alone, and a new token is always computed."""
    model = of_one_layer(canvas)
    reference = Run(canvas, "none", model=model).go()
    run = Run(canvas, f"d2(current_k=12,rollout_p={rollout_p},inflate_w={inflate_w})", model=model).go()
    for b in range(run.state.batch):
        assert run.commits(b) == reference.commits(b)


def test_dkv_without_its_delay_is_found_by_the_one_layer_property() -> None:
    """The planted fault that the property above is for: reuse what was decoded by the very last commit."""

    class NoDelay(type(make_policy("dkv"))):  # type: ignore[misc]
        def plan(self, state: State) -> Any:
            self.before = state.valid & ~state.masked
            return super().plan(state)

    canvas = {"seed": 0, "shift": 0, "lengths": [(5, 12)], "block_length": None, "unmask": "low-confidence"}
    canvas |= {"after_end": "decode"}
    model = of_one_layer(canvas)
    assert (
        Run(canvas, NoDelay(interval=100), model=model).go().commits()
        != Run(canvas, "none", model=model).go().commits()
    )


def test_elastic_with_gamma_above_one_is_not_no_cache() -> None:
    """Layer 0 still reuses rows; the recorded case `gamma_above_one` shows the same of the released code."""
    canvas = {"seed": 0, "shift": 0, "lengths": [(9, 12)], "block_length": None, "unmask": "low-confidence(window=4)"}
    canvas |= {"after_end": "decode"}
    reference, run = Run(canvas, "none").go(), Run(canvas, "elastic(gamma=1.1)").go()
    assert [int(s.start[0]) for s in run.trace[1:] if s.start is not None] == [1] * (len(run.trace) - 1)
    assert any(
        not np.allclose(a.confidence[a.commit], b.confidence[a.commit], atol=1e-4)
        for a, b in zip(run.trace[1:], reference.trace[1:], strict=False)
    )


# -- every policy -----------------------------------------------------------------------------------------------------


@given(canvas=canvases, policy=st.sampled_from(POLICIES))
def test_a_committed_row_never_changes(canvas: dict[str, Any], policy: str) -> None:
    run = Run(canvas, policy).go()
    committed = np.zeros_like(run.state.valid)
    for step in run.trace:
        assert not (step.commit & committed).any()
        committed |= step.commit
    assert not run.state.masked.any()
    for step in run.trace:
        assert (run.state.tokens[step.commit] == step.tokens[step.commit]).all()


@given(canvas=canvases, policy=st.sampled_from(POLICIES))
def test_a_batch_decodes_each_sequence_as_if_it_were_alone(canvas: dict[str, Any], policy: str) -> None:
    together = Run(canvas, policy).go()
    for b in range(together.state.batch):
        alone = Run(canvas, policy, only=b).go()
        assert together.rows(b) == alone.rows()
        assert together.commits(b) == alone.commits()
        mine, own = (Trace(r.trace, i, 0, 0) for r, i in ((together, b), (alone, 0)))
        assert (mine.row_layers, mine.kv_row_layers, mine.nfe) == (own.row_layers, own.kv_row_layers, own.nfe)


@contextmanager
def watched_stores(run: Run) -> Iterator[list[int]]:
    """Compare K and V bit for bit around every pass: rows that a pass does not compute keep theirs."""
    checked: list[int] = []
    engine, inner = run.engine, run.engine._run

    def watched(plan: Any, ask: Any, earlier: Any) -> Any:
        before = {n: [x.clone() for x in engine.stores.tensors[n]] for n in "KV"}
        seen = inner(plan, ask, earlier)
        for name, layers in before.items():
            for index, old in enumerate(layers):
                begun = np.ones(run.state.batch, bool) if plan.start is None else plan.start <= index
                computed = plan.row_mask & run.state.valid & (begun & run.state.active)[:, None]
                kept = torch.from_numpy(~computed)
                new = engine.stores.tensors[name][index]
                for b in range(run.state.batch):
                    rows = kept[b].nonzero()[:, 0]
                    assert torch.equal(old[b, :, rows].view(torch.int32), new[b, :, rows].view(torch.int32))
                    checked.append(len(rows))
        return seen

    engine._run = watched  # type: ignore[method-assign]
    yield checked


@given(canvas=canvases, policy=st.sampled_from(POLICIES))
def test_reused_rows_keep_their_bits(canvas: dict[str, Any], policy: str) -> None:
    run = Run(canvas, policy)
    with watched_stores(run) as checked:
        run.go()
    long = len(run.trace) > 3 and canvas["block_length"] is None  # short blocks leave nothing to reuse
    assert sum(checked) > 0 or policy == "none" or not long


@given(canvas=canvases, policy=st.sampled_from(POLICIES), buckets=st.sampled_from([(), (4, 16)]))
def test_accounting_equals_a_counting_hook(canvas: dict[str, Any], policy: str, buckets: tuple[int, ...]) -> None:
    counted: dict[str, int] = {"attend": 0, "write": 0}
    originals = {name: getattr(Layer, name) for name in counted}

    def counting(name: str) -> Any:
        def call(self: Layer, rows: torch.Tensor, *rest: Any) -> Any:
            counted[name] += int((rows < self.dump).sum())
            return originals[name](self, rows, *rest)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in counted:
            patch.setattr(Layer, name, counting(name))
        run = Run(canvas, policy, buckets=buckets, maps=True).go()
    assert sum(int(s.row_layers.sum()) for s in run.trace) == counted["attend"]
    assert sum(int(s.kv_row_layers.sum()) for s in run.trace) == counted["write"]
    for step in run.trace:  # a map holds each row once, the count adds up both passes
        assert (step.maps["rows"].sum(2) <= step.row_layers).all()
        if step.again is None:
            assert (step.maps["rows"].sum(2) == step.row_layers).all()


@given(canvas=canvases, policy=st.sampled_from(POLICIES))
def test_padding_of_row_lists_changes_nothing(canvas: dict[str, Any], policy: str) -> None:
    exact, padded = Run(canvas, policy, buckets=()).go(), Run(canvas, policy, buckets=(8, 64)).go()
    for b in range(exact.state.batch):
        assert exact.rows(b) == padded.rows(b)
        assert exact.commits(b) == padded.commits(b)


@settings(max_examples=25)
@given(canvas=canvases, policy=st.sampled_from(POLICIES))
def test_a_recorded_pass_replays_to_the_same_run(canvas: dict[str, Any], policy: str) -> None:
    """Capture without a GPU: syncs are refused, and what is read from Python stays that of the recording."""
    eager = Run(canvas, policy, buckets=(8, 64)).go()
    recorder = Recorder()
    run = Run(canvas, policy, buckets=(8, 64), executor=recorder)
    for _ in range(3):  # the first time runs eagerly, the second records, the third replays everything
        run.state = Run(canvas, policy).state
        run.go()
        for b in range(run.state.batch):
            assert run.rows(b) == eager.rows(b)
            assert run.commits(b) == eager.commits(b)
        for now, then in zip(run.trace, eager.trace, strict=True):
            assert np.array_equal(now.confidence, then.confidence, equal_nan=True)
    assert recorder.replayed > 0


@given(canvas=canvases, policy=st.sampled_from(POLICIES))
def test_a_second_run_on_the_same_engine_is_the_first_again(canvas: dict[str, Any], policy: str) -> None:
    run = Run(canvas, policy).go()
    first, rows = run.commits(), run.rows()
    run.state = Run(canvas, policy).state
    run.go()
    assert (run.commits(), run.rows()) == (first, rows)


@given(canvas=canvases, policy=st.sampled_from(POLICIES))
def test_a_finished_sequence_costs_nothing(canvas: dict[str, Any], policy: str) -> None:
    run = Run(canvas, policy, maps=True).go()
    for step in run.trace:  # both are counted where the work is done, not copied from the plan
        assert not step.row_layers[:, ~step.active].any()
        assert not step.maps["kv_rows"][:, ~step.active].any()


@given(canvas=canvases)
def test_the_engine_computes_what_the_plain_forward_does(canvas: dict[str, Any]) -> None:
    run = Run(canvas, "none")
    state, model = run.state, run.model
    run.engine.begin(state)
    ask = state.expect(run.unmasker.ask(state))
    seen = run.engine.run(run.policy.plan(state), ask)
    logits = model(torch.from_numpy(state.tokens), valid=torch.from_numpy(state.valid)).softmax(-1)
    for b, p in zip(*np.nonzero(seen.predicted), strict=True):
        row = max(p - model.spec.shift, 0)
        assert abs(float(logits[b, row, seen.tokens[b, p]]) - seen.confidence[b, p]) < 1e-5
