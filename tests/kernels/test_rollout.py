"""The chain of a rollout against the product of its matrices in float64; what is padded holds NaN."""

import pytest
import torch
from torch import Tensor

from dcache.kernels import rollout as module
from dcache.kernels.rollout import rollout, rollout_ref, rollout_triton

SHAPES = [(1, 1, 1), (3, 2, 5), (2, 3, 16), (4, 1, 33), (3, 2, 130), (2, 1, 300)]  # layers, batch, rows
TRUE_SHAPES = [(32, 1, 144), (32, 4, 160), (28, 1, 256)]
OPS = {"kernel": rollout_triton, "twin": rollout_ref}


def build(shape: tuple[int, ...], device: str) -> tuple[Tensor, Tensor]:
    """Shares of attention that rows pass to one another, less than all of it, and which rows are real."""
    layers, batch, n = shape
    draw = torch.Generator(device).manual_seed(sum(shape))
    flow = torch.rand(layers, batch, n, n + 3, generator=draw, device=device) ** 8
    flow = (flow / flow.sum(-1, keepdim=True))[..., :n]
    real = torch.arange(n, device=device) < n - 2 * torch.arange(batch, device=device)[:, None]
    return flow.masked_fill(~(real[:, :, None] & real[:, None]), torch.nan), real


def by_products(flow: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """The same from matrices W = (flow + identity) / 2 of real rows, multiplied from the left."""
    layers, batch, n, _ = flow.shape
    total = torch.eye(n, dtype=torch.float64, device=flow.device).expand(batch, n, n)
    total = total * real[:, :, None]
    passed = torch.empty(layers, batch, n, dtype=torch.float64, device=flow.device)
    for layer in reversed(range(layers)):
        passed[layer] = total.sum(1) / 2
        mixing = (flow[layer].nan_to_num().double() + torch.eye(n, device=flow.device)) / 2
        total = total @ mixing
    return passed, total.sum(1)


def check(op: str, shape: tuple[int, ...], device: str) -> None:
    flow, real = build(shape, device)
    for found, expected in zip(OPS[op](flow, real), by_products(flow, real), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)
        assert (found.masked_select(~real) == 0).all()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_product_of_all_layers_whatever_padded_rows_hold(
    op: str, shape: tuple[int, ...], device: str
) -> None:
    check(op, shape, device)


def test_blocks_of_few_rows_and_strides_of_any_kind(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flow, real = build((3, 2, 21), device)
    expected = rollout_ref(flow, real)
    turned = flow.transpose(2, 3).contiguous().transpose(2, 3)
    for block, columns in ((4, 16), (8, 2)):
        monkeypatch.setattr(module, "BLOCK", block)
        monkeypatch.setattr(module, "COLUMNS", columns)
        for x in (flow, turned, flow.transpose(0, 1).contiguous().transpose(0, 1)):
            for a, b in zip(rollout_triton(x, real), expected, strict=True):
                torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_a_sequence_has_the_same_bits_alone_and_among_others(device: str) -> None:
    flow, real = build((3, 3, 40), device)
    both, alone = rollout_triton(flow, real), rollout_triton(flow[:, 1:2], real[1:2])
    assert torch.equal(both[0][:, 1:2], alone[0])
    assert torch.equal(both[1][1:2], alone[1])


def test_without_a_real_row_nothing_is_passed_on(device: str) -> None:
    flow, real = build((2, 1, 8), device)
    assert not any(x.any() for x in rollout_triton(flow, torch.zeros_like(real)))


def test_on_a_cpu_the_twin_runs() -> None:
    flow, real = build((2, 1, 8), "cpu")
    assert all(torch.equal(a, b) for a, b in zip(rollout(flow, real), rollout_ref(flow, real), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", TRUE_SHAPES, ids=str)
def test_it_is_the_product_at_true_sizes(shape: tuple[int, ...]) -> None:
    check("kernel", shape, "cuda")
