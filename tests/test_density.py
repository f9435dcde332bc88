"""The certainty density is the sum that the released code evaluates by FFT."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcache.density import certainty_density, densities
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


def test_each_sequence_of_a_batch_has_its_own_region() -> None:
    state = State(random_model().spec, [[1, 2, 3], [4]], [8, 6])
    found = densities(state, state.known, 10.0)
    assert found[0, 3:11] == pytest.approx(certainty_density(np.zeros(8, bool), 10.0))
    assert found[1, 1:7] == pytest.approx(certainty_density(np.zeros(6, bool), 10.0))
    assert found[0, :3].tolist() == [0, 0, 0]
    assert found[1, 7:].tolist() == [0] * 4
