"""d²Cache: its sums are those of the dense product, and its selection keeps what it promises."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dcache import Sampling, State, Unmasker
from dcache.arrays import close_gaps, highest
from dcache.decode import decode
from dcache.engine import Engine, across, layer
from dcache.engine.layer import Layer
from dcache.models.transformer import Transformer
from dcache.plugins import make_policy
from dcache.policies.d2 import D2Cache, Selection
from dcache.policy import Plan
from dcache.testing.golden.d2 import Together
from dcache.testing.models import random_model
from dcache.testing.recorder import Recorder
from dcache.trace import Step
from dcache.unmasking.base import Picks
from dcache.unmasking.confidence import LowConfidence, Random, Threshold

MODELS = {shift: random_model(0, shift=shift) for shift in (0, 1)}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3]]
KNOBS = [
    {"current_k": 3},
    {"current_k": 5, "rollout_p": 0.4, "inflate_w": 2},
    {"current_k": 4, "confidence": "latest", "search": "blocks", "nucleus": "above"},
    {"current_k": 4, "search": "all"},
]
both_shifts = pytest.mark.parametrize("shift", [0, 1])
each_setting = pytest.mark.parametrize("knobs", KNOBS, ids=str)


class Watched(D2Cache):
    """Keeps, per step, the state a plan was made from and the selection, and per pass the attention rows."""

    def begin(self, net: Any, state: State) -> None:
        super().begin(net, state)
        self.planned: list[tuple[Selection | None, dict[str, np.ndarray]]] = []
        self.attention: list[list[tuple[Tensor, Tensor]]] = []

    def plan(self, state: State) -> Plan:
        before = {"in_block": self.block & self.masked, "masked_before": self.masked}
        plan = super().plan(state)
        now = {name: getattr(state, name).copy() for name in ("changed", "masked", "window", "active", "prompt")}
        self.planned.append((self.selection, before | now | {"rows": plan.row_mask}))
        return plan

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        result = super().layer(at, rows, h)
        if at.index == 0:
            self.attention.append([])
        self.attention[-1].append((rows.clone(), at.head_mean(at.q)))
        return result


def go(
    policy: D2Cache,
    shift: int = 0,
    *,
    unmasker: Unmasker | None = None,
    prompts: list[list[int]] = PROMPTS,
    ids: list[int] | None = None,
    block_length: int | None = None,
    model: Transformer | None = None,
    canvas: type[State] = State,
    **engine: Any,
) -> list[Step]:
    model = model or MODELS[shift]
    unmasker = unmasker or LowConfidence(sampling=Sampling(after_end="decode"))
    state = canvas(model.spec, prompts, 16, block_length, ids=ids)
    return decode(Engine(model, policy, unmasker, debug=True, **engine), state)


# -- rollout ----------------------------------------------------------------------------------------------------------


def dense(attention: list[tuple[Tensor, Tensor]], b: int, n: int) -> Tensor:
    """Column sums of the product of L matrices (n, n), newest layer on the left, as the paper writes it."""
    product = torch.eye(n, dtype=torch.float64)
    for rows, mean in attention:
        e = torch.eye(n, dtype=torch.float64)
        for i, row in enumerate(rows[b].tolist()):
            if row < n:
                e[row] = mean[b, i, :n].double()
        w = e + torch.eye(n, dtype=torch.float64)
        product = (w / w.sum(-1, keepdim=True)) @ product
    return product.sum(0)


@both_shifts
def test_importance_is_the_column_sum_of_the_dense_product_with_grouped_heads_and_padded_rows(shift: int) -> None:
    policy = Watched(current_k=5)
    trace = go(policy, shift, buckets=(8, 64))  # 4 heads over 2 key heads; prompts of 8 and 2
    for step, attention in zip(trace, policy.attention, strict=True):
        for b, prompt in enumerate(PROMPTS):
            n = len(prompt) + 16
            if step.active[b]:
                expected = dense(attention, b, n)
                np.testing.assert_allclose(step.reports["importance"][b, :n], expected, rtol=2e-6, atol=2e-6)


@both_shifts
def test_importance_sums_to_the_length_and_reused_rows_keep_their_own(shift: int) -> None:
    for step in go(D2Cache(current_k=4), shift):
        for b, prompt in enumerate(PROMPTS):
            if step.active[b]:
                found = step.reports["importance"][b, : len(prompt) + 16]
                assert found.sum() == pytest.approx(len(found), abs=1e-4)
                assert (found[~step.rows[b, : len(found)]] >= 1 - 1e-6).all()


def at_once(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """From here on all layers are rolled out at once, as with kernels; the rows for which that happened."""
    rolled: list[Tensor] = []
    rollout = across.Across.rollout

    def noted(every: across.Across, queries: list[Tensor], rows: Tensor) -> Tensor:
        rolled.append(rows)
        return rollout(every, queries, rows)

    monkeypatch.setattr(across, "use_triton", lambda rows: True)
    monkeypatch.setattr(layer, "finds_lse", lambda *given: True)
    monkeypatch.setattr(across.Across, "rollout", noted)
    return rolled


@both_shifts
def test_with_kernels_few_rows_are_rolled_out_in_all_layers_at_once(
    shift: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rolled = at_once(monkeypatch)
    policy = Watched(current_k=5)
    trace = go(policy, shift=shift, buckets=(8, 64))
    for step, attention in zip(trace, policy.attention, strict=True):
        for b, prompt in enumerate(PROMPTS):
            if step.active[b]:
                expected = dense(attention, b, len(prompt) + 16)
                np.testing.assert_allclose(step.reports["importance"][b, : len(expected)], expected, rtol=2e-6)
    assert len(rolled) == len(trace)


@pytest.mark.parametrize("policy", ["d2(current_k=4)", "sparse-dllm(inner=d2(current_k=4),keep=0.5)"])
@pytest.mark.parametrize("buckets", [(), (8, 64)])
def test_both_ways_to_roll_out_are_one_but_for_rounding(
    policy: str, buckets: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    more: dict[str, Any] = {"buckets": buckets, "block_length": 4, "prompts": [*PROMPTS, [7]]}
    one_by_one = go(make_policy(policy), **more)  # type: ignore[arg-type]
    rolled = at_once(monkeypatch)
    for found, expected in zip(go(make_policy(policy), **more), one_by_one, strict=True):  # type: ignore[arg-type]
        assert (found.rows == expected.rows).all()
        assert (found.tokens == expected.tokens).all()
        a, b = (step.reports["importance"][step.active] for step in (found, expected))
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert rolled


# -- selection --------------------------------------------------------------------------------------------------------


@both_shifts
@each_setting
@pytest.mark.parametrize("block_length", [None, 4])
def test_the_prior_is_full_and_new_tokens_are_always_computed(
    shift: int, knobs: dict[str, Any], block_length: int | None
) -> None:
    policy = Watched(**knobs)
    go(policy, shift, block_length=block_length)
    for selection, at in policy.planned[1:]:
        assert selection is not None
        for b in np.flatnonzero(at["active"]):
            assert not (at["changed"][b] & ~at["rows"][b]).any()
            assert not (selection.prior[b] & ~at["masked"][b]).any()
            assert (selection.prior[b] & at["window"][b]).any()
            if knobs.get("search") == "all":
                assert selection.prior[b].sum() == min(knobs["current_k"], at["masked"][b].sum())
            rank = np.where(at["in_block"][b] & at["masked"][b], selection.score[b], 0)
            if knobs.get("search") is None and rank.any():
                assert selection.prior[b, rank.argmax()]  # the bias puts the block first


def test_the_prior_searches_up_to_a_multiple_of_what_is_left_of_the_block() -> None:
    policy = Watched(current_k=3)
    go(policy, unmasker=LowConfidence(tokens_per_step=2, sampling=Sampling(after_end="decode")), prompts=[PROMPTS[1]])
    for selection, at in policy.planned[1:]:
        assert selection is not None
        masked, n = at["masked"][0, 2:], int(at["in_block"].sum())
        enough = masked.cumsum() >= 3
        reach = int(enough.argmax()) if enough.any() else 15
        end = (reach // n + 1) * n  # first position that is not searched
        begin = int(at["in_block"][0, 2:].argmax())
        searched = masked & (np.arange(16) >= begin) & (np.arange(16) < end)
        assert selection.prior[0, 2:].sum() == min(3, searched.sum())
        assert not (selection.prior[0, 2:] & ~searched).any()


@pytest.mark.parametrize("p", [0.0, 0.05, 0.3, 0.9])
@pytest.mark.parametrize("side", ["below", "above"])
def test_the_nucleus_is_a_prefix_by_importance_that_stops_at_its_share(p: float, side: str) -> None:
    policy = Watched(rollout_p=p, nucleus=side, current_k=4)
    trace = go(policy, prompts=PROMPTS[:1])
    for step, (selection, _) in zip(trace, policy.planned[1:], strict=False):
        assert selection is not None
        free, chosen = ~selection.early[0], selection.nucleus[0]
        weight = step.reports["importance"][0].astype(np.float64)
        share = weight[chosen].sum() / weight[free].sum()
        rest, least = weight[free & ~chosen], weight[chosen].min()
        assert not (chosen & ~free).any()
        assert (rest <= least).all()
        if side == "below":
            assert share <= p or chosen.sum() == 1
            assert share + rest.max() / weight[free].sum() > p  # one more would be too many
        else:
            assert share > p >= share - least / weight[free].sum()


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(0, 6))
def test_inflation_closes_gaps_and_nothing_else(chosen: list[bool], width: int) -> None:
    rows = np.array([chosen])
    found = close_gaps(rows, width)
    expected = rows.copy()
    index = np.flatnonzero(rows[0])
    for a, b in pairwise(index):
        if b - a <= width:
            expected[0, a:b] = True
    assert (found == expected).all()
    assert (found <= close_gaps(rows, width + 1)).all()


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=1, max_size=20), st.integers(-1, 22))
def test_highest_is_a_stable_sort(drawn: list[tuple[bool, int]], count: int) -> None:
    among, score = (np.array([x]) for x in zip(*drawn, strict=True))
    order = sorted(np.flatnonzero(among[0]).tolist(), key=lambda i: -score[0, i])
    assert np.flatnonzero(highest(score, among, count)[0]).tolist() == sorted(order[: max(count, 0)])


@both_shifts
def test_the_last_prompt_row_is_computed_for_the_first_position_alone(shift: int) -> None:
    policy = Watched(current_k=4, rollout_p=0.6)
    go(policy, shift, prompts=PROMPTS[:1])
    first, kept = len(PROMPTS[0]), []
    for selection, _ in policy.planned[1:]:
        assert selection is not None
        if shift:
            assert selection.rows[0, first - 1] == selection.prior[0, first]
        kept.append(bool(selection.rows[0, first - 1]))
    assert shift or any(kept)  # without a shift it is a prompt row like any other


def test_scores_use_the_first_confidences_or_the_latest() -> None:
    for which in ("first", "latest"):
        policy = D2Cache(current_k=4, confidence=which)
        trace = go(policy, prompts=PROMPTS[:1])
        expected = np.zeros_like(policy.confidence)
        for i, step in enumerate(trace[:-1]):  # nothing is planned after the last
            fresh = (step.tokens >= 0) & np.isfinite(step.confidence) & (i == 0 or which == "latest")
            expected = np.where(fresh, step.confidence, expected)
        assert (policy.confidence == expected).all()
    assert len(trace) == 16


# -- progress ---------------------------------------------------------------------------------------------------------


class TakesBack(Threshold):
    """Puts the first committed row back once per sequence, whatever was computed."""

    def begin(self, net: Any, state: State) -> None:
        super().begin(net, state)
        self.taken = np.zeros(state.batch, dtype=np.int64)

    def ask(self, state: State) -> Any:
        ask = super().ask(state)
        known = state.known & ~state.prompt
        back = known & (known.cumsum(1) == 1) & ((state.step % 3 == 2) & (self.taken < 3))[:, None]
        self.taken += back.any(1)
        return type(ask)(ask.window, ask.block, read=ask.window | back, flags={"back": back})

    def pick(self, logits: Tensor, at: Any) -> Picks:
        picks = super().pick(logits, at)
        return Picks(picks.tokens, picks.confidence, picks.commit, at.flags["back"])


@both_shifts
@pytest.mark.parametrize("knobs", KNOBS[::2], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        lambda s: LowConfidence(sampling=s, tokens_per_step=3),
        lambda s: LowConfidence(sampling=s, window=2),
        lambda s: Threshold(sampling=s, threshold=0.9),
        lambda s: Random(sampling=s),
        lambda s: TakesBack(sampling=s, threshold=0.6),
    ],
    ids=["quota", "window", "threshold", "random", "takes back"],
)
def test_every_step_predicts_something_that_may_be_committed(shift: int, knobs: dict[str, Any], make: Any) -> None:
    for block_length, after_end in ((None, "decode"), (4, "drop")):
        policy = Watched(**knobs)
        unmasker = make(Sampling(after_end=after_end))
        trace = go(policy, shift, unmasker=unmasker, block_length=block_length)
        for step, (_, at) in zip(trace, policy.planned, strict=True):
            assert ((at["window"] & (step.tokens >= 0)).any(1) | ~step.active).all()
            assert (step.commit.any(1) | ~step.active).all()


# -- exactness and batches --------------------------------------------------------------------------------------------


def commits(trace: list[Step], b: int) -> list[list[tuple[int, int]]]:
    return [[(int(p), int(s.tokens[b, p])) for p in np.flatnonzero(s.commit[b])] for s in trace if s.active[b]]


def test_a_coupled_batch_computes_as_many_rows_in_each_sequence() -> None:
    policy = Watched(current_k=5, rollout_p=0.3, couple_batch=True)
    go(policy, unmasker=Threshold(threshold=0.5))
    added = 0
    for selection, at in policy.planned[1:]:
        assert selection is not None
        counts = at["rows"][at["active"]].sum(1)
        assert len(set(counts)) == 1
        assert not (selection.rows & ~at["rows"]).any()
        added += int((at["rows"] & ~selection.rows)[at["active"]].sum())
        assert counts[0] == selection.rows[at["active"]].sum(1).max()
    assert added > 0


@both_shifts
def test_a_sequence_that_sits_passes_out_keeps_its_selection(shift: int) -> None:
    policy = Watched(current_k=4, couple_batch=True)
    prompts, unmasker = [PROMPTS[0], PROMPTS[0][::-1]], Threshold(threshold=0.4)
    trace = go(policy, shift, unmasker=unmasker, prompts=prompts, block_length=4, canvas=Together)
    waited = 0
    for b in range(2):
        took_part = [n for n, step in enumerate(trace) if step.active[b]]
        for last, n in pairwise(took_part):
            (made, _), (kept, at) = policy.planned[last + 1], policy.planned[n]
            assert made is not None
            assert kept is not None
            assert np.array_equal(made.rows[b], kept.rows[b])
            assert not (made.rows[b] & ~at["rows"][b]).any()
            waited += n > last + 1
    assert waited > 0


def test_a_coupled_batch_of_one_is_not_coupled() -> None:
    alone, coupled = (go(D2Cache(current_k=4, couple_batch=c), prompts=PROMPTS[:1]) for c in (False, True))
    assert all((a.rows == b.rows).all() for a, b in zip(alone, coupled, strict=True))


@both_shifts
def test_it_can_be_captured(shift: int) -> None:
    eager = go(D2Cache(current_k=4), shift, buckets=(8, 64))
    recorder = Recorder()
    model = MODELS[shift]
    unmasker = LowConfidence(sampling=Sampling(after_end="decode"))
    engine = Engine(model, D2Cache(current_k=4), unmasker, buckets=(8, 64), executor=recorder, debug=True)
    for _ in range(3):
        trace = decode(engine, State(model.spec, PROMPTS, 16))
        for b in range(2):
            assert commits(trace, b) == commits(eager, b)
        for a, b in zip(trace, eager, strict=True):
            assert torch.equal(*(torch.from_numpy(s.reports["importance"][s.active]) for s in (a, b)))
    assert recorder.replayed > recorder.recorded > 0


def test_what_is_computed_is_the_rows_of_the_selection_in_every_layer() -> None:
    policy = Watched(current_k=4)
    trace = go(policy)
    for step, (selection, at) in zip(trace[1:], policy.planned[1:], strict=True):
        assert selection is not None
        bound = np.minimum(4, at["masked"].sum(1)) + at["changed"].sum(1) + selection.nucleus.sum(1)
        assert (selection.rows.sum(1) <= bound).all()
        assert (step.row_layers == selection.rows.sum(1) * at["active"]).all()
        assert (step.kv_row_layers == step.row_layers).all()


def test_the_defaults_are_those_of_the_released_configuration() -> None:
    config = make_policy("d2").config
    assert (config.rollout_p, config.current_k, config.sigma, config.inflate_w) == (0.1, 32, 10, 0)  # type: ignore[attr-defined]
