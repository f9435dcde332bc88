"""Attention probabilities themselves, for small sets of rows, and the sums that policies ask for.

``probs(q, k)[b, h, i, j] = softmax_j(q[b, h, i] . k[s(b), g(h), j] / sqrt(head_dim))``, 0 for hidden keys;
``received(q, k, weight)[b, j] = sum_{h, i} weight[b, i] p[b, h, i, j]``;
``head_mean(q, k)[b, i, j] = mean_h p[b, h, i, j]``;
``products(q, k)[b, i, j] = mean_h q[b, h, i] . k[s(b), g(h), j]``, without scale and softmax, 0 for hidden keys.

Lane b reads the keys of sequence ``s(b) = lanes[b]``, or b without lanes; query head h reads key/value head
``g(h) = h // (heads / kv_heads)``. Every result has one more column than there are keys, for the dump slot: always 0.
`head_mean` also gives the columns of chosen keys alone, ``out[b, i, c] = mean_h p[b, h, i, columns[b, c]]``, with the
softmax over all visible keys as before.

The softmax is taken in float32 whatever the dtype of the model. The twins materialise heads x rows x slots; that of
`received` for `ROWS_AT_ONCE` rows at a time, since policies ask for it over all rows of a sequence.

The kernels work on tiles of scores. A first one finds the log-sum-exp of every row, which the caller may know already;
a second one computes the scores again and has the probabilities at once. Where a result is a sum over heads, groups of
them make partial sums, which a last kernel adds in a fixed order. A hidden key spoils no score but its own, and that is
replaced. What they share stands in `scores`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dcache.kernels.attend import hide
from dcache.kernels.backend import tl, triton, use_triton
from dcache.kernels.scores import (
    LOG2E,
    PROGRAMS,
    SOME,
    arguments_of,
    joined,
    packed_rows,
    per_program,
    row_lse,
    row_of,
    seen,
    sequence_of,
    tile_of,
    vectors,
)

ROWS_AT_ONCE = 256


def probs_ref(q: Tensor, k: Tensor, visible: Tensor | None, lanes: Tensor | None = None) -> Tensor:
    """The torch twin of `probs`."""
    k = k if lanes is None else k.index_select(0, lanes)
    if visible is not None:
        k = hide(k, visible)
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, dim=1) if group > 1 else k
    score = (q @ k.transpose(-1, -2)).to(torch.float32) * q.shape[-1] ** -0.5
    if visible is not None:
        seen = visible.repeat_interleave(group, dim=1) if visible.shape[1] > 1 and group > 1 else visible
        score = score.masked_fill(~seen[:, :, None], float("-inf"))
    return pad(torch.softmax(score, -1), (0, 1))


def probs_triton(q: Tensor, k: Tensor, visible: Tensor | None, lanes: Tensor | None, lse: Tensor | None) -> Tensor:
    """Launch the kernels of `probs`."""
    common, (batch, heads, n, slots) = arguments_of(q, k, visible, lanes)
    lse = row_lse(q, k, common) if lse is None else lse.contiguous()[:, None]
    splits = lse.shape[1]
    out = torch.empty(batch, heads, n, slots + 1, dtype=torch.float32, device=q.device)
    packed = heads // k.shape[1] * n
    tile = tile_of("probs", packed, q)
    grid = (triton.cdiv(slots, tile["BLOCK_N"]), k.shape[1] * triton.cdiv(packed, tile["BLOCK_M"]), batch)
    _probs_kernel[grid](**common, **tile, lse=lse, splits=splits, out=out, BLOCK_S=triton.next_power_of_2(splits))
    return out


def probs(
    q: Tensor, k: Tensor, visible: Tensor | None = None, lanes: Tensor | None = None, lse: Tensor | None = None
) -> Tensor:
    """Attention probabilities of rows over stored keys.

    Args:
        q: (batch, heads, rows, head_dim).
        k: (sequences, kv_heads, slots, head_dim), dtype of `q`.
        visible: (batch, 1 or kv_heads, slots) bool, or None when every key is visible.
        lanes: (batch,) int64, the sequence of `k` that each lane reads; None when they are all of them, in order.
        lse: (batch, heads, rows) float32 log-sum-exp of the scaled scores over the visible keys, if the caller knows it
            from `attend_lse`: saves a pass over the keys. The twin, which has the scores anyway, ignores it.

    Returns:
        (batch, heads, rows, slots + 1) float32.
    """
    return probs_triton(q, k, visible, lanes, lse) if use_triton(q) else probs_ref(q, k, visible, lanes)


def received_ref(q: Tensor, k: Tensor, weight: Tensor, visible: Tensor | None, lanes: Tensor | None = None) -> Tensor:
    """The torch twin of `received`."""
    total = torch.zeros(q.shape[0], k.shape[2] + 1, device=k.device)
    for first in range(0, q.shape[2], ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        share = weight[:, rows].to(torch.float32)
        each = probs_ref(q[:, :, rows], k, visible, lanes).masked_fill((share == 0)[:, None, :, None], 0)
        total += torch.einsum("bhij,bi->bj", each, share)
    return total


def received_triton(
    q: Tensor,
    k: Tensor,
    weight: Tensor,
    visible: Tensor | None,
    lanes: Tensor | None,
    lse: Tensor | None,
    layers: int = 1,
) -> Tensor:
    """Launch the kernels of `received`."""
    common, (batch, heads, n, slots) = arguments_of(q, k, visible, lanes)
    lse = row_lse(q, k, common, weight, layers) if lse is None else lse.contiguous()[:, None]
    splits = lse.shape[1]
    packed = heads // k.shape[1] * n
    tile = tile_of("received", packed, q, layers)
    row_blocks, key_blocks = triton.cdiv(packed, tile["BLOCK_M"]), triton.cdiv(slots, tile["BLOCK_N"])
    per = per_program(row_blocks, key_blocks * k.shape[1])
    parts = triton.cdiv(row_blocks, per)
    partial = torch.empty(batch, k.shape[1] * parts, slots + 1, dtype=torch.float32, device=q.device)
    _received_kernel[(key_blocks, k.shape[1] * parts, batch)](
        **common,
        **tile,
        lse=lse,
        splits=splits,
        weight=weight,
        out=partial,
        parts=parts,
        per=per,
        weight_strides=weight.stride(),
        BLOCK_S=triton.next_power_of_2(splits),
        SKIPS=packed > SOME,
    )
    return _summed(partial)


def received(
    q: Tensor,
    k: Tensor,
    weight: Tensor,
    visible: Tensor | None = None,
    lanes: Tensor | None = None,
    lse: Tensor | None = None,
    layers: int = 1,
) -> Tensor:
    """Attention that each key receives, summed over heads and weighted rows.

    Args:
        q: (batch, heads, rows, head_dim).
        k: (sequences, kv_heads, slots, head_dim), dtype of `q`.
        weight: (batch, rows) bool or float; 0 for padded rows, which then add nothing, whatever they hold.
        visible: (batch, 1 or kv_heads, slots) bool, or None when every key is visible.
        lanes: as for `probs`.
        lse: as for `probs`.
        layers: how many layers the batch is made of, each with the same number of sequences.

    Returns:
        (batch, slots + 1) float32.
    """
    if use_triton(q):
        return received_triton(q, k, weight, visible, lanes, lse, layers)
    return received_ref(q, k, weight, visible, lanes)


def head_mean_ref(
    q: Tensor, k: Tensor, visible: Tensor | None, lanes: Tensor | None = None, columns: Tensor | None = None
) -> Tensor:
    """The torch twin of `head_mean`."""
    mean = probs_ref(q, k, visible, lanes).mean(1)
    return mean if columns is None else mean.gather(-1, columns[:, None].expand(-1, q.shape[2], -1))


def head_mean_triton(
    q: Tensor,
    k: Tensor,
    visible: Tensor | None,
    lanes: Tensor | None,
    lse: Tensor | None,
    columns: Tensor | None = None,
    layers: int = 1,
) -> Tensor:
    """Launch the kernels of `head_mean`."""
    common, _ = arguments_of(q, k, visible, lanes)
    lse = row_lse(q, k, common, layers=layers) if lse is None else lse.contiguous()[:, None]
    return _mean(q, k, common, lse, columns, layers)


def head_mean(
    q: Tensor,
    k: Tensor,
    visible: Tensor | None = None,
    lanes: Tensor | None = None,
    lse: Tensor | None = None,
    columns: Tensor | None = None,
    layers: int = 1,
) -> Tensor:
    """Attention rows averaged over heads.

    Args:
        q: (batch, heads, rows, head_dim).
        k: (sequences, kv_heads, slots, head_dim), dtype of `q`.
        visible: (batch, 1 or kv_heads, slots) bool, or None when every key is visible.
        lanes: as for `probs`.
        lse: as for `probs`.
        columns: (batch, m) int64 in 0..slots, the keys whose columns are wanted, where that of the dump slot is 0;
            None for all of them.
        layers: as for `received`.

    Returns:
        (batch, rows, slots + 1) float32, or (batch, rows, m) with `columns`.
    """
    if use_triton(q):
        return head_mean_triton(q, k, visible, lanes, lse, columns, layers)
    return head_mean_ref(q, k, visible, lanes, columns)


def products_ref(q: Tensor, k: Tensor, visible: Tensor | None, lanes: Tensor | None = None) -> Tensor:
    """The torch twin of `products`: a sum over heads of a group comes before the product with its key."""
    k = k if lanes is None else k.index_select(0, lanes)
    if visible is not None:
        k = hide(k, visible)
    grouped = q.to(torch.float32).reshape(q.shape[0], k.shape[1], q.shape[1] // k.shape[1], *q.shape[2:])
    summed = grouped.sum(2)  # (batch, kv_heads, rows, head_dim)
    return pad(torch.einsum("bgid,bgjd->bij", summed, k.to(torch.float32)) / q.shape[1], (0, 1))


def products_triton(q: Tensor, k: Tensor, visible: Tensor | None, lanes: Tensor | None) -> Tensor:
    """Launch the kernels of `products`, which add the heads of a group after the products: no sum is rounded."""
    common, _ = arguments_of(q, k, visible, lanes)
    return _mean(q, k, common, None)


def products(q: Tensor, k: Tensor, visible: Tensor | None = None, lanes: Tensor | None = None) -> Tensor:
    """Dot products of rows with stored keys, averaged over heads.

    Args:
        q: (batch, heads, rows, head_dim), dtype of `k` or float32.
        k: (sequences, kv_heads, slots, head_dim).
        visible: (batch, 1 or kv_heads, slots) bool, or None when every key is visible.
        lanes: as for `probs`.

    Returns:
        (batch, rows, slots + 1) float32.
    """
    return products_triton(q, k, visible, lanes) if use_triton(q) else products_ref(q, k, visible, lanes)


# -- launching --------------------------------------------------------------------------------------------------------


def _mean(
    q: Tensor,
    k: Tensor,
    common: dict[str, Any],
    lse: Tensor | None,
    columns: Tensor | None = None,
    layers: int = 1,
) -> Tensor:
    """Mean over heads of the probabilities, or of the bare products without `lse`: (batch, rows, slots + 1 or m)."""
    batch, heads, n, _ = q.shape
    wanted, wide = (k.shape[2], k.shape[2] + 1) if columns is None else (columns.shape[1], columns.shape[1])
    tile = tile_of("mean", n, q, layers)
    key_blocks = triton.cdiv(wanted, tile["BLOCK_N"])
    blocks = key_blocks * triton.cdiv(n, tile["BLOCK_M"])
    per = per_program(heads, blocks * layers)
    parts = triton.cdiv(heads, per)
    splits = 1 if lse is None else lse.shape[1]
    partial = torch.empty(batch, parts, n, wide, dtype=torch.float32, device=q.device)
    _mean_kernel[(blocks, parts, batch)](
        **common,
        **tile,
        lse=lse,
        splits=splits,
        columns=columns,
        columns_strides=(0, 0) if columns is None else columns.stride(),
        out=partial,
        wide=wide,
        per=per,
        key_blocks=key_blocks,
        BLOCK_S=triton.next_power_of_2(splits),
    )
    return _summed(partial)


def _summed(partial: Tensor) -> Tensor:
    """Sum over the parts of (batch, parts, ...) in their order."""
    batch, parts = partial.shape[:2]
    if parts == 1:
        return partial[:, 0]
    out = torch.empty(batch, *partial.shape[2:], dtype=torch.float32, device=partial.device)
    size = out[0].numel()
    block, at_once = (64, 32) if size < 64 * PROGRAMS else (256, 8)
    _sum_kernel[(triton.cdiv(size, block), batch)](partial, out, parts, size, BLOCK=block, BLOCK_P=at_once, num_warps=4)
    return out


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _store_rows(p_out, b_tile, o_m, m_m, i_n, o_n, slots):
    """Write a tile of (rows, slots + 1); with the first keys the column of the dump slot."""
    p_rows = p_out + o_m * (slots + 1)
    tl.store(p_rows[:, None] + o_n[None, :], b_tile, mask=m_m[:, None] & (o_n < slots)[None, :])
    if i_n == 0:
        tl.store(p_rows + slots, tl.zeros_like(o_m).to(tl.float32), mask=m_m)


@triton.jit
def _probs_kernel(
    q,
    k,
    visible,
    lanes,
    lse,
    out,
    n,
    slots,
    splits,
    scale,
    q_strides,
    k_strides,
    visible_strides,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """out[b, h, i, j] = exp(scale * q[b, h, i] . k[j] - lse[b, h, i]) for visible keys j, else 0; packed rows."""
    i_n, i_b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    row_blocks = tl.cdiv(GROUP * n, BLOCK_M)
    i_g, i_m = tl.program_id(1) // row_blocks, tl.program_id(1) % row_blocks
    o_m, o_d = i_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < GROUP * n
    p_q = packed_rows(q, q_strides, i_b, i_g * GROUP, o_m, n, GROUP)
    b_q = vectors(p_q[:, None], m_m[:, None], o_d[None, :], HEAD_DIM, BLOCK_D)
    p_k = k + sequence_of(lanes, i_b) * k_strides[0] + i_g * k_strides[1] + o_n * k_strides[2]
    b_k = vectors(p_k[None, :], (o_n < slots)[None, :], o_d[:, None], HEAD_DIM, BLOCK_D)
    m_n = seen(visible, i_b * visible_strides[0] + i_g * visible_strides[1], o_n, slots)
    b_lse = joined(lse + i_b * splits * HEADS * n, i_g * GROUP * n + o_m, m_m, HEADS * n, splits, BLOCK_S)
    b_score = tl.dot(b_q, b_k, input_precision="ieee") * (scale * LOG2E)
    b_p = tl.where(m_n[None, :], tl.exp2(b_score - b_lse[:, None]), 0.0)
    _store_rows(out + (i_b * HEADS + i_g * GROUP) * n * (slots + 1), b_p, o_m, m_m, i_n, o_n, slots)


@triton.jit
def _weighted(b_k, b_q, b_lse, b_weight, scale):
    """weight[i] p[i, j] of a tile of keys by rows."""
    b_score = tl.dot(b_k, b_q, input_precision="ieee") * (scale * LOG2E)
    return tl.exp2(b_score - b_lse[None, :]) * b_weight[None, :]


@triton.jit
def _received_kernel(
    q,
    k,
    visible,
    lanes,
    lse,
    weight,
    out,
    n,
    slots,
    splits,
    parts,
    per,
    scale,
    q_strides,
    k_strides,
    visible_strides,
    weight_strides,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SKIPS: tl.constexpr,
):
    """out[b, part, j] = sum over the packed rows of a part of weight[b, i] p[b, h, i, j], with keys by rows as tile.

    The keys of a program stay, the rows pass by.
    """
    i_n, i_part, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_g, i_first = i_part // parts, (i_part % parts) * per
    o_n, o_d = i_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    p_k = k + sequence_of(lanes, i_b) * k_strides[0] + i_g * k_strides[1] + o_n * k_strides[2]
    b_k = vectors(p_k[:, None], (o_n < slots)[:, None], o_d[None, :], HEAD_DIM, BLOCK_D)
    m_n = seen(visible, i_b * visible_strides[0] + i_g * visible_strides[1], o_n, slots)
    lse += i_b * splits * HEADS * n

    b_sum = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for i_m in range(i_first, tl.minimum(i_first + per, tl.cdiv(GROUP * n, BLOCK_M))):
        o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        p_weight = weight + i_b * weight_strides[0] + row_of(o_m, n, GROUP) * weight_strides[1]
        b_weight = tl.load(p_weight, mask=o_m < GROUP * n, other=0).to(tl.float32)
        m_m = b_weight != 0  # the others may hold anything
        p_q, o_r = packed_rows(q, q_strides, i_b, i_g * GROUP, o_m, n, GROUP)[None, :], i_g * GROUP * n + o_m
        if SKIPS:  # a policy may weight few of many rows
            if tl.max(m_m.to(tl.int32), 0) > 0:
                b_q = vectors(p_q, m_m[None, :], o_d[:, None], HEAD_DIM, BLOCK_D)
                b_lse = joined(lse, o_r, m_m, HEADS * n, splits, BLOCK_S)
                b_sum += _weighted(b_k, b_q, b_lse, b_weight, scale)
        else:
            b_q = vectors(p_q, m_m[None, :], o_d[:, None], HEAD_DIM, BLOCK_D)
            b_lse = joined(lse, o_r, m_m, HEADS * n, splits, BLOCK_S)
            b_sum += _weighted(b_k, b_q, b_lse, b_weight, scale)
    p_out = out + (i_b * tl.num_programs(1) + i_part) * (slots + 1)
    tl.store(p_out + o_n, tl.where(m_n, tl.sum(b_sum, 1), 0.0), mask=o_n < slots)
    if i_n == 0:
        tl.store(p_out + slots, 0.0)


@triton.jit
def _mean_kernel(
    q,
    k,
    visible,
    lanes,
    lse,
    columns,
    out,
    n,
    slots,
    splits,
    wide,
    per,
    key_blocks,
    scale,
    q_strides,
    k_strides,
    visible_strides,
    columns_strides,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """out[b, part, i, c] = 1 / heads * sum over the heads of a part of p[b, h, i, j], or without `lse` of q . k.

    Key j is c, or columns[b, c].
    """
    i_n, i_m = tl.program_id(0) % key_blocks, tl.program_id(0) // key_blocks
    i_part, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_m, o_c = i_m * BLOCK_M + tl.arange(0, BLOCK_M), i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_m = o_m < n
    if columns is None:
        o_n = o_c
    else:
        p_columns = columns + i_b * columns_strides[0] + o_c * columns_strides[1]
        o_n = tl.load(p_columns, mask=o_c < wide, other=slots)
    p_q = q + i_b * q_strides[0] + o_m * q_strides[2]
    p_k = k + sequence_of(lanes, i_b) * k_strides[0] + o_n * k_strides[2]

    b_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i_h in range(i_part * per, tl.minimum((i_part + 1) * per, HEADS)):
        b_q = vectors((p_q + i_h * q_strides[1])[:, None], m_m[:, None], o_d[None, :], HEAD_DIM, BLOCK_D)
        p_kh = (p_k + i_h // GROUP * k_strides[1])[None, :]
        b_k = vectors(p_kh, (o_n < slots)[None, :], o_d[:, None], HEAD_DIM, BLOCK_D)
        m_n = seen(visible, i_b * visible_strides[0] + i_h // GROUP * visible_strides[1], o_n, slots)
        if b_q.dtype == b_k.dtype:
            b_score = tl.dot(b_q, b_k, input_precision="ieee")
        else:  # float32 by half precision: three products lose two bits of the query
            b_score = tl.dot(b_q, b_k.to(tl.float32), input_precision="tf32x3")
        if lse is not None:
            b_lse = joined(lse + i_b * splits * HEADS * n, i_h * n + o_m, m_m, HEADS * n, splits, BLOCK_S)
            b_score = tl.exp2(b_score * (scale * LOG2E) - b_lse[:, None])
        b_sum += tl.where(m_n[None, :], b_score, 0.0)
    p_out = out + (i_b * tl.num_programs(1) + i_part) * n * wide
    if columns is None:
        _store_rows(p_out, b_sum / HEADS, o_m, m_m, i_n, o_n, slots)
    else:
        p_tile = p_out + o_m[:, None] * wide + o_c[None, :]
        tl.store(p_tile, b_sum / HEADS, mask=m_m[:, None] & (o_c < wide)[None, :])


@triton.jit
def _sum_kernel(partial, out, parts, size, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr):
    """out[b, j] = sum_part partial[b, part, j]."""
    i_b = tl.program_id(1).to(tl.int64)
    o_j, o_p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_P)
    p_partial = partial + i_b * parts * size + o_p[:, None].to(tl.int64) * size + o_j[None, :]
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for i_p in range(0, parts, BLOCK_P):
        m = (i_p + o_p < parts)[:, None] & (o_j < size)[None, :]
        b_sum += tl.sum(tl.load(p_partial + i_p * size, mask=m, other=0.0), 0)
    tl.store(out + i_b * size + o_j, b_sum, mask=o_j < size)
