from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dcache
from dcache import CachePolicy, Sampling, Seen, State, Unmasker, Update
from dcache.arrays import leftmost
from dcache.engine import Engine
from dcache.policies.fast_dllm import FastDLLM
from dcache.policies.none import NoCache
from dcache.testing.models import random_model
from dcache.testing.runs import Canvas, Run
from dcache.unmasking.confidence import LowConfidence, Threshold

ALL = Sampling(after_end="decode")

canvases = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2),
        "shift": st.sampled_from([0, 1]),
        "lengths": st.lists(st.tuples(st.integers(1, 7), st.sampled_from([4, 8, 12])), min_size=1, max_size=3),
        "block": st.sampled_from([None, 2, 4]),
    }
)
modes = st.sampled_from(["dual", "prefix"])
thresholds = st.sampled_from([0.2, 0.4, 0.6, 0.9])


def decoded(
    canvas: dict[str, Any], policy: CachePolicy, unmasker: Unmasker, n_layers: int = 3, only: int | None = None
) -> Run:
    """Decode a drawn canvas, all sequences or one of them."""
    sizes = {name: canvas[name] for name in ("seed", "shift")} | {"n_layers": n_layers, "block_length": canvas["block"]}
    return Run(lambda: policy, Canvas(lengths=tuple(canvas["lengths"]), **sizes), only, unmasker).go()


class TakesBack(LowConfidence):
    """Puts the first decoded row back to the mask in every third step of the first nine."""

    def settle(self, state: State, seen: Seen) -> Update:
        decoded = state.known & ~state.prompt
        due = (state.step % 3 == 2) & (state.step < 9) & state.active
        return replace(super().settle(state, seen), remask=leftmost(decoded, 1) & due[:, None])


def assert_same_commits(a: Run, b: Run) -> None:
    assert [a.commits(i) for i in range(a.state.batch)] == [b.commits(i) for i in range(b.state.batch)]


# -- exact configurations ---------------------------------------------------------------------------------------------


@given(canvas=canvases, mode=modes, threshold=thresholds)
def test_one_layer_equals_no_cache(canvas: dict[str, Any], mode: str, threshold: float) -> None:
    canvas = canvas | {"shift": 0}
    run = decoded(canvas, FastDLLM(mode=mode), Threshold(sampling=ALL, threshold=threshold), n_layers=1)
    assert_same_commits(run, decoded(canvas, NoCache(), Threshold(sampling=ALL, threshold=threshold), n_layers=1))


def test_two_layers_do_not() -> None:
    canvas = {"seed": 0, "shift": 0, "lengths": [(5, 24)], "block": 8}
    runs = [decoded(canvas, policy, LowConfidence(sampling=ALL)) for policy in (NoCache(), FastDLLM(mode="prefix"))]
    assert runs[0].commits() != runs[1].commits()


@given(canvas=canvases, mode=modes)
def test_a_refresh_in_every_step_equals_no_cache(canvas: dict[str, Any], mode: str) -> None:
    run = decoded(canvas, FastDLLM(mode=mode, interval=1), LowConfidence(sampling=ALL))
    assert_same_commits(run, decoded(canvas, NoCache(), LowConfidence(sampling=ALL)))


@given(canvas=canvases, mode=modes)
def test_blocks_that_their_first_pass_completes_equal_no_cache(canvas: dict[str, Any], mode: str) -> None:
    run = decoded(canvas, FastDLLM(mode=mode), Threshold(sampling=ALL, threshold=0))
    assert_same_commits(run, decoded(canvas, NoCache(), Threshold(sampling=ALL, threshold=0)))
    for b, (_, gen) in enumerate(canvas["lengths"]):
        assert len(run.commits(b)) == gen // (canvas["block"] or gen)  # and no pass is made that commits nothing


@given(canvas=canvases, threshold=thresholds)
def test_prefix_and_dual_are_the_same_in_one_block(canvas: dict[str, Any], threshold: float) -> None:
    canvas = canvas | {"block": None}
    runs = [decoded(canvas, FastDLLM(mode=m), Threshold(sampling=ALL, threshold=threshold)) for m in ("dual", "prefix")]
    assert_same_commits(*runs)
    for b in range(runs[0].state.batch):
        assert runs[0].rows(b) == runs[1].rows(b)


@given(canvas=canvases, mode=modes)
def test_a_threshold_above_one_is_one_token_per_step(canvas: dict[str, Any], mode: str) -> None:
    run = decoded(canvas, FastDLLM(mode=mode), Threshold(sampling=ALL, threshold=1.5))
    assert_same_commits(run, decoded(canvas, FastDLLM(mode=mode), LowConfidence(sampling=ALL)))


@given(canvas=canvases, mode=modes)
def test_a_cached_pass_on_the_canvas_of_the_refresh_predicts_the_same(canvas: dict[str, Any], mode: str) -> None:
    model = random_model(canvas["seed"], shift=canvas["shift"])
    state = State(model.spec, [[3, 1, 4]] * len(canvas["lengths"]), [g for _, g in canvas["lengths"]], canvas["block"])
    engine = Engine(model, FastDLLM(mode=mode), LowConfidence(sampling=ALL), debug=True)
    engine.begin(state)
    ask = state.expect(engine.unmasker.ask(state))
    refresh = engine.run(engine.policy.plan(state), ask)
    state.block_step = state.block_step + 1
    plan = engine.policy.plan(state)
    assert (plan.row_mask & state.valid).sum() < state.valid.sum()
    cached = engine.run(plan, ask)
    told = refresh.predicted & state.window
    assert (cached.tokens[told] == refresh.tokens[told]).all()
    np.testing.assert_allclose(cached.confidence[told], refresh.confidence[told], atol=1e-5)


