"""Best token of a row of logits, its probability, its lead, and the entropy of the row.

With ``m = max_v x[v]`` and ``Z = sum_v exp(x[v] - m)`` over the whole vocabulary, allowed or not, in float32:

==============  =====================================================================================
``token``       ``argmax_v x[v]`` over the ids that are allowed, lowest id first on a tie
``confidence``  ``exp(x[token] - m) / Z``
``margin``      ``(1 - exp(x2 - m)) / Z``, with ``x2`` the second largest logit, allowed or not
``certainty``   ``sum_v p[v] log(p[v] + 1e-10)`` with ``p[v] = exp(x[v] - m) / Z``: the negative entropy
==============  =====================================================================================

Published samplers take a float64 softmax of every row. Subtracting the maximum before anything is rounded keeps float32
within a few units of its last place of that (``tests/kernels/test_confidence.py`` bounds it by 1e-6 at 126,464 ids),
and needs one pass over the row. The certainty takes a second one: its 1e-10 counts beside p, which is not known before
Z is.

The kernels cut a row into chunks of the vocabulary, one program each, and a second kernel combines them: it reads the
chunk of the maximum once more for the id and the second largest logit. An id that is not allowed is left out of its
chunk and added as one more chunk of its own. Chunks do not depend on the number of rows, so neither does any result.
"""

from typing import NamedTuple

import torch
from torch import Tensor, float32, float64

from dcache.kernels.backend import tl, triton, use_triton

TINY = 1e-10  # as published; keeps the logarithm of a filtered token finite
CHUNK = 4096  # ids of one program: 32 to a thread, four loads of 16 bytes in bfloat16
WARPS = 4


class Summary(NamedTuple):
    """What one pass over the logits of each row tells, all (batch, rows).

    Attributes:
        token: int64, the best allowed id.
        confidence: float32, its probability.
        margin: float32, lead of the likeliest id over the second.
        finite: bool, whether every logit of the row is.
        peak: float32, m.
        mass: float32, Z.
    """

    token: Tensor
    confidence: Tensor
    margin: Tensor
    finite: Tensor
    peak: Tensor
    mass: Tensor


def summarize_ref(logits: Tensor, forbidden: tuple[int, ...]) -> Summary:
    """The torch twin of `summarize`."""
    wide = logits.to(float32)
    top = wide.topk(2, dim=-1).values
    weight = (wide - top[..., :1]).exp()
    mass = weight.sum(-1)
    token = best_token_ref(logits, forbidden)
    confidence = weight.gather(-1, token[..., None])[..., 0] / mass
    margin = (1 - (top[..., 1] - top[..., 0]).exp()) / mass
    return Summary(token, confidence, margin, logits.isfinite().all(-1), top[..., 0], mass)


def summarize_triton(logits: Tensor, forbidden: tuple[int, ...]) -> Summary:
    """The launcher of the kernels of `summarize`."""
    logits, forbidden = _rows(logits), _distinct(forbidden)
    parts = _parts(logits, forbidden, float32)
    token = torch.empty(logits.shape[:2], dtype=torch.int64, device=logits.device)
    finite = torch.empty(logits.shape[:2], dtype=torch.bool, device=logits.device)
    stats = torch.empty((4, *logits.shape[:2]), dtype=float32, device=logits.device)
    _summary_kernel[(token.numel(),)](
        logits, parts, token, finite, stats, *_sizes(logits, parts), forbidden, *_blocks(parts, logits), num_warps=WARPS
    )
    confidence, margin, peak, mass = stats.unbind(0)
    return Summary(token, confidence, margin, finite, peak, mass)


def summarize(logits: Tensor, forbidden: tuple[int, ...] = ()) -> Summary:
    """Best allowed token of every row and what is known about it, in one pass.

    Args:
        logits: (batch, rows, vocab).
        forbidden: ids that are never chosen.
    """
    return summarize_triton(logits, forbidden) if use_triton(logits) else summarize_ref(logits, forbidden)


def certainty_ref(logits: Tensor) -> Tensor:
    """The torch twin of `certainty`."""
    p = logits.to(float32).softmax(-1)
    return (p * (p + TINY).log()).sum(-1)


def certainty_triton(logits: Tensor, summary: Summary | None) -> Tensor:
    """The launcher of the kernels of `certainty`."""
    logits = _rows(logits)
    summary = summarize_triton(logits, ()) if summary is None else summary
    chunk, chunks = _chunks(logits)
    parts = torch.empty((*logits.shape[:2], chunks), dtype=float32, device=logits.device)
    peak, mass = summary.peak.contiguous(), summary.mass.contiguous()
    _certainty_kernel[(parts.numel(),)](logits, peak, mass, parts, *_sizes(logits, parts), TINY, chunk, num_warps=WARPS)
    return parts.sum(-1)


