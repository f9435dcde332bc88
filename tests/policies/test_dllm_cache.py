from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcache import CachePolicy, State
from dcache.decode import decode
from dcache.engine import Engine
from dcache.models.transformer import Transformer
from dcache.policies.dllm_cache import UNCHANGED, DLLMCache
from dcache.testing import Canvas
from dcache.testing.golden.base import Watched
from dcache.testing.models import random_model
from dcache.testing.runs import Run, same_decisions
from dcache.trace import Step
from dcache.unmasking.confidence import LowConfidence

MODEL = random_model(0, n_layers=4)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
GEN = 12

intervals, ratios = st.integers(1, 9), st.sampled_from([0.0, 0.05, 0.25, 0.4, 0.5, 0.99, 1.0, 1.5])
canvases = st.builds(
    Canvas,
    seed=st.integers(0, 3),
    shift=st.integers(0, 1),
    lengths=st.lists(st.tuples(st.integers(1, 9), st.sampled_from([4, 8, 12])), min_size=1, max_size=3).map(tuple),
    block_length=st.sampled_from([None, 4]),
)


def dllm(prompt: int, gen: int, ratio: float, more: str = "") -> str:
    return f"dllm-cache(prompt_interval={prompt},gen_interval={gen},transfer_ratio={ratio}{more})"


def same_runs(one: str, other: str, canvas: Canvas) -> None:
    found, expected = Run(one, canvas).go(), Run(other, canvas).go()
    for b in range(found.state.batch):
        same_decisions(found, b, expected, b, f"{one} must equal {other}")


class Stored(Watched):
    """Keeps what the stores hold after each step."""

    def begin(self, net: Any, state: State) -> None:
        super().begin(net, state)
        self.layers, self.stores = net.layers, []  # type: ignore[var-annotated]

    def settle(self, state: State, seen: Any) -> Any:
        self.stores.append(
            {name: [at.stores[name][:, ..., : at.dump, :].clone() for at in self.layers] for name in "KVAF"}
        )
        return super().settle(state, seen)


def go(
    policy: CachePolicy,
    prompts: Sequence[Sequence[int]] = (PROMPT,),
    gen: int | Sequence[int] = GEN,
    block: int | None = None,
    model: Transformer = MODEL,
) -> tuple[list[Step], Stored]:
    watched = Stored(LowConfidence())
    engine = Engine(model, policy, watched, maps=True, debug=True)
    return decode(engine, State(model.spec, prompts, gen, block)), watched


def computed(step: Step, layer: int, name: str = "rows", b: int = 0) -> list[int]:
    return np.flatnonzero(step.maps[name][layer, b]).tolist()


@cache
def usual() -> tuple[list[Step], Stored]:
    return go(DLLMCache(prompt_interval=3, gen_interval=4, transfer_ratio=0.3))


@given(intervals, intervals, ratios, canvases)
def test_one_layer_is_plain_decoding(prompt: int, gen: int, ratio: float, canvas: Canvas) -> None:
    one = Canvas(**{**vars(canvas), "n_layers": 1})
    same_runs(dllm(prompt, gen, ratio), "none", one)


@given(intervals, intervals, canvases)
def test_a_ratio_of_one_is_a_refresh_of_the_response_in_every_step(prompt: int, gen: int, canvas: Canvas) -> None:
    same_runs(dllm(prompt, gen, 1.0), dllm(prompt, 1, 0.25), canvas)


@given(intervals, canvases)
def test_a_ratio_of_one_with_a_fresh_prompt_is_plain_decoding(gen: int, canvas: Canvas) -> None:
    same_runs(dllm(1, gen, 1.0), "none", canvas)


@given(intervals, intervals, st.floats(1.01, 9), canvases)
def test_ratios_of_zero_and_above_one_are_the_same(prompt: int, gen: int, ratio: float, canvas: Canvas) -> None:
    same_runs(dllm(prompt, gen, 0), dllm(prompt, gen, round(ratio, 3)), canvas)