# -- rows -------------------------------------------------------------------------------------------------------------


@given(canvas=canvases, mode=modes, threshold=thresholds, interval=st.sampled_from([None, 2, 3]))
def test_a_block_begins_with_all_rows_and_goes_on_with_those_that_predict_it(
    canvas: dict[str, Any], mode: str, threshold: float, interval: int | None
) -> None:
    run = decoded(canvas, FastDLLM(mode=mode, interval=interval), Threshold(sampling=ALL, threshold=threshold))
    shift = canvas["shift"]
    for b, (prompt, gen) in enumerate(canvas["lengths"]):
        total, width = prompt + gen, canvas["block"] or gen
        masked, last, i = set(range(prompt, total)), -1, 0
        for rows, commits in zip(run.rows(b), run.commits(b), strict=True):
            start = prompt + (min(masked) - prompt) // width * width
            i, last = (i + 1 if start == last else 0), start
            end = start + width if mode == "dual" else total
            full = i == 0 or (interval is not None and i % interval == 0)
            assert rows == list(range(total) if full else range(start - shift, end - shift))
            masked -= set(commits)


@given(canvas=canvases, mode=modes)
def test_released_rows_of_a_shifted_model_are_the_block_itself(canvas: dict[str, Any], mode: str) -> None:
    canvas = canvas | {"shift": 1, "block": 4}
    run = decoded(canvas, FastDLLM(mode=mode, rows="block"), LowConfidence(sampling=ALL, first="alone"))
    for b, (prompt, gen) in enumerate(canvas["lengths"]):
        total = prompt + gen
        for i, (rows, commits) in enumerate(zip(run.rows(b), run.commits(b), strict=True)):
            start = prompt + i // 4 * 4
            assert rows == list(range(total) if i % 4 == 0 else range(start, start + 4 if mode == "dual" else total))
            assert i % 4 or set(commits) == {start}


@given(canvas=canvases, mode=modes, threshold=thresholds)
def test_cost_is_one_full_pass_per_block_and_the_block_after_it(
    canvas: dict[str, Any], mode: str, threshold: float
) -> None:
    run = decoded(canvas | {"block": 4}, FastDLLM(mode=mode), Threshold(sampling=ALL, threshold=threshold))
    for b, (prompt, gen) in enumerate(canvas["lengths"]):
        cached = [0] * (gen // 4)  # passes after the first, by block
        for commits in run.commits(b):
            cached[(min(commits) - prompt) // 4] += 1
        cost = 0
        for block, n in enumerate(cached):
            rest = gen - 4 * block
            cost += prompt + gen + (n - 1) * (4 if mode == "dual" else rest)
        assert sum(int(s.row_layers[:, b].sum()) for s in run.trace) == run.state.spec.n_layers * cost


def test_in_a_sliding_window_the_prompt_alone_is_reused() -> None:
    canvas = {"seed": 0, "shift": 0, "lengths": [(5, 12)], "block": 4}
    rows = decoded(canvas, FastDLLM(), Threshold(sampling=ALL, threshold=0.9, window=4)).rows()
    assert rows == [list(range(17))] + [list(range(5, 17))] * (len(rows) - 1)


# -- batches, rows put back, refusals ---------------------------------------------------------------------------------


@given(canvas=canvases, mode=modes, threshold=thresholds, after_end=st.sampled_from(["decode", "drop"]))
def test_a_batch_decodes_each_sequence_as_if_it_were_alone(
    canvas: dict[str, Any], mode: str, threshold: float, after_end: str
) -> None:
    sampling = Sampling.model_validate({"after_end": after_end})
    together = decoded(canvas, FastDLLM(mode=mode), Threshold(sampling=sampling, threshold=threshold))
    for b in range(together.state.batch):
        alone = decoded(canvas, FastDLLM(mode=mode), Threshold(sampling=sampling, threshold=threshold), only=b)
        assert together.rows(b) == alone.rows()
        assert together.commits(b) == alone.commits()


@given(canvas=canvases, mode=modes)
def test_a_row_put_back_is_decoded_again(canvas: dict[str, Any], mode: str) -> None:
    run = decoded(canvas, FastDLLM(mode=mode), TakesBack(sampling=ALL))
    assert not run.state.masked.any()
    assert sum(int(s.remask.sum()) for s in run.trace) >= len(canvas["lengths"])


def test_released_rows_are_refused_where_the_first_position_would_have_no_predictor() -> None:
    shifted, plain = (
        dcache.Model("random", random_model(0, shift=shift).spec, random_model(0, shift=shift))  #
        for shift in (1, 0)
    )
    dcache.generate(plain, [[3, 1, 4]], policy="fast-dllm(rows=block)", gen_length=8)
    forced = "low-confidence(first=alone)"
    dcache.generate(shifted, [[3, 1, 4]], policy="fast-dllm(rows=block)", unmask=forced, gen_length=8)
    with pytest.raises(dcache.UsageError, match=r"'low-confidence' does not commit it, .* use rows=predicting"):
        dcache.generate(shifted, [[3, 1, 4]], policy="fast-dllm(rows=block)", gen_length=8)
