"""Candidates and scores against a plain reference in float64, and what samples look like."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dcache import Sampling
from dcache.testing.models import random_model
from dcache.testing.steps import asked
from dcache.unmasking.sampling import Noise, draw, filtered, probability
from dcache.unmasking.scores import HELD, certainty_of, margin_of, score_of

SPEC = random_model(0).spec
EOS, MASK, VOCAB = SPEC.eos_id, SPEC.mask_id, SPEC.vocab_size

filters = st.tuples(
    st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    st.one_of(st.none(), st.floats(0.05, 1.0)),
    st.one_of(st.none(), st.integers(1, VOCAB + 3)),
)
seeds = st.integers(0, 10_000)


def random_logits(seed: int, w: int = 6, ties: bool = False) -> Tensor:
    logits = torch.randn(1, w, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    return logits.round() if ties else logits


def reference(row: np.ndarray, temperature: float, top_p: float | None, top_k: int | None) -> np.ndarray:
    """Dream's ``sample_tokens`` up to the softmax, token by token: probabilities (vocab,)."""
    row = row.astype(np.float64) / (temperature if temperature > 0 else 1)
    p = np.exp(row - row.max())
    p /= p.sum()
    keep = np.ones(len(row), dtype=bool)
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    if top_p is not None and top_p < 1:
        mass = 0.0
        for i in order:
            keep[i] = mass <= top_p
            mass += p[i]
    if top_k is not None:
        kept = sorted(row[keep], reverse=True)
        keep &= row >= kept[min(top_k, len(kept)) - 1]
    p = np.where(keep, p, 0)
    return p / p.sum()


@given(seed=seeds, how=filters, ties=st.booleans())
def test_the_filters_are_temperature_then_top_p_then_top_k(seed, how, ties):
    temperature, top_p, top_k = how
    logits = random_logits(seed, ties=ties)
    found = filtered(logits, Sampling(temperature=temperature, top_p=top_p, top_k=top_k)).softmax(-1)[0].numpy()
    for row, p in zip(logits[0].numpy(), found, strict=True):
        expected = reference(row, temperature, top_p, top_k)
        at_the_edge = top_p is not None and np.abs(np.cumsum(np.sort(expected)[::-1]) - top_p).min() < 1e-5
        if not at_the_edge:
            np.testing.assert_allclose(p, expected, atol=2e-6)


@given(seed=seeds, how=filters)
def test_scores_come_from_the_filtered_distribution(seed, how):
    temperature, top_p, top_k = how
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, confidence="filtered")
    logits = random_logits(seed)
    drawn = draw(logits, asked(SPEC), sampling, Noise(seed))
    p = filtered(logits, sampling).to(torch.float64).softmax(-1)
    confidence = p.gather(-1, drawn.tokens[..., None])[..., 0]
    torch.testing.assert_close(drawn.confidence.to(torch.float64), confidence, atol=1e-6, rtol=0)
    two = p.sort(descending=True).values
    torch.testing.assert_close(margin_of(drawn.logits).double(), two[..., 0] - two[..., 1], atol=1e-6, rtol=0)
    torch.testing.assert_close(certainty_of(drawn.logits).double(), (p * (p + 1e-10).log()).sum(-1), atol=1e-5, rtol=0)


@given(seed=seeds, temperature=st.sampled_from([0.0, 0.7]))
def test_plain_scores_know_neither_temperature_nor_filters(seed, temperature):
    logits = random_logits(seed)
    drawn = draw(logits, asked(SPEC), Sampling(temperature=temperature, top_p=0.4, top_k=3, seed=seed), Noise(seed))
    p = logits.softmax(-1)
    torch.testing.assert_close(drawn.confidence, p.gather(-1, drawn.tokens[..., None])[..., 0])
    assert torch.equal(margin_of(drawn.logits), margin_of(logits))


@given(seed=seeds, how=filters, rule=st.sampled_from(["plain", "filtered"]), loud=st.booleans())
def test_the_mask_is_never_a_candidate_and_the_filters_bound_what_is(seed, how, rule, loud):
    temperature, top_p, top_k = how
    logits = random_logits(seed)
    logits[..., MASK] = 50.0 if loud else 0.0  # 50: the filters leave nothing but the mask
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, confidence=rule, seed=seed)
    drawn = draw(logits, asked(SPEC), sampling, Noise(seed))
    others = logits.clone()
    others[..., MASK] = float("-inf")
    best = others.argmax(-1)
    allowed = (filtered(logits, sampling) > float("-inf")).gather(-1, drawn.tokens[..., None])[..., 0]
    assert (drawn.tokens != MASK).all()
    assert drawn.confidence.isfinite().all()
    assert (allowed | (drawn.tokens == best)).all()
    if temperature == 0:
        assert torch.equal(drawn.tokens, best)


