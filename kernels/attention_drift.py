"""Similarity of the attention of some rows before and after their step wrote keys, without either map in memory.

`remember` keeps what a write takes away: the queries of then, the log-sum-exps of their scores, and the keys at the
rows that are going to be written. `attention_drift` then has ``drift(probs(q of then, keys of then), probs(q, k))`` as
`drift` defines it, at the price of reading the stored keys once: both maps are made tile by tile, of one load where a
key is what it was, and what a tile adds to the cosines is all that is kept. Written keys have tiles of their own.

Over heads, a program has a tile of keys and rows and goes through the heads; ``a.b``, ``a.a`` and ``b.b`` of every pair
of a row and a key stay in registers. In the other variants a program has rows of a head and goes through the keys.
Tiles are keys by rows, so that there are enough keys for the tensor cores where rows are few.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcache.kernels.attention_probs import probs_ref
from dcache.kernels.backend import tl, triton, use_triton
from dcache.kernels.drift import cosine_of, drift_ref, mean_cosine
from dcache.kernels.scores import LOG2E, arguments_of, joined, row_lse, seen, sequence_of, side, vectors

ROWS, KEYS, WARPS, STAGES = 32, 64, 4, 3  # of a tile; of a program


class Past(NamedTuple):
    """Attention of some rows as it was: see `remember`.

    Attributes:
        q: (batch, heads, n, head_dim).
        lse: (batch, splits, heads, n) float32, or None where torch computes.
        k: (batch, kv_heads, m, head_dim), the keys of then at `rows`.
        rows: (batch / layers, m) int64, the same in every layer; padding is out of range.
    """

    q: Tensor
    lse: Tensor | None
    k: Tensor
    rows: Tensor


def remember(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    kept: Tensor,
    visible: Tensor | None = None,
    lanes: Tensor | None = None,
    layers: int = 1,
) -> Past:
    """What `attention_drift` needs of the time before a write.

    Args:
        q: (batch, heads, n, head_dim).
        k: (sequences, kv_heads, slots, head_dim), dtype of `q`.
        rows: (batch / layers, m) int64, where keys are going to be written, in every layer, padded with `slots`.
        kept: (batch, kv_heads, m, head_dim), the keys at `rows`.
        visible: (batch, 1 or kv_heads, slots) bool, or None when every key is visible.
        lanes: (batch,) int64, the sequence of `k` that each lane reads; None when they are all of them, in order.
        layers: how many layers the batch is made of, each with the same number of sequences.
    """
    lse = row_lse(q, k, arguments_of(q, k, visible, lanes)[0], layers=layers) if use_triton(q) else None
    return Past(q, lse, kept, rows)


def attention_drift_ref(
    past: Past, q: Tensor, k: Tensor, real: Tensor, visible: Tensor | None, lanes: Tensor | None, over: str
) -> Tensor:
    """The torch twin of `attention_drift`."""
    now = k if lanes is None else k.index_select(0, lanes)
    rows = past.rows.repeat(len(q) // len(past.rows), 1)[:, None, :, None].expand(past.k.shape)
    then = torch.cat([now, now[:, :, :1]], 2).scatter(2, rows, past.k)[:, :, :-1]  # one more for the padding
    return drift_ref(probs_ref(past.q, then, visible), probs_ref(q, now, visible), real, visible, over)


def attention_drift_triton(
    past: Past,
    q: Tensor,
    k: Tensor,
    real: Tensor,
    visible: Tensor | None,
    lanes: Tensor | None,
    over: str,
    lse: Tensor | None,
    layers: int = 1,
) -> Tensor:
    """Launch the kernels of `attention_drift`."""
    common, (batch, heads, n, slots) = arguments_of(q, k, visible, lanes)
    assert past.lse is not None
    now = row_lse(q, k, common, layers=layers) if lse is None else lse.contiguous()[:, None]
    written = torch.zeros(len(past.rows), slots + 1, dtype=torch.uint8, device=q.device)
    written.scatter_(1, past.rows, 1)
    given: dict[str, Any] = {
        **common,
        "then_q": past.q,
        "then_k": past.k,
        "then_lse": past.lse,
        "lse": now,
        "written": written,
        "rows": past.rows.contiguous(),
        "sequences": len(written),
        "m": past.rows.shape[1],
        "then_splits": past.lse.shape[1],
        "splits": now.shape[1],
        "then_q_strides": past.q.stride()[:3],
        "then_k_strides": past.k.stride()[:3],
        "BLOCK_S": triton.next_power_of_2(now.shape[1]),
        "THEN_BLOCK_S": triton.next_power_of_2(past.lse.shape[1]),
        "BLOCK_M": min(ROWS, side(n)),
        "BLOCK_N": KEYS if side(q.shape[-1]) * q.element_size() <= 256 else KEYS // 2,
        "num_warps": WARPS,
        "num_stages": STAGES if q.element_size() <= 2 else 1,
    }
    row_blocks = triton.cdiv(n, given["BLOCK_M"])
    if over == "heads":
        parts = sum(triton.cdiv(keys, given["BLOCK_N"]) for keys in (slots, given["m"]))
        part = torch.empty(batch, n, parts, 1, dtype=torch.float32, device=q.device)
        _heads_kernel[(parts, row_blocks, batch)](**given, part=part, STAGES=given["num_stages"])
    else:
        part = torch.empty(batch, n, heads, 3, dtype=torch.float32, device=q.device)
        _rows_kernel[(heads, row_blocks, batch)](**given, part=part)
    return mean_cosine(part, real.contiguous(), visible, slots, over)


def attention_drift(
    past: Past,
    q: Tensor,
    k: Tensor,
    real: Tensor,
    visible: Tensor | None = None,
    lanes: Tensor | None = None,
    over: str = "heads",
    lse: Tensor | None = None,
    layers: int = 1,
) -> Tensor:
    """Mean cosine similarity of attention before and after a write.

    Args:
        past: what `remember` kept of the same rows.
        q: (batch, heads, n, head_dim), their queries now.
        k: (sequences, kv_heads, slots, head_dim), dtype of `q`; written since at `past.rows` and nowhere else.
        real: (batch, n) bool; False for padding.
        visible: as for `remember`, and the same.
        lanes: as for `remember`, and the same.
        over: "heads", "rows" or "flat": see `drift`.
        lse: (batch, heads, n) float32 log-sum-exp of the scaled scores of now, if the caller knows it; saves another
            pass over the keys.
        layers: as for `remember`.

    Returns:
        (batch,) float32 in 0..1; NaN where no row is real.
    """
    if use_triton(q):
        return attention_drift_triton(past, q, k, real, visible, lanes, over, lse, layers)
    return attention_drift_ref(past, q, k, real, visible, lanes, over)


@triton.jit
def _chances(b_k, b_q, b_lse, m_n, scale):
    """Probabilities (keys, rows) from keys (keys, head_dim), queries (head_dim, rows) and log-sum-exps; 0 if hidden."""
    b_score = tl.dot(b_k, b_q, input_precision="ieee") * (scale * LOG2E)
    return tl.where(m_n[:, None], tl.exp2(b_score - b_lse[None, :]), 0.0)


@triton.jit
def _same(written, i_b, sequences, o_n, slots):
    """Which keys of a tile exist and are what they were."""
    m_k = o_n < slots
    return m_k & (tl.load(written + (i_b % sequences) * (slots + 1) + o_n, mask=m_k, other=1) == 0)


@triton.jit
def _cosines(
    p_k,
    p_then_k,
    p_q,
    p_then_q,
    lse,
    then_lse,
    visible,
    o_n,
    m_k,
    o_m,
    m_m,
    n,
    slots,
    splits,
    then_splits,
    scale,
    k_step,
    then_k_step,
    q_step,
    then_q_step,
    visible_step,
    SAME: tl.constexpr,
    STAGES: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    THEN_BLOCK_S: tl.constexpr,
):
    """Sum over the visible keys of a tile of cos(then[:, i, j], now[:, i, j]) over heads, for its rows; keys o_n."""
    o_d = tl.arange(0, BLOCK_D)
    b_both = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    b_old, b_new = tl.zeros_like(b_both), tl.zeros_like(b_both)
    for i_h in tl.range(HEADS, num_stages=STAGES if SAME else 1):  # few tiles are not the same, and shared memory is
        i_g = i_h // GROUP
        m_n = m_k & seen(visible, i_g * visible_step, o_n, slots)
        b_k = vectors((p_k + i_g * k_step)[:, None], m_k[:, None], o_d[None, :], HEAD_DIM, BLOCK_D)
        b_q = vectors((p_q + i_h * q_step)[None, :], m_m[None, :], o_d[:, None], HEAD_DIM, BLOCK_D)
        b_lse = joined(lse, i_h * n + o_m, m_m, HEADS * n, splits, BLOCK_S)
        b_now = _chances(b_k, b_q, b_lse, m_n, scale)
        if not SAME:
            b_k = vectors((p_then_k + i_g * then_k_step)[:, None], m_k[:, None], o_d[None, :], HEAD_DIM, BLOCK_D)
        b_q = vectors((p_then_q + i_h * then_q_step)[None, :], m_m[None, :], o_d[:, None], HEAD_DIM, BLOCK_D)
        b_lse = joined(then_lse, i_h * n + o_m, m_m, HEADS * n, then_splits, THEN_BLOCK_S)
        b_then = _chances(b_k, b_q, b_lse, m_n, scale)
        b_both += b_then * b_now
        b_old += b_then * b_then
        b_new += b_now * b_now
    m_n = m_k & seen(visible, 0, o_n, slots)
    return tl.sum(tl.where(m_n[:, None], cosine_of(b_both, b_old, b_new), 0.0), 0)


@triton.jit
def _heads_kernel(
    q,
    k,
    visible,
    lanes,
    then_q,
    then_k,
    then_lse,
    lse,
    written,
    rows,
    part,
    n,
    m,
    slots,
    sequences,
    then_splits,
    splits,
    scale,
    q_strides,
    k_strides,
    then_q_strides,
    then_k_strides,
    visible_strides,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    THEN_BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
):
    """part[b, i, block] = sum over the visible keys j of a block of cos(then[b, :, i, j], now[b, :, i, j]).

    The last blocks are those of the written keys, which the others pass over.
    """
    i_n, i_m, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_n, o_m = tl.arange(0, BLOCK_N), i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < n
    p_k = k + sequence_of(lanes, i_b) * k_strides[0]
    p_q = q + i_b * q_strides[0] + o_m * q_strides[2]
    p_then_q = then_q + i_b * then_q_strides[0] + o_m * then_q_strides[2]
    lse += i_b * splits * HEADS * n
    then_lse += i_b * then_splits * HEADS * n
    if visible is not None:
        visible += i_b * visible_strides[0]
    i_written = i_n - tl.cdiv(slots, BLOCK_N)
    if i_written < 0:
        o_slot = o_n + i_n * BLOCK_N
        p_now = p_k + o_slot * k_strides[2]
        b_sum = _cosines(
            *(p_now, p_now, p_q, p_then_q, lse, then_lse, visible),
            *(o_slot, _same(written, i_b, sequences, o_slot, slots), o_m, m_m, n, slots, splits, then_splits, scale),
            *(k_strides[1], k_strides[1], q_strides[1], then_q_strides[1], visible_strides[1]),
            *(True, STAGES, HEADS, GROUP, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_S, THEN_BLOCK_S),
        )
    else:
        o_row = o_n + i_written * BLOCK_N
        o_written = tl.load(rows + (i_b % sequences) * m + o_row, mask=o_row < m, other=slots)
        p_then_k = then_k + i_b * then_k_strides[0] + o_row * then_k_strides[2]
        b_sum = _cosines(
            *(p_k + o_written * k_strides[2], p_then_k, p_q, p_then_q, lse, then_lse, visible),
            *(o_written, o_written < slots, o_m, m_m, n, slots, splits, then_splits, scale),
            *(k_strides[1], then_k_strides[1], q_strides[1], then_q_strides[1], visible_strides[1]),
            *(False, STAGES, HEADS, GROUP, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_S, THEN_BLOCK_S),
        )
    tl.store(part + (i_b * n + o_m) * tl.num_programs(0) + i_n, b_sum, mask=m_m)


@triton.jit
def _rows_kernel(
    q,
    k,
    visible,
    lanes,
    then_q,
    then_k,
    then_lse,
    lse,
    written,
    rows,
    part,
    n,
    m,
    slots,
    sequences,
    then_splits,
    splits,
    scale,
    q_strides,
    k_strides,
    then_q_strides,
    then_k_strides,
    visible_strides,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    THEN_BLOCK_S: tl.constexpr,
):
    """part[b, i, h] = (then . now, then . then, now . now) over the keys of a row of a head."""
    i_h, i_m, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_g = i_h // GROUP
    o_m, o_d = i_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    m_m = o_m < n
    p_q = q + i_b * q_strides[0] + i_h * q_strides[1] + o_m * q_strides[2]
    p_then_q = then_q + i_b * then_q_strides[0] + i_h * then_q_strides[1] + o_m * then_q_strides[2]
    b_q = vectors(p_q[None, :], m_m[None, :], o_d[:, None], HEAD_DIM, BLOCK_D)
    b_then_q = vectors(p_then_q[None, :], m_m[None, :], o_d[:, None], HEAD_DIM, BLOCK_D)
    o_r = i_h * n + o_m
    b_lse = joined(lse + i_b * splits * HEADS * n, o_r, m_m, HEADS * n, splits, BLOCK_S)
    b_then_lse = joined(then_lse + i_b * then_splits * HEADS * n, o_r, m_m, HEADS * n, then_splits, THEN_BLOCK_S)
    p_k = k + sequence_of(lanes, i_b) * k_strides[0] + i_g * k_strides[1]
    p_then_k = then_k + i_b * then_k_strides[0] + i_g * then_k_strides[1]
    visible_g = i_b * visible_strides[0] + i_g * visible_strides[1]

    b_both = tl.zeros((BLOCK_M,), tl.float32)
    b_old, b_new = tl.zeros_like(b_both), tl.zeros_like(b_both)
    for i_n in range(0, slots, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = _same(written, i_b, sequences, o_n, slots) & seen(visible, visible_g, o_n, slots)
        p_tile = (p_k + o_n * k_strides[2])[:, None]
        b_k = vectors(p_tile, m_n[:, None], o_d[None, :], HEAD_DIM, BLOCK_D)
        b_now = _chances(b_k, b_q, b_lse, m_n, scale)
        b_then = _chances(b_k, b_then_q, b_then_lse, m_n, scale)
        b_both += tl.sum(b_then * b_now, 0)
        b_old += tl.sum(b_then * b_then, 0)
        b_new += tl.sum(b_now * b_now, 0)
    for i_n in range(0, m, BLOCK_N):  # written keys
        o_n = i_n + tl.arange(0, BLOCK_N)
        o_slot = tl.load(rows + (i_b % sequences) * m + o_n, mask=o_n < m, other=slots)
        m_n = (o_slot < slots) & seen(visible, visible_g, o_slot, slots)
        p_tile, p_then_tile = (p_k + o_slot * k_strides[2])[:, None], (p_then_k + o_n * then_k_strides[2])[:, None]
        b_k = vectors(p_tile, m_n[:, None], o_d[None, :], HEAD_DIM, BLOCK_D)
        b_now = _chances(b_k, b_q, b_lse, m_n, scale)
        b_k = vectors(p_then_tile, m_n[:, None], o_d[None, :], HEAD_DIM, BLOCK_D)
        b_then = _chances(b_k, b_then_q, b_then_lse, m_n, scale)
        b_both += tl.sum(b_then * b_now, 0)
        b_old += tl.sum(b_then * b_then, 0)
        b_new += tl.sum(b_now * b_now, 0)
    p_part = part + ((i_b * n + o_m) * HEADS + i_h) * 3
    tl.store(p_part, b_both, mask=m_m)
    tl.store(p_part + 1, b_old, mask=m_m)
    tl.store(p_part + 2, b_new, mask=m_m)
