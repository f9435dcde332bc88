"""Bidirectional attention of some rows over the key/value store.

``o[b, h, i] = sum_j p[b, h, i, j] v[b, g(h), j]`` with ``p = softmax_j(q[b, h, i] . k[b, g(h), j] / sqrt(head_dim))``
over the visible keys ``j``, where query head ``h`` reads key/value head ``g(h) = h // (heads / kv_heads)``, and
``lse[b, h, i] = log sum_j exp(q[b, h, i] . k[b, g(h), j] / sqrt(head_dim))``.

A hidden key may hold anything, NaN included, so it is never multiplied by zero. The twin selects it away: scores are
replaced before the softmax, and hidden keys and values by zeros (torch's attention returns NaN for a NaN in a hidden
key, whatever the mask says). The kernel reads the visible keys alone, by a list of their slots.

Few rows leave most of the GPU idle, so several programs share the keys of one row. Each gives the softmax average over
its part and the ``lse`` of that part, and ``o = sum_s exp(lse_s - lse) o_s`` with ``lse = log sum_s exp(lse_s)``.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dcache.kernels.backend import tl, triton, use_triton

# From this many rows on cuDNN's attention runs where all keys are visible and all sequences take part: for 1,280 LLaDA
# rows on an H200 it takes 54 us, this kernel 68, torch's flash attention 104; for 256 rows 22, 18 and 31.
SDPA_ROWS = 512
PROGRAMS = 132  # how many programs the split over keys aims at: one for each multiprocessor of an H200
MOST_SPLITS = 64
SDPA_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


@dataclass(frozen=True)
class Keys:
    """The visible keys as lists: see `visible_keys`.

    Attributes:
        index: (..., 1 or kv_heads, slots) int32, the visible slots ascending; what follows them is any slot.
        count: (..., 1 or kv_heads) int32, how many are visible.
    """

    index: Tensor
    count: Tensor


class Tiles(NamedTuple):
    """How the kernel divides its work.

    Attributes:
        block_m: pairs of a row and a query head per program.
        block_n: keys per step of its loop.
        warps: per program.
        stages: loads in flight.
        splits: programs that share the keys.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    splits: int


def hide(x: Tensor, visible: Tensor) -> Tensor:
    """Zero the hidden rows of `x` (batch, kv_heads, slots, head_dim); `visible` (batch, 1 or kv_heads, slots)."""
    return x.masked_fill(~visible[..., None], 0)


def visible_keys_ref(visible: Tensor) -> Keys:
    """The torch twin of `visible_keys`."""
    order = (~visible).byte().sort(dim=-1, stable=True).indices
    return Keys(order.int(), visible.sum(-1, dtype=torch.int32))


