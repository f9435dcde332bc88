import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dcache
from dcache import CachePolicy, Filter, Plan, Sampling, State, Unmasker
from dcache.policies.elastic import ElasticCache
from dcache.policies.none import NoCache
from dcache.policies.suffix import Suffix
from dcache.testing.models import random_model
from dcache.testing.runs import Canvas, Run
from dcache.testing.unmaskers import Remasking
from dcache.unmasking.confidence import LowConfidence, Threshold

ALL = Sampling(after_end="decode")

canvases = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2),
        "shift": st.sampled_from([0, 1]),
        "lengths": st.lists(st.tuples(st.integers(1, 7), st.sampled_from([4, 8, 12])), min_size=1, max_size=3),
        "block_length": st.sampled_from([2, 4]),
    }
)
inners = st.sampled_from(["none", "dkv", "fast-dllm", "fast-dllm(mode=prefix)", "elastic(gamma=0.95)", "es-dllm"])


def decoded(canvas: dict[str, Any], policy: CachePolicy, unmasker: Unmasker | None = None, **more: Any) -> Run:
    """Decode a drawn canvas."""
    sizes = canvas | {"lengths": tuple(canvas["lengths"])}
    return Run(lambda: policy, Canvas(**sizes), unmasker=unmasker or LowConfidence(sampling=ALL), **more).go()


def shown(run: Run) -> list[np.ndarray]:
    """Keys that each plan of a run shows, (batch, slots); decodes the run."""
    masks, plan = [], run.policy.plan

    def planning(state: State) -> Plan:
        made = plan(state)
        masks.append((state.valid if made.visible is None else made.visible & state.valid).copy())
        return made

    vars(run.policy)["plan"] = planning
    run.go()
    return masks


def canvas_of(canvas: dict[str, Any], policy: CachePolicy, unmasker: Unmasker | None = None) -> Run:
    sizes = canvas | {"lengths": tuple(canvas["lengths"])}
    return Run(lambda: policy, Canvas(**sizes), unmasker=unmasker or LowConfidence(sampling=ALL))


def test_rows_and_keys_of_a_short_run() -> None:
    """2 prompt tokens, blocks 2-3, 4-5, 6-7, 8-9; of the suffix stay the next position and the last."""
    canvas = {"lengths": [(2, 8)], "block_length": 2}
    run = canvas_of(canvas, Suffix("fast-dllm(mode=prefix)", window=1))
    keys = [np.flatnonzero(mask[0]).tolist() for mask in shown(run)]
    first, second, rest = [0, 1, 2, 3, 4, 9], [0, 1, 2, 3, 4, 5, 6, 9], list(range(10))
    assert keys == [first, first, second, second, rest, rest, rest, rest]
    assert run.rows() == [first, [2, 3, 4, 9], second, [4, 5, 6, 9], rest, [6, 7, 8, 9], rest, [8, 9]]


def test_rows_of_a_dual_cache_are_the_block_alone() -> None:
    canvas = {"lengths": [(2, 6)], "block_length": 2}
    rows = decoded(canvas, Suffix("fast-dllm", window=0, tail=0)).rows()
    assert rows == [[0, 1, 2, 3], [2, 3], [0, 1, 2, 3, 4, 5], [4, 5], list(range(8)), [6, 7]]


def test_a_sliding_window_takes_the_place_of_the_block() -> None:
    canvas = {"lengths": [(2, 8)]}
    run = canvas_of(canvas, Suffix("none", window=1, tail=1), Threshold(sampling=ALL, threshold=1.5, window=2))
    masked = set(range(2, 10))
    for mask, commits in zip(shown(run), run.commits(), strict=False):
        end = sorted(masked)[:2][-1]
        assert np.flatnonzero(mask[0]).tolist() == sorted({*range(min(end + 2, 10)), 9} | set(range(10)) - masked)
        masked -= set(commits)


@given(canvas=canvases, inner=inners, decay=st.sampled_from([None, "gauss"]))
def test_a_window_of_the_generation_is_the_inner_policy(canvas: dict[str, Any], inner: str, decay: str | None) -> None:
    run = decoded(canvas, Suffix(inner, window=12, decay=decay))
    alone = decoded(canvas, dcache.plugins.make_policy(inner))
    for b in range(run.state.batch):
        assert run.rows(b) == alone.rows(b)
        assert run.commits(b) == alone.commits(b)


