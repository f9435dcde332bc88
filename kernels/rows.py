"""Gather and scatter of rows by position: data movement, exact.

``take(x, rows, lanes)[b, ..., i, :] = x[lanes[b], ..., rows[b, i], :]`` and ``put(x, rows, y, lanes)`` is its inverse
in place; without lanes, lane b is sequence b. Padded entries of `rows` point at the dump slot, which every store has,
so no mask is needed; what several of them write there is undefined and never read as a result.
"""

from torch import Tensor


def take_ref(x: Tensor, rows: Tensor, lanes: Tensor | None) -> Tensor:
    """The torch twin of `take`."""
    if lanes is not None:
        lane = lanes[:, None]
        return x[lane, rows] if x.dim() == 3 else x[lane, :, rows].transpose(1, 2)
    index = rows.reshape(rows.shape[0], *([1] * (x.dim() - 3)), rows.shape[1], 1)
    return x.gather(-2, index.expand(*x.shape[:-2], rows.shape[1], x.shape[-1]))


def take(x: Tensor, rows: Tensor, lanes: Tensor | None = None) -> Tensor:
    """Read rows.

    Args:
        x: (sequences, slots, width) or (sequences, heads, slots, head_dim).
        rows: (batch, n) int64, each in 0..slots-1.
        lanes: (batch,) int64, the sequence of `x` that each list of rows belongs to; None when they are all of them,
            in order.

    Returns:
        (batch, n, width) or (batch, heads, n, head_dim).
    """
    return take_ref(x, rows, lanes)


def put_ref(x: Tensor, rows: Tensor, y: Tensor, lanes: Tensor | None) -> None:
    """The torch twin of `put`."""
    if lanes is not None:
        lane = lanes[:, None]
        if x.dim() == 3:
            x[lane, rows] = y
        else:
            x[lane, :, rows] = y.transpose(1, 2)
        return
    index = rows.reshape(rows.shape[0], *([1] * (x.dim() - 3)), rows.shape[1], 1)
    x.scatter_(-2, index.expand(*x.shape[:-2], rows.shape[1], x.shape[-1]), y)


def put(x: Tensor, rows: Tensor, y: Tensor, lanes: Tensor | None = None) -> None:
    """Write rows in place.

    Args:
        x: (sequences, slots, width) or (sequences, heads, slots, head_dim), overwritten at `rows`.
        rows: (batch, n) int64, each in 0..slots-1; repeated entries must be the dump slot.
        y: (batch, n, width) or (batch, heads, n, head_dim), dtype of `x`.
        lanes: as for `take`.
    """
    if y.shape[-2:] != (rows.shape[1], x.shape[-1]):
        raise ValueError(
            f"values of shape {tuple(y.shape)} do not fit a store of shape {tuple(x.shape)} at {rows.shape[1]} rows; "
            f"expected (..., rows={rows.shape[1]}, width={x.shape[-1]})"
        )
    put_ref(x, rows, y, lanes)
