"""Rotary position embedding, rotate-half convention, over the whole head.

``angle[i] = position * theta**(-2 i / head_dim)`` for ``i < head_dim / 2``, computed in float32; with
``x = [x1, x2]`` split in halves, ``y = [x1 cos - x2 sin, x2 cos + x1 sin]``.

Two published precisions exist (both give the same float32 result): LLaDA keeps cos and sin in float32, upcasts the
heads and casts the result back (`full_precision`); Dream rounds cos and sin to the compute dtype and stays there, so
every product and every sum is rounded. The kernels keep either order to the bit: they never fuse a product and a sum.

`rotary_scatter` is what a layer does between its fused projection and its attention: ``[q, k, v] = qkv + bias``, rotate
q and k, and write k and v to the stores at their rows.
"""

import torch
from torch import Tensor

from dcache.kernels.backend import tl, triton, use_triton
from dcache.kernels.rows import put_ref

TILE = 1024  # elements of heads that one program rotates: 1.83 us for 16 LLaDA rows on an H200, 2.13 with 2,048


def rotary_table(n_positions: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each (n_positions, head_dim / 2) float32."""
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    frequency = 1.0 / theta**exponent
    angle = torch.arange(n_positions, device=device, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotary_ref(x: Tensor, cos: Tensor, sin: Tensor, full_precision: bool) -> Tensor:
    """The torch twin of `rotary`."""
    kind = torch.float32 if full_precision else x.dtype
    cos, sin = cos.to(kind), sin.to(kind)
    x1, x2 = x.to(kind).chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


def rotary_triton(x: Tensor, cos: Tensor, sin: Tensor, full_precision: bool) -> Tensor:
    """The kernel of `rotary`."""
    batch, heads, n, head_dim = x.shape
    y = x.new_empty(batch, n, heads, head_dim).transpose(1, 2)
    cos, sin = (table.expand(batch, 1, n, head_dim // 2) for table in (cos, sin))
    block = _block_heads(heads, head_dim)
    _rotary_kernel[(n, triton.cdiv(heads, block), batch)](
        x,
        cos,
        sin,
        y,
        *x.stride(),
        *(cos.stride(i) for i in (0, 2, 3)),
        *(sin.stride(i) for i in (0, 2, 3)),
        HEADS=heads,
        HALF=head_dim // 2,
        FULL=full_precision,
        BLOCK_HEADS=block,
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
        num_warps=2,
        enable_fp_fusion=False,
    )
    return y


def rotary(x: Tensor, cos: Tensor, sin: Tensor, full_precision: bool) -> Tensor:
    """Rotate heads by the angles of their positions.

    Args:
        x: (batch, heads, rows, head_dim).
        cos: (batch or 1, 1, rows, head_dim / 2) float32: `rotary_table` rows at the positions of `x`.
        sin: like `cos`.
        full_precision: rotate in float32 and cast back.

    Returns:
        (batch, heads, rows, head_dim), dtype of `x`.
    """
    return (rotary_triton if use_triton(x) else rotary_ref)(x, cos, sin, full_precision)


def rotary_scatter_ref(
    qkv: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    cos: Tensor,
    sin: Tensor,
    full_precision: bool,
    k_store: Tensor,
    v_store: Tensor,
    lanes: Tensor | None = None,
    q_store: Tensor | None = None,
    positions: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The torch twin of `rotary_scatter`."""
    x = qkv if bias is None else qkv + bias
    x = x.reshape(*x.shape[:2], -1, k_store.shape[-1])  # (batch, n, heads + 2 * kv_heads, head_dim)
    at = (rows if positions is None else positions).clamp(max=len(cos) - 1)
    cos, sin = cos[at][:, :, None], sin[at][:, :, None]
    kv_heads = k_store.shape[1]
    q, k, v = torch.split(x, [x.shape[2] - 2 * kv_heads, kv_heads, kv_heads], dim=2)
    q, k = (rotary_ref(part, cos, sin, full_precision) for part in (q, k))
    q = (q if out is None else out.copy_(q)).transpose(1, 2)
    put_ref(k_store, rows, k.transpose(1, 2), lanes)
    put_ref(v_store, rows, v.transpose(1, 2), lanes)
    if q_store is not None:
        put_ref(q_store, rows, q, lanes)
    return q


def rotary_scatter_triton(
    qkv: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    cos: Tensor,
    sin: Tensor,
    full_precision: bool,
    k_store: Tensor,
    v_store: Tensor,
    lanes: Tensor | None = None,
    q_store: Tensor | None = None,
    positions: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The kernel of `rotary_scatter`."""
    (batch, n, width), (kv_heads, head_dim) = qkv.shape, k_store.shape[1::2]
    heads = width // head_dim - 2 * kv_heads
    q = qkv.new_empty(batch, n, heads, head_dim) if out is None else out
    assert q.is_contiguous()
    positions = rows if positions is None else positions
    block = _block_heads(heads + 2 * kv_heads, head_dim)
    _rotary_scatter_kernel[(n, triton.cdiv(heads + 2 * kv_heads, block), batch)](
        qkv,
        bias,
        rows,
        cos,
        sin,
        q,
        k_store,
        v_store,
        lanes,
        q_store,
        positions,
        len(cos) - 1,
        *qkv.stride()[:2],
        *rows.stride(),
        *positions.stride(),
        *k_store.stride()[:3],
        *v_store.stride()[:3],
        *((0, 0, 0) if q_store is None else q_store.stride()[:3]),
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=head_dim // 2,
        FULL=full_precision,
        BLOCK_HEADS=block,
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
        num_warps=2,
        enable_fp_fusion=False,
    )
    return q.transpose(1, 2)


def rotary_scatter(
    qkv: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    cos: Tensor,
    sin: Tensor,
    full_precision: bool,
    k_store: Tensor,
    v_store: Tensor,
    lanes: Tensor | None = None,
    q_store: Tensor | None = None,
    positions: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Rotate the queries and keys of a fused projection, and write keys and values to their stores.

    Args:
        qkv: (batch, n, (heads + 2 * kv_heads) * head_dim): queries, keys and values side by side, not yet rotated;
            the last axis contiguous, like that of every store.
        bias: ((heads + 2 * kv_heads) * head_dim,), dtype of `qkv`, added to it and rounded first; or None.
        rows: (batch, n) int64, the slots of the rows; repeated entries must be the dump slot.
        cos: (positions, head_dim / 2) float32, contiguous, from `rotary_table`; later positions turn by the last
            angle, so that the dump slot needs none.
        sin: like `cos`.
        full_precision: rotate in float32 and cast back.
        k_store: (sequences, kv_heads, slots, head_dim), dtype of `qkv`, overwritten at `rows` with rotated keys.
        v_store: like `k_store`, with the values.
        lanes: (batch,) int64, the sequence of the stores that each list of rows belongs to; None when they are all of
            them, in order.
        q_store: (sequences, heads, slots, head_dim), overwritten at `rows` with the result; or None.
        positions: (batch, n) int64, by which they are rotated; None when these are the slots.
        out: (batch, n, heads, head_dim), contiguous, dtype of `qkv`: where to write the result; or None.

    Returns:
        rotated queries (batch, heads, n, head_dim); a transposed view of (batch, n, heads, head_dim), which is `out`.
    """
    op = rotary_scatter_triton if use_triton(qkv) else rotary_scatter_ref
    return op(qkv, bias, rows, cos, sin, full_precision, k_store, v_store, lanes, q_store, positions, out)


def _block_heads(heads: int, head_dim: int) -> int:
    """Heads per program: a power of two."""
    block: int = min(triton.next_power_of_2(heads), max(TILE // triton.next_power_of_2(head_dim), 1))
    return block


@triton.jit
def _turn(b_x1, b_x2, b_cos, b_sin, FULL: tl.constexpr):
    """Both halves of the rotated heads, in the dtype of the given ones."""
    kind: tl.constexpr = tl.float32 if FULL else b_x1.dtype
    b_cos, b_sin = b_cos.to(kind).to(tl.float32), b_sin.to(kind).to(tl.float32)
    b_wide1, b_wide2 = b_x1.to(tl.float32), b_x2.to(tl.float32)
    b_cos1, b_sin2 = (b_wide1 * b_cos).to(kind).to(tl.float32), (b_wide2 * b_sin).to(kind).to(tl.float32)
    b_cos2, b_sin1 = (b_wide2 * b_cos).to(kind).to(tl.float32), (b_wide1 * b_sin).to(kind).to(tl.float32)
    return (b_cos1 - b_sin2).to(b_x1.dtype), (b_cos2 + b_sin1).to(b_x1.dtype)


@triton.jit
def _write(p_row, o_h, o_d, stride_h, b_1, b_2, m, HALF: tl.constexpr):
    """Both halves of heads `o_h` to a row."""
    p = p_row + o_h.to(tl.int64)[:, None] * stride_h + o_d[None, :]
    tl.store(p, b_1, mask=m)
    tl.store(p + HALF, b_2, mask=m)


@triton.jit
def _rotary_kernel(
    x,
    cos,
    sin,
    y,
    stride_x_b,
    stride_x_h,
    stride_x_n,
    stride_x_d,
    stride_cos_b,
    stride_cos_n,
    stride_cos_d,
    stride_sin_b,
    stride_sin_n,
    stride_sin_d,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    i_n, i_b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_h = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    o_d = tl.arange(0, BLOCK_HALF)
    m_d = o_d < HALF
    m = (o_h < HEADS)[:, None] & m_d[None, :]
    b_cos = tl.load(cos + i_b * stride_cos_b + i_n * stride_cos_n + o_d * stride_cos_d, mask=m_d, other=0.0)
    b_sin = tl.load(sin + i_b * stride_sin_b + i_n * stride_sin_n + o_d * stride_sin_d, mask=m_d, other=0.0)
    p_x = x + i_b * stride_x_b + i_n * stride_x_n
    p_x += o_h.to(tl.int64)[:, None] * stride_x_h + o_d[None, :] * stride_x_d
    b_x1 = tl.load(p_x, mask=m, other=0.0)
    b_x2 = tl.load(p_x + HALF * stride_x_d, mask=m, other=0.0)
    b_y1, b_y2 = _turn(b_x1, b_x2, b_cos[None, :], b_sin[None, :], FULL)
    _write(y + (i_b * tl.num_programs(0) + i_n) * (HEADS * 2 * HALF), o_h, o_d, 2 * HALF, b_y1, b_y2, m, HALF)


@triton.jit
def _rotary_scatter_kernel(
    qkv,
    bias,
    rows,
    cos,
    sin,
    q,
    k_store,
    v_store,
    lanes,
    q_store,
    positions,
    last_position,
    stride_qkv_b,
    stride_qkv_n,
    stride_rows_b,
    stride_rows_n,
    stride_positions_b,
    stride_positions_n,
    stride_k_b,
    stride_k_h,
    stride_k_n,
    stride_v_b,
    stride_v_h,
    stride_v_n,
    stride_q_b,
    stride_q_h,
    stride_q_n,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    i_n, i_b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_h = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)  # of q, k and v side by side
    o_d = tl.arange(0, BLOCK_HALF)
    m_d = o_d < HALF
    m = (o_h < HEADS + 2 * KV_HEADS)[:, None] & m_d[None, :]
    o_qkv = o_h[:, None] * (2 * HALF) + o_d[None, :]
    p_qkv = qkv + i_b * stride_qkv_b + i_n * stride_qkv_n + o_qkv
    b_x1 = tl.load(p_qkv, mask=m, other=0.0)
    b_x2 = tl.load(p_qkv + HALF, mask=m, other=0.0)
    if bias is not None:
        b_bias1 = tl.load(bias + o_qkv, mask=m, other=0.0)
        b_bias2 = tl.load(bias + o_qkv + HALF, mask=m, other=0.0)
        b_x1 = (b_x1.to(tl.float32) + b_bias1.to(tl.float32)).to(q.dtype.element_ty)
        b_x2 = (b_x2.to(tl.float32) + b_bias2.to(tl.float32)).to(q.dtype.element_ty)

    i_slot = tl.load(rows + i_b * stride_rows_b + i_n * stride_rows_n)
    i_lane = i_b
    if lanes is not None:
        i_lane = tl.load(lanes + i_b)
    i_position = tl.load(positions + i_b * stride_positions_b + i_n * stride_positions_n)
    p_angle = tl.minimum(i_position, last_position) * HALF + o_d
    b_cos = tl.load(cos + p_angle, mask=m_d, other=0.0)
    b_sin = tl.load(sin + p_angle, mask=m_d, other=0.0)
    b_y1, b_y2 = _turn(b_x1, b_x2, b_cos[None, :], b_sin[None, :], FULL)

    m_q = (o_h < HEADS)[:, None] & m_d[None, :]
    _write(q + (i_b * tl.num_programs(0) + i_n) * (HEADS * 2 * HALF), o_h, o_d, 2 * HALF, b_y1, b_y2, m_q, HALF)
    if q_store is not None:
        p_kept = q_store + i_lane * stride_q_b + i_slot * stride_q_n
        _write(p_kept, o_h, o_d, stride_q_h, b_y1, b_y2, m_q, HALF)
    m_k = ((o_h >= HEADS) & (o_h < HEADS + KV_HEADS))[:, None] & m_d[None, :]
    p_k = k_store + i_lane * stride_k_b + i_slot * stride_k_n
    _write(p_k, o_h - HEADS, o_d, stride_k_h, b_y1, b_y2, m_k, HALF)
    m_v = (o_h >= HEADS + KV_HEADS)[:, None] & m
    p_v = v_store + i_lane * stride_v_b + i_slot * stride_v_n
    _write(p_v, o_h - HEADS - KV_HEADS, o_d, stride_v_h, b_x1, b_x2, m_v, HALF)
