"""Similarity of attention before and after a cache write, for some tracked rows.

With ``a`` (old) and ``b`` (new) of shape heads x rows x keys, three means of a cosine:

* ``heads``: for every (row, key) the cosine of the two length-``heads`` vectors; mean over rows and keys;
* ``rows``: for every (head, row) the cosine of the two length-``keys`` vectors; mean over heads and rows;
* ``flat``: for every row the cosine of the two vectors of length ``heads * keys``; mean over rows.

Each norm is clamped from below at 1e-8 before dividing. Only real rows and visible keys count in the means; with no
real row the mean is 0/0 = NaN, which compares as "not below" any threshold, as it should.
"""

import torch
from torch import Tensor

AXES = {"heads": (1,), "rows": (3,), "flat": (1, 3)}
SMALLEST_NORM = 1e-8


def drift_ref(past: Tensor, now: Tensor, real: Tensor, visible: Tensor | None, over: str) -> Tensor:
    """The torch twin of `drift`."""
    axes = AXES[over]
    norms = [x.pow(2).sum(axes, keepdim=True).sqrt().clamp_min(SMALLEST_NORM) for x in (past, now)]
    cosine = (past / norms[0] * (now / norms[1])).sum(axes, keepdim=True)  # (batch, heads or 1, rows, keys or 1)
    counted = real[:, None, :, None].to(torch.float32)
    if visible is not None and cosine.shape[-1] > 1:
        counted = counted * visible[:, :1, None].to(torch.float32)
    counted = counted.expand_as(cosine)
    # a padded row has no finite cosine of its own: select, then sum
    total = torch.where(counted > 0, cosine, torch.zeros_like(cosine)).sum((1, 2, 3))
    return total / counted.sum((1, 2, 3))


def drift(past: Tensor, now: Tensor, real: Tensor, visible: Tensor | None, over: str = "heads") -> Tensor:
    """Mean cosine similarity of two attention maps.

    Args:
        past: (batch, heads, rows, keys) float32 probabilities before the write.
        now: the same rows after it.
        real: (batch, rows) bool; False for padding.
        visible: (batch, 1 or kv_heads, keys) bool, or None when all keys are visible.
        over: "heads", "rows" or "flat".

    Returns:
        (batch,) float32 in 0..1; NaN where no row is real.
    """
    return drift_ref(past, now, real, visible, over)
