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

from dcache.arrays import Bools, places
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
    bell, side = _gaussian(len(known), float(sigma))
    reach = len(bell) // 2
    density: NDArray[np.float64] = np.convolve(known.astype(np.float64), bell)[reach : reach + len(known)] + side
    return density + side[::-1] if known[-1] else density


class Densities:
    """`certainty_density` of each generation region of a batch, kept up to date while it is decoded.

    A token that becomes known adds its Gaussian to what is there, so that a step costs little, between two passes. The
    sum is that of `certainty_density` but for rounding, since it is taken in the order of commits.

    Args:
        state: the batch, before its first step.
        sigma: as for `certainty_density`.
    """

    def __init__(self, state: State, sigma: float):
        self._state, self._sigma = state, float(sigma)
        spans = zip(state.gen_start.tolist(), state.lengths.tolist(), strict=True)
        self._regions = [(begin, end, *_gaussian(end - begin, self._sigma)) for begin, end in spans]
        self._known: Bools = state.prompt.copy()
        self._table = np.zeros(state.valid.shape)
        for b in range(state.batch):
            self._sum_up(b)
        self._shown = self._table.view()
        self._shown.setflags(write=False)

    def now(self) -> NDArray[np.float64]:
        """(batch, slots) float64, 0 outside the regions; it changes with the next call."""
        news = places(self._state.known != self._known).tolist()
        if news:
            self._known = self._state.known.copy()
            lost = set()
            for b, place in (divmod(at, self._state.slots) for at in news):
                if self._known[b, place]:
                    self._add(b, place)
                else:
                    lost.add(b)
            for b in lost:
                self._sum_up(b)
        return self._shown

    def _add(self, b: int, place: int) -> None:
        """The Gaussian of a token at `place`, and what stands behind the region if that is its end."""
        begin, end, bell, side = self._regions[b]
        start = place - len(bell) // 2  # of the bell
        left, right = max(begin, start), min(end, start + len(bell))
        reached = self._table[b, left:right]  # named, since `table[...] += x` would copy the view onto itself
        reached += bell[left - start : right - start]
        if place == end - 1:
            self._table[b, begin:end] += side[::-1]

    def _sum_up(self, b: int) -> None:
        begin, end = self._regions[b][:2]
        self._table[b, begin:end] = certainty_density(self._known[b, begin:end], self._sigma)


@lru_cache(maxsize=64)
def _gaussian(n: int, sigma: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Share of the whole that is added by a known token (2 * reach + 1,), and by a known left piece (n,)."""

    def g(distance: np.ndarray) -> NDArray[np.float64]:
        with np.errstate(over="ignore"):  # of a tiny sigma; what is far then weighs 0
            weight: NDArray[np.float64] = np.exp(-0.5 * (distance / sigma) ** 2)
        return weight

    reach = min(n - 1, int(np.ceil(VANISHES * sigma)))
    beyond = np.append(np.cumsum(g(np.arange(2 * n))[::-1])[::-1], 0)  # g over d..2n-1: differences never negative
    side = beyond[1 : n + 1] - beyond[n + 1 :]  # at position i, a known left piece is i + 1 to i + n away
    whole = float(g(np.arange(-3 * n, 3 * n)).sum())
    return g(np.arange(-reach, reach + 1)) / whole, side / whole
