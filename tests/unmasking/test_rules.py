"""Rules against plain Python, on scores made up for the purpose; and their equivalences on small models."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dcache import Sampling
from dcache.testing.models import random_model
from dcache.testing.steps import commits, counts, uncached
from dcache.unmasking.confidence import CertaintyPrior, Entropy, LowConfidence, Margin, Threshold
from dcache.unmasking.order import LeftToRight
from dcache.unmasking.parallel import EntropyBounded, Factor
from dcache.unmasking.selection import best, between, prefix_by_entropy, prefix_by_factor

ROOT = Path(__file__).resolve().parents[2]
MODEL = random_model(2)
SPEC = MODEL.spec
PROMPT = [[1, 2, 3, 4]]

scores = st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0]), min_size=1, max_size=9)


def ranking(score: list[float], eligible: list[bool]) -> list[int]:
    return sorted((i for i, e in enumerate(eligible) if e), key=lambda i: (-score[i], i))


def marked(mask: Tensor) -> set[int]:
    return set(mask[0].nonzero()[:, 0].tolist())


def as_row(values: list) -> Tensor:
    return torch.tensor([values])


@st.composite
def rows(draw):
    score = draw(scores)
    eligible = draw(st.lists(st.booleans(), min_size=len(score), max_size=len(score)))
    return score, eligible


@given(given_=rows(), n=st.integers(0, 10))
def test_best_takes_the_highest_scores_and_the_leftmost_of_equals(given_, n):
    score, eligible = given_
    assert marked(best(as_row(score), as_row(eligible), n)) == set(ranking(score, eligible)[:n])


@given(given_=rows(), least=st.integers(1, 4), more=st.one_of(st.none(), st.integers(0, 4)), bound=st.floats(0, 1))
def test_a_rule_is_kept_between_its_bounds(given_, least, more, bound):
    score, eligible = given_
    most = None if more is None else least + more
    order = ranking(score, eligible)
    sure = [i for i in order if as_row(score)[0, i] >= bound]
    expected = order[: max(len(sure), min(least, len(order)))][:most]
    chosen = as_row(score) >= bound
    assert marked(between(as_row(score), as_row(eligible), chosen, least, most)) == set(expected)


def by_factor(score: list[float], eligible: list[bool], factor: float, variant: str) -> set[int]:
    """The published loops, in words: `decoding.md`, sections 4 and 5.3."""
    order = ranking(score, eligible)
    n = len(order)
    c = [float(torch.tensor(score[i])) for i in order]
    if variant == "d2":
        failing = next((k for k in range(1, n + 1) if not (k + 1) * (1 - c[k - 1]) < factor), n)
        return set(order[: failing - 1])
    failing = next((k for k in range(2, n + 1) if c[k - 1] < 1 - factor / (k + 1)), n + 1)
    if variant == "fast-dllm" and failing >= n:
        return set(order)
    return set(order[: failing - 1])


@given(given_=rows(), factor=st.floats(0, 3), variant=st.sampled_from(["repaired", "fast-dllm", "d2"]))
def test_the_factor_rule_and_its_two_published_quirks(given_, factor, variant):
    score, eligible = given_
    order = ranking(score, eligible)
    close = [abs((k + 2) * (1 - score[i]) - factor) < 1e-4 for k, i in enumerate(order)]
    if not any(close):
        found = marked(prefix_by_factor(as_row(score), as_row(eligible), factor, variant))
        assert found == by_factor(score, eligible, factor, variant)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_recorded_selections_of_the_factor_rule_are_reproduced(dtype):
    data = json.loads((ROOT / "tests/golden/fast_dllm/factor_selection.json").read_text())
    for case in data["cases"]:
        score = torch.tensor([case["confidence"]], dtype=dtype)
        found = prefix_by_factor(score, torch.ones_like(score, dtype=torch.bool), case["factor"], "fast-dllm")
        assert marked(found) == set(case["selected"])
    assert len(data["cases"]) > 20


@given(given_=rows(), gamma=st.floats(0, 4), published=st.booleans(), seed=st.integers(0, 99))
def test_the_entropy_bound_leaves_out_the_largest_or_as_published_the_latest(given_, gamma, published, seed):
    score, eligible = given_
    entropy = np.random.default_rng(seed).uniform(0, 1.5, len(score)).astype(np.float32)
    expected = set()
    order = ranking(score, eligible)
    for k in range(1, len(order) + 1):
        first = [float(entropy[i]) for i in order[:k]]
        if sum(first) - (first[-1] if published else max(first)) > gamma + 1e-6:
            break
        expected.add(order[k - 1])
    found = prefix_by_entropy(as_row(score), as_row(eligible), torch.from_numpy(entropy)[None], gamma, published)
    assert marked(found) == expected or abs(gamma - round(gamma, 3)) < 1e-6


@pytest.mark.parametrize(
    ("unmasker", "same"),
    [
        (Threshold(threshold=1.5), LowConfidence()),
        (Factor(factor=0.0), LowConfidence()),
        (Factor(factor=0.0, variant="d2"), LowConfidence()),
        (EntropyBounded(gamma=0.0), LowConfidence()),
        (EntropyBounded(gamma=0.0, largest="published"), LowConfidence()),
        (CertaintyPrior(sigma=None, at_least=2), LowConfidence(tokens_per_step=2)),
        (CertaintyPrior(sigma=1e5, at_least=2), LowConfidence(tokens_per_step=2)),
        (Threshold(threshold=-1.0), LowConfidence(steps=3)),
        (Factor(factor=1e9), LowConfidence(steps=3)),
        (EntropyBounded(gamma=1e9), LowConfidence(steps=3)),
        (LeftToRight(threshold=0.0), LowConfidence(steps=3)),
        (Threshold(threshold=1.5, score="margin"), Margin()),
        (Threshold(threshold=1.5, score="entropy"), Entropy()),
        (Threshold(threshold=-1.0, at_most=2), LowConfidence(tokens_per_step=2)),
    ],
)
def test_settings_that_must_agree_do(unmasker, same):
    found, expected = (uncached(MODEL, u, PROMPT, 12, 4)[0] for u in (unmasker, same))
    assert [commits(found)] == [commits(expected)]


def test_the_d2_variant_leaves_one_row_of_a_block_out():
    trace, _ = uncached(MODEL, Factor(factor=1e9, variant="d2"), PROMPT, 12, 4)
    assert counts(trace) == [3, 1] * 3


def test_a_narrow_density_decodes_from_left_to_right():
    trace, _ = uncached(MODEL, CertaintyPrior(sigma=0.05), PROMPT, 12)
    assert [list(c) for c in commits(trace)] == [[p] for p in range(4, 16)]


@given(threshold=st.floats(0, 1), at_least=st.integers(1, 3), at_most=st.one_of(st.none(), st.integers(3, 5)))
def test_left_to_right_commits_the_longest_prefix_that_is_sure(threshold, at_least, at_most):
    unmasker = LeftToRight(threshold=threshold, at_least=at_least, at_most=at_most)
    trace, state = uncached(MODEL, unmasker, PROMPT, 12, 6)
    at, ends = 4, {10, 16}
    for step in trace:
        if state.spec.eos_id in state.tokens[0, at:]:
            break
        place = at
        end = min(e for e in ends if e > at)
        while place < end and step.confidence[0, place] >= np.float32(threshold):
            place += 1
        stop = min(max(place, at + at_least), end, at + (at_most or 99))
        assert np.flatnonzero(step.commit[0]).tolist() == list(range(at, stop))
        at = stop


def test_left_to_right_without_a_threshold_is_one_row_at_a_time():
    trace, _ = uncached(MODEL, LeftToRight(sampling=Sampling(after_end="decode")), PROMPT, 12, 4)
    assert [list(c) for c in commits(trace)] == [[p] for p in range(4, 16)]


@given(threshold=st.floats(0, 1.2), steps=st.sampled_from([3, 4, 6, 12, 15]))
def test_a_budget_carries_over_what_was_refused(threshold, steps):
    """Fast-dLLM's loop on Dream without a cache, written out: the quota, its carry, and the appended steps."""
    keep = Sampling(after_end="decode")
    trace, _ = uncached(MODEL, Threshold(threshold=threshold, budget=steps, sampling=keep), PROMPT, 12)
    if 12 % steps:
        return
    carry = 0
    for i, step in enumerate(trace):
        judged = (12 // steps if i < steps else 0) + carry
        masked = np.isfinite(step.confidence[0])
        order = sorted(np.flatnonzero(masked), key=lambda p: (-step.confidence[0, p], p))[:judged]
        taken = [p for k, p in enumerate(order) if k == 0 or step.confidence[0, p] >= np.float32(threshold)]
        assert np.flatnonzero(step.commit[0]).tolist() == sorted(taken)
        carry = judged - len(taken)
    assert carry == 0


def test_a_density_times_an_entropy_is_refused():
    with pytest.raises(ValueError, match="ranks the least known rows first"):
        Threshold(score="entropy", sigma=10.0)
    with pytest.raises(ValueError, match="at_most=1 is below at_least=2"):
        Factor(at_least=2, at_most=1)
