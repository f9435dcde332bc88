from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcache import Sampling, Seen, State, Unmasker, Update, UsageError
from dcache.decode import decode
from dcache.engine import Engine
from dcache.errors import UnmaskerError
from dcache.policies.none import NoCache
from dcache.testing.models import random_model
from dcache.trace import Step
from dcache.unmasking.base import Asked, Noise, candidates
from dcache.unmasking.confidence import LowConfidence, Random, Threshold

MODEL = random_model(2)
SPEC = MODEL.spec


def go(unmasker: Unmasker, gen: int = 12, block: int | None = None, prompt: int = 4) -> tuple[list[Step], State]:
    state = State(SPEC, [list(range(1, prompt + 1))], gen, block)
    return decode(Engine(MODEL, NoCache(), unmasker), state), state


def asked(w: int = 2) -> Asked:
    one = torch.ones(1, w, dtype=torch.bool)
    zero = torch.zeros(1, 1, dtype=torch.int64)
    ids = (SPEC.mask_id, SPEC.eos_id, SPEC.end_ids)
    return Asked(torch.arange(w)[None], one, one, zero, zero, *ids, lanes=zero[0], flags={})


@given(n=st.integers(1, 12), s=st.integers(1, 15), blocks=st.sampled_from([1, 2, 3]))
def test_the_schedule_splits_a_block_evenly_with_the_remainder_first(n: int, s: int, blocks: int) -> None:
    trace, _ = go(LowConfidence(steps=s * blocks), gen=n * blocks, block=n)
    share, rest = divmod(n, s)
    expected = [share + (i < rest) for i in range(s)]
    last = max(i for i, k in enumerate(expected) if k)  # steps behind the last commit are not made: nothing is masked
    assert [int(t.commit.sum()) for t in trace] == expected[: last + 1] * blocks


def test_a_window_narrower_than_the_quota_takes_more_steps_and_ends() -> None:
    trace, state = go(LowConfidence(steps=3, window=2))
    assert [int(t.commit.sum()) for t in trace] == [2, 2, 2, 2, 2, 2]
    assert not state.masked.any()


def test_a_row_put_back_after_the_last_scheduled_step_is_decoded_again() -> None:
    class Late(LowConfidence):
        def settle(self, state: State, seen: Seen) -> Update:
            update = super().settle(state, seen)
            if state.step[0] != 3:
                return update
            back = np.zeros_like(update.commit)
            back[0, 4] = True
            return replace(update, commit=update.commit & ~back, remask=back)

    trace, state = go(Late(steps=8), gen=4)
    assert not state.masked.any()
    assert len(trace) == 5


def test_threshold_commits_at_least_as_many_as_asked() -> None:
    trace, _ = go(Threshold(threshold=1.5, at_least=5))
    assert [int(t.commit.sum()) for t in trace] == [5, 5, 2]


def test_steps_must_be_divisible_by_the_number_of_blocks() -> None:
    with pytest.raises(UsageError, match="steps 5 is not divisible by the 3 blocks"):
        go(LowConfidence(steps=5), block=4)