@given(canvas=canvases, window=st.integers(0, 5), tail=st.integers(0, 2), threshold=st.sampled_from([0.2, 0.5, 0.9]))
def test_what_stays_is_the_prefix_the_block_the_window_and_the_tail(
    canvas: dict[str, Any], window: int, tail: int, threshold: float
) -> None:
    canvas = canvas | {"shift": 0}
    unmasker = Threshold(sampling=ALL, threshold=threshold)
    run = canvas_of(canvas, Suffix("none", window=window, tail=tail), unmasker)
    keys = shown(run)
    for b, (prompt, gen) in enumerate(canvas["lengths"]):
        total, width = prompt + gen, canvas["block_length"]
        masked = set(range(prompt, total))
        for n, commits in enumerate(run.commits(b)):
            end = prompt + (min(masked) - prompt) // width * width + width
            expected = sorted({*range(min(end + window, total)), *range(max(total - tail, 0), total)})
            assert np.flatnonzero(keys[n][b]).tolist() == expected
            assert run.rows(b)[n] == expected
            masked -= set(commits)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("unmask", ["low-confidence", "threshold(threshold=0.5,window=4)", "remasking"])
@pytest.mark.parametrize("inner", ["elastic(gamma=0.97,track_num=2)", "dkv", "es-dllm", "d2(current_k=3)"])
def test_over_many_steps_no_key_is_read_that_nobody_wrote(inner: str, unmask: str, shift: int) -> None:
    """Stores begin as NaN; a key that appears is computed in that pass."""
    canvas = Canvas(lengths=((5, 32), (3, 24)), block_length=4, unmask=unmask, shift=shift)
    run = Run(f"suffix(inner={inner},window=2,decay=gauss,sigma=2)", canvas).go()
    assert not run.state.masked.any()
    assert all(np.isfinite(step.confidence[step.commit]).all() for step in run.trace)


def test_a_key_that_was_hidden_is_computed_when_it_is_shown_again() -> None:
    class Once(CachePolicy):
        """All rows at first, then what the step needs."""

        def plan(self, state: State) -> Plan:
            return Plan(state.needed | state.changed | (state.step == 0)[:, None])

    canvas = {"lengths": [(2, 8)], "block_length": 2}
    run = decoded(canvas, Suffix(Once(), window=1))
    fresh = {2: [5, 6], 4: [7, 8]}  # at the first step of blocks 2 and 3
    for step, rows in fresh.items():
        assert set(rows) <= set(run.rows()[step])


def test_refreshes_of_the_inner_policy_pass_through_the_filter() -> None:
    canvas = {"lengths": [(5, 24), (2, 16)], "block_length": 4}
    run = decoded(canvas, Suffix(ElasticCache(gamma=0.999), window=3))
    refreshes = 0
    for b, (prompt, gen) in enumerate(canvas["lengths"]):
        for n, step in enumerate(run.steps(b)):
            if step.again is not None and step.again[b].any():
                refreshes += 1
                end = prompt + n // 4 * 4 + 4  # one token per step
                assert np.flatnonzero(step.again[b]).tolist() == sorted(
                    {*range(min(end + 3, prompt + gen)), prompt + gen - 1}
                )
    assert refreshes > 4


@given(canvas=canvases, inner=inners, window=st.integers(0, 3), decay=st.sampled_from([None, "gauss"]))
def test_a_batch_decodes_each_sequence_as_if_it_were_alone(
    canvas: dict[str, Any], inner: str, window: int, decay: str | None
) -> None:
    policy = Suffix(inner, window=window, decay=decay, sigma=3.0)
    together = decoded(canvas, policy, Threshold(sampling=ALL, threshold=0.4))
    for b in range(together.state.batch):
        alone = decoded(canvas, policy, Threshold(sampling=ALL, threshold=0.4), only=b)
        assert together.rows(b) == alone.rows()
        assert together.commits(b) == alone.commits()


