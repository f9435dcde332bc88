"""What kernels over scores of rows and stored keys share: their arguments, tiles, and the log-sum-exps of rows.

They work on tiles of scores ``q[b, h, i] . k[s(b), g(h), j]``: lane b reads the keys of sequence ``s(b) = lanes[b]``,
or b without lanes, and query head h reads key/value head ``g(h) = h // (heads / kv_heads)``. Packed rows are those of
all heads that read one key/value head: head after head, n each.

How work is divided depends on the shape of one lane alone, so a lane's bits do not depend on its batch; where the lanes
are those of several layers, it may depend on how many layers, which is a property of the model.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcache.kernels.backend import tl, triton

PROGRAMS = 256  # what a lane's work is split into if it can be: about two programs per processor of a large GPU
MOST_SPLITS = 32  # of the keys: each program of the second kernel joins the log-sum-exps of all splits
LOG2E = tl.constexpr(1.4426950408889634)


class Tile(NamedTuple):
    """Most rows and keys of a tile of scores; the warps and pipeline stages of its programs."""

    rows: int
    keys: int
    warps: int
    stages: int


TILES = {  # by kernel, for few, some and many rows
    "lse": (Tile(16, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
    "probs": (Tile(16, 128, 4, 1), Tile(64, 64, 4, 1), Tile(64, 128, 8, 1)),
    "received": (Tile(16, 64, 4, 1), Tile(32, 64, 4, 3), Tile(32, 128, 4, 2)),
    "mean": (Tile(16, 64, 4, 3), Tile(64, 32, 4, 3), Tile(64, 64, 4, 3)),
}
FEW, SOME = 16, 256
# Of all layers at once, up to `SOME` rows: by kernel, the most rows and the tile. There are enough programs without a
# fine division, and what counts is how often an operand is read from the second-level cache: once per tile of the other
# operand, so those are large.
ALL_LAYERS = {
    "lse": ((FEW, Tile(16, 128, 4, 3)), (SOME, Tile(64, 128, 4, 3))),
    "received": ((FEW, Tile(16, 128, 8, 3)), (64, Tile(32, 128, 8, 3)), (SOME, Tile(32, 128, 4, 2))),
    "mean": ((FEW, Tile(16, 64, 4, 3)), (SOME, Tile(64, 64, 4, 2))),
}


def arguments_of(
    q: Tensor, k: Tensor, visible: Tensor | None, lanes: Tensor | None
) -> tuple[dict[str, Any], tuple[int, int, int, int]]:
    """The arguments that all these kernels take, and (batch, heads, rows, slots)."""
    batch, heads, n, head_dim = q.shape
    if q.stride(-1) != 1 or k.stride(-1) != 1 or (visible is not None and visible.stride(-1) != 1):
        raise ValueError("the last axis of queries, keys and visible must be contiguous")
    arguments = {
        "q": q,
        "k": k,
        "visible": visible,
        "lanes": lanes,
        "n": n,
        "slots": k.shape[2],
        "scale": head_dim**-0.5,
        "q_strides": q.stride()[:3],
        "k_strides": k.stride()[:3],
        "visible_strides": _visible_strides(visible),
        "HEADS": heads,
        "GROUP": heads // k.shape[1],
        "HEAD_DIM": head_dim,
        "BLOCK_D": side(head_dim),
    }
    return arguments, (batch, heads, n, k.shape[2])


def _visible_strides(visible: Tensor | None) -> tuple[int, int]:
    """Steps from lane to lane and from key/value head to key/value head, 0 where all heads see the same."""
    if visible is None:
        return 0, 0
    return visible.stride(0), visible.stride(1) if visible.shape[1] > 1 else 0


def side(size: int) -> int:
    """The least side of a tile that holds `size`: a power of two that tensor cores take."""
    return max(int(triton.next_power_of_2(size)), 16)


def tile_of(kernel: str, rows: int, q: Tensor, layers: int = 1) -> dict[str, int]:
    """The launch arguments of a kernel that works on `rows` rows per key/value head, or per head, of some layers."""
    tile = TILES[kernel][0 if rows <= FEW else 1 if rows <= SOME else 2]
    if layers > 1 and rows <= SOME and kernel in ALL_LAYERS:
        tile = next(tile for most, tile in ALL_LAYERS[kernel] if rows <= most)
    if side(q.shape[-1]) * q.element_size() > 256:  # wide rows: what is to stay in shared memory must fit
        tile = Tile(min(tile.rows, 32), 32, 8, 2)
    return {
        "BLOCK_M": min(tile.rows, side(rows)),
        "BLOCK_N": tile.keys,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def per_program(blocks: int, others: int) -> int:
    """How many of `blocks` one program works through, where `others` programs exist for each of them."""
    return int(triton.cdiv(blocks, min(blocks, max(PROGRAMS // others, 1))))


def row_lse(q: Tensor, k: Tensor, arguments: dict[str, Any], weight: Tensor | None = None, layers: int = 1) -> Tensor:
    """Log-sum-exps of the scaled scores of every row, by part of the keys.

    Args:
        q: (batch, heads, rows, head_dim).
        k: (sequences, kv_heads, slots, head_dim).
        arguments: `arguments_of` them.
        weight: (batch, rows); blocks of rows without any are passed over, and hold nothing of meaning.
        layers: how many layers the batch is made of.

    Returns:
        (batch, parts, heads, rows) float32.
    """
    batch, heads, n, _ = q.shape
    packed = heads // k.shape[1] * n
    tile = tile_of("lse", packed, q, layers)
    row_blocks, key_blocks = k.shape[1] * triton.cdiv(packed, tile["BLOCK_M"]), triton.cdiv(k.shape[2], tile["BLOCK_N"])
    per = max(per_program(key_blocks, row_blocks * layers), triton.cdiv(key_blocks, MOST_SPLITS))
    splits = triton.cdiv(key_blocks, per)
    lse = torch.empty(batch, splits, heads, n, dtype=torch.float32, device=q.device)
    strides = (0, 0) if weight is None else weight.stride()
    _lse_kernel[(splits, row_blocks, batch)](
        **arguments, **tile, lse=lse, per=per, weight=weight, weight_strides=strides
    )
    return lse


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def sequence_of(lanes, i_b):
    """The sequence whose keys lane i_b reads."""
    if lanes is not None:
        i_b = tl.load(lanes + i_b).to(tl.int64)
    return i_b


@triton.jit
def seen(visible, offset, o_n, slots):
    """Which keys of a tile exist and are visible."""
    m_n = o_n < slots
    if visible is not None:
        m_n = m_n & tl.load(visible + offset + o_n, mask=m_n, other=0)
    return m_n


@triton.jit
def row_of(o_m, n, GROUP: tl.constexpr):
    """Which row a packed row is; a division is slow, and one head needs none."""
    if GROUP == 1:
        return o_m
    else:
        return o_m % n


@triton.jit
def packed_rows(q, q_strides, i_b, i_h, o_m, n, GROUP: tl.constexpr):
    """Pointers to rows o_m of the heads from i_h on: head after head, n rows each."""
    p_q = q + i_b * q_strides[0] + i_h * q_strides[1] + row_of(o_m, n, GROUP) * q_strides[2]
    if GROUP > 1:
        p_q += o_m // n * q_strides[1]
    return p_q


@triton.jit
def vectors(p_rows, m_rows, o_d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Vectors (rows, head_dim) from pointers (rows, 1), or their transpose from pointers (1, rows)."""
    m = m_rows
    if HEAD_DIM != BLOCK_D:
        m = m_rows & (o_d < HEAD_DIM)
    return tl.load(p_rows + o_d, mask=m, other=0.0)


