"""Similarity of attention before and after a cache write, for some tracked rows.

With ``a`` (old) and ``b`` (new) of shape heads x rows x keys, three means of a cosine:

* ``heads``: for every (row, key) the cosine of the two length-``heads`` vectors; mean over rows and keys;
* ``rows``: for every (head, row) the cosine of the two length-``keys`` vectors; mean over heads and rows;
* ``flat``: for every row the cosine of the two vectors of length ``heads * keys``; mean over rows.

Each norm is clamped from below at 1e-8 before dividing. Only real rows and visible keys count in the means; with no
real row the mean is 0/0 = NaN, which compares as "not below" any threshold, as it should. The last column of the maps
is that of the dump slot and does not count.

The kernels: the first one takes a real row, and some keys (``heads``) or a head (the others), to a part: the sum of the
cosines over those keys, or ``a.b``, ``a.a`` and ``b.b``. The second one adds the parts of a lane in a fixed order. Over
heads each thread has one key, whose heads it loads all at once and adds by itself.
"""

import torch
from torch import Tensor

from dcache.kernels.backend import tl, triton, use_triton

AXES = {"heads": (1,), "rows": (3,), "flat": (1, 3)}
SMALLEST_NORM = 1e-8
SMALLEST = tl.constexpr(SMALLEST_NORM)
KEYS = 128  # of one program of "heads": one for each of its threads
KEYS_AT_ONCE = 1024  # in the other variants
ROWS_AT_ONCE = 16  # in the sum of the parts


def drift_ref(past: Tensor, now: Tensor, real: Tensor, visible: Tensor | None, over: str) -> Tensor:
    """The torch twin of `drift`."""
    axes = AXES[over]
    past, now = past[..., :-1], now[..., :-1]
    norms = [x.pow(2).sum(axes, keepdim=True).sqrt().clamp_min(SMALLEST_NORM) for x in (past, now)]
    cosine = (past / norms[0] * (now / norms[1])).sum(axes, keepdim=True)  # (batch, heads or 1, rows, keys or 1)
    counted = real[:, None, :, None].to(torch.float32)
    if visible is not None and cosine.shape[-1] > 1:
        counted = counted * visible[:, :1, None].to(torch.float32)
    counted = counted.expand_as(cosine)
    # a padded row has no finite cosine of its own: select, then sum
    total = torch.where(counted > 0, cosine, torch.zeros_like(cosine)).sum((1, 2, 3))
    return total / counted.sum((1, 2, 3))


def drift_triton(past: Tensor, now: Tensor, real: Tensor, visible: Tensor | None, over: str) -> Tensor:
    """Launch the kernels of `drift`."""
    past, now, real = past.contiguous(), now.contiguous(), real.contiguous()
    batch, heads, n, keys = past.shape[0], past.shape[1], past.shape[2], past.shape[3] - 1
    visible_step = 0 if visible is None else visible.stride(0)
    if over == "heads":
        parts = triton.cdiv(keys, KEYS)
        part = torch.empty(batch, n, parts, 1, dtype=torch.float32, device=past.device)
        _heads_kernel[(parts, n, batch)](
            *(past, now, real, visible, part, heads, n, keys, visible_step),
            BLOCK_H=triton.next_power_of_2(heads),
            BLOCK=KEYS,
            num_warps=KEYS // 32,
        )
    else:
        parts = heads
        part = torch.empty(batch, n, parts, 3, dtype=torch.float32, device=past.device)
        _rows_kernel[(heads, n, batch)](past, now, real, part, heads, n, keys, BLOCK=KEYS_AT_ONCE, num_warps=4)
    return mean_cosine(part, real, visible, keys, over)


def mean_cosine(part: Tensor, real: Tensor, visible: Tensor | None, keys: int, over: str) -> Tensor:
    """Launch the kernel that adds up parts.

    Args:
        part: (batch, rows, parts, 1) sums of cosines over some keys, or (batch, rows, heads, 3) ``a.b, a.a, b.b``.
        real: (batch, rows) bool, contiguous.
        visible: as for `drift`.
        keys: how many there are.
        over: as for `drift`.
    """
    batch, n, parts, _ = part.shape
    out = torch.empty(batch, dtype=torch.float32, device=part.device)
    _mean_kernel[(batch,)](
        *(part, real, visible, out, n, keys, parts, 0 if visible is None else visible.stride(0)),
        OVER=over,
        BLOCK_R=ROWS_AT_ONCE,
        BLOCK_P=triton.next_power_of_2(parts),
        BLOCK_N=KEYS_AT_ONCE,
        num_warps=4,
    )
    return out


def drift(past: Tensor, now: Tensor, real: Tensor, visible: Tensor | None, over: str = "heads") -> Tensor:
    """Mean cosine similarity of two attention maps.

    Args:
        past: (batch, heads, rows, keys + 1) float32 probabilities before the write, as `probs` returns them.
        now: the same rows after it.
        real: (batch, rows) bool; False for padding.
        visible: (batch, 1 or kv_heads, keys) bool, or None when all keys are visible.
        over: "heads", "rows" or "flat".

    Returns:
        (batch,) float32 in 0..1; NaN where no row is real.
    """
    run = drift_triton if use_triton(past) else drift_ref
    return run(past, now, real, None if visible is None else visible.contiguous(), over)


