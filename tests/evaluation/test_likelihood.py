"""The Monte-Carlo likelihood against the expectation that it estimates, written out."""

from itertools import product
from math import comb

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcache import Model, UsageError
from dcache.evaluation.likelihood import Likelihood, every_mask, some_masks
from dcache.testing.models import random_model
from dcache.unmasking.base import Sampling

CONTEXT, ANSWER = [3, 1, 4, 1, 5], [9, 2, 6, 5]
each_shift = pytest.mark.parametrize("shift", [0, 1])


def model_of(shift=0, seed=0):
    transformer = random_model(seed, vocab_size=24, shift=shift, n_layers=2)
    return Model("random", transformer.spec, transformer)


@torch.no_grad()
def log_probs(model, context, answer, hidden, guidance=0.0):
    """Log-probabilities of the hidden tokens, one forward over everything and nothing clever."""

    def logits(prompt):
        shown = [model.spec.mask_id if h else t for h, t in zip(hidden, answer, strict=True)]
        return model.transformer(torch.tensor([[*prompt, *shown]]))[0]

    found = logits(context)
    if guidance:
        free = logits([model.spec.mask_id] * len(context))
        found = free + (1 + guidance) * (found - free)
    total = 0.0
    for i, token in enumerate(answer):
        if hidden[i]:
            row = max(len(context) + i - model.spec.shift, 0)
            total += float(found[row].log_softmax(-1)[token])
    return total


def expectation(model, context, answer, guidance=0.0):
    """E over l from 1 to n, then over sets of l tokens, of n / l times the log-probabilities of the set."""
    n = len(answer)
    total = 0.0
    for hidden in product([False, True], repeat=n):
        if (size := sum(hidden)) > 0:
            chance = 1 / n / comb(n, size)
            total += chance * n / size * log_probs(model, context, answer, hidden, guidance)
    return total


@each_shift
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_short_answer_gets_the_expectation_itself(shift, n):
    model = model_of(shift)
    found = Likelihood(model, count=2**n - 1, batch_size=3).of(CONTEXT, ANSWER[:n])
    assert found == pytest.approx(expectation(model, CONTEXT, ANSWER[:n]), abs=1e-4)


@each_shift
def test_one_token_is_the_models_own_prediction(shift):
    model = model_of(shift)
    likelihood = Likelihood(model, count=128)
    assert likelihood.of(CONTEXT, [7]) == pytest.approx(log_probs(model, CONTEXT, [7], [True]), abs=1e-5)
    assert likelihood.calls == 1


def test_guidance_changes_the_distribution_as_it_does_in_decoding():
    model = model_of()
    found = Likelihood(model, count=7, sampling=Sampling(guidance=0.5)).of(CONTEXT, ANSWER[:3])
    assert found == pytest.approx(expectation(model, CONTEXT, ANSWER[:3], guidance=0.5), abs=1e-4)
    assert abs(found - expectation(model, CONTEXT, ANSWER[:3])) > 0.01


def test_the_estimate_is_unbiased():
    model, exact = model_of(), expectation(model_of(), CONTEXT, ANSWER)
    draws = [Likelihood(model, 3, 3, Sampling(seed=seed)).of(CONTEXT, ANSWER) for seed in range(300)]
    error = np.std(draws) / len(draws) ** 0.5
    assert 0.01 < error < 0.5  # it does vary, and the test can see a bias
    assert abs(np.mean(draws) - exact) < 4 * error


