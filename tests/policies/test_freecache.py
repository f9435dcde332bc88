from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcache import CachePolicy, Sampling, Unmasker
from dcache.policies.fast_dllm import FastDLLM
from dcache.policies.freecache import FreeCache
from dcache.policies.none import NoCache
from dcache.testing.runs import Canvas, Run
from dcache.testing.unmaskers import Remasking
from dcache.unmasking.confidence import LowConfidence, Threshold

ALL = Sampling(after_end="decode")

canvases = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2),
        "shift": st.sampled_from([0, 1]),
        "lengths": st.lists(st.tuples(st.integers(1, 7), st.sampled_from([4, 8, 12])), min_size=1, max_size=3),
        "block_length": st.sampled_from([None, 2, 4]),
    }
)
own_blocks = st.sampled_from([None, 1, 3, 4, 32])
delays = st.sampled_from([0, 1, 2])


def decoded(canvas: dict[str, Any], policy: CachePolicy, unmasker: Unmasker | None = None, **more: Any) -> Run:
    """Decode a drawn canvas."""
    sizes = canvas | {"lengths": tuple(canvas["lengths"])} | more.pop("on", {})
    return Run(lambda: policy, Canvas(**sizes), unmasker=unmasker or LowConfidence(sampling=ALL), **more).go()


def assert_same_commits(a: Run, b: Run) -> None:
    assert [a.commits(i) for i in range(a.state.batch)] == [b.commits(i) for i in range(b.state.batch)]


def test_rows_of_a_short_run() -> None:
    """3 prompt tokens, two blocks of 2, one token per step."""
    canvas = {"lengths": [(3, 4)], "block_length": 2}
    everything = [0, 1, 2, 3, 4, 5, 6]
    # step 2 is the first that starts with block 1 complete: its last pass, with the final tokens
    assert decoded(canvas, FreeCache(block_length=2)).rows() == [everything, [3, 4, 5, 6], [3, 4, 5, 6], [5, 6]]
    assert decoded(canvas, FreeCache(block_length=2, freeze_delay=0)).rows() == [
        everything,
        [3, 4, 5, 6],
        [5, 6],
        [5, 6],
    ]
    assert decoded(canvas, FreeCache(block_length=None)).rows() == [everything, [3, 4, 5, 6], [3, 4, 5, 6], [5, 6]]
    assert decoded(canvas, FreeCache()).rows() == [everything] + [[3, 4, 5, 6]] * 3
    unfrozen = decoded(canvas, FreeCache(block_length=2, freeze_prompt=False)).rows()
    assert unfrozen == [everything] * 3 + [[0, 1, 2, 5, 6]]
    assert decoded(canvas, FreeCache(block_length=2, refresh_every=3)).rows()[3] == everything


def test_rows_of_a_short_run_where_a_row_predicts_the_next_position() -> None:
    canvas = {"lengths": [(3, 4)], "block_length": 2, "shift": 1}
    rows = decoded(canvas, FreeCache(block_length=2)).rows()
    assert rows == [[0, 1, 2, 3, 4, 5, 6], [2, 3, 4, 5, 6], [2, 3, 4, 5, 6], [4, 5, 6]]


@given(canvas=canvases, own=own_blocks, delay=delays, threshold=st.sampled_from([0.2, 0.5, 0.9]))
def test_rows_are_those_from_the_first_unfrozen_block_on(
    canvas: dict[str, Any], own: int | None, delay: int, threshold: float
) -> None:
    """A block's final tokens are computed in as many passes as the delay says, and those behind it in all."""
    policy = FreeCache(block_length=own, freeze_delay=delay)
    run = decoded(canvas, policy, Threshold(sampling=ALL, threshold=threshold))
    for b, (prompt, gen) in enumerate(canvas["lengths"]):
        width = own or canvas["block_length"] or gen
        masked, starts = set(range(prompt, prompt + gen)), []
        for n, (rows, commits) in enumerate(zip(run.rows(b), run.commits(b), strict=True)):
            starts.append(prompt + (min(masked) - prompt) // width * width)
            begin = starts[n - delay] if n >= delay else prompt  # complete before that many passes
            assert rows == list(range(0 if n == 0 else begin - canvas["shift"], prompt + gen))
            masked -= set(commits)


@given(canvas=canvases)
def test_a_refresh_in_every_step_equals_no_cache(canvas: dict[str, Any]) -> None:
    assert_same_commits(decoded(canvas, FreeCache(refresh_every=1, block_length=2)), decoded(canvas, NoCache()))


@given(canvas=canvases)
def test_one_block_and_no_frozen_prompt_equal_no_cache(canvas: dict[str, Any]) -> None:
    run = decoded(canvas, FreeCache(freeze_prompt=False, block_length=12))
    assert_same_commits(run, decoded(canvas, NoCache()))


@given(canvas=canvases)
def test_in_one_block_it_is_fast_dllm(canvas: dict[str, Any]) -> None:
    """Its prefix mode there computes all rows once, and then all but the prompt."""
    canvas = canvas | {"block_length": None, "shift": 0}
    assert_same_commits(decoded(canvas, FreeCache(block_length=None)), decoded(canvas, FastDLLM(mode="prefix")))


def test_keys_frozen_at_once_are_those_of_a_mask() -> None:
    canvas = {"lengths": [(5, 12)], "block_length": 4}
    late, soon = (decoded(canvas, FreeCache(block_length=4, freeze_delay=n)) for n in (1, 0))
    confidence = [[float(s.confidence[s.commit][0]) for s in run.trace] for run in (late, soon)]
    assert confidence[0][:4] == pytest.approx(confidence[1][:4], abs=1e-6)
    assert confidence[0][4:] != pytest.approx(confidence[1][4:], abs=1e-3)


@given(canvas=canvases, own=own_blocks, delay=delays)
def test_rows_put_back_thaw_their_block(canvas: dict[str, Any], own: int | None, delay: int) -> None:
    run = decoded(canvas, FreeCache(block_length=own, freeze_delay=delay), Remasking(sampling=ALL))
    assert not run.state.masked.any()
    for b in range(run.state.batch):
        steps = list(run.steps(b))
        for step, following in pairwise(steps):
            assert not (step.remask[b] & ~following.rows[b]).any()


@given(canvas=canvases, own=own_blocks, delay=delays, threshold=st.sampled_from([0.2, 0.5, 0.9]))
def test_a_batch_decodes_each_sequence_as_if_it_were_alone(
    canvas: dict[str, Any], own: int | None, delay: int, threshold: float
) -> None:
    policy, unmasker = FreeCache(block_length=own, freeze_delay=delay), Threshold(sampling=ALL, threshold=threshold)
    together = decoded(canvas, policy, unmasker)
    for b in range(together.state.batch):
        alone = decoded(canvas, policy, unmasker, only=b)
        assert together.rows(b) == alone.rows()
        assert together.commits(b) == alone.commits()
