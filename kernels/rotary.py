"""Rotary position embedding, rotate-half convention, over the whole head.

``angle[i] = position * theta**(-2 i / head_dim)`` for ``i < head_dim / 2``, computed in float32; with
``x = [x1, x2]`` split in halves, ``y = [x1 cos - x2 sin, x2 cos + x1 sin]``.

Two published precisions exist (both give the same float32 result): LLaDA keeps cos and sin in float32, upcasts the
heads and casts the result back (`full_precision`); Dream rounds cos and sin to the compute dtype and stays there.
"""

import torch
from torch import Tensor


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
    return rotary_ref(x, cos, sin, full_precision)
