"""The SwiGLU kernel against the formula in float64 and against its torch twin."""

import pytest
import torch
from torch import Tensor

from dcache.kernels.swiglu import swiglu_ref, swiglu_triton

HALVES = [  # the interpreter truncates to bfloat16 instead of rounding
    ("cpu", torch.float16),
    ("cuda", torch.float16),
    ("cuda", torch.bfloat16),
]


def normal(*shape: int, device: str, kind: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))).to(device, kind)


def formula(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.double().chunk(2, dim=-1)
    return gate * gate.sigmoid() * up


@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 3, 14), (33, 66), (2, 2, 2, 160), (1, 2, 2 * 2050)])
def test_the_kernel_gates_the_second_half_of_any_shape(device: str, shape: tuple[int, ...]) -> None:
    x = normal(*shape, device=device)
    y = swiglu_triton(x)
    assert y.shape == (*shape[:-1], shape[-1] // 2)
    torch.testing.assert_close(y.double(), formula(x), atol=1e-6, rtol=1e-5)


def test_the_kernel_reads_views(device: str) -> None:
    x = normal(2, 5, 20, device=device)
    for view in (x[:, 1:3, 4:16], x.transpose(0, 1), x.transpose(1, 2)[..., :4]):
        torch.testing.assert_close(swiglu_triton(view).double(), formula(view), atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of the interpreter: silu is then -0, as it should
def test_large_gates_neither_overflow_nor_vanish(device: str) -> None:
    gate = torch.tensor([-1e4, -200.0, -80.0, -20.0, 0.0, 20.0, 80.0, 200.0, 1e4], device=device)
    x = torch.cat([gate, torch.full_like(gate, 2.0)])[None]
    torch.testing.assert_close(swiglu_triton(x).double(), formula(x), atol=1e-30, rtol=1e-5)


@pytest.mark.parametrize(("device", "kind"), HALVES)
def test_the_kernel_rounds_before_the_product(device: str, kind: torch.dtype) -> None:
    x = normal(4, 512, device=device, kind=kind)
    twin, late = swiglu_ref(x), formula(x).to(kind)
    assert (swiglu_triton(x) != twin).float().mean() < 0.01  # the exponential is not torch's
    assert (late != twin).float().mean() > 0.1


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 16, 2 * 12_288), (1, 1280, 2 * 18_944)])
@pytest.mark.parametrize("device", ["cuda"])
def test_the_kernel_is_no_less_exact_than_the_twin_at_model_sizes(
    device: str, shape: tuple[int, ...], kind: torch.dtype
) -> None:
    x = normal(*shape, device=device, kind=kind)
    expected = formula(x)
    error, of_twin = ((y.double() - expected).norm() / expected.norm() for y in (swiglu_triton(x), swiglu_ref(x)))
    assert error <= 1.1 * of_twin + 1e-6
