"""One rule tells host from device: a numpy array lives on the host, a torch tensor on the device.

Between two passes everything is small and countable, and numpy costs a tenth of torch there; inside a pass everything
is a tensor. Since the two are different types, nothing crosses over by accident, and a sync cannot hide in a policy.
"""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Bools: TypeAlias = NDArray[np.bool_]
Bytes: TypeAlias = NDArray[np.uint8]
Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float32]


def positions(mask: Bools, fill: int, width: Callable[[int], int] = int, least: int = 0) -> Ints:
    """Turn a mask (batch, n) into ascending indices, padded with `fill` to what `width` makes of the longest list.

    The longest list counts as `least` if it is shorter.
    """
    if len(mask) == 1:  # a batch of one, where the device waits for every microsecond of this
        index = mask[0].nonzero()[0]
        n = len(index)
        table = np.empty((1, width(n if n > least else least)), dtype=np.int64)
        row = table[0]
        row[:n], row[n:] = index, fill
        return table
    found = [row.nonzero()[0] for row in mask]
    table = np.full((len(found), width(max(least, max(map(len, found), default=0)))), fill, dtype=np.int64)
    for b, index in enumerate(found):
        table[b, : len(index)] = index
    return table


def places(mask: Bools) -> Ints:
    """Ascending indices of the true entries of `mask`, flattened; a third of the time of `np.flatnonzero`."""
    return mask.ravel().nonzero()[0]


def leftmost(mask: Bools, n: int) -> Bools:
    """Keep the first `n` true entries of each row of `mask` (batch, n_positions)."""
    kept = np.zeros_like(mask)
    for b, row in enumerate(mask):
        kept[b, row.nonzero()[0][:n]] = True
    return kept


def first(mask: Bools, otherwise: Ints | int) -> Ints:
    """Index of the first true entry of each row of `mask` (batch, n); `otherwise`, or of it, where there is none."""
    return np.where(mask.any(-1), mask.argmax(-1), otherwise).astype(np.int64)


def highest(score: np.ndarray, among: Bools, count: Ints | int) -> Bools:
    """Mark the `count` (batch,) highest scores (batch, n) of `among`, or all if they are fewer; ties go left."""
    chosen = np.zeros(among.shape, dtype=bool)
    for b, wanted in enumerate([count] * len(among) if isinstance(count, int) else count.tolist()):
        index = among[b].nonzero()[0]
        if 0 < wanted < len(index):  # a partition, because a stable sort of 4,096 costs 0.7 ms
            value = score[b].take(index)
            index = index[_reaching(np.partition(value, -wanted)[-wanted], value, wanted)]
        if wanted > 0:
            chosen[b][index] = True
    return chosen


def heaviest(weight: np.ndarray, falling: Ints, among: Bools, share: float, beyond: bool = False) -> Bools:
    """Mark those of `among` (batch, n) with the highest weights (batch, n), as many as make up a `share` of all.

    Args:
        weight: none is negative. Their sums are taken in float64.
        falling: (batch, n) positions by falling weight, as the device sorted them while it was busy with other things;
            of equal weights the earlier one is marked first.
        among: what is weighed.
        share: of the sum of their weights, and of 1e-9 more.
        beyond: also mark the one that passes the share; otherwise the sum stays within it, unless one alone passes.
    """
    chosen = np.zeros(among.shape, dtype=bool)
    for b in range(len(chosen)):
        index = falling[b][among[b].take(falling[b])]
        if len(index):
            mass = weight[b].take(index).astype(np.float64).cumsum()  # a running sum that casts takes twice as long
            within = int(mass.searchsorted(share * (mass[-1] + 1e-9), "right"))
            chosen[b][index[: within + 1 if beyond else max(within, 1)]] = True
    return chosen


def _reaching(cut: float, score: np.ndarray, count: int) -> Bools:
    """Mark the scores (n,) that are at least `cut`, the `count`-th highest; of those equal to it the leftmost."""
    kept: Bools = score >= cut
    surplus = np.count_nonzero(kept) - count
    if surplus > 0:
        kept[places(score == cut)[-surplus:]] = False
    return kept


def close_gaps(mask: Bools, width: int) -> Bools:
    """Also mark what lies between two true entries of a row of `mask` (batch, n) at most `width` apart."""
    if width < 2:  # neighbours are 1 apart, with nothing between them
        return mask
    place, far = np.arange(mask.shape[1]), mask.shape[1] + width + 1
    before = np.maximum.accumulate(np.where(mask, place, -far), axis=1)
    after = np.minimum.accumulate(np.where(mask, place, 2 * far)[:, ::-1], axis=1)[:, ::-1]
    return mask | (after - before <= width)
