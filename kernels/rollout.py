"""Attention rollout over a few computed rows: what of it has to go from layer to layer.

Row i of W^l is half the head-averaged attention of row i and half the identity if the row was computed, else the
identity. The column sums of ``W^L ... W^1`` are a vector of ones that goes through the layers from the last to the
first. What it holds for computed rows depends on computed rows alone, so for the part of it that has to wait for the
layer above, attention of the computed rows to one another is enough: ``flow[l, b, i, j]``, layer l, sequence b.
``rollout(flow, real)`` begins with ``sums[b, i] = 1``, 0 for a padded row, and has for each layer from the last

``passed[l, b, i] = sums[b, i] / 2``, then ``sums[b, j] = passed[l, b, j] + sum_i passed[l, b, i] flow[l, b, i, j]``.

A key that was not computed has ``1 + sum_{l, i} passed[l, b, i] F``, with F its attention from row i in layer l: a sum
that needs no order.

The kernel is a small launch per layer: each program has some columns and all rows.
"""

import torch
from torch import Tensor

from dcache.kernels.backend import tl, triton, use_triton

BLOCK = 256  # rows that a program multiplies at a time
COLUMNS = 32  # of a program


def rollout_ref(flow: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """The torch twin of `rollout`."""
    flow = flow.masked_fill(~(real[:, :, None] & real[:, None]), 0)
    sums, passed = real.to(torch.float32), []
    for each in reversed(flow.unbind()):
        passed.append(sums / 2)
        sums = passed[-1] + torch.einsum("bi,bij->bj", passed[-1], each)
    return torch.stack(passed[::-1]), sums


def rollout_triton(flow: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the kernel of `rollout` for every layer."""
    layers, batch, n, _ = flow.shape
    passed = torch.empty(layers, batch, n, dtype=torch.float32, device=flow.device)
    sums = torch.empty(batch, n, dtype=torch.float32, device=flow.device)
    torch.mul(real, 0.5, out=passed[-1])
    for layer in reversed(range(layers)):
        _rollout_kernel[(triton.cdiv(n, COLUMNS), batch)](
            flow[layer],
            real,
            passed[layer],
            passed[layer - 1] if layer else sums,
            0.5 if layer else 1.0,
            n,
            flow.stride()[1:],
            real.stride(),
            BLOCK=min(max(triton.next_power_of_2(n), 16), BLOCK),
            COLUMNS=COLUMNS,
            num_warps=4,
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
def _rollout_kernel(
    flow,
    real,
    passed,
    out,
    share,
    n,
    strides,
    real_strides,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out[b, j] = share * (passed[b, j] + sum_i passed[b, i] flow[b, i, j]), of one layer; 0 for a padded column."""
    i_b = tl.program_id(1).to(tl.int64)
    o_j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    p_real, p_passed, p_flow = real + i_b * real_strides[0], passed + i_b * n, flow + i_b * strides[0]
    b_column = tl.load(p_real + o_j * real_strides[1], mask=o_j < n, other=0) != 0
    b_sum = tl.load(p_passed + o_j, mask=o_j < n, other=0.0)
    for i_row in range(0, n, BLOCK):
        o_i = i_row + tl.arange(0, BLOCK)
        b_row = tl.load(p_real + o_i * real_strides[1], mask=o_i < n, other=0) != 0
        b_passed = tl.load(p_passed + o_i, mask=o_i < n, other=0.0)
        m_flow = b_row[:, None] & b_column[None, :]
        b_flow = tl.load(p_flow + o_i[:, None] * strides[1] + o_j[None, :] * strides[2], mask=m_flow, other=0.0)
        b_sum += tl.sum(b_passed[:, None] * b_flow, 0)
    tl.store(out + i_b * n + o_j, tl.where(b_column, share * b_sum, 0.0), mask=o_j < n)
