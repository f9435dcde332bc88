"""The certainty density is the sum that the released code evaluates by FFT."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcache.density import Densities, certainty_density
from dcache.state import State
from dcache.testing.models import random_model


def literal(known: np.ndarray, sigma: float) -> np.ndarray:
    """The formula as it is written: three pieces of length n, and a constant divisor."""
    n = len(known)
    padded = np.concatenate([np.ones(n, bool), known, np.full(n, known[-1])])
    away = n + np.arange(n)[:, None] - np.arange(3 * n)
    weight = np.exp(-(away**2) / (2 * sigma**2))
    return (padded * weight).sum(1) / np.exp(-(np.arange(-3 * n, 3 * n) ** 2) / (2 * sigma**2)).sum()


@given(st.lists(st.booleans(), min_size=1, max_size=70), st.sampled_from([0.1, 1, 3, 10, 80]))
def test_density_is_the_literal_sum(known: list[bool], sigma: float) -> None:
    density = certainty_density(np.array(known), sigma)
    assert density == pytest.approx(literal(np.array(known), sigma), abs=1e-14)
    assert (density >= 0).all()


def test_density_far_from_anything_known_is_not_negative() -> None:
    density = certainty_density(np.zeros(1000, bool), 10.0)
    assert (np.diff(density) <= 0).all()
    assert density[-1] == 0


def test_everything_known_has_density_one() -> None:
    density = certainty_density(np.ones(64, bool), 10.0)
    assert density == pytest.approx(np.ones(64), abs=1e-9)  # short of one by what lies further than 64 positions away


@given(
    sigma=st.sampled_from([0.1, 1.0, 3.0, 40.0]),
    steps=st.lists(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 7)), max_size=4), min_size=1, max_size=8),
)
def test_densities_kept_up_to_date_are_those_of_what_is_known(sigma: float, steps: list[list[tuple[int, int]]]) -> None:
    """Each sequence of a batch has its own region; tokens come, several at once, and go again."""
    state = State(random_model().spec, [[1, 2, 3], [4]], [8, 6])
    kept = Densities(state, sigma)
    for toggled in [[], *steps]:
        state.known = state.known.copy()
        for b, i in toggled:
            place = state.gen_start[b] + i % state.gen_length[b]
            state.known[b, place] ^= True
        found = kept.now()
        for b, (begin, end) in enumerate(((3, 11), (1, 7))):
            assert found[b, begin:end] == pytest.approx(certainty_density(state.known[b, begin:end], sigma), rel=1e-12)
            assert not found[b, :begin].any()
            assert not found[b, end:].any()


def test_nobody_else_writes_the_densities() -> None:
    kept = Densities(State(random_model().spec, [[1]], [4]), 1.0)
    with pytest.raises(ValueError, match="read-only"):
        kept.now()[0, 1] = 1