@given(canvas=canvases, inner=inners)
def test_a_row_put_back_is_decoded_again(canvas: dict[str, Any], inner: str) -> None:
    assert not decoded(canvas, Suffix(inner, window=1), Remasking(sampling=ALL)).state.masked.any()


# -- decay ------------------------------------------------------------------------------------------------------------


def kept(policy: Suffix, ids: range, gen: int, block_length: int) -> tuple[np.ndarray, State]:
    """What a policy keeps of the first step of equal sequences."""
    spec = random_model(0, max_positions=4096).spec
    state = State(spec, [[3, 1]] * len(ids), gen, block_length, ids=list(ids))
    state.window = state.block & state.masked
    policy.shown, policy.drawn = np.zeros_like(state.valid), np.ones(state.valid.shape)
    policy.drawn_for = np.full(state.batch, -1)
    return policy.keep(state), state


def test_the_share_that_stays_falls_with_the_distance_to_the_window() -> None:
    keep, _ = kept(Suffix("none", window=8, tail=0, decay="gauss", sigma=20.0), range(2000), gen=128, block_length=8)
    assert keep[:, : 2 + 8 + 8].all()
    for distance in (1, 10, 20, 40):
        share = keep[:, 2 + 8 + 8 - 1 + distance].mean()
        assert share == pytest.approx(math.exp(-(distance**2) / (2 * 20.0**2)), abs=0.05)


def test_draws_hold_for_a_block_and_depend_on_seed_and_sequence() -> None:
    policy = Suffix("none", window=0, tail=0, decay="gauss", sigma=20.0)
    keep, state = kept(policy, range(3), gen=128, block_length=8)
    assert (policy.keep(state) == keep).all()
    assert (keep[0] != keep[1]).any()
    same = Suffix("none", window=0, tail=0, decay="gauss", sigma=20.0)
    assert (kept(same, range(1, 3), 128, 8)[0] == keep[1:]).all()
    other = Suffix("none", window=0, tail=0, decay="gauss", sigma=20.0, seed=1)
    assert (kept(other, range(3), 128, 8)[0] != keep).any()
    state.masked[:, 2:10], state.window = False, np.zeros_like(state.valid)
    state._enter(state._fixed_block())
    assert (policy.keep(state)[:, 40:] != keep[:, 40:]).any()


# -- filters over filters, refusals -----------------------------------------------------------------------------------


class EveryThird(Filter):
    """Hides every third key of the prompt: by a mask of each shape that a plan may have."""

    form = "flat"

    def restrict(self, state: State, plan: Plan) -> Plan:
        keep = ~(state.prompt & (np.arange(state.slots) % 3 == 1))
        shape = (state.spec.n_layers, state.batch, 1, state.slots)
        wide = np.broadcast_to(keep[:, None], shape).copy()
        forms = {"flat": keep, "layers": wide, "device": torch.from_numpy(wide), "device-flat": torch.from_numpy(keep)}
        return Plan(plan.row_mask, plan.kind, visible=forms[self.form])


def test_masks_of_an_inner_filter_are_combined_whatever_their_form() -> None:
    canvas, runs = {"lengths": [(6, 12), (4, 8)], "block_length": 4}, []
    for form in ("flat", "layers", "device", "device-flat"):
        inner = EveryThird(NoCache())
        inner.form = form
        runs.append(decoded(canvas, Suffix(inner, window=1)))
    plain = decoded(canvas, Suffix(NoCache(), window=1))
    for run in runs:
        assert [run.commits(b) for b in (0, 1)] == [runs[0].commits(b) for b in (0, 1)]
    assert float(runs[0].trace[0].confidence.max()) != float(plain.trace[0].confidence.max())


def test_an_inner_policy_that_replays_outputs_is_refused() -> None:
    class Replays(NoCache):
        name = "replays"

        def stores(self, spec: Any) -> dict[str, int]:
            return {"C": spec.d_model}

    model = random_model(0)
    with pytest.raises(dcache.UsageError, match=r"replays outputs of rows that it does not compute \(stores C\)"):
        dcache.generate(dcache.Model("random", model.spec, model), [[3, 1]], policy=Suffix(Replays()), gen_length=8)
