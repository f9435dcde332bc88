"""Places by counting against torch's stable sort: the same order, whatever the ties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcache.kernels.select import (
    ascending_ref,
    ascending_triton,
    find_ref,
    find_triton,
    highest_ref,
    highest_triton,
    lowest_ref,
    lowest_triton,
    rank_ref,
    rank_triton,
)

SIZES = [1, 7, 33, 270]
TRUE_SIZES = [(1, 1280), (8, 4096), (1, 16_384)]
NAN, INF = float("nan"), float("inf")


def scores(batch: int, n: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Many ties, signed zeros, and infinities."""
    generator = torch.Generator().manual_seed(n)
    drawn = torch.randint(-3, 4, (batch, n), generator=generator) * 0.5
    table = torch.tensor([-INF, INF, -0.0, 1e-40, torch.finfo(torch.float32).min])
    odd = table[torch.randint(0, len(table), (batch, n), generator=generator)]
    return torch.where(torch.rand(batch, n, generator=generator) < 0.3, odd, drawn).to(device, dtype)


def marks(batch: int, n: int, device: str) -> Tensor:
    return (torch.rand(batch, n, generator=torch.Generator().manual_seed(n + 1)) < 0.7).to(device)


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def check(batch: int, n: int, device: str) -> None:
    score, eligible = scores(batch, n, device), marks(batch, n, device)
    count = torch.arange(1, batch + 1, device=device) * n // 3
    for wanted, bound in ((count, n), (min(3, n), 5), (1, n + 3), (count, 1), (1, 8), (0, 9)):
        assert same(lowest_triton(score, wanted, bound), lowest_ref(score, wanted, bound))
    for dtype, wanted in ((torch.float32, count), (torch.float64, min(3, n))):
        score = scores(batch, n, device, dtype)
        assert same(rank_triton(score, eligible), rank_ref(score, eligible))
        assert torch.equal(highest_triton(score, eligible, wanted), highest_ref(score, eligible, wanted))
    rows = torch.randint(0, n, (batch, n), generator=torch.Generator().manual_seed(n)).to(device)
    assert same(ascending_triton(rows), ascending_ref(rows))


@pytest.mark.parametrize("n", SIZES)
def test_places_are_those_of_a_stable_sort(device: str, n: int) -> None:
    check(2, n, device)


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "n"), TRUE_SIZES)
def test_true_sizes_agree_as_well(batch: int, n: int) -> None:
    check(batch, n, "cuda")


@pytest.mark.parametrize("bound", [0, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_few_are_those_of_the_stable_sort_whatever_their_bits(device: str, bound: int, dtype: torch.dtype) -> None:
    info = torch.finfo(torch.float32)
    odd = [0.0, -0.0, INF, -INF, info.tiny, -info.tiny, 1e-45, -1e-45, info.max, info.min, 1.0, -1.0]
    drawn = torch.tensor(odd * 20, device=device, dtype=dtype)
    for seed in range(6):
        order = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(seed)).to(device)
        score = drawn[order].reshape(5, -1)  # (5, 48): each lane lacks some
        assert same(lowest_triton(score, 2, bound), lowest_ref(score, 2, bound))
        score = score.masked_fill(score == -INF, INF)
        assert same(lowest_triton(score, 2, bound), lowest_ref(score, 2, bound))


def test_of_a_few_that_are_not_numbers_the_first_is_taken_and_none_twice(device: str) -> None:
    index, real = lowest_triton(torch.full((2, 300), NAN, device=device), 4, 8)
    assert index.tolist() == [list(range(8))] * 2
    assert real.tolist() == [[True] * 4 + [False] * 4] * 2


@settings(max_examples=15)
@given(st.lists(st.sampled_from([-INF, -1.0, -0.0, 0.0, 1.0, INF]), min_size=1, max_size=40), st.data())
def test_the_lowest_come_in_order_and_ties_go_left(device: str, values: list[float], data: st.DataObject) -> None:
    bound = data.draw(st.integers(1, len(values)))
    count = data.draw(st.integers(0, bound))
    index, real = lowest_triton(torch.tensor([values], device=device), count, bound)
    assert index[0].tolist() == sorted(range(len(values)), key=lambda i: (values[i], i))[:bound]
    assert real[0].tolist() == [place < count for place in range(bound)]


def test_a_score_that_is_not_a_number_counts_as_infinite_and_leaves_no_place_empty(device: str) -> None:
    score = torch.tensor([[NAN, 2.0, INF, NAN, 1.0]], device=device)
    every = torch.ones_like(score, dtype=torch.bool)
    index, _ = lowest_triton(score, 5, 5)
    assert index.tolist() == [[4, 1, 0, 2, 3]]
    assert rank_triton(score, every)[0].tolist() == [[0, 2, 3, 1, 4]]


def test_scores_in_float64_are_not_rounded(device: str) -> None:
    score = torch.tensor([[0.5, 0.5 + 1e-12, 0.5 - 1e-12]], dtype=torch.float64, device=device)
    every = torch.ones_like(score, dtype=torch.bool)
    assert rank_triton(score, every)[0].tolist() == [[1, 0, 2]]


def test_rows_that_are_not_eligible_are_never_among_the_highest(device: str) -> None:
    score = torch.full((1, 40), -INF, device=device)
    eligible = torch.zeros(1, 40, dtype=torch.bool, device=device)
    eligible[0, [3, 38]] = True
    assert torch.equal(highest_triton(score, eligible, 40), eligible)
    assert rank_triton(score, eligible)[0][0, :3].tolist() == [3, 38, 0]


def test_views_of_scores_and_counts_are_read_in_place(device: str) -> None:
    board, counts = scores(4, 33, device), torch.arange(12, device=device).reshape(4, 3)
    view, count = board[::2, 5:], counts[::2, 1]
    assert same(lowest_triton(view, count, 9), lowest_ref(view, count, 9))
    on = marks(4, 33, device)[::2, 5:]
    assert torch.equal(highest_triton(view, on, count), highest_ref(view, on, count))
    across = board.t()
    assert same(lowest_triton(across, 2, 3), lowest_ref(across, 2, 3))
    assert same(rank_triton(across, marks(4, 33, device).t()), rank_ref(across, marks(4, 33, device).t()))


@pytest.mark.parametrize("n", SIZES)
def test_a_position_is_found_where_it_stands_and_others_in_range(device: str, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    rows = torch.randint(0, 2 * n, (3, n), generator=generator).sort(dim=-1).values.to(device)
    positions = torch.randint(-2, 2 * n + 3, (3, 150), generator=generator).to(device)
    assert torch.equal(find_triton(rows, positions), find_ref(rows, positions))
    one = rows[:1].expand(3, n)
    assert torch.equal(find_triton(one, positions[:, ::2]), find_ref(one, positions[:, ::2]))
