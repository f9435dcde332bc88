"""How far rows turned: ``cos[b, i] = u . v`` with ``u = x / max(|x|, 1e-8)`` and ``v`` likewise, in float32.

It is computed as ``(|u|^2 + |v|^2 - |u - v|^2) / 2``, where the first two are 1. Rows that hardly turned differ in
their distance, which float32 holds to seven digits of its own; a sum of products near 1 is off by more than they
differ. A row of heads is one vector, all heads side by side.
"""

import torch
from torch import Tensor

from dcache.kernels.backend import tl, triton, use_triton

SMALLEST_NORM = 1e-8
TILE = 2048  # elements of a row that a program reads at once


def cosine_ref(x: Tensor, y: Tensor) -> Tensor:
    """The torch twin of `cosine`."""
    rows = (z.transpose(1, 2).flatten(2) if z.dim() == 4 else z for z in (x, y))
    units, squares = [], []
    for row in rows:
        row = row.to(torch.float32)
        norm = row.norm(dim=-1, keepdim=True)
        units.append(row / norm.clamp_min(SMALLEST_NORM))
        squares.append((norm / SMALLEST_NORM).clamp_max(1).square())
    distance = (units[0] - units[1]).square().sum(-1, keepdim=True)
    cos: Tensor = (squares[0] + squares[1] - distance) / 2
    return cos.squeeze(-1)


def cosine_triton(x: Tensor, y: Tensor) -> Tensor:
    """The kernel of `cosine`."""
    x, y = (z if z.dim() == 4 else z[:, None] for z in (x, y))
    batch, heads, n, width = x.shape
    out = x.new_empty(batch, n, dtype=torch.float32)
    block_width = min(triton.next_power_of_2(width), TILE)
    block_heads = min(triton.next_power_of_2(heads), TILE // block_width)
    _cosine_kernel[(n, batch)](
        x,
        y,
        out,
        heads,
        width,
        *x.stride(),
        *y.stride(),
        SMALLEST=SMALLEST_NORM,
        BLOCK_HEADS=block_heads,
        BLOCK_WIDTH=block_width,
        num_warps=4,
    )
    return out


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Cosine of the rows of two tensors.

    Args:
        x: (batch, n, width) or (batch, heads, n, head_dim), any floating dtype.
        y: like `x`.

    Returns:
        (batch, n) float32.
    """
    return (cosine_triton if use_triton(x) else cosine_ref)(x, y)


@triton.jit
def _cosine_kernel(
    x,
    y,
    out,
    heads,
    width,
    stride_x_b,
    stride_x_h,
    stride_x_n,
    stride_x_w,
    stride_y_b,
    stride_y_h,
    stride_y_n,
    stride_y_w,
    SMALLEST: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    i_n, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    p_x, p_y = x + i_b * stride_x_b + i_n * stride_x_n, y + i_b * stride_y_b + i_n * stride_y_n
    b_xx = tl.zeros((BLOCK_HEADS, BLOCK_WIDTH), tl.float32)
    b_yy = tl.zeros((BLOCK_HEADS, BLOCK_WIDTH), tl.float32)
    for i_h in range(0, heads, BLOCK_HEADS):
        o_h = (i_h + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[:, None]
        for i_w in range(0, width, BLOCK_WIDTH):
            o_w = i_w + tl.arange(0, BLOCK_WIDTH)[None, :]
            m = (o_h < heads) & (o_w < width)
            b_x = tl.load(p_x + o_h * stride_x_h + o_w * stride_x_w, mask=m, other=0.0).to(tl.float32)
            b_y = tl.load(p_y + o_h * stride_y_h + o_w * stride_y_w, mask=m, other=0.0).to(tl.float32)
            b_xx += b_x * b_x
            b_yy += b_y * b_y
    norm_x, norm_y = tl.sqrt_rn(tl.sum(b_xx)), tl.sqrt_rn(tl.sum(b_yy))
    over_x, over_y = tl.maximum(norm_x, SMALLEST), tl.maximum(norm_y, SMALLEST)
    b_zz = tl.zeros((BLOCK_HEADS, BLOCK_WIDTH), tl.float32)
    for i_h in range(0, heads, BLOCK_HEADS):
        o_h = (i_h + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[:, None]
        for i_w in range(0, width, BLOCK_WIDTH):
            o_w = i_w + tl.arange(0, BLOCK_WIDTH)[None, :]
            m = (o_h < heads) & (o_w < width)
            b_x = tl.load(p_x + o_h * stride_x_h + o_w * stride_x_w, mask=m, other=0.0).to(tl.float32)
            b_y = tl.load(p_y + o_h * stride_y_h + o_w * stride_y_w, mask=m, other=0.0).to(tl.float32)
            b_z = b_x / over_x - b_y / over_y
            b_zz += b_z * b_z
    short_x, short_y = tl.minimum(norm_x / SMALLEST, 1.0), tl.minimum(norm_y / SMALLEST, 1.0)
    cos = (short_x * short_x + short_y * short_y - tl.sum(b_zz)) / 2
    tl.store(out + i_b * tl.num_programs(0) + i_n, cos)
