"""Gather and scatter of rows by position, and their number by class: data movement, exact.

``take(x, rows, lanes)[b, ..., i, :] = x[lanes[b], ..., rows[b, i], :]`` and ``put(x, rows, y, lanes)`` is its inverse
in place; without lanes, lane b is sequence b. Padded entries of `rows` point at the dump slot, which every store has,
so no mask is needed; what several of them write there is undefined and never read as a result.
``tally(counter, rows, classes, lanes)`` adds to ``counter[b, c]`` the number of ``rows[b]`` whose position has class c.
"""

import torch
from torch import Tensor

from dcache.kernels.backend import tl, triton, use_triton

TILE = 2048  # elements that one program moves
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def take_ref(x: Tensor, rows: Tensor, lanes: Tensor | None = None) -> Tensor:
    """The torch twin of `take`."""
    if lanes is not None:
        lane = lanes[:, None]
        return x[lane, rows] if x.dim() == 3 else x[lane, :, rows].transpose(1, 2)
    index = rows.reshape(rows.shape[0], *([1] * (x.dim() - 3)), rows.shape[1], 1)
    return x.gather(-2, index.expand(*x.shape[:-2], rows.shape[1], x.shape[-1]))


def take_triton(x: Tensor, rows: Tensor, lanes: Tensor | None = None) -> Tensor:
    """The kernel of `take`."""
    y = x.new_empty(rows.shape[0], *x.shape[1:-2], rows.shape[1], x.shape[-1])
    _copy(x, rows, y, lanes, put=False)
    return y


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
    return take_triton(x, rows, lanes) if use_triton(x) else take_ref(x, rows, lanes)


def put_ref(x: Tensor, rows: Tensor, y: Tensor, lanes: Tensor | None = None) -> None:
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


def put_triton(x: Tensor, rows: Tensor, y: Tensor, lanes: Tensor | None = None) -> None:
    """The kernel of `put`."""
    _copy(x, rows, y, lanes, put=True)


def put(x: Tensor, rows: Tensor, y: Tensor, lanes: Tensor | None = None) -> None:
    """Write rows in place.

    Args:
        x: (sequences, slots, width) or (sequences, heads, slots, head_dim), overwritten at `rows`.
        rows: (batch, n) int64, each in 0..slots-1; repeated entries must be the dump slot.
        y: (batch, n, width) or (batch, heads, n, head_dim), dtype of `x`.
        lanes: as for `take`.
    """
    check_fit(x, rows, y)
    (put_triton if use_triton(x) else put_ref)(x, rows, y, lanes)


def check_fit(x: Tensor, rows: Tensor, y: Tensor) -> None:
    """Refuse values `y` that `put` cannot write to a store `x`."""
    expected = (rows.shape[0], *x.shape[1:-2], rows.shape[1], x.shape[-1])
    if y.shape != expected or y.dtype != x.dtype:
        raise ValueError(
            f"values of shape {tuple(y.shape)} and dtype {y.dtype} do not fit a store of shape {tuple(x.shape)} and "
            f"dtype {x.dtype} at {rows.shape[1]} rows; expected shape {expected}"
        )


def tally_ref(counter: Tensor, rows: Tensor, classes: Tensor, lanes: Tensor | None = None) -> None:
    """The torch twin of `tally`."""
    mine = classes if lanes is None else classes[lanes]
    found = mine.gather(1, rows)[..., None] == torch.arange(counter.shape[1], device=rows.device)
    counter += found.sum(1)


