"""Order rows by a score, stably: ties go to the lowest index.

``lowest(score, count, bound)`` returns the first ``bound`` entries of a stable ascending sort along the last axis, and
which of them are among the first ``count``; ``ascending`` is the whole sort. ``rank`` and ``highest`` take the eligible
entries first, from the highest score down. ``find(rows, positions)`` is a binary search in ascending rows.

The kernels do not sort. The place of an entry is a count, ``place[i] = #{j: x[j] < x[i], or x[j] = x[i] and j < i}``,
which needs one launch, any number of programs and no exchange between them; places are a permutation, so every entry of
a result is written. NaN counts as infinity, so that this holds for it too. Where `lowest` is asked for a few entries,
one program holds a lane and takes out the least ``(x[i], i)`` as often as that.
"""

import torch
from torch import Tensor

from dcache.kernels.backend import tl, triton, use_triton

ROWS = 16  # entries that a program places
TILE = {"ROWS": ROWS, "COLUMNS": 256, "num_warps": 8}  # COLUMNS: entries that it compares them with at a time
BLOCK = 128  # positions that a program looks up
MOST = 2**28  # comparisons; a sort needs fewer from here on
FEW = 8  # entries that are taken out one by one
WIDEST = 2**14  # entries that the registers of one program hold
LAST = tl.constexpr(2**63 - 1)  # above every pair of a score and an index


def lowest_ref(score: Tensor, count: Tensor | int, bound: int) -> tuple[Tensor, Tensor]:
    """The torch twin of `lowest`."""
    index = score.sort(dim=-1, stable=True).indices[..., :bound]
    place = torch.arange(index.shape[-1], device=score.device).expand_as(index)
    real = place < (count if isinstance(count, int) else count[..., None])
    return index, real


