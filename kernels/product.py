"""Products of a few rows with a weight matrix: ``y[i, j] = sum_c x[i, c] w[j, c]``.

Beside it what ends a product in a transformer, in the same kernel: SwiGLU, ``silu(gate) * up`` of ``[gate, up] = y``,
and the addition to the residual stream, ``h + y``, in float32 and rounded once.

Few rows cost the time in which the weights are read. A program owns some rows of the weight matrix, whose tiles the
copy engine loads several steps ahead, and multiplies them with all rows of `x`. The left factor of a product on tensor
cores has at least 64 rows, so that is the tile of weights, and what comes out is ``y`` transposed.

Where the kernel does not win, cuBLAS multiplies: more rows, other GPUs, float32.
"""

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import linear

from dcache.kernels.backend import on_hopper, tl, triton, use_triton
from dcache.kernels.swiglu import swiglu, swiglu_ref

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no Triton for this platform
    TensorDescriptor = None

# Measured on an H200 at the shapes of LLaDA-8B and Dream-7B: see benchmarks/README.md. Up to 32 rows the kernel is up
# to 20 % faster than cuBLAS and nowhere more than 1 % slower, and up to 64 rows of matrices that give 4,096 outputs or
# more and are not gated.
FEW_ROWS = 32
MORE_ROWS = 64
MANY_OUTPUTS = 4096
NARROW = 8192  # outputs up to which there are not two programs for each multiprocessor, so that each has more in flight
PROGRAMS = 264  # that run at once, two on each multiprocessor; a few more would take as long again
ALIGN = 16  # bytes; of each row that the copy engine reads


class Tiles(NamedTuple):
    """How the kernel divides its work.

    Attributes:
        block_n: outputs per program; of a gated product, of gate and up each.
        block_k: columns per step of its loop.
        warps: per program.
        stages: loads in flight.
    """

    block_n: int
    block_k: int
    warps: int
    stages: int


def product_ref(x: Tensor, weight: Tensor) -> Tensor:
    """The torch twin of `product`."""
    return linear(x, weight)