@triton.jit
def joined(lse, o_r, m_r, rows, splits, BLOCK_S: tl.constexpr):
    """Log-sum-exp in base 2 of rows at offsets o_r, from those of the splits, `rows` apart; 0 beyond the last row."""
    if BLOCK_S == 1:
        b_lse = tl.load(lse + o_r, mask=m_r, other=0.0) * LOG2E
    else:
        o_s = tl.arange(0, BLOCK_S)
        b_each = (
            tl.load(lse + o_s[:, None] * rows + o_r[None, :], mask=m_r[None, :] & (o_s < splits)[:, None], other=0.0)
            * LOG2E
        )
        b_each = tl.where((o_s < splits)[:, None], b_each, -float("inf"))
        b_max = tl.max(b_each, 0)
        b_lse = b_max + tl.log2(tl.sum(tl.exp2(b_each - b_max[None, :]), 0))
    return b_lse


@triton.jit
def _lse_kernel(
    q,
    k,
    visible,
    lanes,
    lse,
    weight,
    n,
    slots,
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
):
    """lse[b, split, h, i] = log sum_j exp(scale * q[b, h, i] . k[j]) over the visible keys j of a split.

    A program takes packed rows: those of all heads that read one key/value head.
    """
    i_split, i_b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    row_blocks = tl.cdiv(GROUP * n, BLOCK_M)
    i_g, i_m = tl.program_id(1) // row_blocks, tl.program_id(1) % row_blocks
    o_m, o_d = i_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    m_m = o_m < GROUP * n
    p_q = packed_rows(q, q_strides, i_b, i_g * GROUP, o_m, n, GROUP)
    b_q = vectors(p_q[:, None], m_m[:, None], o_d[None, :], HEAD_DIM, BLOCK_D)
    p_k = k + sequence_of(lanes, i_b) * k_strides[0] + i_g * k_strides[1]

    i_stop = tl.minimum((i_split + 1) * per, tl.cdiv(slots, BLOCK_N))
    if weight is not None:
        b_weight = tl.load(
            weight + i_b * weight_strides[0] + row_of(o_m, n, GROUP) * weight_strides[1], mask=m_m, other=0
        )
        i_stop = tl.where(tl.max((b_weight != 0).to(tl.int32), 0) > 0, i_stop, i_split * per)

    b_max = tl.full((BLOCK_M,), -1e30, tl.float32)  # finite: no inf - inf where all keys are hidden
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    for i_n in range(i_split * per, i_stop):
        o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        b_k = vectors(p_k + (o_n * k_strides[2])[None, :], (o_n < slots)[None, :], o_d[:, None], HEAD_DIM, BLOCK_D)
        m_n = seen(visible, i_b * visible_strides[0] + i_g * visible_strides[1], o_n, slots)
        b_score = tl.dot(b_q, b_k, input_precision="ieee") * (scale * LOG2E)
        b_score = tl.where(m_n[None, :], b_score, -float("inf"))
        b_new = tl.maximum(b_max, tl.max(b_score, 1))
        b_sum = b_sum * tl.exp2(b_max - b_new) + tl.sum(tl.exp2(b_score - b_new[:, None]), 1)
        b_max = b_new
    b_lse = (b_max + tl.log2(tl.maximum(b_sum, 1.0))) / LOG2E  # a sum is at least 1 where a key is visible
    p_lse = lse + (i_b * tl.num_programs(0) + i_split) * HEADS * n + i_g * GROUP * n + o_m
    tl.store(p_lse, b_lse, mask=m_m)
