"""The kernel of few rows and a weight matrix against float64 and against its torch twins."""

import pytest
import torch
from torch import Tensor

from dcache.kernels import product as ops
from dcache.kernels.product import add_product, gated_product, product

CLOSE = {"atol": 2e-5, "rtol": 2e-5}
SHAPES = [  # rows, outputs, columns
    ((1, 1), 24, 40),
    ((2, 3), 130, 64),
    ((17,), 300, 200),
    ((1, 32), 4104, 72),
    ((33,), 8200, 16),
    ((2, 32), 72, 136),
]
MODELS = [  # outputs and columns of LLaDA-8B and Dream-7B: qkv, out, down
    (12_288, 4096),
    (4096, 4096),
    (4096, 12_288),
    (4608, 3584),
    (3584, 18_944),
]


def normal(*shape: int, device: str, seed: int = 0, kind: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, kind)


def gated(y: Tensor) -> Tensor:
    gate, up = y.chunk(2, dim=-1)
    return gate * gate.sigmoid() * up


@pytest.mark.parametrize(("rows", "n", "k"), SHAPES)
def test_products_of_any_shape(device: str, rows: tuple[int, ...], n: int, k: int) -> None:
    x, weight = normal(*rows, k, device=device), normal(n, k, device=device, seed=1) / k**0.5
    y, expected = ops.product_triton(x, weight), x.double() @ weight.double().T
    assert y.shape == (*rows, n)
    torch.testing.assert_close(y.double(), expected, **CLOSE)
    torch.testing.assert_close(ops.gated_product_triton(x, weight).double(), gated(expected), **CLOSE)
    h = normal(*rows, n, device=device, seed=2)
    expected += h
    ops.add_product_triton(h, x, weight)
    torch.testing.assert_close(h.double(), expected, **CLOSE)


def test_rows_and_weights_may_be_views(device: str) -> None:
    x, weight = normal(2, 9, 64, device=device), normal(80, 64, device=device, seed=1)
    for rows, part in ((x[:, ::2], weight[16:48]), (x.transpose(0, 1), weight[:, :32]), (x[0], weight)):
        rows = rows[..., : part.shape[1]]
        torch.testing.assert_close(ops.product_triton(rows, part).double(), rows.double() @ part.double().T, **CLOSE)


def test_what_lies_behind_the_rows_is_not_read(device: str) -> None:
    wide = normal(40, 64, device=device)
    wide[5:] = torch.nan
    weight = normal(48, 64, device=device, seed=1)
    weight[40:] = torch.nan
    found = ops.product_triton(wide[:5], weight[:40])
    torch.testing.assert_close(found.double(), wide[:5].double() @ weight[:40].double().T, **CLOSE)


@pytest.mark.parametrize("rows", [1, 16, 32, 64])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", ["cuda"])
def test_the_residual_is_added_in_float32_and_the_sum_rounded_once(device: str, kind: torch.dtype, rows: int) -> None:
    x, weight = normal(1, rows, 512, device=device, kind=kind), normal(256, 512, device=device, kind=kind, seed=1)
    h, y = normal(1, rows, 256, device=device, kind=kind, seed=2), x.double() @ weight.double().T
    once, twice = (h + y).to(kind), h + y.to(kind)
    ops.add_product_triton(h, x, weight)
    assert (h != once).float().mean() < 0.01  # sums in another order may round to the neighbour
    assert (twice != once).float().mean() > 0.05


@pytest.mark.parametrize("rows", [1, 16, 32, 64])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", ["cuda"])
def test_the_product_is_rounded_before_the_gate(device: str, kind: torch.dtype, rows: int) -> None:
    x, weight = normal(1, rows, 512, device=device, kind=kind), normal(256, 512, device=device, kind=kind, seed=1)
    apart = ops.gated_product_triton(x, weight) != ops.gated_product_ref(x, weight)
    assert apart.float().mean() < 0.02  # sums in another order, and an exponential that is not torch's


@pytest.mark.parametrize("rows", [1, 16, 32, 48, 64])
@pytest.mark.parametrize(("n", "k"), MODELS)
@pytest.mark.parametrize("device", ["cuda"])
def test_the_kernel_is_no_less_exact_than_the_twin_at_model_sizes(device: str, n: int, k: int, rows: int) -> None:
    x = normal(1, rows, k, device=device, kind=torch.bfloat16)
    weight = normal(n, k, device=device, kind=torch.bfloat16, seed=1)
    expected = x.double() @ weight.double().T
    error, of_twin = (
        (y.double() - expected).norm() / expected.norm()
        for y in (ops.product_triton(x, weight), ops.product_ref(x, weight))
    )
    assert error <= 1.05 * of_twin + 1e-6
    assert torch.equal(ops.product_triton(x, weight), ops.product_triton(x, weight))


@pytest.mark.parametrize(("width", "k"), [(12_288, 4096), (18_944, 3584)])
@pytest.mark.parametrize("device", ["cuda"])
def test_gated_products_at_model_sizes(device: str, width: int, k: int) -> None:
    weight = normal(2 * width, k, device=device, kind=torch.bfloat16, seed=1) / k**0.5
    for rows in (5, 32):
        x = normal(1, rows, k, device=device, kind=torch.bfloat16)
        expected = gated(x.double() @ weight.double().T)
        error, of_twin = (
            (y.double() - expected).norm() / expected.norm()
            for y in (ops.gated_product_triton(x, weight), ops.gated_product_ref(x, weight))
        )
        assert error <= 1.05 * of_twin + 1e-6


@pytest.mark.parametrize("device", ["cuda"])
def test_the_kernel_runs_where_it_wins_and_nowhere_else(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    launch = ops._launch
    monkeypatch.setattr(ops, "_launch", lambda *a, **more: (ran.append(1), launch(*a, **more)))

    @torch.no_grad()
    def kernel_runs(rows: int, n: int, kind: torch.dtype = torch.bfloat16, k: int = 64) -> bool:
        ran.clear()
        product(normal(1, rows, k, device=device, kind=kind), normal(n, k, device=device, kind=kind))
        return bool(ran)

    hopper = torch.cuda.get_device_capability()[0] == 9
    assert kernel_runs(32, 64) == kernel_runs(64, 4096) == hopper
    assert not any((kernel_runs(33, 64), kernel_runs(65, 4096), kernel_runs(32, 64, torch.float32)))
    assert not kernel_runs(32, 64, k=60)  # rows of 120 bytes
    weight = normal(64, 64, device=device, kind=torch.bfloat16).requires_grad_()
    product(normal(1, 4, 64, device=device, kind=torch.bfloat16), weight).sum().backward()
    assert weight.grad is not None


def test_without_a_gpu_the_twins_run() -> None:
    x, weight = normal(2, 3, 8, device="cpu"), normal(6, 8, device="cpu", seed=1)
    y = x @ weight.T
    torch.testing.assert_close(product(x, weight), y)
    torch.testing.assert_close(gated_product(x, weight), gated(y))
    h = torch.ones(2, 3, 6)
    add_product(h, x, weight)
    torch.testing.assert_close(h, y + 1)
