"""One rule tells host from device: a numpy array lives on the host, a torch tensor on the device.

Between two passes everything is small and countable, and numpy costs a tenth of torch there; inside a pass everything
is a tensor. Since the two are different types, nothing crosses over by accident, and a sync cannot hide in a policy.
"""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Bools: TypeAlias = NDArray[np.bool_]
Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float32]


def positions(mask: Bools, width: int, fill: int) -> Ints:
    """Turn a mask (batch, n) into ascending indices (batch, width), padded with `fill`."""
    table = np.full((mask.shape[0], width), fill, dtype=np.int64)
    for b, row in enumerate(mask):
        index = np.flatnonzero(row)
        table[b, : len(index)] = index
    return table


def leftmost(mask: Bools, n: int) -> Bools:
    """Keep the first `n` true entries of each row of `mask` (batch, n_positions)."""
    return mask & (mask.cumsum(-1) <= n)


def first(mask: Bools, otherwise: int) -> Ints:
    """Index of the first true entry of each row of `mask` (batch, n); `otherwise` where there is none."""
    return np.where(mask.any(-1), mask.argmax(-1), otherwise).astype(np.int64)


def highest(score: np.ndarray, among: Bools, count: Ints | int) -> Bools:
    """Mark the `count` (batch,) highest scores (batch, n) of `among`, or all if they are fewer; ties go left."""
    order = np.argsort(np.where(among, -score, np.inf), axis=-1, kind="stable")
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.arange(order.shape[-1])[None], -1)
    return among & (place < np.reshape(count, (-1, 1)))