@triton.jit
def _heads_kernel(
    past, now, real, visible, part, heads, n, keys, visible_step, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr
):
    """part[b, i, block] = sum over the visible keys j of a block of cos(past[b, :, i, j], now[b, :, i, j]).

    Of a padded row there is no part: nothing is read, and nothing written.
    """
    i_block, i_n, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if tl.load(real + i_b * n + i_n):
        o_j, o_h = i_block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_H)
        m_j = o_j < keys
        if visible is not None:
            m_j = m_j & tl.load(visible + i_b * visible_step + o_j, mask=m_j, other=0)
        o = o_h[:, None] * n * (keys + 1) + o_j[None, :]  # within a lane: 2**31 would be 8 GiB
        m = (o_h < heads)[:, None] & m_j[None, :]
        o_row = (i_b * heads * n + i_n) * (keys + 1)
        b_past, b_now = tl.load(past + o_row + o, mask=m, other=0.0), tl.load(now + o_row + o, mask=m, other=0.0)
        b_both, b_old, b_new = tl.sum(b_past * b_now, 0), tl.sum(b_past * b_past, 0), tl.sum(b_now * b_now, 0)
        tl.store(part + (i_b * n + i_n) * tl.num_programs(0) + i_block, tl.sum(cosine_of(b_both, b_old, b_new), 0))


@triton.jit
def _rows_kernel(past, now, real, part, heads, n, keys, BLOCK: tl.constexpr):
    """part[b, i, h] = (past . now, past . past, now . now) over the keys of one row of a head."""
    i_h, i_n, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    last = tl.load(real + i_b * n + i_n).to(tl.int32) * keys  # a padded row has no keys
    o_row = ((i_b * heads + i_h) * n + i_n) * (keys + 1)
    b_both, b_old, b_new = (
        tl.zeros((BLOCK,), tl.float32),
        tl.zeros((BLOCK,), tl.float32),
        tl.zeros((BLOCK,), tl.float32),
    )
    for i_j in range(0, last, BLOCK):
        o_j = i_j + tl.arange(0, BLOCK)
        m_j = o_j < last
        b_past = tl.load(past + o_row + o_j, mask=m_j, other=0.0)
        b_now = tl.load(now + o_row + o_j, mask=m_j, other=0.0)
        b_both += b_past * b_now
        b_old += b_past * b_past
        b_new += b_now * b_now
    p_part = part + ((i_b * n + i_n) * heads + i_h) * 3
    tl.store(p_part, tl.sum(b_both, 0))
    tl.store(p_part + 1, tl.sum(b_old, 0))
    tl.store(p_part + 2, tl.sum(b_new, 0))


@triton.jit
def _mean_kernel(
    part,
    real,
    visible,
    out,
    n,
    keys,
    parts,
    visible_step,
    OVER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[b] = sum of the cosines of the real rows / their number."""
    i_b = tl.program_id(0).to(tl.int64)
    o_p = tl.arange(0, BLOCK_P)
    b_sum, b_rows = tl.zeros((BLOCK_R,), tl.float32), tl.zeros((BLOCK_R,), tl.float32)
    for i_r in range(0, n, BLOCK_R):
        o_r = i_r + tl.arange(0, BLOCK_R)
        m_r = tl.load(real + i_b * n + o_r, mask=o_r < n, other=0)
        m = m_r[:, None] & (o_p < parts)[None, :]
        o = (i_b * n + o_r)[:, None] * parts + o_p[None, :]
        if OVER == "heads":
            b_sum += tl.sum(tl.load(part + o, mask=m, other=0.0), 1)
        else:
            b_both = tl.load(part + o * 3, mask=m, other=0.0)
            b_old = tl.load(part + o * 3 + 1, mask=m, other=0.0)
            b_new = tl.load(part + o * 3 + 2, mask=m, other=0.0)
            if OVER == "rows":
                b_sum += tl.sum(cosine_of(b_both, b_old, b_new), 1)
            else:
                b_sum += cosine_of(tl.sum(b_both, 1), tl.sum(b_old, 1), tl.sum(b_new, 1))
        b_rows += m_r.to(tl.float32)
    b_count = tl.sum(b_rows, 0)
    if OVER == "rows":
        b_count *= parts
    if OVER == "heads":
        b_count *= _visible_keys(visible, i_b * visible_step, keys, BLOCK_N)
    tl.store(out + i_b, tl.where(b_count > 0, tl.sum(b_sum, 0) / tl.maximum(b_count, 1.0), float("nan")))


@triton.jit
def _visible_keys(visible, offset, keys, BLOCK: tl.constexpr):
    """Number of visible keys of a lane, as a float."""
    if visible is None:
        count = keys + 0.0
    else:
        b_seen = tl.zeros((BLOCK,), tl.float32)
        for i_j in range(0, keys, BLOCK):
            o_j = i_j + tl.arange(0, BLOCK)
            b_seen += tl.load(visible + offset + o_j, mask=o_j < keys, other=0).to(tl.float32)
        count = tl.sum(b_seen, 0)
    return count


@triton.jit
def cosine_of(b_both, b_old, b_new):
    """Cosine from products, with the norms clamped from below; 0 of zeros."""
    return b_both / (tl.maximum(tl.sqrt(b_old), SMALLEST) * tl.maximum(tl.sqrt(b_new), SMALLEST))
