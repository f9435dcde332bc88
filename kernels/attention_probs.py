"""Attention probabilities themselves, for small sets of rows, and the sums that policies ask for.

``probs(q, k)[b, h, i, j] = softmax_j(q[b, h, i] . k[b, g(h), j] / sqrt(head_dim))`` over the visible keys, 0 elsewhere;
``received(q, k, weight)[b, j] = sum_{h, i} weight[b, i] p[b, h, i, j]``;
``head_mean(q, k)[b, i, j] = mean_h p[b, h, i, j]``;
``products(q, k)[b, i, j] = mean_h q[b, h, i] . k[b, g(h), j]``, without scale and softmax, 0 for hidden keys.

The softmax is taken in float32 whatever the dtype of the model. The twins materialise heads x rows x slots; that of
`received` for `ROWS_AT_ONCE` rows at a time, since policies ask for it over all rows of a sequence.
"""

import torch
from torch import Tensor

from dcache.kernels.attend import hide

ROWS_AT_ONCE = 256


def probs_ref(q: Tensor, k: Tensor, visible: Tensor | None) -> Tensor:
    """The torch twin of `probs`."""
    if visible is not None:
        k = hide(k, visible)
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, dim=1) if group > 1 else k
    score = (q @ k.transpose(-1, -2)).to(torch.float32) * q.shape[-1] ** -0.5
    if visible is not None:
        seen = visible.repeat_interleave(group, dim=1) if visible.shape[1] > 1 and group > 1 else visible
        score = score.masked_fill(~seen[:, :, None], float("-inf"))
    return torch.softmax(score, -1)


def probs(q: Tensor, k: Tensor, visible: Tensor | None = None) -> Tensor:
    """Attention probabilities of rows over stored keys.

    Args:
        q: (batch, heads, rows, head_dim).
        k: (batch, kv_heads, slots, head_dim).
        visible: (batch, 1 or kv_heads, slots) bool, or None.

    Returns:
        (batch, heads, rows, slots) float32.
    """
    return probs_ref(q, k, visible)


def received_ref(q: Tensor, k: Tensor, weight: Tensor, visible: Tensor | None) -> Tensor:
    """The torch twin of `received`."""
    total = torch.zeros(k.shape[0], k.shape[2], device=k.device)
    for first in range(0, q.shape[2], ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        total += torch.einsum("bhij,bi->bj", probs_ref(q[:, :, rows], k, visible), weight[:, rows].to(torch.float32))
    return total


def received(q: Tensor, k: Tensor, weight: Tensor, visible: Tensor | None = None) -> Tensor:
    """Attention that each key receives, summed over heads and weighted rows.

    Args:
        q: (batch, heads, rows, head_dim).
        k: (batch, kv_heads, slots, head_dim).
        weight: (batch, rows) bool or float; 0 for padded rows.
        visible: (batch, 1 or kv_heads, slots) bool, or None.

    Returns:
        (batch, slots) float32.
    """
    return received_ref(q, k, weight, visible)


def head_mean_ref(q: Tensor, k: Tensor, visible: Tensor | None) -> Tensor:
    """The torch twin of `head_mean`."""
    return probs_ref(q, k, visible).mean(1)


def head_mean(q: Tensor, k: Tensor, visible: Tensor | None = None) -> Tensor:
    """Attention rows averaged over heads.

    Args:
        q: (batch, heads, rows, head_dim).
        k: (batch, kv_heads, slots, head_dim).
        visible: (batch, 1 or kv_heads, slots) bool, or None.

    Returns:
        (batch, rows, slots) float32.
    """
    return head_mean_ref(q, k, visible)


def products_ref(q: Tensor, k: Tensor, visible: Tensor | None) -> Tensor:
    """The torch twin of `products`: a sum over heads of a group comes before the product with its key."""
    if visible is not None:
        k = hide(k, visible)
    grouped = q.to(torch.float32).reshape(q.shape[0], k.shape[1], -1, *q.shape[2:])
    summed = grouped.sum(2)  # (batch, kv_heads, rows, head_dim)
    return torch.einsum("bgid,bgjd->bij", summed, k.to(torch.float32)) / q.shape[1]


def products(q: Tensor, k: Tensor, visible: Tensor | None = None) -> Tensor:
    """Dot products of rows with stored keys, averaged over heads.

    Args:
        q: (batch, heads, rows, head_dim).
        k: (batch, kv_heads, slots, head_dim).
        visible: (batch, 1 or kv_heads, slots) bool, or None.

    Returns:
        (batch, rows, slots) float32.
    """
    return products_ref(q, k, visible)
