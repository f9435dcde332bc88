"""Choose a fixed number of positions by score, stably: ties go to the lowest index.

``lowest(score, count, bound)`` returns the first ``bound`` entries of a stable ascending sort along the last axis, and
which of them are among the first ``count``. ``find(rows, positions)`` is a binary search in ascending rows.
"""

import torch
from torch import Tensor


def lowest_ref(score: Tensor, count: Tensor | int, bound: int) -> tuple[Tensor, Tensor]:
    """The torch twin of `lowest`."""
    index = score.sort(dim=-1, stable=True).indices[..., :bound]
    place = torch.arange(index.shape[-1], device=score.device).expand_as(index)
    real = place < (count if isinstance(count, int) else count[..., None])
    return index, real


def lowest(score: Tensor, count: Tensor | int, bound: int) -> tuple[Tensor, Tensor]:
    """Positions of the smallest scores.

    Args:
        score: (batch, n) float.
        count: how many are wanted, (batch,) int64 or one number for all.
        bound: the largest count, a Python number: the width of the result.

    Returns:
        index (batch, bound) int64 in order of score, and real (batch, bound) bool.
    """
    return lowest_ref(score, count, bound)


def find_ref(rows: Tensor, positions: Tensor) -> Tensor:
    """The torch twin of `find`."""
    return torch.searchsorted(rows, positions).clamp_max(rows.shape[-1] - 1)


def find(rows: Tensor, positions: Tensor) -> Tensor:
    """Where positions stand in an ascending row list.

    Args:
        rows: (batch, n) int64, ascending.
        positions: (batch, k) int64; those not in `rows` give an index of no meaning, but in range.

    Returns:
        (batch, k) int64 in 0..n-1.
    """
    return find_ref(rows.contiguous(), positions.contiguous())
