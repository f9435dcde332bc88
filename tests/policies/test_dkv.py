from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dcache
from dcache import CachePolicy, Plan, Sampling, Seen, State, Unmasker, Update
from dcache.arrays import leftmost
from dcache.decode import decode
from dcache.engine import Engine
from dcache.policies.dkv import DKVCache, near
from dcache.policies.none import NoCache
from dcache.testing.models import random_model
from dcache.testing.runs import Canvas, Run
from dcache.unmasking.confidence import LowConfidence, Threshold
from dcache.unmasking.order import RandomOrder

canvases = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2),
        "shift": st.sampled_from([0, 1]),
        "lengths": st.lists(st.tuples(st.integers(1, 7), st.sampled_from([4, 8, 12])), min_size=1, max_size=3),
        "block": st.sampled_from([None, 4]),
        "per_step": st.integers(1, 3),
    }
)
knobs = st.one_of(
    st.fixed_dictionaries(
        {
            "variant": st.sampled_from(["decode", "pd", "prefill"]),
            "interval": st.integers(1, 9),
            "cacheable": st.sampled_from(["un", "un_right", "right"]),
        }
    ),
    st.fixed_dictionaries(
        {"variant": st.just("greedy"), "interval": st.integers(1, 9), "neighbours": st.integers(0, 4)}
    ),
)


class TakesBack(LowConfidence):
    """Puts the first decoded row back to the mask in every third step of the first nine."""

    def settle(self, state: State, seen: Seen) -> Update:
        decoded = state.known & ~state.prompt
        due = (state.step % 3 == 2) & (state.step < 9) & state.active
        return replace(super().settle(state, seen), remask=leftmost(decoded, 1) & due[:, None])


def unmasker_of(canvas: dict[str, Any], knobs: dict[str, Any]) -> Unmasker:
    kind = RandomOrder if knobs.get("variant") == "greedy" else LowConfidence
    return kind(sampling=Sampling(after_end="decode"), tokens_per_step=canvas["per_step"])


def decoded(
    canvas: dict[str, Any], policy: CachePolicy, unmasker: Unmasker, n_layers: int = 3, only: int | None = None
) -> Run:
    """Decode a drawn canvas, all sequences or one of them."""
    sizes = {name: canvas[name] for name in ("seed", "shift")} | {"n_layers": n_layers, "block_length": canvas["block"]}
    return Run(lambda: policy, Canvas(lengths=tuple(canvas["lengths"]), **sizes), only, unmasker).go()


def assert_equals_no_cache(canvas: dict[str, Any], knobs: dict[str, Any], n_layers: int = 3) -> None:
    run = decoded(canvas, DKVCache(**knobs), unmasker_of(canvas, knobs), n_layers)
    reference = decoded(canvas, NoCache(), unmasker_of(canvas, knobs), n_layers)
    for b in range(run.state.batch):
        assert run.commits(b) == reference.commits(b)


# -- exact configurations ---------------------------------------------------------------------------------------------


@given(canvas=canvases, variant=st.sampled_from(["decode", "greedy"]))
def test_a_refresh_in_every_step_equals_no_cache(canvas: dict[str, Any], variant: str) -> None:
    assert_equals_no_cache(canvas, {"variant": variant, "interval": 1})


@given(canvas=canvases, interval=st.integers(1, 9))
def test_two_steps_per_block_equal_no_cache(canvas: dict[str, Any], interval: int) -> None:
    assert_equals_no_cache(canvas | {"shift": 0, "block": 4, "per_step": 2}, {"interval": interval})


@given(canvas=canvases, knobs=knobs)
def test_one_layer_equals_no_cache_unless_rows_are_cached_before_their_token_is_known(
    canvas: dict[str, Any], knobs: dict[str, Any]
) -> None:
    """K and V of the first layer depend on the token alone, so this is the test of the delay."""
    if canvas["shift"] and knobs.get("cacheable") == "un":
        knobs = knobs | {"cacheable": "un_right"}
    assert_equals_no_cache(canvas, knobs, n_layers=1)


LONG = {"seed": 0, "shift": 0, "lengths": [(5, 24)], "block": None, "per_step": 1}