def test_a_pass_that_refreshes_both_computes_what_the_plain_forward_computes() -> None:
    for model in (MODEL, random_model(1, n_layers=3, shift=1)):
        trace, watched = go(DLLMCache(prompt_interval=2, gen_interval=3, transfer_ratio=0.25), model=model)
        tokens = torch.tensor([PROMPT + [model.spec.mask_id] * GEN])
        for n, step in enumerate(trace):
            if n % 6 == 0:
                expected = model(tokens)[0]
                for p, logits in watched.logits[n][0].items():
                    torch.testing.assert_close(logits, expected[max(p - model.spec.shift, 0)], atol=1e-4, rtol=1e-4)
            tokens = torch.where(torch.from_numpy(step.commit), torch.from_numpy(step.tokens), tokens)


def test_the_block_length_changes_commits_but_no_number_of_rows() -> None:
    policy = DLLMCache(prompt_interval=3, gen_interval=4, transfer_ratio=0.3)
    counts = {}
    for block in (None, 4, 6):
        trace, _ = go(policy, block=block)
        counts[block] = [(s.row_layers.tolist(), s.kv_row_layers.tolist()) for s in trace]
    assert counts[None] == counts[4] == counts[6]


def test_rows_follow_the_intervals_and_the_ratio() -> None:
    trace, _ = usual()
    prompt, response = list(range(len(PROMPT))), list(range(len(PROMPT), len(PROMPT) + GEN))
    assert {(n % 3 == 0, n % 4 == 0) for n in range(len(trace))} == {
        (a, b) for a in (False, True) for b in (False, True)
    }
    for n, step in enumerate(trace):
        assert computed(step, 0) == computed(step, 0, "kv_rows") == prompt + response  # layer 0, as released
        for layer in range(1, MODEL.spec.n_layers):
            rows, values = computed(step, layer), computed(step, layer, "kv_rows")
            assert values == prompt * (n % 3 == 0) + response  # values of the response are fresh in every step
            assert [p for p in rows if p < len(PROMPT)] == prompt * (n % 3 == 0)
            assert len(rows) - len(prompt) * (n % 3 == 0) == (GEN if n % 4 == 0 else int(0.3 * GEN))


def test_a_ratio_below_one_row_replaces_values_and_computes_nothing() -> None:
    trace, watched = go(DLLMCache(prompt_interval=100, gen_interval=6, transfer_ratio=0.05))
    assert computed(trace[1], 1) == []
    assert computed(trace[1], 1, "kv_rows") == list(range(len(PROMPT), len(PROMPT) + GEN))
    (v0, v1), (k0, k1) = ([watched.stores[n][name][1] for n in (0, 1)] for name in "VK")
    assert not torch.equal(v0, v1)
    assert torch.equal(k0, k1)


def test_without_partial_updates_nothing_is_computed_between_refreshes() -> None:
    trace, watched = go(DLLMCache(prompt_interval=100, gen_interval=6, transfer_ratio=0))
    for name in ("rows", "kv_rows"):
        assert [computed(trace[n], 1, name) for n in (1, 5)] == [[], []]
    for name in "KVAF":
        assert torch.equal(watched.stores[0][name][2], watched.stores[5][name][2])


def test_the_rows_whose_values_moved_most_are_selected() -> None:
    trace, watched = usual()
    begin, n_compared = len(PROMPT), 0
    for n in range(1, len(trace)):
        if n % 4 == 0:
            continue
        for layer in range(1, MODEL.spec.n_layers):
            old, new = (watched.stores[i]["V"][layer][0, :, begin:].transpose(0, 1).flatten(1) for i in (n - 1, n))
            similarity = torch.cosine_similarity(old, new, dim=-1)
            chosen = np.array(computed(trace[n], layer))
            chosen = chosen[chosen >= begin] - begin
            refused = np.setdiff1d(np.arange(GEN), chosen)
            assert similarity[chosen].max() <= max(float(similarity[refused].min()) + 1e-6, UNCHANGED)
            n_compared += 1
    assert n_compared == 9 * (MODEL.spec.n_layers - 1)


def test_rows_that_are_not_computed_keep_keys_and_increments_bit_for_bit() -> None:
    trace, watched = usual()
    for n in range(1, len(trace)):
        for layer in range(1, MODEL.spec.n_layers):
            for name in "KAF":
                old, new = (watched.stores[i][name][layer][0] for i in (n - 1, n))
                moved = (old != new).any(-1)
                moved = moved.any(0) if moved.dim() == 2 else moved
                assert set(np.flatnonzero(moved)) <= set(computed(trace[n], layer))


