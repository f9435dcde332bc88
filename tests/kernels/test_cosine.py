"""The cosine kernel against the formula in float64."""

import pytest
import torch
from torch import Tensor

from dcache.kernels.cosine import cosine_ref, cosine_triton


def pair(*shape: int, device: str, kind: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(*shape, generator=draw), torch.randn(*shape, generator=draw)
    return x.to(device, kind), (x + 0.3 * y).to(device, kind)


def formula(x: Tensor, y: Tensor) -> Tensor:
    one, other = (z.double() if z.dim() == 3 else z.double().transpose(1, 2).flatten(2) for z in (x, y))
    norms = [z.norm(dim=-1).clamp_min(1e-8) for z in (one, other)]
    return (one * other).sum(-1) / (norms[0] * norms[1])


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 5), (3, 4, 2050), (2, 3, 5, 8), (1, 33, 2, 80), (2, 1, 4, 16)])
def test_heads_and_width_are_one_vector(device: str, shape: tuple[int, ...]) -> None:
    x, y = pair(*shape, device=device)
    expected = formula(x, y)
    for op in (cosine_triton, cosine_ref):
        torch.testing.assert_close(op(x, y).double(), expected, atol=1e-6, rtol=1e-6)


def test_views_are_read_as_they_stand(device: str) -> None:
    x, y = pair(2, 6, 5, 12, device=device)
    x, y = x[:, ::2, 1:4, 2:9], y.transpose(0, 1)[:2, :1].expand(2, 3, 5, 12)[:, :, 1:4, 2:9]
    torch.testing.assert_close(cosine_triton(x, y).double(), formula(x, y), atol=1e-6, rtol=1e-6)


def test_a_row_of_zeros_has_no_direction(device: str) -> None:
    x = torch.zeros(1, 2, 6, device=device)
    for op in (cosine_triton, cosine_ref):
        assert op(x, x).tolist() == [[0.0, 0.0]]
        assert op(x, torch.ones_like(x)).abs().max() < 1e-7  # what the length of a unit vector is off by


def test_a_row_that_did_not_turn_has_cosine_one(device: str) -> None:
    x, _ = pair(2, 4, 3, 80, device=device)
    torch.testing.assert_close(cosine_triton(x, 2 * x), torch.ones(2, 3, device=device), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 256, 256), (1, 32, 256, 128), (8, 4, 256, 128)])
@pytest.mark.parametrize("device", ["cuda"])
def test_model_sizes_in_half_precision(device: str, shape: tuple[int, ...], kind: torch.dtype) -> None:
    x, y = pair(*shape, device=device, kind=kind)
    torch.testing.assert_close(cosine_triton(x, y).double(), formula(x, y), atol=2e-6, rtol=2e-6)


def test_rows_that_hardly_turned_are_told_apart(device: str) -> None:
    x, y = pair(1, 64, 256, device=device)
    y = x + torch.linspace(1e-4, 3e-3, 64, device=device)[None, :, None] * (y - x)
    expected = 1 - formula(x, y)
    assert expected.max() < 1e-5
    for op in (cosine_triton, cosine_ref):
        found = 1 - op(x, y).double()
        assert (found - expected).abs().max() < 4e-8  # half the distance of two float32 below 1, and a little