def test_blocks_are_finished_from_left_to_right() -> None:
    trace, _ = go(Random(), block=4)
    order = [int(p) for t in trace for p in np.flatnonzero(t.commit[0])]
    assert [sorted(order[i : i + 4]) for i in range(0, 12, 4)] == [[4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]


def test_a_window_holds_the_leftmost_masked_rows() -> None:
    trace, _ = go(Random(window=3))
    masked = set(range(4, 16))
    for step in trace:
        committed = set(np.flatnonzero(step.commit[0]).tolist())
        assert committed <= set(sorted(masked)[:3])
        masked -= committed


@given(threshold=st.floats(-0.5, 1.5), window=st.sampled_from([None, 1, 4]))
def test_threshold_commits_what_reaches_it_and_never_stalls(threshold: float, window: int | None) -> None:
    trace, state = go(Threshold(threshold=threshold, window=window))
    assert not state.masked.any()
    for step in trace:
        sure = step.confidence[step.commit]
        assert len(sure) == 1 or (sure >= np.float32(threshold)).all()


def test_threshold_zero_commits_the_whole_block_at_once() -> None:
    assert [int(t.commit.sum()) for t in go(Threshold(threshold=0.0), block=4)[0]] == [4, 4, 4]


def test_threshold_above_one_is_one_token_per_step() -> None:
    thresholded, _ = go(Threshold(threshold=1.5))
    scheduled, _ = go(LowConfidence())
    assert [t.commit.tolist() for t in thresholded] == [t.commit.tolist() for t in scheduled]


def test_low_confidence_commits_the_most_confident_row() -> None:
    for step in go(LowConfidence())[0]:
        assert step.confidence[step.commit].max() == step.confidence[np.isfinite(step.confidence)].max()


def test_random_order_depends_on_the_seed_alone() -> None:
    orders = [[t.commit.tolist() for t in go(Random(sampling=Sampling(seed=s)))[0]] for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_sampled_frequencies_follow_the_tempered_softmax() -> None:
    n, temperature = 40_000, 0.7
    logits = torch.full((SPEC.vocab_size,), float("-inf"))
    logits[:4] = torch.tensor([1.0, 0.0, -1.0, 2.0])
    sampling = Sampling(temperature=temperature, seed=1)
    tokens, confidence = candidates(logits.expand(1, n, -1), asked(n), sampling, Noise(1))
    share = torch.bincount(tokens[0], minlength=SPEC.vocab_size) / n
    torch.testing.assert_close(share, (logits / temperature).softmax(-1), atol=0.01, rtol=0)
    torch.testing.assert_close(confidence[0], logits.softmax(-1)[tokens[0]])  # un-noised and un-tempered


def test_the_mask_is_never_a_candidate() -> None:
    logits = torch.zeros(1, 2, SPEC.vocab_size)
    logits[..., SPEC.mask_id] = 9.0
    tokens, confidence = candidates(logits, asked(), Sampling(), Noise(0))
    assert (tokens != SPEC.mask_id).all()
    assert (confidence < 0.01).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_forbidden_end_of_text_is_never_generated(temperature: float) -> None:
    for seed in range(4):
        sampling = Sampling(forbid_eos=True, temperature=temperature, seed=seed)
        assert SPEC.eos_id not in go(LowConfidence(sampling=sampling), gen=24)[1].tokens


def test_end_of_text_can_be_committed_last() -> None:
    logits = torch.zeros(1, 2, SPEC.vocab_size)
    logits[0, 0, SPEC.eos_id] = 9.0
    logits[0, 1, 3] = 0.5
    tokens, confidence = candidates(logits, asked(), Sampling(eos_last="on"), Noise(0))
    assert tokens.tolist() == [[SPEC.eos_id, 3]]
    assert confidence[0, 0] == 0.0 < confidence[0, 1]


class Scripted(Threshold):
    """Commits given tokens in a given order, one per step, so that ends of text come where a test wants them."""

    def __init__(self, script: list[tuple[int, int]], after_end: str, fill_every: int = 1):
        super().__init__(sampling=Sampling(after_end=after_end, fill_every=fill_every))
        self.script = script

    def settle(self, state: State, seen: object) -> object:
        place, token = self.script[int(state.step[0])]
        tokens, taken = np.full_like(state.tokens, -1), np.zeros_like(state.valid)
        tokens[0, place], taken[0, place] = token, True
        return super().settle(state, replace(seen, tokens=tokens, taken=taken))  # type: ignore[arg-type, type-var]


@pytest.mark.parametrize(
    ("after_end", "decoded"), [("decode", [4, 5, 6, 7, 8]), ("drop", [4, 5, 7]), ("drop-once", [4, 5, 6, 7])]
)
def test_rows_behind_an_end_of_text_are_decoded_or_dropped_as_asked(after_end: str, decoded: list[int]) -> None:
    """The first end stands at 7; a second, earlier one at 5 drops row 6 only where every end of text drops."""
    script = [(7, SPEC.eos_id), (5, SPEC.eos_id), (4, 1), (6, 2), (8, 3)]
    _, state = go(Scripted(script, after_end), gen=5)
    assert np.flatnonzero(state.tokens[0] != SPEC.mask_id)[4:].tolist() == decoded


def test_all_behind_the_first_end_of_text_is_overwritten_every_few_steps() -> None:
    """Ends stand at 8, then at 5 too; rows decoded behind them keep their tokens until it is due."""
    eos = SPEC.eos_id
    script = [(7, 1), (8, eos), (5, eos), (6, 2), (4, 3)]
    trace, state = go(Scripted(script, "fill", 2), gen=6)
    written = [{int(p): int(s.tokens[0, p]) for p in np.flatnonzero(s.commit[0])} for s in trace]
    assert written == [{7: 1}, {8: eos, 9: eos}, {5: eos}, {6: eos, 7: eos}, {4: 3}]
    assert state.tokens[0, 4:].tolist() == [3, eos, eos, eos, eos, eos]
    assert state.known.all()


def test_the_step_that_completes_a_text_still_overwrites_what_is_behind_its_end() -> None:
    eos = SPEC.eos_id
    _, state = go(Scripted([(5, 1), (6, 2), (4, eos)], "fill", 3), gen=3)
    assert state.tokens[0, 4:].tolist() == [eos, eos, eos]
    _, state = go(Scripted([(5, 1), (6, 2), (4, eos)], "fill", 4), gen=3)
    assert state.tokens[0, 4:].tolist() == [eos, 1, 2]


def test_an_interval_of_overwriting_needs_overwriting() -> None:
    with pytest.raises(ValueError, match="fill_every=4 belongs to after_end=fill"):
        Sampling(fill_every=4)


@pytest.mark.parametrize("place", [0, 4])
def test_only_generated_rows_that_stay_may_be_overwritten(place: int) -> None:
    class Overwrites(LowConfidence):
        def settle(self, state: State, seen: Seen) -> Update:
            update, fill = super().settle(state, seen), np.zeros_like(state.valid)
            fill[0, place] = True
            return replace(update, fill=fill, remask=fill & ~state.prompt)

    with pytest.raises(UnmaskerError, match=f"position {place} is overwritten with end-of-text, but it is"):
        go(Overwrites(), gen=3)