def tally_triton(counter: Tensor, rows: Tensor, classes: Tensor, lanes: Tensor | None = None) -> None:
    """The kernel of `tally`; a program counts one class of one lane."""
    n = rows.shape[1]
    block = min(triton.next_power_of_2(max(n, 1)), TILE)
    _tally_kernel[tuple(counter.shape)](
        counter,
        rows,
        classes,
        lanes,
        n,
        *counter.stride(),
        *rows.stride(),
        *classes.stride(),
        BLOCK=block,
        num_warps=max(block // 256, 1),
    )


def tally(counter: Tensor, rows: Tensor, classes: Tensor, lanes: Tensor | None = None) -> None:
    """Count rows by the class of their position, in place.

    Args:
        counter: (batch, n_classes) int64; the number of rows of each lane and class is added to it.
        rows: (batch, n) int64, each in 0..slots-1.
        classes: (sequences, slots) uint8, the class of every position. Those from n_classes on are not counted; that of
            the dump slot is one of them.
        lanes: as for `take`.
    """
    (tally_triton if use_triton(rows) else tally_ref)(counter, rows, classes, lanes)


def _copy(x: Tensor, rows: Tensor, y: Tensor, lanes: Tensor | None, put: bool) -> None:
    """Move rows between a store and `y` as bits, whatever the dtype: from `y` to the store with `put`, else back."""
    bits = BITS[x.element_size()]
    x, y = x.view(bits), y.view(bits)
    if x.dim() == 3:
        x, y = x[:, None], y[:, None]
    batch, heads, n, width = y.shape
    block_width = min(triton.next_power_of_2(max(width, 1)), TILE)
    block_rows = min(triton.next_power_of_2(max(n, 1)), TILE // block_width)
    grid = (triton.cdiv(n, block_rows) * triton.cdiv(width, block_width), heads, batch)
    _copy_kernel[grid](
        x,
        rows,
        y,
        lanes,
        n,
        *x.stride(),
        *rows.stride(),
        *y.stride(),
        PUT=put,
        WIDTH=width,
        BLOCK_ROWS=block_rows,
        BLOCK_WIDTH=block_width,
        num_warps=min(max(block_rows * block_width // 256, 1), 4),
    )


@triton.jit
def _copy_kernel(
    x,
    rows,
    y,
    lanes,
    n,
    stride_x_b,
    stride_x_h,
    stride_x_n,
    stride_x_w,
    stride_rows_b,
    stride_rows_n,
    stride_y_b,
    stride_y_h,
    stride_y_n,
    stride_y_w,
    PUT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    n_across: tl.constexpr = (WIDTH + BLOCK_WIDTH - 1) // BLOCK_WIDTH
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_n = (tl.program_id(0) // n_across) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_w = (tl.program_id(0) % n_across) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    m_n = o_n < n
    m = m_n[:, None] & (o_w < WIDTH)[None, :]
    i_lane = i_b
    if lanes is not None:
        i_lane = tl.load(lanes + i_b)
    o_n = o_n.to(tl.int64)
    b_slot = tl.load(rows + i_b * stride_rows_b + o_n * stride_rows_n, mask=m_n, other=0)
    p_x = x + i_lane * stride_x_b + i_h * stride_x_h + b_slot[:, None] * stride_x_n + o_w[None, :] * stride_x_w
    p_y = y + i_b * stride_y_b + i_h * stride_y_h + o_n[:, None] * stride_y_n + o_w[None, :] * stride_y_w
    if PUT:
        tl.store(p_x, tl.load(p_y, mask=m, other=0), mask=m)
    else:
        tl.store(p_y, tl.load(p_x, mask=m, other=0), mask=m)


@triton.jit
def _tally_kernel(
    counter,
    rows,
    classes,
    lanes,
    n,
    stride_counter_b,
    stride_counter_c,
    stride_rows_b,
    stride_rows_n,
    stride_classes_b,
    stride_classes_n,
    BLOCK: tl.constexpr,
):
    i_b, i_c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_lane = i_b
    if lanes is not None:
        i_lane = tl.load(lanes + i_b)
    b_count = tl.zeros((BLOCK,), dtype=tl.int64)
    for i_n in range(0, n, BLOCK):
        o_n = i_n + tl.arange(0, BLOCK)
        m_n = o_n < n
        b_slot = tl.load(rows + i_b * stride_rows_b + o_n * stride_rows_n, mask=m_n, other=0)
        b_class = tl.load(classes + i_lane * stride_classes_b + b_slot * stride_classes_n, mask=m_n, other=0)
        b_count += (m_n & (b_class.to(tl.int32) == i_c)).to(tl.int64)
    p_counter = counter + i_b * stride_counter_b + i_c * stride_counter_c
    tl.store(p_counter, tl.load(p_counter) + tl.sum(b_count, axis=0))