@given(seed=seeds, how=filters, rule=st.sampled_from(["plain", "filtered"]), end=st.booleans())
def test_forbidden_tokens_are_as_if_the_vocabulary_had_none_of_them(seed, how, rule, end):
    temperature, top_p, top_k = how
    logits, never, step = random_logits(seed), (2, 5), asked(replace(SPEC, forbidden=(2, 5)))
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, confidence=rule, seed=seed, forbid_eos=end)
    without = logits.clone()
    without[..., [*never, *[EOS] * end]] = float("-inf")
    found = draw(logits, step, sampling, Noise(seed))
    expected = draw(without, asked(SPEC), sampling.model_copy(update={"forbid_eos": False}), Noise(seed))
    assert not torch.isin(found.tokens, torch.tensor(never)).any()
    for name in ("tokens", "logits", "confidence"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    given = probability(logits, torch.full_like(found.tokens, never[0]), step, sampling)
    assert (given == 0).all()


@pytest.mark.parametrize(
    "how", [{"temperature": 1.3}, {"temperature": 0.8, "top_p": 0.7}, {"temperature": 2, "top_k": 4}]
)
@pytest.mark.parametrize("rule", ["plain", "filtered"])
def test_samples_follow_the_filtered_distribution(how, rule):
    logits = random_logits(3, w=1)
    logits[..., MASK] = float("-inf")
    many = logits.expand(1, 20_000, VOCAB)
    drawn = draw(many, asked(SPEC, w=20_000), Sampling(confidence=rule, **how), Noise(5))
    share = torch.bincount(drawn.tokens[0], minlength=VOCAB) / drawn.tokens.numel()
    torch.testing.assert_close(share, filtered(logits, Sampling(**how)).softmax(-1)[0, 0], atol=0.015, rtol=0)


@pytest.mark.parametrize("rule", ["plain", "filtered"])
@pytest.mark.parametrize("score", ["confidence", "margin", "entropy"])
def test_an_end_of_text_that_comes_last_scores_below_every_other_row(rule, score):
    logits = random_logits(1)
    logits[0, :, MASK] = -40.0
    logits[0, 2, EOS] = 40.0
    sampling = Sampling(eos_last="on", confidence=rule, top_k=1)  # top-k leaves row 2 nothing else
    drawn = draw(logits, asked(SPEC), sampling, Noise(0))
    found = score_of(score, drawn, asked(SPEC), Noise(0))
    assert drawn.tokens[0, 2] == EOS
    assert not found.isnan().any()
    assert found[0, 2] == (0 if score == "confidence" else HELD)
    assert (found[0, 2] < torch.cat([found[0, :2], found[0, 3:]])).all()


@pytest.mark.parametrize("rule", ["plain", "filtered"])
def test_the_probability_of_a_given_token_is_the_confidence_if_it_is_the_candidate(rule):
    logits, sampling = random_logits(4), Sampling(confidence=rule, top_p=0.8)
    drawn = draw(logits, asked(SPEC), sampling, Noise(0))
    assert torch.equal(probability(logits, drawn.tokens, asked(SPEC), sampling), drawn.confidence)


def test_the_order_of_a_block_depends_on_its_start_and_not_on_the_batch():
    noise = Noise(3)
    two = noise.order(torch.tensor([[4], [9]]), torch.tensor([[2], [2]]), 16)
    assert torch.equal(two[1:], noise.order(torch.tensor([[9]]), torch.tensor([[2]]), 16))
    assert not torch.equal(two[1:], noise.order(torch.tensor([[9]]), torch.tensor([[6]]), 16))
    assert not torch.equal(two[0], two[1])


def test_leads_near_one_keep_their_order_at_a_low_temperature():
    logits = torch.zeros(1, 8, 32)
    logits[..., 5] = 20.0
    logits[..., 6] = 20.0 - torch.linspace(1.1, 1.3, 8)  # 11 to 13 nats at temperature 0.1
    tempered = filtered(logits, Sampling(temperature=0.1, confidence="filtered"))
    two = tempered.to(torch.float64).softmax(-1).sort(descending=True).values
    lead = margin_of(tempered)
    torch.testing.assert_close(lead.to(torch.float64), two[..., 0] - two[..., 1], atol=2e-7, rtol=0)
    assert (lead.diff() > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("score", ["confidence", "margin", "entropy"])
def test_without_temperature_and_filters_both_rules_judge_alike(score, dtype):
    logits = random_logits(6).to(dtype)
    plain, filtering = (
        draw(logits, asked(SPEC), Sampling(confidence=rule), Noise(0)) for rule in ("plain", "filtered")
    )
    assert torch.equal(plain.tokens, filtering.tokens)
    by_hand = {
        "confidence": plain.logits.float().softmax(-1).gather(-1, plain.tokens[..., None])[..., 0],
        "margin": margin_of(filtered(logits, Sampling())),
        "entropy": certainty_of(filtered(logits, Sampling())),
    }
    for drawn in (plain, filtering):
        torch.testing.assert_close(score_of(score, drawn, asked(SPEC), Noise(0)), by_hand[score])
