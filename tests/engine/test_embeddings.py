"""Prompts that start from embeddings."""

from typing import Any

import numpy as np
import pytest
import torch

from dcache import Sampling, State, UsageError
from dcache.decode import decode
from dcache.engine import Engine
from dcache.plugins import make_policy, make_unmasker
from dcache.state import Embeddings
from dcache.testing.models import random_model
from dcache.testing.recorder import Recorder
from dcache.trace import Step

MODEL = random_model(2)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5], [8, 9, 7, 9, 3]]
POLICIES = ["none", "elastic(gamma=0.97)", "dkv(interval=3)", "d2(current_k=3)", "fast-dllm", "sparse-dllm"]
POLICIES += [
    "suffix(window=1)",
    "spa(interval=4,gen_interval=2,rank=4)",
    "dllm-cache(prompt_interval=3,gen_interval=2)",
]
SOME = [np.array([0, 2, 3, 4]), None, np.array([4])]


def go(policy: str, prompts: list[list[int]], given: list[Any] | None, engine: Engine | None = None, **more: Any):
    sampling = Sampling(temperature=0.5, guidance=more.pop("guidance", 0.0))
    if engine is None:
        engine = Engine(MODEL, make_policy(policy), make_unmasker("low-confidence", sampling), debug=True, **more)
    state = State(MODEL.spec, prompts, [8, 12, 4], 4, embeddings=given, guided=engine.unmasker.sampling.guidance > 0)
    return decode(engine, state), engine


def as_embeddings() -> tuple[list[list[int]], list[Embeddings | None]]:
    """The prompts with other tokens at some positions, where the embeddings of the right ones are given."""
    prompts, given = [list(p) for p in PROMPTS], []
    for prompt, where in zip(prompts, SOME, strict=True):
        if where is None:
            given.append(None)
            continue
        given.append(Embeddings(where, MODEL.embed(torch.tensor([prompt[i] for i in where]))))
        for i in where:
            prompt[i] = MODEL.spec.eos_id
    return prompts, given


def assert_same(one: list[Step], two: list[Step]) -> None:
    for a, b in zip(one, two, strict=True):
        for name in ("rows", "commit", "tokens", "confidence", "row_layers", "kv_row_layers"):
            assert np.array_equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize("policy", POLICIES)
def test_embeddings_of_tokens_are_as_good_as_the_tokens(policy: str) -> None:
    assert_same(go(policy, PROMPTS, None)[0], go(policy, *as_embeddings())[0])


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_they_are_recorded_and_only_the_prompt_of_a_guided_text_has_them(guidance: float) -> None:
    plain = go("elastic", PROMPTS, None, guidance=guidance)[0]
    recorded = go("elastic", *as_embeddings(), guidance=guidance, buckets=(8, 64), executor=Recorder())[0]
    for a, b in zip(plain, recorded, strict=True):
        assert np.array_equal(a.commit, b.commit)
        assert np.array_equal(a.tokens, b.tokens)


def test_other_embeddings_give_other_tokens() -> None:
    prompts, given = as_embeddings()
    given[0] = given[0]._replace(values=torch.randn(4, MODEL.spec.d_model))
    one, two = go("none", prompts, as_embeddings()[1])[0], go("none", prompts, given)[0]
    assert any((a.confidence[0] != b.confidence[0]).any() for a, b in zip(one, two, strict=True))
    for a, b in zip(one, two, strict=True):
        assert np.array_equal(a.tokens[1:], b.tokens[1:])


def test_the_next_batch_starts_from_its_own() -> None:
    prompts, given = as_embeddings()
    moved = [None, None, Embeddings(np.array([1]), MODEL.embed(torch.tensor([PROMPTS[2][1]])))]
    third = [list(p) for p in PROMPTS]
    third[2][1] = 0
    expected = go("elastic", PROMPTS, None)[0]
    engine = go("elastic", prompts, given)[1]
    assert_same(expected, go("", third, moved, engine)[0])
    assert_same(expected, go("", PROMPTS, None, engine)[0])
    assert engine.embeddings is None
    assert_same(expected, go("", prompts, given, engine)[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([None], "1 prompts have embeddings, or None, but there are 3"),
        ([Embeddings(np.array([8]), torch.zeros(1, MODEL.spec.d_model)), None, None], "name position 8; it has 8"),
        ([None, Embeddings(np.array([-1]), torch.zeros(1, MODEL.spec.d_model)), None], "prompt 1 name position -1"),
        ([Embeddings(np.array([1, 1]), torch.zeros(2, MODEL.spec.d_model)), None, None], "name a position twice"),
        ([Embeddings(np.array([1]), torch.zeros(2, MODEL.spec.d_model)), None, None], r"expected \(1, "),
    ],
)
def test_embeddings_that_do_not_fit_their_prompt_are_refused(given: list[Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        State(MODEL.spec, PROMPTS, 4, embeddings=given)