def test_values_that_did_not_change_tie_and_the_leftmost_rows_are_selected() -> None:
    class Idle(LowConfidence):
        """Commits in every third step."""

        def ask(self, state: State) -> Any:
            asked = super().ask(state)
            return asked if state.step[0] % 3 == 2 else type(asked)(**{**vars(asked), "window": asked.window & False})

    policy = DLLMCache(prompt_interval=100, gen_interval=50, transfer_ratio=0.25)
    engine = Engine(MODEL, policy, Idle(), maps=True, debug=True)
    trace = decode(engine, State(MODEL.spec, [PROMPT], GEN))
    for layer in range(1, MODEL.spec.n_layers):
        assert computed(trace[1], layer) == [8, 9, 10]  # nothing was committed before it


def test_the_first_layer_is_always_exact_unless_it_is_scheduled() -> None:
    knobs = {"prompt_interval": 100, "gen_interval": 50, "transfer_ratio": 0.25}
    scheduled, _ = go(DLLMCache(**knobs, first_layer="scheduled"))
    assert len(computed(scheduled[1], 0)) == int(0.25 * GEN)
    assert not scheduled[1].refresh[0]
    always, _ = go(DLLMCache(**knobs))
    assert len(computed(always[1], 0)) == len(PROMPT) + GEN
    assert [s.refresh[0] for s in always] == [True] + [False] * (GEN - 1)  # although layer 0 computes every row


@given(intervals, intervals, ratios, canvases, st.sampled_from(["always", "scheduled"]))
def test_a_ragged_batch_computes_what_single_runs_compute(
    prompt: int, gen: int, ratio: float, canvas: Canvas, first: str
) -> None:
    policy = dllm(prompt, gen, ratio, f",first_layer={first}")
    together = Run(policy, canvas, maps=True).go()
    for b in range(together.state.batch):
        alone = Run(policy, canvas, only=b, maps=True).go()
        same_decisions(together, b, alone, 0, "the same sequence alone")
        for name in ("rows", "kv_rows"):
            for step, own in zip(together.steps(b), alone.steps(0), strict=False):
                found, expected = step.maps[name][:, b], own.maps[name][:, 0]
                assert (found.sum(-1) == expected.sum(-1)).all()


@pytest.mark.parametrize("seed", range(3))
def test_sequences_of_a_batch_may_be_at_different_steps(seed: int) -> None:
    """As where a sequence joins late: one refreshes while the other makes a partial update."""
    model = random_model(seed, n_layers=3)
    policy = DLLMCache(prompt_interval=3, gen_interval=4, transfer_ratio=0.3)
    lengths = [4, 12]

    def decoded(which: list[int], ahead: int) -> list[Step]:
        plan = policy.plan

        def shifted(state: State) -> Any:
            real = state.step
            state.step = np.where(np.array(which) == 1, real + ahead * (real > 0), real)
            try:
                return plan(state)
            finally:
                state.step = real

        vars(policy)["plan"] = shifted
        try:
            engine = Engine(model, policy, LowConfidence(), maps=True, debug=True)
            return decode(
                engine, State(model.spec, [[PROMPT, PROMPT[:5]][b] for b in which], [lengths[b] for b in which])
            )
        finally:
            del vars(policy)["plan"]

    both = decoded([0, 1], 1)
    for b in (0, 1):
        for step, own in zip(both, decoded([b], 1), strict=False):
            n = own.rows.shape[1]
            for name in ("rows", "kv_rows"):
                np.testing.assert_array_equal(step.maps[name][:, b, :n], own.maps[name][:, 0])
            np.testing.assert_allclose(step.confidence[b, :n], own.confidence[0], atol=1e-4)


def test_a_response_refreshed_in_every_step_is_spa_with_that_refresh() -> None:
    """SPA-Cache whose generation is refreshed in every step caches the prompt alone, as this does, without a shift."""
    for seed in range(3):
        canvas = Canvas(seed=seed, lengths=((7, 12), (4, 8)), n_layers=4)
        same_runs("spa(interval=5,gen_interval=1)", dllm(5, 1, 0.25), canvas)
