"""Classifier-free guidance: two sequences per text, one of them with a masked prompt, and the same commits in both."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dcache
from dcache.decode import decode
from dcache.engine import Engine
from dcache.errors import UnmaskerError, UsageError
from dcache.plugins import make_policy, make_unmasker
from dcache.state import State
from dcache.testing.models import random_model
from dcache.unmasking.base import Ask, Sampling
from dcache.unmasking.confidence import LowConfidence

MODEL = random_model(2)
SPEC = MODEL.spec
POLICIES = ["none", "elastic(gamma=0.97)", "dkv(interval=3)", "dkv(variant=pd)", "fast-dllm", "d2(current_k=3)"]


def run(policy: str, prompts: list[list[int]], gen: int, guidance: float) -> State:
    unmasker = make_unmasker("low-confidence", Sampling(after_end="decode", guidance=guidance))
    state = State(SPEC, prompts, gen, guided=guidance > 0)
    decode(Engine(MODEL, make_policy(policy), unmasker, debug=True), state)
    return state


def by_hand(prompt: list[int], gen: int, guidance: float) -> list[int]:
    """LLaDA's rule on whole sequences."""
    tokens = torch.tensor([[*prompt, *[SPEC.mask_id] * gen]])
    masked = torch.arange(tokens.shape[1]) >= len(prompt)
    while masked.any():
        blank = tokens.clone()
        blank[:, : len(prompt)] = SPEC.mask_id
        c, u = MODEL(torch.cat([tokens, blank])).chunk(2)
        logits = u + (1 + guidance) * (c - u)
        allowed = logits.clone()
        allowed[..., SPEC.mask_id] = float("-inf")
        best = allowed.argmax(-1)
        confidence = logits.softmax(-1).gather(-1, best[..., None])[0, :, 0].masked_fill(~masked, -1)
        p = int(confidence.argmax())
        tokens[0, p], masked[p] = best[0, p], False
    return tokens[0].tolist()


@pytest.mark.parametrize("guidance", [0.5, 1.5])
def test_guidance_follows_the_published_formula(guidance: float) -> None:
    state = run("none", [[3, 1, 4, 1, 5]], 8, guidance)
    assert state.tokens[0].tolist() == by_hand([3, 1, 4, 1, 5], 8, guidance)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3), policy=st.sampled_from(POLICIES))
def test_guided_batches_equal_single_runs(lengths: list[int], policy: str) -> None:
    prompts = [[1 + (i * 7 + n) % 20 for n in range(k)] for i, k in enumerate(lengths)]
    together = run(policy, prompts, 8, 1.0)
    assert together.batch == 2 * len(prompts)
    for b, prompt in enumerate(prompts):
        alone = run(policy, [prompt], 8, 1.0)
        assert together.tokens[b, : len(prompt) + 8].tolist() == alone.tokens[0].tolist()
        twin = together.tokens[len(prompts) + b]
        assert (twin[: len(prompt)] == SPEC.mask_id).all()
        assert (twin[len(prompt) : len(prompt) + 8] == alone.tokens[0, len(prompt) :]).all()


def test_guidance_counts_the_rows_of_both_sequences() -> None:
    model = dcache.Model("random", SPEC, MODEL)
    plain = dcache.generate(model, [[3, 1, 4]], gen_length=4, after_end="decode")[0].trace
    guided = dcache.generate(model, [[3, 1, 4]], gen_length=4, after_end="decode", guidance=1.0)[0].trace
    assert (guided.row_layers, guided.nfe) == (2 * plain.row_layers, plain.nfe)
    assert guided.row_share == plain.row_share == 1


def test_a_canvas_without_second_sequences_is_refused() -> None:
    unmasker = LowConfidence(sampling=Sampling(guidance=1.0))
    with pytest.raises(UsageError, match="guided=False"):
        decode(Engine(MODEL, make_policy("none"), unmasker), State(SPEC, [[1]], 4))


def test_an_unmasker_that_tells_the_two_apart_is_named() -> None:
    class Lopsided(LowConfidence):
        def ask(self, state: State) -> Ask:
            quota = np.arange(1, state.batch + 1)
            return Ask(state.masked, flags={"quota": quota})

    engine = Engine(MODEL, make_policy("none"), Lopsided(sampling=Sampling(guidance=1.0, after_end="decode")))
    with pytest.raises(UnmaskerError, match="treats the two sequences of a guided text differently"):
        decode(engine, State(SPEC, [[1]], 4, guided=True))