def certainty(logits: Tensor, summary: Summary | None = None) -> Tensor:
    """Negative entropy of the softmax of every row.

    Args:
        logits: (batch, rows, vocab).
        summary: of the same logits, if it is at hand: saves a pass.

    Returns:
        (batch, rows) float32.
    """
    return certainty_triton(logits, summary) if use_triton(logits) else certainty_ref(logits)


def confidence_of_ref(logits: Tensor, token: Tensor) -> Tensor:
    """The torch twin of `confidence_of`."""
    wide = logits.to(float32)
    weight = (wide - wide.amax(-1, keepdim=True)).exp()
    return weight.gather(-1, token[..., None])[..., 0] / weight.sum(-1)


def confidence_of_triton(logits: Tensor, token: Tensor) -> Tensor:
    """The launcher of the kernels of `confidence_of`."""
    logits, token = _rows(logits), token.contiguous()
    parts = _parts(logits, (), float32)
    confidence = torch.empty(token.shape, dtype=float32, device=logits.device)
    _confidence_kernel[(token.numel(),)](
        logits, parts, token, confidence, *_sizes(logits, parts), _blocks(parts, logits)[1], num_warps=1
    )
    return confidence


def confidence_of(logits: Tensor, token: Tensor) -> Tensor:
    """Probability of given tokens.

    Args:
        logits: (batch, rows, vocab).
        token: (batch, rows) int64.

    Returns:
        (batch, rows) float32.
    """
    return confidence_of_triton(logits, token) if use_triton(logits) else confidence_of_ref(logits, token)


def best_token_ref(logits: Tensor, forbidden: tuple[int, ...]) -> Tensor:
    """The torch twin of `best_token`."""
    allowed = logits.clone()
    for token in forbidden:  # a few ids, known on the host
        allowed[..., token] = float("-inf")
    return allowed.argmax(-1)


def best_token_triton(logits: Tensor, forbidden: tuple[int, ...]) -> Tensor:
    """The launcher of the kernels of `best_token`; logits in float64 are compared in float64."""
    logits, forbidden = _rows(logits), _distinct(forbidden)
    parts = _parts(logits, forbidden, float64 if logits.dtype == float64 else float32, sums=False)
    token = torch.empty(logits.shape[:2], dtype=torch.int64, device=logits.device)
    _best_kernel[(token.numel(),)](
        logits, parts, token, *_sizes(logits, parts), forbidden, *_blocks(parts, logits), num_warps=WARPS
    )
    return token


def best_token(logits: Tensor, forbidden: tuple[int, ...] = ()) -> Tensor:
    """Most likely allowed token, lowest id first on a tie.

    Args:
        logits: (batch, rows, vocab).
        forbidden: ids that are never chosen.

    Returns:
        (batch, rows) int64.
    """
    return best_token_triton(logits, forbidden) if use_triton(logits) else best_token_ref(logits, forbidden)


def all_finite_ref(logits: Tensor) -> Tensor:
    """The torch twin of `all_finite`."""
    return logits.isfinite().all(-1)


def all_finite_triton(logits: Tensor) -> Tensor:
    """The launcher of the kernel of `all_finite`."""
    logits = _rows(logits)
    chunk, chunks = _chunks(logits)
    parts = torch.empty((*logits.shape[:2], chunks), dtype=torch.bool, device=logits.device)
    _finite_kernel[(parts.numel(),)](logits, parts, *_sizes(logits, parts), chunk, num_warps=WARPS)
    return parts.all(-1)


def all_finite(logits: Tensor) -> Tensor:
    """Whether every logit of a row is finite: (batch, rows, vocab) -> (batch, rows) bool."""
    return all_finite_triton(logits) if use_triton(logits) else all_finite_ref(logits)


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def _distinct(forbidden: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(forbidden)))


def _chunks(logits: Tensor) -> tuple[int, int]:
    """Ids of a chunk, a power of two, and how many chunks there are."""
    chunk = min(CHUNK, max(16, triton.next_power_of_2(logits.shape[-1])))
    return chunk, triton.cdiv(logits.shape[-1], chunk)


def _blocks(parts: Tensor, logits: Tensor) -> tuple[int, int]:
    """Ids of a chunk, and the number of chunks rounded up to a power of two."""
    return _chunks(logits)[0], triton.next_power_of_2(parts.shape[-1])