def lowest_triton(score: Tensor, count: Tensor | int, bound: int) -> tuple[Tensor, Tensor]:
    """The launcher of the kernel of `lowest`."""
    (batch, n), score = score.shape, _lines(score)
    index = torch.empty((batch, min(bound, n)), dtype=torch.int64, device=score.device)
    real = torch.empty(index.shape, dtype=torch.bool, device=score.device)
    given = score, index, real, *_count(count), n, index.shape[1], score.stride(0), isinstance(count, int)
    if _few(score, bound):
        block = max(int(triton.next_power_of_2(n)), 128)
        _few_kernel[(batch,)](*given, block, num_warps=min(max(block // 256, 4), 16))
    else:
        _lowest_kernel[_grid(score)](*given, _top(score), **TILE)
    return index, real


def lowest(score: Tensor, count: Tensor | int, bound: int) -> tuple[Tensor, Tensor]:
    """Positions of the smallest scores.

    Args:
        score: (batch, n) float.
        count: how many are wanted, (batch,) int64 or one number for all.
        bound: the largest count, a Python number: the width of the result.

    Returns:
        index (batch, bound) int64 in order of score, and real (batch, bound) bool.
    """
    on_gpu = _counts(score) or (use_triton(score) and _few(score, bound))
    return lowest_triton(score, count, bound) if on_gpu else lowest_ref(score, count, bound)


def ascending_ref(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The torch twin of `ascending`."""
    values, order = rows.sort(dim=-1, stable=True)
    return values, order


def ascending_triton(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The launcher of the kernel of `ascending`."""
    rows = _lines(rows)
    values = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    order = torch.empty(rows.shape, dtype=torch.int64, device=rows.device)
    _ascending_kernel[_grid(rows)](rows, values, order, rows.shape[1], rows.stride(0), _top(rows), **TILE)
    return values, order


def ascending(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Sort a set of rows, stably.

    Args:
        rows: (batch, n) int64.

    Returns:
        values (batch, n) in ascending order, and order (batch, n) int64, where each stood.
    """
    return ascending_triton(rows) if _counts(rows) else ascending_ref(rows)


def rank_ref(score: Tensor, eligible: Tensor) -> tuple[Tensor, Tensor]:
    """The torch twin of `rank`."""
    lowest = torch.finfo(score.dtype).min  # above -inf, so that an eligible row never falls behind one that is not
    bounded = score.clamp_min(lowest).masked_fill(~eligible, float("-inf"))
    order = bounded.sort(dim=-1, descending=True, stable=True).indices
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    place = torch.empty_like(order).scatter_(-1, order, places)
    return order, place


def rank_triton(score: Tensor, eligible: Tensor) -> tuple[Tensor, Tensor]:
    """The launcher of the kernel of `rank`."""
    score, eligible = _lines(score), _lines(eligible)
    order = torch.empty(score.shape, dtype=torch.int64, device=score.device)
    place = torch.empty(score.shape, dtype=torch.int64, device=score.device)
    strides = score.stride(0), eligible.stride(0)
    _rank_kernel[_grid(score)](
        score, eligible, order, place, score.shape[1], *strides, _top(score), _least(score), **TILE
    )
    return order, place


def rank(score: Tensor, eligible: Tensor) -> tuple[Tensor, Tensor]:
    """Order of the eligible entries, the highest score first, then the others.

    Args:
        score: (batch, n) float32 or float64.
        eligible: (batch, n) bool.

    Returns:
        order (batch, n) int64, entry at each place, and place (batch, n) int64, place of each entry.
    """
    return rank_triton(score, eligible) if _counts(score) else rank_ref(score, eligible)


def highest_ref(score: Tensor, eligible: Tensor, count: Tensor | int) -> Tensor:
    """The torch twin of `highest`."""
    place = rank_ref(score, eligible)[1]
    return eligible & (place < (count if isinstance(count, int) else count[:, None]))


def highest_triton(score: Tensor, eligible: Tensor, count: Tensor | int) -> Tensor:
    """The launcher of the kernel of `highest`."""
    score, eligible = _lines(score), _lines(eligible)
    chosen = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    strides = score.stride(0), eligible.stride(0)
    ends = _top(score), _least(score)
    _highest_kernel[_grid(score)](
        score, eligible, chosen, *_count(count), score.shape[1], *strides, isinstance(count, int), *ends, **TILE
    )
    return chosen


def highest(score: Tensor, eligible: Tensor, count: Tensor | int) -> Tensor:
    """Mark the highest scores among the eligible entries.

    Args:
        score: (batch, n) float32 or float64.
        eligible: (batch, n) bool.
        count: how many are wanted, (batch,) int64 or one number for all.

    Returns:
        (batch, n) bool.
    """
    return highest_triton(score, eligible, count) if _counts(score) else highest_ref(score, eligible, count)


def find_ref(rows: Tensor, positions: Tensor) -> Tensor:
    """The torch twin of `find`."""
    return torch.searchsorted(rows.contiguous(), positions.contiguous()).clamp_max(rows.shape[-1] - 1)


def find_triton(rows: Tensor, positions: Tensor) -> Tensor:
    """The launcher of the kernel of `find`."""
    rows, positions = _lines(rows), _lines(positions)
    (batch, k), n = positions.shape, rows.shape[1]
    place = torch.empty((batch, k), dtype=torch.int64, device=rows.device)
    grid = (batch, triton.cdiv(k, BLOCK))
    _find_kernel[grid](
        rows,
        positions,
        place,
        n,
        k,
        rows.stride(0),
        positions.stride(0),
        n.bit_length(),
        BLOCK,
    )
    return place


def find(rows: Tensor, positions: Tensor) -> Tensor:
    """Where positions stand in an ascending row list.

    Args:
        rows: (batch, n) int64, ascending.
        positions: (batch, k) int64; those not in `rows` give an index of no meaning, but in range.

    Returns:
        (batch, k) int64 in 0..n-1.
    """
    return find_triton(rows, positions) if use_triton(rows) else find_ref(rows, positions)


def _counts(x: Tensor) -> bool:
    """Whether places are counted: (batch, n) of which the comparisons do not outweigh a sort."""
    return use_triton(x) and x.numel() * x.shape[-1] <= MOST


def _few(score: Tensor, bound: int) -> bool:
    """Whether the lowest are taken out one by one; a score in float64 leaves no room for its index."""
    return bound <= FEW and score.shape[1] <= WIDEST and score.dtype != torch.float64


def _lines(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _grid(x: Tensor) -> tuple[int, int]:
    return x.shape[0], triton.cdiv(x.shape[1], ROWS)


def _count(count: Tensor | int) -> tuple[Tensor | int, int]:
    """The number or a pointer to the numbers, and the step from one to the next."""
    return (count, 0) if isinstance(count, int) else (count, count.stride(0))


def _top(x: Tensor) -> float:
    """What no entry exceeds."""
    return float("inf") if x.is_floating_point() else torch.iinfo(x.dtype).max


def _least(score: Tensor) -> float:
    return torch.finfo(score.dtype).min


@triton.jit
def _keys(p_x, p_on, o_x, n, TOP: tl.constexpr, LEAST: tl.constexpr):
    """Numbers that ascend in the wanted order: the entries themselves, or with `p_on` those that are on, negated."""
    b_x = tl.load(p_x + o_x, mask=o_x < n, other=TOP)
    b_x = tl.where(b_x != b_x, TOP, b_x)
    if p_on is not None:
        b_on = tl.load(p_on + o_x, mask=o_x < n, other=0)
        b_x = tl.where(b_on, -tl.maximum(b_x, LEAST), TOP)
    return b_x


@triton.jit
def _places(p_x, p_on, o_i, n, TOP: tl.constexpr, LEAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """How many entries come before each of `o_i` (ROWS,)."""
    b_i = _keys(p_x, p_on, o_i, n, TOP, LEAST)[:, None]
    b_before = tl.zeros((ROWS, COLUMNS), tl.int32)
    for i_j in range(0, n, COLUMNS):
        o_j = i_j + tl.arange(0, COLUMNS)
        b_j = _keys(p_x, p_on, o_j, n, TOP, LEAST)[None, :]
        b_before += ((b_j < b_i) | ((b_j == b_i) & (o_j[None, :] < o_i[:, None]))).to(tl.int32)
    return tl.sum(b_before, 1)


@triton.jit
def _lowest_kernel(
    p_score,
    p_index,
    p_real,
    count,
    stride_count,
    n,
    bound,
    stride_score,
    FIXED: tl.constexpr,
    TOP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program per lane and ROWS entries; those among the first `bound` write themselves to their place."""
    i_b = tl.program_id(0)
    o_i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    b_place = _places(p_score + i_b * stride_score, None, o_i, n, TOP, None, ROWS, COLUMNS)
    b_count = count if FIXED else tl.load(count + i_b * stride_count)
    m_i = (o_i < n) & (b_place < bound)
    tl.store(p_index + i_b * bound + b_place, o_i.to(tl.int64), mask=m_i)
    tl.store(p_real + i_b * bound + b_place, b_place < b_count, mask=m_i)


@triton.jit
def _few_kernel(
    p_score,
    p_index,
    p_real,
    count,
    stride_count,
    n,
    bound,
    stride_score,
    FIXED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per lane. Half of a key is the score, as an integer that ascends with it, and half the index."""
    i_b = tl.program_id(0).to(tl.int64)
    o_i = tl.arange(0, BLOCK)
    b_score = tl.load(p_score + i_b * stride_score + o_i, mask=o_i < n, other=0.0).to(tl.float32)
    b_score = tl.where(b_score != b_score, float("inf"), b_score)
    b_score = tl.where(b_score == 0, 0.0, b_score)  # -0.0 is a tie with 0.0
    b_bits = b_score.to(tl.int32, bitcast=True)
    b_bits = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)  # of negative numbers, larger bits are below
    b_key = tl.where(o_i < n, (b_bits.to(tl.int64) << 32) | o_i, LAST)
    b_count = count if FIXED else tl.load(count + i_b * stride_count)
    for i_place in range(bound):
        b_least = tl.min(b_key, 0)
        tl.store(p_index + i_b * bound + i_place, b_least.to(tl.int32).to(tl.int64))
        tl.store(p_real + i_b * bound + i_place, i_place < b_count)
        b_key = tl.where(b_key == b_least, LAST, b_key)


@triton.jit
def _ascending_kernel(
    p_rows, p_values, p_order, n, stride_rows, TOP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """One program per lane and ROWS entries."""
    i_b = tl.program_id(0)
    o_i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    p_line = p_rows + i_b * stride_rows
    b_place = _places(p_line, None, o_i, n, TOP, None, ROWS, COLUMNS)
    tl.store(p_values + i_b * n + b_place, tl.load(p_line + o_i, mask=o_i < n, other=TOP), mask=o_i < n)
    tl.store(p_order + i_b * n + b_place, o_i.to(tl.int64), mask=o_i < n)


@triton.jit
def _rank_kernel(
    p_score,
    p_on,
    p_order,
    p_place,
    n,
    stride_score,
    stride_on,
    TOP: tl.constexpr,
    LEAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program per lane and ROWS entries."""
    i_b = tl.program_id(0)
    o_i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    b_place = _places(p_score + i_b * stride_score, p_on + i_b * stride_on, o_i, n, TOP, LEAST, ROWS, COLUMNS)
    tl.store(p_order + i_b * n + b_place, o_i.to(tl.int64), mask=o_i < n)
    tl.store(p_place + i_b * n + o_i, b_place.to(tl.int64), mask=o_i < n)


@triton.jit
def _highest_kernel(
    p_score,
    p_on,
    p_chosen,
    count,
    stride_count,
    n,
    stride_score,
    stride_on,
    FIXED: tl.constexpr,
    TOP: tl.constexpr,
    LEAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program per lane and ROWS entries."""
    i_b = tl.program_id(0)
    o_i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    b_place = _places(p_score + i_b * stride_score, p_on + i_b * stride_on, o_i, n, TOP, LEAST, ROWS, COLUMNS)
    b_count = count if FIXED else tl.load(count + i_b * stride_count)
    b_on = tl.load(p_on + i_b * stride_on + o_i, mask=o_i < n, other=0)
    tl.store(p_chosen + i_b * n + o_i, b_on & (b_place < b_count), mask=o_i < n)


@triton.jit
def _find_kernel(
    p_rows, p_positions, p_place, n, k, stride_rows, stride_positions, STEPS: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per lane and BLOCK positions; the first row that is not below stays in ``first <= place <= last``."""
    i_b = tl.program_id(0)
    o_k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b_position = tl.load(p_positions + i_b * stride_positions + o_k, mask=o_k < k, other=0)
    b_first = tl.zeros((BLOCK,), tl.int32)
    b_last = b_first + n
    for _ in range(STEPS):
        b_middle = (b_first + b_last) // 2
        m_open = b_first < b_last
        b_row = tl.load(p_rows + i_b * stride_rows + b_middle, mask=m_open, other=0)
        b_first = tl.where(m_open & (b_row < b_position), b_middle + 1, b_first)
        b_last = tl.where(m_open & (b_row >= b_position), b_middle, b_last)
    tl.store(p_place + i_b * k + o_k, tl.minimum(b_first, n - 1).to(tl.int64), mask=o_k < k)
