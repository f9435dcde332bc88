"""SwiGLU: ``silu(gate) * up`` of a fused projection ``[gate, up]``."""

from torch import Tensor
from torch.nn.functional import silu


def swiglu_ref(gate_up: Tensor) -> Tensor:
    """The torch twin of `swiglu`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def swiglu(gate_up: Tensor) -> Tensor:
    """Gate the second half of the last axis by the first.

    Args:
        gate_up: (..., 2 * width).

    Returns:
        (..., width), dtype of `gate_up`.
    """
    return swiglu_ref(gate_up)
