"""SwiGLU: ``silu(gate) * up`` of a fused projection ``[gate, up]``.

silu is taken in float32 and rounded to the input dtype before the product, as torch does.
"""

from torch import Tensor
from torch.nn.functional import silu

from dcache.kernels.backend import tl, triton, use_triton

BLOCK = 1024


def swiglu_ref(gate_up: Tensor) -> Tensor:
    """The torch twin of `swiglu`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def swiglu_triton(gate_up: Tensor) -> Tensor:
    """The kernel of `swiglu`."""
    width = gate_up.shape[-1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], width)
    x = gate_up.reshape(-1, 2 * width)
    x = x if x.stride(-1) == 1 else x.contiguous()
    block = min(triton.next_power_of_2(width), BLOCK)
    _swiglu_kernel[(len(x) * triton.cdiv(width, block),)](
        x,
        y,
        x.stride(0),
        WIDTH=width,
        BLOCK=block,
        num_warps=max(block // 256, 1),  # 8 elements of each half per thread
    )
    return y


def swiglu(gate_up: Tensor) -> Tensor:
    """Gate the second half of the last axis by the first.

    Args:
        gate_up: (..., 2 * width).

    Returns:
        (..., width), dtype of `gate_up`.
    """
    return swiglu_triton(gate_up) if use_triton(gate_up) else swiglu_ref(gate_up)


@triton.jit
def _swiglu_kernel(x, y, stride_x, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    n_blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    i_row = (tl.program_id(0) // n_blocks).to(tl.int64)
    o = (tl.program_id(0) % n_blocks) * BLOCK + tl.arange(0, BLOCK)
    m = o < WIDTH
    p_gate = x + i_row * stride_x + o
    b_gate = tl.load(p_gate, mask=m, other=0.0).to(tl.float32)
    b_up = tl.load(p_gate + WIDTH, mask=m, other=0.0).to(tl.float32)
    b_silu = (b_gate / (1.0 + tl.exp(-b_gate))).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + i_row * WIDTH + o, (b_silu * b_up).to(y.dtype.element_ty), mask=m)
