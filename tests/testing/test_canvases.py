"""What the conformance kit draws: prompts with embeddings among others."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings

from dcache.testing import Canvas, hold, search
from dcache.testing.runs import Refused, starts

TWO = Canvas(lengths=((6, 4), (5, 4), (3, 4)), spans=(((0, 2, 7), (4, 9, 1)), (), ((1, 3, 7),)))


def test_many_canvases_have_embeddings_and_batches_of_these_prompts_without() -> None:
    drawn: list[Canvas] = []

    @seed(0)
    @settings(max_examples=200, database=None, derandomize=False, suppress_health_check=list(HealthCheck))
    @given(canvas=search.canvases([(0, "low-confidence")]))
    def draw(canvas: Canvas) -> None:
        drawn.append(canvas)

    draw()
    embedded = [canvas.state().embedded for canvas in drawn]
    some = [where for where in embedded if where.any()]
    assert 0.25 < len(some) / len(drawn) < 0.75
    assert sum(not where.any(1).all() for where in some if len(where) > 1) > len(some) / 4
    assert any((np.diff(where.astype(int), axis=1) == 1).sum(1).max() > 1 for where in some)  # two spans, apart
    last = [
        where[b, n - 1]
        for canvas, where in zip(drawn, embedded, strict=True)
        for b, (n, _) in enumerate(canvas.lengths)
    ]
    assert any(last)


def test_spans_of_one_number_and_length_are_the_same_embeddings_under_one_key() -> None:
    first, second, third = TWO.state().embeddings
    assert first is not None
    assert second is None
    assert third is not None
    assert [span[:2] for span in first.spans] == [(0, 2), (4, 6)]  # cut where the prompt ends
    assert first.positions.tolist() == [0, 1, 4, 5]
    assert torch.equal(first.values[:2], third.values)
    assert first.spans[0].key == third.spans[0].key != first.spans[1].key
    longer = Canvas(lengths=((6, 4),), spans=(((0, 3, 7),),)).state().embeddings[0]
    assert longer is not None
    assert longer.spans[0].key != third.spans[0].key


def test_another_request_has_the_same_embeddings_and_other_keys_and_another_draw_those_of_the_next() -> None:
    (first, *_), (again, *_), (moved, *_) = (
        state.embeddings for state in (TWO.state(), TWO.state(request=1), TWO.state(draw=2))
    )
    assert first is not None
    assert again is not None
    assert moved is not None
    assert torch.equal(first.values, again.values)
    assert {span.key for span in first.spans}.isdisjoint(span.key for span in again.spans)
    assert moved.spans[0] == (1, 3, first.spans[0].key)


def test_a_spelled_canvas_starts_from_what_the_same_prompts_of_tokens_start_from() -> None:
    tokens, spelled = Canvas(lengths=TWO.lengths).state(), TWO.spelled()
    assert torch.equal(starts(TWO.model, tokens), starts(TWO.model, spelled))
    assert not torch.equal(starts(TWO.model, tokens), starts(TWO.model, TWO.state()))
    assert ((tokens.tokens != spelled.tokens) == spelled.embedded).all()


def test_a_claim_about_embeddings_asks_for_a_canvas_that_has_some() -> None:
    with pytest.raises(Refused, match="no prompt has embeddings"):
        hold("embeddings_of_tokens_decode_as_the_tokens", "none", Canvas())
