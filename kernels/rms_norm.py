"""RMSNorm: ``y = (x / sqrt(mean(x**2) + eps)).to(x.dtype) * weight``.

The mean and the division are taken in float32 and the quotient is rounded back to the input dtype *before* the
multiplication by the weight; in bfloat16 the order is visible, and this is the one of the published models.
"""

import torch
from torch import Tensor


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The torch twin of `rms_norm`."""
    wide = x.to(torch.float32)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last axis.

    Args:
        x: (..., width), any floating dtype.
        weight: (width,), dtype of `x`.
        eps: added to the mean of squares.

    Returns:
        (..., width), dtype of `x`.
    """
    return rms_norm_ref(x, weight, eps)