def visible_keys_triton(visible: Tensor) -> Keys:
    """The Triton launch of `visible_keys`."""
    slots = visible.shape[-1]
    index = torch.empty(visible.shape, dtype=torch.int32, device=visible.device)
    count = torch.empty(visible.shape[:-1], dtype=torch.int32, device=visible.device)
    block = min(triton.next_power_of_2(slots), 4096)
    mask = visible.contiguous().view(torch.uint8)
    _visible_keys_kernel[(count.numel(),)](mask, index, count, slots, BLOCK=block, num_warps=max(1, block // 512))
    return Keys(index, count)


def visible_keys(visible: Tensor) -> Keys:
    """Lists of the visible keys, for any number of layers and sequences at once.

    Args:
        visible: (..., 1 or kv_heads, slots) bool.
    """
    return visible_keys_triton(visible) if use_triton(visible) else visible_keys_ref(visible)


def attend_ref(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None, lanes: Tensor | None = None) -> Tensor:
    """The torch twin of `attend`."""
    if lanes is not None:
        k, v = k.index_select(0, lanes), v.index_select(0, lanes)
    grouped = q.shape[1] != k.shape[1]
    if visible is None:
        return _by_row(scaled_dot_product_attention(q, k, v, enable_gqa=grouped))
    k, v = hide(k, visible), hide(v, visible)
    mask = visible
    if mask.shape[1] not in (1, q.shape[1]):
        mask = mask.repeat_interleave(q.shape[1] // mask.shape[1], dim=1)
    return _by_row(scaled_dot_product_attention(q, k, v, attn_mask=mask[:, :, None], enable_gqa=grouped))


def attend_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None = None,
    lanes: Tensor | None = None,
    keys: Keys | None = None,
) -> Tensor:
    """The Triton launch of `attend`."""
    return _launch(q, k, v, _listed(visible, keys), lanes, want_lse=False)[0]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None = None,
    lanes: Tensor | None = None,
    keys: Keys | None = None,
) -> Tensor:
    """Attention of rows over stored keys.

    Args:
        q: (batch, heads, rows, head_dim).
        k: (sequences, kv_heads, slots, head_dim), after rotary embedding.
        v: (sequences, kv_heads, slots, head_dim).
        visible: (batch, 1 or kv_heads, slots) bool; None when every key is visible. A row of False only gives
            zeros or NaN, by backend: give each sequence at least one visible key.
        lanes: (batch,) int64, which sequence each row of the batch is; None when they are all of them in order.
        keys: `visible_keys` of `visible`, for a caller that has it already.

    Returns:
        (batch, heads, rows, head_dim), dtype of `q`; in memory (batch, rows, heads, head_dim).
    """
    if not use_triton(q):
        return attend_ref(q, k, v, visible, lanes)
    if finds_lse(q, visible, lanes):
        return attend_triton(q, k, v, visible, lanes, keys)
    with sdpa_kernel(SDPA_BACKENDS, set_priority=True):
        return attend_ref(q, k, v)


def finds_lse(q: Tensor, visible: Tensor | None, lanes: Tensor | None) -> bool:
    """Whether `attend` runs its kernel for these, so that `attend_lse` gives the same and costs no more."""
    library = q.shape[2] >= SDPA_ROWS and visible is None and lanes is None and q.dtype != torch.float32
    return use_triton(q) and not library


def attend_lse_ref(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None, lanes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The torch twin of `attend_lse`."""
    o = attend_ref(q, k, v, visible, lanes)
    if lanes is not None:
        k = k.index_select(0, lanes)
    if visible is not None:
        k = hide(k, visible)
    grouped = q.float().reshape(len(q), k.shape[1], -1, *q.shape[2:])  # (batch, kv_heads, group, rows, head_dim)
    score = grouped @ k.float()[:, :, None].transpose(-1, -2) / math.sqrt(q.shape[-1])
    if visible is not None:
        score = score.masked_fill(~visible[:, :, None, None], float("-inf"))
    return o, score.logsumexp(-1).flatten(1, 2)


def attend_lse_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None = None,
    lanes: Tensor | None = None,
    keys: Keys | None = None,
) -> tuple[Tensor, Tensor]:
    """The Triton launch of `attend_lse`."""
    o, lse = _launch(q, k, v, _listed(visible, keys), lanes, want_lse=True)
    assert lse is not None
    return o, lse


def attend_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None = None,
    lanes: Tensor | None = None,
    keys: Keys | None = None,
) -> tuple[Tensor, Tensor]:
    """`attend`, and the logarithm of the sum in its softmax.

    Returns:
        what `attend` returns, and ``lse`` (batch, heads, rows) float32.
    """
    if use_triton(q):
        return attend_lse_triton(q, k, v, visible, lanes, keys)
    return attend_lse_ref(q, k, v, visible, lanes)


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


def _by_row(o: Tensor) -> Tensor:
    """`o` (batch, heads, rows, head_dim) with the memory of (batch, rows, heads, head_dim)."""
    return o.transpose(1, 2).contiguous().transpose(1, 2)


def _listed(visible: Tensor | None, keys: Keys | None) -> Keys | None:
    if keys is None and visible is not None:
        return visible_keys_triton(visible)
    return keys


def _tiles(batch: int, kv_heads: int, pairs: int, slots: int, item_bytes: int, listed: bool) -> Tiles:
    """A fixed rule of the shape, since it decides the order of sums; `pairs` = rows * heads / kv_heads.

    A slot of a list is loaded before its key, so that five stages keep as many keys in flight as three do otherwise.
    """
    if item_bytes > 2:  # no tensor cores: these tiles fit the registers (32 x 32 by 4 warps spills)
        block_m, block_n, warps, stages = min(32, max(16, triton.next_power_of_2(pairs))), 32, 8, 2
    else:
        block_m, block_n, warps, stages = min(64, max(16, triton.next_power_of_2(pairs))), 64, 4, 5 if listed else 3
    programs = batch * kv_heads * triton.cdiv(pairs, block_m)
    if PROGRAMS // 2 < programs <= PROGRAMS and item_bytes <= 2 and not listed:
        block_n = 128  # one program on a multiprocessor: longer steps wait less often, 16.5 us instead of 17.8
    blocks = triton.cdiv(slots, block_n)
    share = triton.cdiv(blocks, min(MOST_SPLITS, max(1, PROGRAMS // programs)))
    return Tiles(block_m, block_n, warps, stages, splits=triton.cdiv(blocks, share))


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Keys | None,
    lanes: Tensor | None,
    want_lse: bool,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor | None]:
    batch, heads, n, dim = q.shape
    kv_heads, slots = k.shape[1:3]
    assert q.stride(3) == k.stride(3) == v.stride(3) == 1
    group = heads // kv_heads
    tiles = tiles or _tiles(batch, kv_heads, n * group, slots, q.element_size(), keys is not None)
    splits, block_d = tiles.splits, max(16, triton.next_power_of_2(dim))
    o = torch.empty(batch, n, heads, dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, n, dtype=torch.float32, device=q.device) if want_lse else None
    part_o, part_lse = o, lse
    if splits > 1:
        part_o = torch.empty(batch, n, heads, splits, dim, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(batch, heads, n, splits, dtype=torch.float32, device=q.device)
    index, count = (keys.index, keys.count) if keys is not None else (None, None)
    grid = (triton.cdiv(n * group, tiles.block_m), splits, batch * kv_heads)
    _attend_kernel[grid](
        *(q, k, v, index, count, lanes, part_o, part_lse),
        *(math.log2(math.e) / math.sqrt(dim), n, slots, heads, splits),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
        *(*_list_strides(index, 3), *_list_strides(count, 2)),
        GROUP=group,
        DIM=dim,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_D=block_d,
        EVEN=keys is None and slots % tiles.block_n == 0 and dim == block_d,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if splits > 1:
        block_s = triton.next_power_of_2(splits)
        warps = min(8, max(1, block_s * block_d // 1024))
        _combine_kernel[(batch * n * heads,)](
            *(part_o, part_lse, o, lse, n, heads, splits), DIM=dim, BLOCK_S=block_s, BLOCK_D=block_d, num_warps=warps
        )
    return o.transpose(1, 2), lse


def _list_strides(x: Tensor | None, dims: int) -> tuple[int, int]:
    """Strides over sequences and key/value heads of a part of `Keys` with `dims` dimensions."""
    if x is None:
        return 0, 0
    assert x.dim() == dims
    return x.stride(0), x.stride(1) if x.shape[1] > 1 else 0


@triton.jit
def _visible_keys_kernel(visible, index, count, slots, BLOCK: tl.constexpr):
    """One row of the mask. Hidden slots write a zero each, from the end of the list, so that all of it is written."""
    i_row = tl.program_id(0).to(tl.int64)
    p_visible, p_index = visible + i_row * slots, index + i_row * slots
    n_seen = 0
    for i_start in range(0, slots, BLOCK):
        o_slot = i_start + tl.arange(0, BLOCK)
        m_slot = o_slot < slots
        b_seen = (tl.load(p_visible + o_slot, mask=m_slot, other=0) != 0).to(tl.int32)
        b_before = n_seen + tl.cumsum(b_seen, 0) - b_seen
        b_place = tl.where(b_seen != 0, b_before, slots - 1 - (o_slot - b_before))
        tl.store(p_index + b_place, b_seen * o_slot, mask=m_slot)
        n_seen += tl.sum(b_seen, 0)
    tl.store(count + i_row, n_seen)


@triton.jit
def _attend_kernel(
    q,
    k,
    v,
    index,
    count,
    lanes,
    o,
    lse,
    scale,
    n,
    slots,
    heads,
    splits,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_slot,
    v_batch,
    v_head,
    v_slot,
    index_batch,
    index_head,
    count_batch,
    count_head,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Some pairs (row, head of a group) over the `i_split`-th part of the keys of one key/value head.

    `scale` is log2(e) / sqrt(head_dim), so that the softmax takes powers of two. Without a key in its part, a program
    gives o = 0 and lse = -inf.
    """
    i_split, i_bh = tl.program_id(1), tl.program_id(2)
    i_b, i_h = (i_bh // (heads // GROUP)).to(tl.int64), i_bh % (heads // GROUP)
    i_seq = i_b
    if lanes is not None:
        i_seq = tl.load(lanes + i_b)
    o_m, o_d = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    o_row, o_head = o_m // GROUP, i_h * GROUP + o_m % GROUP
    m_m, m_d = o_m < n * GROUP, o_d < DIM
    p_q = q + i_b * q_batch + (o_head * q_head + o_row * q_row)[:, None] + o_d[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0)
    p_k, p_v = k + i_seq * k_batch + i_h * k_head, v + i_seq * v_batch + i_h * v_head

    n_keys = slots
    if index is not None:
        n_keys = tl.load(count + i_b * count_batch + i_h * count_head)
        index += i_b * index_batch + i_h * index_head
    share = tl.cdiv(tl.cdiv(n_keys, BLOCK_N), splits) * BLOCK_N
    stop = tl.minimum((i_split + 1) * share, n_keys)

    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i_n in range(i_split * share, stop, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < stop
        o_slot = o_n
        if index is not None:
            o_slot = tl.load(index + o_n, mask=m_n, other=0)
        if EVEN:
            b_k = tl.load(p_k + o_slot[:, None] * k_slot + o_d[None, :])
            b_v = tl.load(p_v + o_slot[:, None] * v_slot + o_d[None, :])
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        else:
            m_kv = m_n[:, None] & m_d[None, :]
            b_k = tl.load(p_k + o_slot[:, None] * k_slot + o_d[None, :], mask=m_kv, other=0.0)
            b_v = tl.load(p_v + o_slot[:, None] * v_slot + o_d[None, :], mask=m_kv, other=0.0)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
            b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_top = tl.maximum(b_max, tl.max(b_s, 1) * scale)  # finite: a step has at least one key
        b_p = tl.exp2(b_s * scale - b_top[:, None])
        b_fade = tl.exp2(b_max - b_top)
        b_sum = b_sum * b_fade + tl.sum(b_p, 1)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_fade[:, None], input_precision="ieee")
        b_max = b_top

    b_whole = tl.where(b_sum == 0, 1.0, b_sum)
    p_o = o + (((i_b * n + o_row) * heads + o_head) * splits + i_split)[:, None] * DIM + o_d[None, :]
    tl.store(p_o, b_o / b_whole[:, None], mask=m_m[:, None] & m_d[None, :])
    if lse is not None:
        p_lse = lse + ((i_b * heads + o_head) * n + o_row) * splits + i_split
        tl.store(p_lse, (b_max + tl.log2(b_whole)) * 0.6931471805599453, mask=m_m)


@triton.jit
def _combine_kernel(
    part_o,
    part_lse,
    o,
    lse,
    n,
    heads,
    splits,
    DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row of one head: the parts of `_attend_kernel` made one."""
    i_o = tl.program_id(0)  # in (batch, rows, heads)
    i_lse = (i_o // (heads * n) * heads + i_o % heads) * n + i_o // heads % n  # in (batch, heads, rows)
    o_s, o_d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    m_s, m_d = o_s < splits, o_d < DIM
    b_lse = tl.load(part_lse + i_lse.to(tl.int64) * splits + o_s, mask=m_s, other=float("-inf"))
    p_o = part_o + (i_o.to(tl.int64) * splits + o_s)[:, None] * DIM + o_d[None, :]
    b_o = tl.load(p_o, mask=m_s[:, None] & m_d[None, :], other=0.0)
    b_max = tl.max(b_lse, 0)
    b_top = tl.where(b_max == float("-inf"), 0.0, b_max)  # no visible key at all: the weights are 0, and o with them
    b_weight = tl.exp(b_lse - b_top)
    b_sum = tl.sum(b_weight, 0)
    b_whole = tl.where(b_sum == 0, 1.0, b_sum)
    tl.store(o + i_o.to(tl.int64) * DIM + o_d, tl.sum(b_o * b_weight[:, None], 0) / b_whole, mask=m_d)
    if lse is not None:
        tl.store(lse + i_lse, b_max + tl.log(b_whole))
