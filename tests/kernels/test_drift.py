"""The kernels of the drift test against its formula in float64; padded rows and the dump column hold NaN."""

import pytest
import torch
from torch import Tensor

from dcache.kernels.drift import AXES, drift_ref, drift_triton

SHAPES = {"small": (2, 3, 5, 11), "odd": (2, 3, 18, 70), "one row": (1, 1, 1, 1), "long": (1, 2, 1, 1_100)}
TRUE_SHAPES = {"LLaDA-8B": (8, 32, 16, 1_280), "Dream-7B": (2, 28, 16, 4_096), "wide": (1, 32, 64, 16_384)}
CLOSE = {"atol": 1e-6, "rtol": 1e-5}


def build(shape: tuple[int, int, int, int], device: str, hidden: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    batch, heads, n, keys = shape
    draw = torch.Generator(device).manual_seed(sum(shape))

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=draw, device=device)

    visible = uniform(batch, 2, keys) > 0.3 if hidden else None
    if visible is not None:
        visible[..., 0] = True
    real = uniform(batch, n) > 0.5
    real[:, 0] = True
    maps = []
    for _ in range(2):
        score = 4 * uniform(batch, heads, n, keys + 1)
        score[..., -1] = -torch.inf
        if visible is not None:
            score[..., :-1].masked_fill_(~visible[:, :1, None], -torch.inf)
        p = score.softmax(-1)
        p[..., -1] = torch.nan
        maps.append(p.masked_fill(~real[:, None, :, None], torch.nan))
    return maps[0], maps[1], real, visible


def formula(past: Tensor, now: Tensor, real: Tensor, visible: Tensor | None, over: str) -> Tensor:
    """The mean by its definition in float64, lane by lane."""
    found = []
    for lane in range(len(past)):
        rows = real[lane].nonzero()[:, 0]
        seen = torch.arange(past.shape[-1] - 1, device=past.device)
        seen = seen if visible is None else seen[visible[lane, 0]]
        a, b = (x[lane][:, rows][..., seen].double() for x in (past, now))
        axes = [axis - 1 for axis in AXES[over]]
        norms = [x.pow(2).sum(axes).sqrt().clamp_min(1e-8) for x in (a, b)]
        found.append(((a * b).sum(axes) / (norms[0] * norms[1])).mean())
    return torch.stack(found)


@pytest.mark.parametrize("over", AXES)
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_the_kernel_counts_real_rows_and_visible_keys_alone(name: str, hidden: bool, over: str, device: str) -> None:
    scene = build(SHAPES[name], device, hidden)
    expected = formula(*scene, over)
    torch.testing.assert_close(drift_triton(*scene, over).double(), expected, **CLOSE)
    torch.testing.assert_close(drift_ref(*scene, over).double(), expected, **CLOSE)


@pytest.mark.parametrize("over", AXES)
def test_a_lane_without_a_real_row_is_nan_and_the_others_are_not(over: str, device: str) -> None:
    past, now, real, visible = build(SHAPES["small"], device, True)
    real[0] = False
    assert drift_triton(past, now, real, visible, over).isnan().tolist() == [True, False]


def test_heads_beyond_a_power_of_two_and_a_last_block_of_one_key_are_counted(device: str) -> None:
    scene = build((2, 28, 2, 257), device, False)
    torch.testing.assert_close(drift_triton(*scene, "heads").double(), formula(*scene, "heads"), **CLOSE)


@pytest.mark.parametrize("over", AXES)
def test_norms_are_clamped_so_that_what_has_no_weight_is_not_similar_to_itself(over: str, device: str) -> None:
    past = torch.full((1, 2, 1, 4), 1e-12, device=device)
    real = torch.ones(1, 1, dtype=torch.bool, device=device)
    assert drift_triton(past, past, real, None, over).item() < 1e-6
    assert drift_triton(1e8 * past, 1e8 * past, real, None, over).item() == pytest.approx(1)


@pytest.mark.gpu
@pytest.mark.parametrize("over", AXES)
@pytest.mark.parametrize("name", TRUE_SHAPES)
def test_the_kernel_follows_the_formula_at_true_sizes(name: str, over: str) -> None:
    scene = build(TRUE_SHAPES[name], "cuda", True)
    torch.testing.assert_close(drift_triton(*scene, over).double(), formula(*scene, over), **CLOSE)
