"""Attention rollout over a few computed rows: what of it has to go from layer to layer.

Row i of W^l is half the head-averaged attention of row i and half the identity if the row was computed, else the
identity. The column sums of ``W^L ... W^1`` are a vector of ones that goes through the layers from the last to the
first. What it holds for computed rows depends on computed rows alone, so for the part of it that has to wait for the
layer above, attention of the computed rows to one another is enough: ``flow[l, b, i, j]``, layer l, sequence b.
``rollout(flow, real)`` begins with ``sums[b, i] = 1``, 0 for a padded row, and has for each layer from the last

``passed[l, b, i] = sums[b, i] / 2``, then ``sums[b, j] = passed[l, b, j] + sum_i passed[l, b, i] flow[l, b, i, j]``.

A key that was not computed has ``1 + sum_{l, i} passed[l, b, i] F``, with F its attention from row i in layer l: a sum
that needs no order.

The kernel is one launch, with a program per sequence that goes through the layers and keeps the sums. While it
multiplies a chunk of the flow it loads the next, also the first of the next layer. So one processor of the GPU reads
all of the flow, 64 bytes per clock at best: meant for some 256 rows, where a launch per layer takes longer.
"""

import torch
from torch import Tensor

from dcache.kernels.backend import tl, triton, use_triton

TILE = 2**14  # numbers of F that a program multiplies at a time, and as many that it loads meanwhile


def rollout_ref(flow: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """The torch twin of `rollout`."""
    flow = flow.masked_fill(~(real[:, :, None] & real[:, None]), 0)
    sums, passed = real.to(torch.float32), []
    for each in reversed(flow.unbind()):
        passed.append(sums / 2)
        sums = passed[-1] + torch.einsum("bi,bij->bj", passed[-1], each)
    return torch.stack(passed[::-1]), sums


def rollout_triton(flow: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the kernel of `rollout`."""
    layers, batch, n, _ = flow.shape
    passed = torch.empty(layers, batch, n, dtype=torch.float32, device=flow.device)
    sums = torch.empty(batch, n, dtype=torch.float32, device=flow.device)
    block = max(triton.next_power_of_2(n), 16)
    chunk = min(max(TILE // block, 1), block)
    _rollout_kernel[(batch,)](
        flow,
        real,
        passed,
        sums,
        layers,
        n,
        flow.stride(),
        real.stride(),
        BLOCK=block,
        CHUNK=chunk,
        num_warps=max(min(block * chunk // 1024, 16), 1),
    )
    return passed, sums


def rollout(flow: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """The part of an attention rollout that goes from layer to layer.

    Args:
        flow: (layers, batch, n, n) float32, head-averaged attention of each computed row to each of them, first layer
            first. What a padded row or column holds is not looked at.
        real: (batch, n) bool, rows that are no padding.

    Returns:
        passed: (layers, batch, n) float32, the weight with which each row's attention counts in each layer.
        sums: (batch, n) float32, column sums of the whole product at the computed rows.
    """
    return rollout_triton(flow, real) if use_triton(flow) else rollout_ref(flow, real)


@triton.jit
def _chunk(flow, i_b, i_l, i_c, n, strides, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Rows of chunk i_c of layer i_l, (CHUNK, BLOCK)."""
    o_i, o_j = i_c * CHUNK + tl.arange(0, CHUNK), tl.arange(0, BLOCK)
    p_flow = (
        flow
        + tl.cast(i_l, tl.int64) * strides[0]
        + i_b * strides[1]
        + o_i[:, None] * strides[2]
        + o_j[None, :] * strides[3]
    )
    return tl.load(p_flow, mask=(o_i < n)[:, None] & (o_j < n)[None, :], other=0.0)


@triton.jit
def _rollout_kernel(
    flow,
    real,
    passed,
    sums,
    layers,
    n,
    strides,
    real_strides,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """passed[l, b] = sums / 2, sums = passed[l, b] + passed[l, b] @ flow[l, b], from the last layer to the first."""
    i_b = tl.program_id(0).to(tl.int64)
    o_i, o_j = tl.arange(0, CHUNK), tl.arange(0, BLOCK)
    b_real = tl.load(real + i_b * real_strides[0] + o_j * real_strides[1], mask=o_j < n, other=0).to(tl.int1)
    b_sums = tl.where(b_real, 1.0, 0.0)
    chunks = tl.cdiv(n, CHUNK)
    b_next = _chunk(flow, i_b, layers - 1, 0, n, strides, BLOCK, CHUNK)
    for i in range(layers):
        i_l = layers - 1 - i
        b_passed = b_sums * 0.5
        tl.store(passed + (i_l * tl.num_programs(0) + i_b) * n + o_j, b_passed, mask=o_j < n)
        b_each = tl.zeros((CHUNK, BLOCK), tl.float32)
        for i_c in range(chunks):
            b_flow = b_next
            i_next = i * chunks + i_c + 1  # of the chunks of all layers; behind the last, one is read for nothing
            i_of = tl.maximum(layers - 1 - i_next // chunks, 0)
            b_next = _chunk(flow, i_b, i_of, i_next % chunks, n, strides, BLOCK, CHUNK)
            b_weight = tl.gather(b_passed, i_c * CHUNK + o_i, 0)[:, None]
            b_each = tl.where(b_weight != 0, b_each + b_weight * b_flow, b_each)  # 0: a padded row, whatever it holds
        b_sums = tl.where(b_real, b_passed + tl.sum(b_each, 0), 0.0)
    tl.store(sums + i_b * n + o_j, b_sums, mask=o_j < n)