def product_triton(x: Tensor, weight: Tensor) -> Tensor:
    """The kernel of `product`."""
    y = x.new_empty(*x.shape[:-1], len(weight))
    _launch(x, weight, y)
    return y


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Rows times a transposed weight matrix.

    Args:
        x: (..., k).
        weight: (n, k), dtype of `x`.

    Returns:
        (..., n), dtype of `x`.
    """
    return product_triton(x, weight) if _wins(x, weight) else product_ref(x, weight)


def gated_product_ref(x: Tensor, gate_up: Tensor) -> Tensor:
    """The torch twin of `gated_product`."""
    return swiglu_ref(linear(x, gate_up))


def gated_product_triton(x: Tensor, gate_up: Tensor) -> Tensor:
    """The kernel of `gated_product`."""
    y = x.new_empty(*x.shape[:-1], len(gate_up) // 2)
    _launch(x, gate_up, y, gated=True)
    return y


def gated_product(x: Tensor, gate_up: Tensor) -> Tensor:
    """SwiGLU of a product, which is rounded first; see `dcache.kernels.swiglu`.

    Args:
        x: (..., k).
        gate_up: (2 * width, k), dtype of `x`: the rows of the gate, then those of what it gates.

    Returns:
        (..., width), dtype of `x`.
    """
    return gated_product_triton(x, gate_up) if _wins(x, gate_up, gated=True) else swiglu(linear(x, gate_up))


def add_product_ref(h: Tensor, x: Tensor, weight: Tensor) -> None:
    """The torch twin of `add_product`."""
    h.view(-1, h.shape[-1]).addmm_(x.flatten(0, -2), weight.T)


def add_product_triton(h: Tensor, x: Tensor, weight: Tensor) -> None:
    """The kernel of `add_product`."""
    _launch(x, weight, h, add=True)


def add_product(h: Tensor, x: Tensor, weight: Tensor) -> None:
    """Add a product to `h` in place. The kernel adds in float32 and rounds once; cuBLAS may round the product before.

    Args:
        h: (..., n), contiguous.
        x: (..., k), dtype of `h`.
        weight: (n, k), dtype of `h`.
    """
    added = add_product_triton if _wins(x, weight) else add_product_ref
    added(h, x, weight)


def _wins(x: Tensor, weight: Tensor, gated: bool = False) -> bool:
    """Whether the kernel is to run: few rows of two bytes, which the copy engine can read."""
    if not (use_triton(x) and x.element_size() == 2 and on_hopper(x.device)):
        return False
    rows = x.numel() // x.shape[-1]
    most = MORE_ROWS if len(weight) >= MANY_OUTPUTS and not gated else FEW_ROWS
    aligned = (x.data_ptr(), weight.data_ptr(), 2 * x.shape[-1], 2 * weight.stride(0))
    return 0 < rows <= most and weight.stride(1) == 1 and all(n % ALIGN == 0 for n in aligned)


def _tiles(block_m: int, n: int, item_bytes: int, gated: bool) -> Tiles:
    """A fixed rule of the shape, since it decides the order of sums."""
    if gated:
        tiles = Tiles(64, 64, 4, 4) if triton.cdiv(n, 64) <= PROGRAMS else Tiles(128, 64, 8, 3)
    elif n <= NARROW:
        tiles = Tiles(64, 128, 4, 6)
    else:
        tiles = Tiles(64, 128, 4, 4) if block_m <= FEW_ROWS else Tiles(128, 128, 8, 4)
    return tiles._replace(block_k=tiles.block_k * 2 // item_bytes)


def _launch(x: Tensor, weight: Tensor, y: Tensor, gated: bool = False, add: bool = False) -> None:
    """Write the product to `y`, or add it."""
    assert y.is_contiguous()
    x, n = x.reshape(-1, x.shape[-1]).contiguous(), y.shape[-1]
    block_m = max(16, triton.next_power_of_2(len(x)))
    tiles = _tiles(block_m, n, x.element_size(), gated)
    _product_kernel[(triton.cdiv(n, tiles.block_n),)](
        TensorDescriptor.from_tensor(x, [block_m, tiles.block_k]),
        TensorDescriptor.from_tensor(weight, [tiles.block_n, tiles.block_k]),
        *(y, len(x), n, x.shape[1]),
        BLOCK_M=block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        GATED=gated,
        ADD=add,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


@triton.jit
def _product_kernel(
    x,
    weight,
    y,
    rows,
    n,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
):
    """All rows of `x` with `BLOCK_N` rows of the weights; what a tile holds beyond the end of either is zero."""
    i_n = tl.program_id(0) * BLOCK_N
    b_y = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    b_up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for i_k in range(0, width, BLOCK_K):
        b_x = tl.trans(x.load([0, i_k]))
        b_y = tl.dot(weight.load([i_n, i_k]), b_x, b_y, input_precision="ieee")
        if GATED:
            b_up = tl.dot(weight.load([n + i_n, i_k]), b_x, b_up, input_precision="ieee")
    o_m, o_n = tl.arange(0, BLOCK_M)[None, :], (i_n + tl.arange(0, BLOCK_N))[:, None]
    p_y, m_y = y + o_m * n + o_n, (o_m < rows) & (o_n < n)
    kind: tl.constexpr = y.dtype.element_ty
    if GATED:
        b_gate = b_y.to(kind).to(tl.float32)
        b_silu = (b_gate / (1.0 + tl.exp(-b_gate))).to(kind).to(tl.float32)
        b_y = b_silu * b_up.to(kind).to(tl.float32)
    if ADD:
        b_y += tl.load(p_y, mask=m_y, other=0.0).to(tl.float32)
    tl.store(p_y, b_y.to(kind), mask=m_y)
