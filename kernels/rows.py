"""Gather and scatter of rows by position: data movement, exact.

``take(x, rows)[b, ..., i, :] = x[b, ..., rows[b, i], :]`` and ``put(x, rows, y)`` is its inverse in place. Padded
entries of `rows` point at the dump slot, which every store has, so no mask is needed; what several of them write
there is undefined and never read as a result.
"""

from torch import Tensor


def take_ref(x: Tensor, rows: Tensor) -> Tensor:
    """The torch twin of `take`."""
    index = rows.reshape(rows.shape[0], *([1] * (x.dim() - 3)), rows.shape[1], 1)
    return x.gather(-2, index.expand(*x.shape[:-2], rows.shape[1], x.shape[-1]))


def take(x: Tensor, rows: Tensor) -> Tensor:
    """Read rows.

    Args:
        x: (batch, slots, width) or (batch, heads, slots, head_dim).
        rows: (batch, n) int64, each in 0..slots-1.

    Returns:
        (batch, n, width) or (batch, heads, n, head_dim).
    """
    return take_ref(x, rows)


def put_ref(x: Tensor, rows: Tensor, y: Tensor) -> None:
    """The torch twin of `put`."""
    index = rows.reshape(rows.shape[0], *([1] * (x.dim() - 3)), rows.shape[1], 1)
    x.scatter_(-2, index.expand(*x.shape[:-2], rows.shape[1], x.shape[-1]), y)


def put(x: Tensor, rows: Tensor, y: Tensor) -> None:
    """Write rows in place.

    Args:
        x: (batch, slots, width) or (batch, heads, slots, head_dim), overwritten at `rows`.
        rows: (batch, n) int64, each in 0..slots-1; repeated entries must be the dump slot.
        y: (batch, n, width) or (batch, heads, n, head_dim), dtype of `x`.
    """
    if y.shape[-2:] != (rows.shape[1], x.shape[-1]):
        raise ValueError(
            f"values of shape {tuple(y.shape)} do not fit a store of shape {tuple(x.shape)} at {rows.shape[1]} rows; "
            f"expected (..., rows={rows.shape[1]}, width={x.shape[-1]})"
        )
    put_ref(x, rows, y)