@pytest.mark.parametrize(
    ("shift", "knobs"),
    [
        (0, {"variant": "decode"}),
        (0, {"variant": "pd"}),
        (0, {"variant": "greedy"}),
        (1, {"variant": "decode", "cacheable": "un_right"}),
        (1, {"variant": "pd", "cacheable": "right"}),
    ],
)
def test_a_missing_delay_is_found_by_the_one_layer_property(shift: int, knobs: dict[str, Any]) -> None:
    """The planted fault: rows committed by the last step are reused with the K and V of the mask."""

    class NoDelay(DKVCache):
        def plan(self, state: State) -> Plan:
            self.before = np.ones_like(state.valid)
            changed = state.changed
            state.changed = np.zeros_like(changed)
            plan = super().plan(state)
            state.changed = changed
            return plan

    canvas, knobs = LONG | {"shift": shift}, knobs | {"interval": 100}
    reference = decoded(canvas, NoCache(), unmasker_of(canvas, knobs), n_layers=1)
    assert decoded(canvas, DKVCache(**knobs), unmasker_of(canvas, knobs), n_layers=1).commits() == reference.commits()
    assert decoded(canvas, NoDelay(**knobs), unmasker_of(canvas, knobs), n_layers=1).commits() != reference.commits()


def test_the_published_rule_for_shifted_models_is_not_exact_on_one_layer() -> None:
    canvas = LONG | {"shift": 1}
    run = decoded(canvas, DKVCache(interval=100), unmasker_of(canvas, {}), n_layers=1)
    assert run.commits() != decoded(canvas, NoCache(), unmasker_of(canvas, {}), n_layers=1).commits()


@given(canvas=canvases, cacheable=st.sampled_from(["un", "un_right", "right"]))
def test_pd_that_refreshes_every_step_equals_prefill(canvas: dict[str, Any], cacheable: str) -> None:
    knobs = {"variant": "pd", "interval": 1, "cacheable": cacheable}
    run = decoded(canvas, DKVCache(**knobs), unmasker_of(canvas, knobs))
    prefill = decoded(canvas, DKVCache(variant="prefill"), unmasker_of(canvas, knobs))
    for b in range(run.state.batch):
        assert run.rows(b) == prefill.rows(b)
        assert run.commits(b) == prefill.commits(b)


# -- rows -------------------------------------------------------------------------------------------------------------


