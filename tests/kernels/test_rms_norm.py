"""The RMSNorm kernels against the formula in float64 and against their torch twins."""

import pytest
import torch
from torch import Tensor

from dcache.kernels import rms_norm as module
from dcache.kernels.rms_norm import add_rms_norm_triton, rms_norm_keep_triton, rms_norm_ref, rms_norm_triton

EPS = 1e-5
HALVES = [  # the interpreter truncates to bfloat16 instead of rounding
    ("cpu", torch.float16),
    ("cuda", torch.float16),
    ("cuda", torch.bfloat16),
]


def normal(*shape: int, device: str, kind: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, kind)


def formula(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def close(y: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(y.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 7), (1, 2, 80), (3, 129), (2, 1, 2, 16), (1, 1, 3584)])
def test_the_kernel_normalises_the_last_axis_of_any_shape(device: str, shape: tuple[int, ...]) -> None:
    x, weight = 3 * normal(*shape, device=device), normal(shape[-1], device=device, seed=1)
    y = rms_norm_triton(x, weight, EPS)
    assert y.shape == x.shape
    close(y, formula(x, weight))


def test_the_kernel_reads_views(device: str) -> None:
    x, weight = normal(2, 9, 3, 16, device=device), normal(16, device=device, seed=1)
    for view in (x[:, 2:7, 1], x[:, 0, :, 4:].transpose(1, 2)[..., :2], x[:, :, 0].transpose(1, 2)[:, :, :5]):
        close(rms_norm_triton(view, weight[: view.shape[-1]], EPS), formula(view, weight[: view.shape[-1]]))


@pytest.mark.parametrize(("device", "kind"), HALVES)
def test_the_kernel_rounds_before_the_weight(device: str, kind: torch.dtype) -> None:
    x, weight = normal(4, 256, device=device, kind=kind), normal(256, device=device, kind=kind, seed=1)
    twin, late = rms_norm_ref(x, weight, EPS), formula(x, weight).to(kind)
    assert (rms_norm_triton(x, weight, EPS) != twin).float().mean() < 0.01  # the sum has another order
    assert (late != twin).float().mean() > 0.1


@pytest.mark.parametrize("lanes", [None, [3, 0]])
def test_rows_are_kept_as_they_were_and_no_other_slot_changes(device: str, lanes: list[int] | None) -> None:
    dump, n, width = 9, 4, 24
    around = torch.full((6, dump + 3, width), 7.0, device=device)
    store = around[1:5, 1 : dump + 2] if lanes else around[1:3, 1 : dump + 2]
    rows = torch.tensor([[0, 4, 8, dump], [2, dump, dump, dump]], device=device)
    x, weight = normal(2, n, width, device=device), normal(width, device=device, seed=1)
    lane = None if lanes is None else torch.tensor(lanes, device=device)
    expected = around.clone()
    for b, sequence in enumerate(lanes or [0, 1]):
        real = rows[b][rows[b] < dump]
        expected[1 + sequence, 1 + real] = x[b, : len(real)]
        expected[1 + sequence, 1 + dump] = x[b, -1]
    y = rms_norm_keep_triton(x, weight, EPS, store, rows, lane)
    assert torch.equal(y, rms_norm_triton(x, weight, EPS))
    unsettled = torch.zeros_like(around, dtype=torch.bool)
    unsettled[:, 1 + dump] = True  # several rows wrote there, in any order
    assert torch.equal(around[~unsettled], expected[~unsettled])
    assert around.isfinite().all()


@pytest.mark.parametrize(("device", "kind"), [*HALVES, ("cpu", torch.float32), ("cuda", torch.float32)])
def test_the_sum_is_rounded_and_then_normalised(device: str, kind: torch.dtype) -> None:
    x, delta = normal(2, 3, 40, device=device, kind=kind), normal(2, 5, 40, device=device, kind=kind, seed=1)[:, :3]
    weight = normal(40, device=device, kind=kind, seed=2)
    total, y = add_rms_norm_triton(x, delta, weight, EPS)
    assert torch.equal(total, x + delta)
    assert torch.equal(y, rms_norm_triton(total, weight, EPS))


def test_values_of_another_width_or_dtype_are_refused() -> None:
    x, rows = torch.ones(1, 2, 4), torch.zeros(1, 2, dtype=torch.int64)
    for store in (torch.ones(1, 3, 5), torch.ones(1, 3, 4, dtype=torch.float16)):
        with pytest.raises(ValueError, match="do not fit a store"):
            module.rms_norm_keep(x, torch.ones(4), EPS, store, rows)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 16, 4096), (8, 1280, 3584)])
@pytest.mark.parametrize("device", ["cuda"])
def test_the_kernel_is_no_less_exact_than_the_twin_at_model_sizes(
    device: str, shape: tuple[int, ...], kind: torch.dtype
) -> None:
    x, weight = normal(*shape, device=device, kind=kind), normal(shape[-1], device=device, kind=kind, seed=1)
    expected = formula(x, weight)
    error, of_twin = (
        (y.double() - expected).norm() / expected.norm()
        for y in (rms_norm_triton(x, weight, EPS), rms_norm_ref(x, weight, EPS))
    )
    assert error <= 1.1 * of_twin + 1e-7