@given(n=st.integers(2, 5), count=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_masks_are_drawn_with_the_chances_of_the_expectation(n, count, seed):
    """For any number per set of masked tokens, the weighted mean is right on average."""
    values = np.random.default_rng(seed).normal(size=2**n)
    power = 2 ** np.arange(n)
    every, chances = every_mask(n)
    exact = float((values[every @ power] * chances).sum())
    rng = np.random.default_rng(seed + 1)
    draws = []
    for _ in range(400):
        masks, weights = some_masks(n, count, rng)
        draws.append(float((values[masks @ power] * weights).sum()))
    assert abs(np.mean(draws) - exact) < 5.5 * np.std(draws) / len(draws) ** 0.5 + 1e-9


@given(n=st.integers(1, 60), count=st.integers(1, 200), seed=st.integers(0, 2**32))
def test_every_draw_masks_some_token_and_counts_each_token_once_in_all(n, count, seed):
    masks, weights = some_masks(n, count, np.random.default_rng(seed))
    assert masks.shape == (count, n)
    assert masks.any(1).all()
    assert float((masks.sum(1) * weights).sum()) == pytest.approx(n)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_all_ways_to_mask_are_different_and_count_each_token_once_in_all(n):
    masks, weights = every_mask(n)
    assert len(np.unique(masks, axis=0)) == 2**n - 1
    assert masks.any(1).all()
    assert (masks * weights[:, None]).sum(0) == pytest.approx(np.ones(n))


def test_the_sizes_of_a_draw_are_spread_evenly():
    masks, _ = some_masks(10, 40, np.random.default_rng(0))
    assert np.bincount(masks.sum(1), minlength=11).tolist() == [0] + [4] * 10


def test_a_number_depends_on_the_seed_and_on_nothing_else():
    model, many = model_of(), list(range(12))
    first = Likelihood(model, 8, 1, Sampling(seed=1)).of(CONTEXT, many)
    other = Likelihood(model, 8, 5, Sampling(seed=1))
    other.of(ANSWER, many)
    assert other.of(CONTEXT, many) == pytest.approx(first, abs=1e-4)
    assert Likelihood(model, 8, 1, Sampling(seed=2)).of(CONTEXT, many) != pytest.approx(first, abs=1e-2)


def test_choices_of_one_length_are_masked_alike():
    likelihood = Likelihood(model_of(), 8)
    assert (likelihood.masks(CONTEXT, 12)[0] == likelihood.masks(CONTEXT, 12)[0]).all()
    assert (likelihood.masks(CONTEXT, 12)[0] != likelihood.masks(ANSWER, 12)[0]).any()


def test_what_was_scored_is_kept():
    likelihood = Likelihood(model_of(), 8)
    first = likelihood.of(CONTEXT, ANSWER)
    calls = likelihood.calls
    assert (likelihood.of(CONTEXT, ANSWER), likelihood.calls) == (first, calls)
    assert likelihood.of(CONTEXT, []) == 0


@torch.no_grad()
def greedy(model, context, n):
    """The surest token first, one forward each."""
    spec = model.spec
    tokens = [*context, *[spec.mask_id] * n]
    for _ in range(n):
        logits = model.transformer(torch.tensor([tokens]))[0]
        best = None
        for at in range(len(context), len(tokens)):
            if tokens[at] == spec.mask_id:
                shares = logits[max(at - spec.shift, 0)].softmax(-1)
                shares[spec.mask_id] = -1
                if best is None or shares.max() > best[0]:
                    best = (shares.max(), at, int(shares.argmax()))
        tokens[best[1]] = best[2]
    return tokens[len(context) :]


@each_shift
def test_the_greedy_answer_is_known_from_any_other(shift):
    model = model_of(shift)
    answer = greedy(model, CONTEXT, 5)
    likelihood = Likelihood(model, 8)
    assert likelihood.is_greedy(CONTEXT, answer)
    assert likelihood.is_greedy(CONTEXT, [])
    for at in range(5):
        assert not likelihood.is_greedy(CONTEXT, [(t + (i == at)) % 20 for i, t in enumerate(answer)])


def test_an_answer_that_does_not_fit_is_refused_with_the_numbers():
    with pytest.raises(UsageError, match=r"prompt and answer have 130 tokens, but the model was built for 128"):
        Likelihood(model_of(), 8).of([1] * 100, [2] * 30)