def _sizes(logits: Tensor, parts: Tensor) -> tuple[int, ...]:
    """What every kernel needs to find a row and its parts."""
    return logits.shape[1], logits.shape[2], parts.shape[-1], logits.stride(0), logits.stride(1)


def _parts(logits: Tensor, forbidden: tuple[int, ...], dtype: torch.dtype, sums: bool = True) -> Tensor:
    """(1 or 3, batch, rows, chunks): largest allowed logit of each chunk; with `sums` also mass and least logit."""
    chunk, chunks = _chunks(logits)
    parts = torch.empty((3 if sums else 1, *logits.shape[:2], chunks), dtype=dtype, device=logits.device)
    _parts_kernel[(parts[0].numel(),)](
        logits, parts, parts[0].numel(), *_sizes(logits, parts), forbidden, sums, chunk, num_warps=WARPS
    )
    return parts


@triton.jit
def _row(p_x, i_r, rows, stride_b, stride_r):
    return p_x + (i_r // rows).to(tl.int64) * stride_b + (i_r % rows).to(tl.int64) * stride_r


@triton.jit
def _without(b_x, o_v, FORBIDDEN: tl.constexpr):
    for i in tl.static_range(len(FORBIDDEN)):
        b_x = tl.where(o_v == FORBIDDEN[i], float("-inf"), b_x)
    return b_x


@triton.jit
def _parts_kernel(
    p_x,
    p_parts,
    plane,
    rows,
    vocab,
    chunks,
    stride_b,
    stride_r,
    FORBIDDEN: tl.constexpr,
    SUMS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program per row and chunk; the mass of a chunk is taken beside its own largest allowed logit."""
    i_p = tl.program_id(0)
    i_r, i_c = i_p // chunks, i_p % chunks
    o_v = i_c * CHUNK + tl.arange(0, CHUNK)
    m_v = o_v < vocab
    b_x = tl.load(_row(p_x, i_r, rows, stride_b, stride_r) + o_v, mask=m_v, other=float("-inf"))
    b_x = b_x.to(p_parts.dtype.element_ty)
    b_allowed = _without(b_x, o_v, FORBIDDEN)
    b_peak = tl.max(b_allowed, 0)
    tl.store(p_parts + i_p, b_peak)
    if SUMS:
        b_shift = tl.where(b_peak == float("-inf"), 0.0, b_peak)
        tl.store(p_parts + plane + i_p, tl.sum(tl.exp(b_allowed - b_shift), 0))
        tl.store(p_parts + 2 * plane + i_p, tl.min(tl.where(m_v, b_x, 0.0), 0))


@triton.jit
def _best(p_row, b_peaks, o_c, vocab, FORBIDDEN: tl.constexpr, CHUNK: tl.constexpr):
    """The largest allowed logit, its lowest id, and the second largest allowed logit."""
    b_peaks = tl.where(b_peaks != b_peaks, float("-inf"), b_peaks)
    b_first = tl.max(b_peaks, 0)
    i_c = tl.argmax(b_peaks, 0)
    o_v = i_c * CHUNK + tl.arange(0, CHUNK)
    b_x = tl.load(p_row + o_v, mask=o_v < vocab, other=float("-inf")).to(b_peaks.dtype)
    b_x = _without(b_x, o_v, FORBIDDEN)
    b_token = tl.min(tl.where(b_x == b_first, o_v, vocab - 1), 0)
    b_others = tl.max(tl.where(o_c == i_c, float("-inf"), b_peaks), 0)
    b_second = tl.maximum(b_others, tl.max(tl.where(o_v == b_token, float("-inf"), b_x), 0))
    return b_first, b_token, b_second


@triton.jit
def _summary_kernel(
    p_x,
    p_parts,
    p_token,
    p_finite,
    p_stats,
    rows,
    vocab,
    chunks,
    stride_b,
    stride_r,
    FORBIDDEN: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """One program per row."""
    i_r = tl.program_id(0)
    n, plane = tl.num_programs(0), tl.num_programs(0) * chunks
    p_row = _row(p_x, i_r, rows, stride_b, stride_r)
    o_c = tl.arange(0, CHUNKS)
    m_c = o_c < chunks
    p_part = p_parts + i_r * chunks + o_c
    b_peaks = tl.load(p_part, mask=m_c, other=float("-inf"))
    b_masses = tl.load(p_part + plane, mask=m_c, other=0.0)
    b_least = tl.min(tl.load(p_part + 2 * plane, mask=m_c, other=0.0), 0)
    b_first, b_token, b_second = _best(p_row, b_peaks, o_c, vocab, FORBIDDEN, CHUNK)
    b_peak = b_first
    for i in tl.static_range(len(FORBIDDEN)):
        b_x = tl.load(p_row + FORBIDDEN[i]).to(tl.float32)
        b_second = tl.maximum(b_second, tl.minimum(b_peak, b_x))
        b_peak = tl.maximum(b_peak, b_x)
    b_mass = tl.sum(b_masses * tl.exp(b_peaks - b_peak), 0)
    for i in tl.static_range(len(FORBIDDEN)):
        b_mass += tl.exp(tl.load(p_row + FORBIDDEN[i]).to(tl.float32) - b_peak)
    tl.store(p_token + i_r, b_token.to(tl.int64))
    tl.store(p_finite + i_r, (b_mass < float("inf")) & (b_least > float("-inf")))
    tl.store(p_stats + i_r, tl.exp(b_first - b_peak) / b_mass)
    tl.store(p_stats + n + i_r, (1 - tl.exp(b_second - b_peak)) / b_mass)
    tl.store(p_stats + 2 * n + i_r, b_peak)
    tl.store(p_stats + 3 * n + i_r, b_mass)


@triton.jit
def _best_kernel(
    p_x,
    p_parts,
    p_token,
    rows,
    vocab,
    chunks,
    stride_b,
    stride_r,
    FORBIDDEN: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """One program per row."""
    i_r = tl.program_id(0)
    o_c = tl.arange(0, CHUNKS)
    b_peaks = tl.load(p_parts + i_r * chunks + o_c, mask=o_c < chunks, other=float("-inf"))
    p_row = _row(p_x, i_r, rows, stride_b, stride_r)
    _, b_token, _ = _best(p_row, b_peaks, o_c, vocab, FORBIDDEN, CHUNK)
    tl.store(p_token + i_r, b_token.to(tl.int64))


@triton.jit
def _confidence_kernel(p_x, p_parts, p_token, p_out, rows, vocab, chunks, stride_b, stride_r, CHUNKS: tl.constexpr):
    """One program per row."""
    i_r = tl.program_id(0)
    o_c = tl.arange(0, CHUNKS)
    m_c = o_c < chunks
    p_part = p_parts + i_r * chunks + o_c
    b_peaks = tl.load(p_part, mask=m_c, other=float("-inf"))
    b_masses = tl.load(p_part + tl.num_programs(0) * chunks, mask=m_c, other=0.0)
    b_peak = tl.max(b_peaks, 0)
    b_mass = tl.sum(b_masses * tl.exp(b_peaks - b_peak), 0)
    b_x = tl.load(_row(p_x, i_r, rows, stride_b, stride_r) + tl.load(p_token + i_r)).to(tl.float32)
    tl.store(p_out + i_r, tl.exp(b_x - b_peak) / b_mass)


@triton.jit
def _certainty_kernel(
    p_x, p_peak, p_mass, p_parts, rows, vocab, chunks, stride_b, stride_r, TINY: tl.constexpr, CHUNK: tl.constexpr
):
    """One program per row and chunk."""
    i_p = tl.program_id(0)
    i_r, i_c = i_p // chunks, i_p % chunks
    o_v = i_c * CHUNK + tl.arange(0, CHUNK)
    p_row = _row(p_x, i_r, rows, stride_b, stride_r)
    b_x = tl.load(p_row + o_v, mask=o_v < vocab, other=float("-inf")).to(tl.float32)
    b_p = tl.exp(b_x - tl.load(p_peak + i_r)) / tl.load(p_mass + i_r)
    tl.store(p_parts + i_p, tl.sum(b_p * tl.log(b_p + TINY), 0))


@triton.jit
def _finite_kernel(p_x, p_parts, rows, vocab, chunks, stride_b, stride_r, CHUNK: tl.constexpr):
    """One program per row and chunk."""
    i_p = tl.program_id(0)
    i_r, i_c = i_p // chunks, i_p % chunks
    o_v = i_c * CHUNK + tl.arange(0, CHUNK)
    b_x = tl.load(_row(p_x, i_r, rows, stride_b, stride_r) + o_v, mask=o_v < vocab, other=0.0).to(tl.float32)
    b_bad = tl.where(tl.abs(b_x) < float("inf"), 0, 1)
    tl.store(p_parts + i_p, tl.max(b_bad, 0) == 0)
