"""Bidirectional attention of some rows over the key/value store.

``o[b, h, i] = sum_j p[b, h, i, j] v[b, g(h), j]`` with ``p = softmax_j(q[b, h, i] . k[b, g(h), j] / sqrt(head_dim))``
over the visible keys ``j``, where query head ``h`` reads key/value head ``g(h) = h // (heads / kv_heads)``.

A hidden key may hold anything, NaN included, so it is *selected away*, never multiplied by zero: scores are replaced
before the softmax, and hidden keys and values are replaced by zeros (torch's attention returns NaN for a NaN in a
hidden key, whatever the mask says).
"""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def hide(x: Tensor, visible: Tensor) -> Tensor:
    """Zero the hidden rows of `x` (batch, kv_heads, slots, head_dim); `visible` (batch, 1 or kv_heads, slots)."""
    return x.masked_fill(~visible[..., None], 0)


def attend_ref(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """The torch twin of `attend`."""
    grouped = q.shape[1] != k.shape[1]
    if visible is None:
        return scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
    k, v = hide(k, visible), hide(v, visible)
    mask = visible
    if mask.shape[1] not in (1, q.shape[1]):
        mask = mask.repeat_interleave(q.shape[1] // mask.shape[1], dim=1)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask[:, :, None], enable_gqa=grouped)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """Attention of rows over stored keys.

    Args:
        q: (batch, heads, rows, head_dim).
        k: (batch, kv_heads, slots, head_dim), after rotary embedding.
        v: (batch, kv_heads, slots, head_dim).
        visible: (batch, 1 or kv_heads, slots) bool; None when every key is visible. A row of False only gives
            zeros or NaN, by backend: give each sequence at least one visible key.

    Returns:
        (batch, heads, rows, head_dim), dtype of `q`.
    """
    return attend_ref(q, k, v, visible)


def attend_each_ref(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """The torch twin of `attend_each`."""
    if seen.shape[1] not in (1, q.shape[1]):
        seen = seen.repeat_interleave(q.shape[1] // seen.shape[1], dim=1)
    return scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=q.shape[1] != k.shape[1])


def attend_each(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Attention in which every row has visible keys of its own; for few rows.

    Args:
        q: (batch, heads, rows, head_dim).
        k: (batch, kv_heads, keys, head_dim), finite: `hide` what nobody wrote.
        v: (batch, kv_heads, keys, head_dim), finite.
        seen: (batch, 1 or kv_heads, rows, keys) bool, with at least one visible key per row.

    Returns:
        (batch, heads, rows, head_dim), dtype of `q`.
    """
    return attend_each_ref(q, k, v, seen)
