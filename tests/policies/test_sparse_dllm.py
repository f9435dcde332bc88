from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcache import CachePolicy, Sampling, State, UsageError
from dcache.decode import decode
from dcache.engine import Engine
from dcache.errors import PolicyError
from dcache.kernels.attention_probs import products
from dcache.plugins import make_policy, make_unmasker
from dcache.policies.fast_dllm import FastDLLM
from dcache.policies.sparse_dllm import SparseDLLM
from dcache.policy import Plan
from dcache.testing.models import random_model
from dcache.testing.recorder import Recorder
from dcache.testing.runs import Canvas, Refused, Run, same_decisions
from dcache.unmasking.confidence import LowConfidence

EXAMPLES = settings(max_examples=6)
TWO = "low-confidence(tokens_per_step=2)"

canvases = st.builds(
    Canvas,
    seed=st.integers(0, 2),
    shift=st.sampled_from([0, 1]),
    lengths=st.lists(st.tuples(st.integers(1, 7), st.sampled_from([8, 12])), min_size=1, max_size=3).map(tuple),
    block_length=st.sampled_from([None, 4]),
)
knobs = st.fixed_dictionaries(
    {"keep": st.sampled_from([0.0, 0.3, 0.5, 0.9]), "kernel": st.sampled_from([None, 1, 3, 5])}
)


def sparse(**given_knobs: Any) -> Any:
    return lambda: SparseDLLM(**given_knobs)


def assert_same(found: Run, expected: Run, told: str) -> None:
    for b in range(expected.state.batch):
        same_decisions(found, b, expected, b, told)


def kept_sets(run: Run, b: int) -> list[tuple[int, np.ndarray]]:
    """Number of the step, and (layers, slots) bool, of each step in which a sequence scored."""
    scored = [(n, step) for n, step in enumerate(run.steps(b)) if "kept" in step.reports]
    return [(n, step.reports["kept"][:, b]) for n, step in scored if step.reports["kept"][:, b].any()]


# -- exact configurations ---------------------------------------------------------------------------------------------


@given(canvas=canvases)
@EXAMPLES
def test_keeping_all_equals_a_dual_cache_with_two_full_passes(canvas: Canvas) -> None:
    expected = Run(lambda: FastDLLM(full_passes=2), canvas).go()
    assert_same(Run(sparse(keep=1), canvas).go(), expected, "the inner policy")
    assert_same(Run(sparse(keep=1, compact=True), canvas).go(), expected, "the inner policy")


@pytest.mark.parametrize("inner", ["elastic(gamma=0.95)", "dkv(interval=3)", "none"])
def test_keeping_all_equals_any_inner_policy(inner: str) -> None:
    canvas = Canvas(lengths=((5, 8), (3, 12)), block_length=4)
    assert_same(Run(sparse(keep=1, inner=inner), canvas).go(), Run(inner, canvas).go(), "the inner policy")


@given(knobs=knobs, compact=st.booleans())
@EXAMPLES
def test_blocks_of_two_passes_equal_no_cache(knobs: dict[str, Any], compact: bool) -> None:
    canvas = Canvas(lengths=((5, 8), (3, 12)), block_length=4, unmask=TWO)
    assert_same(Run(sparse(**knobs, compact=compact), canvas).go(), Run("none", canvas).go(), "no cache")


def test_one_layer_that_keeps_all_equals_no_cache() -> None:
    canvas = Canvas(lengths=((5, 8), (3, 12)), block_length=4, n_layers=1)
    assert_same(Run(sparse(keep=1), canvas).go(), Run("none", canvas).go(), "no cache")


@given(canvas=canvases, keep=st.sampled_from([0.3, 0.5]))
@EXAMPLES
def test_no_pooling_equals_a_kernel_of_one(canvas: Canvas, keep: float) -> None:
    found, expected = (Run(sparse(keep=keep, kernel=kernel), canvas).go() for kernel in (None, 1))
    assert_same(found, expected, "kernel 1")


def test_a_second_pass_of_the_step_that_scores_sees_everything_though_another_sequence_has_hidden_keys() -> None:
    lengths = ((34, 4), (7, 4), (13, 4), (1, 4), (10, 8), (38, 8))
    canvas = Canvas(seed=1, lengths=lengths, block_length=4, unmask="eb")
    policy = "sparse-dllm(inner=elastic,keep=0.4,kernel=none)"
    together = Run(policy, canvas).go()
    assert any(step.again is not None and (step.again & step.active[:, None])[4].any() for step in together.trace)
    same_decisions(together, 4, Run(policy, canvas, only=4).go(), 0, "the same sequence alone")


# -- what is kept -----------------------------------------------------------------------------------------------------


