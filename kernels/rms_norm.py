"""RMSNorm: ``y = (x / sqrt(mean(x**2) + eps)).to(x.dtype) * weight``.

The mean and the division are taken in float32 and the quotient is rounded back to the input dtype *before* the
multiplication by the weight; in bfloat16 the order is visible, and this is the one of the published models.

Two companions read the rows once for two purposes: `rms_norm_keep` also writes them to a store, and `add_rms_norm`
normalises ``x + delta``, rounded to the input dtype, and returns the sum too.
"""

import torch
from torch import Tensor

from dcache.kernels.backend import tl, triton, use_triton
from dcache.kernels.rows import check_fit, put_ref


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The torch twin of `rms_norm`."""
    wide = x.to(torch.float32)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The kernel of `rms_norm`."""
    return _launch(x, weight, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last axis.

    Args:
        x: (..., width), any floating dtype.
        weight: (width,), dtype of `x`.
        eps: added to the mean of squares.

    Returns:
        (..., width), dtype of `x`.
    """
    return rms_norm_triton(x, weight, eps) if use_triton(x) else rms_norm_ref(x, weight, eps)


def rms_norm_keep_ref(
    x: Tensor, weight: Tensor, eps: float, store: Tensor, rows: Tensor, lanes: Tensor | None = None
) -> Tensor:
    """The torch twin of `rms_norm_keep`."""
    put_ref(store, rows, x, lanes)
    return rms_norm_ref(x, weight, eps)


def rms_norm_keep_triton(
    x: Tensor, weight: Tensor, eps: float, store: Tensor, rows: Tensor, lanes: Tensor | None = None
) -> Tensor:
    """The kernel of `rms_norm_keep`."""
    return _launch(x, weight, eps, store=store, rows=rows, lanes=lanes)


def rms_norm_keep(
    x: Tensor, weight: Tensor, eps: float, store: Tensor, rows: Tensor, lanes: Tensor | None = None
) -> Tensor:
    """Normalise rows and keep them as they were: ``put(store, rows, x, lanes)`` and ``rms_norm(x, weight, eps)``.

    Args:
        x: (batch, n, width).
        weight: (width,), dtype of `x`.
        eps: added to the mean of squares.
        store: (sequences, slots, width), dtype of `x`, the last axis contiguous; overwritten at `rows`.
        rows: (batch, n) int64, each in 0..slots-1; repeated entries must be the dump slot.
        lanes: (batch,) int64, the sequence of `store` that each list of rows belongs to; None when they are all of
            them, in order.

    Returns:
        (batch, n, width), dtype of `x`.
    """
    check_fit(store, rows, x)
    normed = rms_norm_keep_triton if use_triton(x) else rms_norm_keep_ref
    return normed(x, weight, eps, store, rows, lanes)


def add_rms_norm_ref(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The torch twin of `add_rms_norm`."""
    total = x + delta
    return total, rms_norm_ref(total, weight, eps)


def add_rms_norm_triton(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The kernel of `add_rms_norm`."""
    total = x.new_empty(x.shape)
    return total, _launch(x, weight, eps, delta=delta, total=total)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add an increment to the residual stream and normalise the sum.

    Args:
        x: (..., width).
        delta: like `x`.
        weight: (width,), dtype of `x`.
        eps: added to the mean of squares.

    Returns:
        ``x + delta`` and its `rms_norm`, each (..., width), dtype of `x`.
    """
    return add_rms_norm_triton(x, delta, weight, eps) if use_triton(x) else add_rms_norm_ref(x, delta, weight, eps)


def _launch(
    x: Tensor,
    weight: Tensor,
    eps: float,
    delta: Tensor | None = None,
    total: Tensor | None = None,
    store: Tensor | None = None,
    rows: Tensor | None = None,
    lanes: Tensor | None = None,
) -> Tensor:
    """Normalise ``x + delta``, and write it to `total` and to `store`, where these are given."""
    y = x.new_empty(x.shape)
    x = _table(x)
    delta = None if delta is None else _table(delta)
    batch, n, width = x.shape
    block = triton.next_power_of_2(width)
    _rms_norm_kernel[(n, batch)](
        x,
        delta,
        weight,
        y,
        total,
        store,
        rows,
        lanes,
        eps,
        *x.stride()[:2],
        *((0, 0) if delta is None else delta.stride()[:2]),
        *((0, 0) if store is None else store.stride()[:2]),
        *((0, 0) if rows is None else rows.stride()),
        WIDTH=width,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),  # 16 elements of a row per thread
    )
    return y


def _table(x: Tensor) -> Tensor:
    """(..., width) as (batch, n, width) with rows that are contiguous, without a copy where `x` allows it."""
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    return x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1])


@triton.jit
def _rms_norm_kernel(
    x,
    delta,
    weight,
    y,
    total,
    store,
    rows,
    lanes,
    eps,
    stride_x_b,
    stride_x_n,
    stride_delta_b,
    stride_delta_n,
    stride_store_b,
    stride_store_n,
    stride_rows_b,
    stride_rows_n,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program normalises one row, held in registers.
    i_n, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o = tl.arange(0, BLOCK)
    m = o < WIDTH
    o_y = (i_b * tl.num_programs(0) + i_n) * WIDTH + o
    b_x = tl.load(x + i_b * stride_x_b + i_n * stride_x_n + o, mask=m, other=0.0)
    b_weight = tl.load(weight + o, mask=m, other=0.0).to(tl.float32)
    if delta is not None:
        b_delta = tl.load(delta + i_b * stride_delta_b + i_n * stride_delta_n + o, mask=m, other=0.0)
        b_x = (b_x.to(tl.float32) + b_delta.to(tl.float32)).to(y.dtype.element_ty)
        tl.store(total + o_y, b_x, mask=m)
    if store is not None:
        i_slot = tl.load(rows + i_b * stride_rows_b + i_n * stride_rows_n)
        i_lane = i_b
        if lanes is not None:
            i_lane = tl.load(lanes + i_b)
        tl.store(store + i_lane * stride_store_b + i_slot * stride_store_n + o, b_x, mask=m)
    b_wide = b_x.to(tl.float32)
    b_scale = tl.rsqrt(tl.sum(b_wide * b_wide, axis=0) / WIDTH + eps)
    b_y = (b_wide * b_scale).to(y.dtype.element_ty).to(tl.float32) * b_weight
    tl.store(y + o_y, b_y.to(y.dtype.element_ty), mask=m)