def decoded_sets(run: Run, b: int) -> Iterator[tuple[int, set[int], set[int], set[int]]]:
    """For each step of a sequence: i in its block, D_{i-1}, what the last step decoded, what this one does."""
    start, total = int(run.state.gen_start[b]), int(run.state.lengths[b])
    width = run.state.block_length or total
    known, last, block, i = set(range(start)), set(), -1, -1
    for now in (set(commit) for commit in run.commits(b)):
        first = min(set(range(total)) - known)
        i, block = (i + 1 if (first - start) // width == block else 0), (first - start) // width
        yield i, set(known), last, now
        known, last = known | now, now


def may_be_cached(known: set[int], total: int, shift: int, rule: str) -> set[int]:
    """Table 4 of the paper in sets: the rows that `rule` caches."""
    if shift == 0:
        return known
    after = {p for p in range(total) if (p + 1) % total in known}
    both = known & after - {total - 1}
    return {"un": after, "right": known, "un_right": both | ({total - 1} if total - 2 in both else set())}[rule]


@given(canvas=canvases, knobs=knobs)
def test_rows_are_those_of_the_paper(canvas: dict[str, Any], knobs: dict[str, Any]) -> None:
    run = decoded(canvas, DKVCache(**knobs), unmasker_of(canvas, knobs))
    shift, variant, interval = canvas["shift"], knobs["variant"], knobs["interval"]
    for b in range(run.state.batch):
        prompt, total = int(run.state.gen_start[b]), int(run.state.lengths[b])
        everything, prefix, before = set(range(total)), set(range(prompt - shift)), None
        for rows, (i, known, last, now) in zip(map(set, run.rows(b)), decoded_sets(run, b), strict=True):
            first_step = before is None
            cached = prefix if first_step else may_be_cached(known, total, shift, knobs.get("cacheable", "un"))
            old, before = before, cached
            refresh = first_step or i % interval == 0 or (shift == 0 and i < 2)
            fixed = set() if first_step or variant == "decode" else prefix
            window = {p - shift for p in everything - known if in_block(run, b, p, known)}
            if variant == "greedy":
                window = {p - shift for p in now}
                full = i % interval == 0
                assert rows == everything if full else rows >= now | last | window
                wanted = canvas["per_step"] + len(last) + knobs["neighbours"] * len(now) + shift * len(now)
                assert full or len(rows) <= wanted
            elif variant == "prefill":
                assert rows == everything - fixed
            else:
                assert rows == everything - fixed - (set() if refresh else old) | window


def in_block(run: Run, b: int, p: int, known: set[int]) -> bool:
    start, width = int(run.state.gen_start[b]), run.state.block_length or 1000
    first = min(set(range(int(run.state.lengths[b]))) - known)
    return (p - start) // width == (first - start) // width


@given(canvas=canvases, interval=st.integers(1, 9), neighbours=st.integers(0, 4))
def test_greedy_commits_in_the_drawn_order(canvas: dict[str, Any], interval: int, neighbours: int) -> None:
    knobs = {"variant": "greedy", "interval": interval, "neighbours": neighbours}
    run = decoded(canvas, DKVCache(**knobs), unmasker_of(canvas, knobs))
    reference = decoded(canvas, NoCache(), unmasker_of(canvas, knobs))
    for b in range(run.state.batch):
        assert [set(c) for c in run.commits(b)] == [set(c) for c in reference.commits(b)]


def test_a_cached_step_of_greedy_costs_a_constant_number_of_rows() -> None:
    knobs = {"variant": "greedy", "interval": 100, "neighbours": 2}
    canvas = LONG | {"lengths": [(5, 24)], "per_step": 2}
    rows = [len(r) for r in decoded(canvas, DKVCache(**knobs), unmasker_of(canvas, knobs)).rows()]
    assert rows[0] == 29
    assert rows[1:9] == [2 + 2 + 2 * 2] * 8


@given(data=st.data(), total=st.integers(2, 14), width=st.integers(0, 5))
def test_neighbours_are_searched_left_and_right_in_turn(data: st.DataObject, total: int, width: int) -> None:
    """Against the search of the released code, step by step, from every decoded row in decoding order."""
    flags = st.lists(st.booleans(), min_size=total, max_size=total)
    masked = data.draw(flags)
    changed = [flag and not m for flag, m in zip(data.draw(flags), masked, strict=True)]
    order = [p for p in data.draw(st.permutations(range(total))) if masked[p]]
    now = order[: data.draw(st.integers(0, 3))]
    chosen = set(now) | {p for p in range(total) if changed[p]}
    for c in now:
        left, right, count, turn_left = c - 1, c + 1, 0, True
        while count < width and (left >= 0 or right < total):
            p = left if turn_left else right
            if 0 <= p < total and p not in chosen and masked[p]:
                chosen.add(p)
                count += 1
            left, right = (left - 1, right) if turn_left else (left, right + 1)
            turn_left = not turn_left
    state = State(random_model(0).spec, [[1]], total - 1)
    state.masked, state.changed = np.array([masked]), np.array([changed])
    state.window = np.isin(np.arange(total), now)[None]
    state.order = np.array([[order.index(p) if p in order else 0 for p in range(total)]])
    assert set(np.flatnonzero(near(state, width)[0]).tolist()) == chosen


# -- batches, rows put back, refusals ---------------------------------------------------------------------------------


@given(canvas=canvases, knobs=knobs)
def test_a_batch_decodes_each_sequence_as_if_it_were_alone(canvas: dict[str, Any], knobs: dict[str, Any]) -> None:
    together = decoded(canvas, DKVCache(**knobs), unmasker_of(canvas, knobs))
    for b in range(together.state.batch):
        alone = decoded(canvas, DKVCache(**knobs), unmasker_of(canvas, knobs), only=b)
        assert together.rows(b) == alone.rows()
        assert together.commits(b) == alone.commits()


@given(canvas=canvases, knobs=knobs.filter(lambda k: k["variant"] != "greedy"))
def test_a_row_put_back_is_computed_again(canvas: dict[str, Any], knobs: dict[str, Any]) -> None:
    run = decoded(canvas | {"block": None}, DKVCache(**knobs), TakesBack(sampling=Sampling(after_end="decode")))
    assert not run.state.masked.any()
    for step, following in zip(run.trace, run.trace[1:], strict=False):
        assert following.rows[step.remask & following.active[:, None]].all()


def test_a_row_dropped_undecoded_is_computed_like_any_mask() -> None:
    for seed in range(8):
        model = random_model(seed, vocab_size=6)
        unmasker = Threshold(sampling=Sampling(after_end="drop"), threshold=0.9)
        state = State(model.spec, [[1, 2, 3]], 24)
        dropped = np.zeros_like(state.valid)
        for step in decode(Engine(model, DKVCache(interval=100), unmasker), state):
            assert step.rows[dropped & step.active[:, None]].all()
            dropped |= step.drop


def test_greedy_is_refused_with_an_unmasker_that_chooses_after_the_pass() -> None:
    transformer = random_model(0)
    model = dcache.Model("random", transformer.spec, transformer)
    with pytest.raises(dcache.UsageError, match="'low-confidence' chooses them after the pass; use one that fixes"):
        dcache.generate(model, [[3, 1, 4]], policy="dkv(variant=greedy)", gen_length=8)


def test_neighbours_without_greedy_are_refused() -> None:
    with pytest.raises(dcache.UsageError, match="neighbours belongs to variant=greedy; variant=decode does not use it"):
        dcache.plugins.make_policy("dkv(neighbours=4)")