@given(canvas=canvases, knobs=knobs, delay=st.integers(0, 2))
@EXAMPLES
def test_each_layer_keeps_its_share_outside_the_block_once_per_block(
    canvas: Canvas, knobs: dict[str, Any], delay: int
) -> None:
    run = Run(sparse(**knobs, delay=delay), canvas).go()
    for b, (prompt, gen) in enumerate(canvas.lengths):
        size = canvas.block_length or gen
        count = int((prompt + gen - size) * knobs["keep"])
        found = kept_sets(run, b)
        assert [n for n, _ in found] == ([block * size + delay for block in range(gen // size)] if count else [])
        for n, kept in found:
            assert (kept.sum(1) == count).all()
            begin = prompt + n // size * size
            assert not kept[:, begin : begin + size].any()
            assert not kept[:, prompt + gen :].any()


@pytest.mark.parametrize("kernel", [1, 3])
def test_scores_are_pooled_mean_products_of_the_mean_query(kernel: int) -> None:
    """In which the two neighbours of the block are neighbours; computed anew from what the layer held."""
    canvas = Canvas(lengths=((5, 12),), block_length=4, seed=1)
    policy = SparseDLLM(keep=0.5, kernel=kernel)
    told: list[tuple[torch.Tensor, torch.Tensor, int]] = []

    def scoring(at: Any) -> torch.Tensor:
        found = SparseDLLM.scores(policy, at)
        q, k = at.q[0], at.stores["K"][0]  # (heads, n, head_dim), (kv_heads, slots + 1, head_dim)
        begin = int(at.flags["sparse-dllm block"][0].int().argmax())
        raw = torch.zeros(17)
        for head in range(4):
            raw += k[head // 2, :17] @ q[head, begin : begin + 4].mean(0) / 4
        raw = torch.cat([raw[:begin], raw[begin + 4 :]])
        pooled = [raw[max(i - kernel // 2, 0) : i + kernel // 2 + 1].max() for i in range(13)]
        told.append((found[0], torch.stack(pooled), begin))
        return found

    policy.scores = scoring  # type: ignore[method-assign]
    Run(lambda: policy, canvas).go()
    assert sorted({begin for *_, begin in told}) == [5, 9, 13]
    for found, expected, _ in told:
        torch.testing.assert_close(found, expected)


def test_equal_scores_keep_the_leftmost() -> None:
    policy = SparseDLLM(keep=0.5, kernel=None)
    policy.scores = lambda at: torch.zeros(at.sets["sparse-dllm candidates"].shape)  # type: ignore[method-assign]
    run = Run(lambda: policy, Canvas(lengths=((5, 8),), block_length=4)).go()
    assert [np.flatnonzero(kept[0]).tolist() for _, kept in kept_sets(run, 0)] == [[0, 1, 2, 3], [0, 1, 2, 3]]


@given(scale=st.sampled_from([0.125, 4.0]), shift=st.sampled_from([-8.0, 8.0]))
@EXAMPLES
def test_scaling_and_shifting_scores_changes_nothing(scale: float, shift: float) -> None:
    canvas, policy = Canvas(lengths=((5, 12),), block_length=4), SparseDLLM()
    policy.scores = lambda at: SparseDLLM.scores(policy, at) * scale + shift  # type: ignore[method-assign]
    for (_, found), (_, expected) in zip(
        kept_sets(Run(lambda: policy, canvas).go(), 0), kept_sets(Run(sparse(), canvas).go(), 0), strict=True
    ):
        assert (found == expected).all()


def test_keeping_none_attends_to_the_block_alone() -> None:
    """So the prompt, overwritten after the choice, is not missed."""
    runs = []
    for overwritten in (False, True):
        run = Run(sparse(keep=0), Canvas(lengths=((5, 4),)))
        original = run.policy.plan

        @torch.inference_mode()
        def plan(state: State, run: Run = run, original: Any = original, overwritten: bool = overwritten) -> Plan:
            for at in run.engine.layers if overwritten and state.block_step[0] == 2 else ():
                at.stores["K"][:, :, :5], at.stores["V"][:, :, :5] = 7, 7
            return original(state)

        run.policy.plan = plan  # type: ignore[method-assign]
        runs.append(run.go())
    assert_same(runs[1], runs[0], "an untouched prompt")


def test_repeated_kv_heads_keep_the_same() -> None:
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 9, 8)
    torch.testing.assert_close(products(q, k), products(q, k.repeat_interleave(2, dim=1)))


def test_hidden_keys_do_not_speak() -> None:
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 9, 8)
    k[:, :, 4] = float("nan")
    visible = torch.ones(2, 1, 9, dtype=torch.bool)
    visible[..., 4] = False
    assert (products(q, k, visible)[..., 4] == 0).all()


# -- freed keys -------------------------------------------------------------------------------------------------------


@given(canvas=canvases, knobs=knobs, inner=st.sampled_from(["fast-dllm(full_passes=2,mode=prefix)", "none", None]))
@EXAMPLES
def test_freeing_keys_changes_nothing(canvas: Canvas, knobs: dict[str, Any], inner: str | None) -> None:
    """With NaN in every key that is not held."""
    told = knobs if inner is None else {**knobs, "inner": inner}
    expected = Run(sparse(**told), canvas).go()
    assert_same(Run(sparse(**told, compact=True), canvas).go(), expected, "keys that are hidden")
    assert_same(Run(sparse(**told, compact=True), canvas, buckets=(4, 16)).go(), expected, "keys that are hidden")


def test_freed_keys_replay() -> None:
    canvas = Canvas(lengths=((5, 8), (3, 12), (1, 4)), block_length=4)
    recorder = Recorder()
    run = Run(sparse(compact=True), canvas, buckets=(8,), executor=recorder)
    expected = Run(sparse(), canvas).go()
    for _ in range(3):
        assert_same(run.again(), expected, "the run that hides keys")
    assert recorder.replayed > 0


def test_held_keys_take_a_share_and_the_workspace() -> None:
    model, lengths = random_model(n_layers=8), [40, 30]
    sizes = {}
    for compact in (False, True):
        policy, unmasker = SparseDLLM(keep=0.25, compact=compact), make_unmasker("low-confidence")
        engine = Engine(model, policy, unmasker)
        engine.begin(State(model.spec, [[1] * n for n in lengths], 24, 8))
        sizes[compact] = engine.store_bytes
    slot = 2 * 2 * 8 * 4  # sequences, kv heads, head_dim, bytes: K of one slot in one layer
    held = int((64 - 8) * 0.25) + 8
    mask = {"buffer sparse-dllm shown": 8 * 2 * 64}  # layers, sequences, slots
    assert sizes[False] == {"K": 8 * 65 * slot, "V": 8 * 65 * slot} | mask
    compact = {"K": (8 * held + 65) * slot, "V": (8 * held + 65) * slot, "positions": 8 * 2 * held * 8}
    assert sizes[True] == compact | mask


def test_another_capacity_makes_room_anew() -> None:
    model = random_model()
    engine = Engine(model, SparseDLLM(keep=0.25, compact=True), LowConfidence(sampling=Sampling(after_end="decode")))
    finals = []
    for block in (4, 8, 4):
        state = State(model.spec, [[1, 2, 3] * 4], 16, block)
        decode(engine, state)
        finals.append(state.tokens.tolist())
        assert engine.stores.capacity == int((28 - block) * 0.25) + block
    assert finals[0] == finals[2]


def test_a_host_mask_may_not_show_what_may_be_gone() -> None:
    class Careless(CachePolicy):
        def capacity(self, state: State) -> int | None:
            return 4

        def plan(self, state: State) -> Plan:
            return Plan(state.valid if state.step.max() == 0 else state.needed)

    with pytest.raises(PolicyError, match="sequence 0 attends to position 0, which this pass does not compute"):
        Run(Careless, Canvas()).go()


def test_a_second_pass_without_a_sequence_that_scores_chooses_nothing() -> None:
    sizes = {"seed": 1, "shift": 1, "lengths": ((22, 12), (1, 4)), "block_length": 4}
    canvas = Canvas(**sizes, unmask="threshold(threshold=0.3)", temperature=0.7)
    run, expected = Run(sparse(inner="elastic", keep=1), canvas).go(), Run("elastic", canvas).go()
    assert any(step.again is not None for step in run.trace)
    assert_same(run, expected, "the inner policy")


# -- what makes no sense ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "unmask", "reason"),
    [
        ("sparse-dllm(inner=sparse-dllm(keep=0.3))", TWO, "evict twice"),
        ("sparse-dllm(compact=true,inner=elastic)", TWO, "inner policy 'elastic' does not compute all rows anew"),
        ("sparse-dllm(compact=true,inner=dkv)", TWO, "inner policy 'dkv' does not compute all rows anew"),
        ("sparse-dllm(compact=true,delay=2,inner=fast-dllm(full_passes=2))", TWO, "passes 0 to 2 of each block"),
        ("sparse-dllm(compact=true)", "wino", "shadow rows"),
        ("sparse-dllm(compact=true)", "threshold(threshold=0.5,window=5)", "slides"),
    ],
)
def test_refused_with_a_reason(policy: str, unmask: str, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        Run(policy, Canvas(unmask=unmask))


def test_an_even_kernel_is_refused() -> None:
    with pytest.raises(UsageError, match="a window of 4 candidates has no centre; give an odd number, or none"):
        make_policy("sparse-dllm(kernel=4)")


def test_the_default_inner_policy_waits_for_the_delay() -> None:
    assert SparseDLLM(delay=3).inner.config == FastDLLM(full_passes=4).config
    assert SparseDLLM(delay=3, inner="dkv").inner.name == "dkv"
