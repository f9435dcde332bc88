"""Which of the eligible rows are committed, given a score: device rules that every unmasker shares.

All work on (batch, w) tensors by read position, ascending, and break ties to the leftmost row.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dcache.kernels.select import highest, rank

FactorVariant = Literal["repaired", "fast-dllm", "d2"]


def ranked(score: Tensor, eligible: Tensor) -> tuple[Tensor, Tensor]:
    """Order of the eligible rows, the highest score first, then the others.

    Returns:
        order (batch, w) int64, row at each place, and place (batch, w) int64, place of each row.
    """
    return rank(score, eligible)


def best(score: Tensor, eligible: Tensor, count: Tensor | int) -> Tensor:
    """Mark the `count` (batch,) highest scores among `eligible` (batch, w); ties go to the leftmost."""
    return highest(score, eligible, count)


def between(score: Tensor, eligible: Tensor, chosen: Tensor, least: Tensor | int, most: Tensor | int | None) -> Tensor:
    """Rows `chosen` by a rule, at least `least` of the highest scores in any case, at most `most`."""
    chosen = (chosen & eligible) | best(score, eligible, least)
    return chosen if most is None else best(score, chosen, most)


def prefix_by_factor(score: Tensor, eligible: Tensor, factor: float, variant: FactorVariant) -> Tensor:
    """The rows before the first rank k whose score fails ``c_k >= 1 - factor / (k + 1)``, the first never failing.

    ``fast-dllm``: if the first failure is the last of all ranks, that one is committed too. ``d2``: the test is
    ``(k + 1) * (1 - c_k) < factor``, rank 1 is tested like the others, and if none fails the last one is left out.
    """
    order, place = ranked(score, eligible)
    n = eligible.sum(-1, keepdim=True)
    rank = torch.arange(1, order.shape[-1] + 1, device=order.device, dtype=score.dtype)
    sorted_score = score.gather(-1, order)
    if variant == "d2":
        passes = (rank + 1) * (1 - sorted_score) < factor
    else:
        passes = (sorted_score >= 1 - factor / (rank + 1)) | (rank == 1)
    count = (passes & (rank <= n)).cumprod(-1).sum(-1, keepdim=True)
    if variant == "d2":
        count = torch.where(count == n, n - 1, count)
    elif variant == "fast-dllm":
        count = torch.where(count == n - 1, n, count)
    return eligible & (place < count)


def prefix_by_entropy(score: Tensor, eligible: Tensor, entropy: Tensor, gamma: float, published: bool) -> Tensor:
    """Rows in order of score while the sum of their entropies, less the largest of them, is at most `gamma`.

    `published` leaves out the latest entropy instead of the largest (see `EntropyBounded`).
    """
    order, place = ranked(score, eligible)
    sorted_entropy = entropy.masked_fill(~eligible, 0.0).gather(-1, order)
    left_out = sorted_entropy if published else sorted_entropy.cummax(-1).values
    within = sorted_entropy.cumsum(-1) - left_out <= gamma
    return eligible & (place < within.cumprod(-1).sum(-1, keepdim=True))


def leftmost_run(eligible: Tensor, where: Tensor) -> Tensor:
    """The first eligible row and those that follow it without a gap in position."""
    seen = eligible.cumsum(-1)
    start = where.gather(-1, eligible.to(torch.int64).argmax(-1, keepdim=True))
    return eligible & (seen == where - start + 1)
