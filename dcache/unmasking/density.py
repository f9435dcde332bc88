"""Certainty density (d2Cache, arXiv 2509.23094): how much of a row's surroundings is known.

For the ``n`` rows of a generation, with ``known`` continued by ``n`` known rows on the left and by ``n`` copies of its
last entry on the right, ``density[i] = sum_j extended[j] g(n + i - j) / sum_{d=-3n}^{3n-1} g(d)`` with
``g(d) = exp(-d**2 / (2 sigma**2))``. The released code evaluates it by FFT, whose noise of 1e-7 outranks the true
values of rows far from anything known; here it is a plain sum.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from dcache.arrays import Bools, Floats
from dcache.state import State


@lru_cache(maxsize=16)
def _weights(n: int, sigma: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights (n, n) of each known row, and (n,) of the whole left and right continuation; float64."""
    bell = np.exp(-(np.arange(-3 * n, 3 * n, dtype=np.float64) ** 2) / (2 * sigma**2))
    offset = np.arange(n)[:, None] - np.arange(-n, 2 * n)[None]  # (n, 3n), i - j
    weight = bell[offset + 3 * n] / bell.sum()
    return weight[:, n : 2 * n], weight[:, :n].sum(1), weight[:, 2 * n :].sum(1)


def density(known: Bools, sigma: float) -> Floats:
    """Density of a generation's rows, (n,) float32, from which of them are `known` (n,)."""
    inside, left, right = _weights(len(known), float(sigma))
    found: Floats = (inside @ known + left + right * known[-1]).astype(np.float32)
    return found


def density_of(state: State, sigma: float) -> Floats:
    """(batch, slots) float32: density of each sequence's generation, 0 outside of it."""
    found = np.zeros(state.valid.shape, dtype=np.float32)
    for b, (start, end) in enumerate(zip(state.gen_start, state.lengths, strict=True)):
        found[b, start:end] = density(state.known[b, start:end], sigma)
    return found
