"""Certainty density: how much of a position's neighbourhood is known already.

A Gaussian sum over the known positions, as in d²Cache (arXiv 2509.23094, equation 4) and its released code, which adds
what the equation leaves out: the generation region stands between two pieces of its own length. The left one counts as
known, whatever the prompt; the right one does if the last position of the region is. The sum is divided by that of a
neighbourhood known on both sides. The cache and the unmasker of that paper both multiply confidences by it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dcache.arrays import Bools
from dcache.state import State

VANISHES = 39  # standard deviations after which exp(-x²/2) is 0 in float64, so leaving it out changes nothing


def certainty_density(known: Bools, sigma: float) -> NDArray[np.float64]:
    """Density of every position of a generation region.

    Args:
        known: (n,) bool: positions of the region that hold a committed token.
        sigma: standard deviation of the Gaussian, in positions.

    Returns:
        (n,) float64, from 0 (nothing known within reach) to about 1.
    """
    kernel, side, total = _gaussian(len(known), float(sigma))
    reach = len(kernel) // 2
    here = known.astype(np.float64)
    density: NDArray[np.float64]
    if reach == len(known) - 1:  # the part below, without the rest: half the work
        density = np.convolve(kernel, here, "valid")
    else:
        density = np.convolve(here, kernel)[reach : reach + len(known)]
    density += side
    if known[-1]:
        density += side[::-1]
    density /= total
    return density


def densities(state: State, known: Bools, sigma: float) -> NDArray[np.float64]:
    """(batch, slots) float64: `certainty_density` of each generation region, 0 elsewhere; `known` (batch, slots)."""
    out = np.zeros(known.shape)
    for b, (begin, end) in enumerate(zip(state.gen_start.tolist(), state.lengths.tolist(), strict=True)):
        out[b, begin:end] = _kept_density(known[b, begin:end].tobytes(), sigma)
    return out


@lru_cache(maxsize=64)
def _kept_density(known: bytes, sigma: float) -> NDArray[np.float64]:
    """`certainty_density` of bools as bytes: in a step of d²Cache the policy and the unmasker ask for the same one."""
    density = certainty_density(np.frombuffer(known, dtype=bool), sigma)
    density.setflags(write=False)  # callers copy from it
    return density


@lru_cache(maxsize=64)
def _gaussian(n: int, sigma: float) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Kernel (2 * reach + 1,), weight of a known left piece at each position (n,), and the divisor."""

    def g(distance: np.ndarray) -> NDArray[np.float64]:
        with np.errstate(over="ignore"):  # of a tiny sigma; what is far then weighs 0
            weight: NDArray[np.float64] = np.exp(-0.5 * (distance / sigma) ** 2)
        return weight

    reach = min(n - 1, int(np.ceil(VANISHES * sigma)))
    beyond = np.append(np.cumsum(g(np.arange(2 * n))[::-1])[::-1], 0)  # g over d..2n-1: differences never negative
    side = beyond[1 : n + 1] - beyond[n + 1 :]  # at position i, a known left piece is i + 1 to i + n away
    return g(np.arange(-reach, reach + 1)), side, float(g(np.arange(-3 * n, 3 * n)).sum())
