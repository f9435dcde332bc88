"""The kernels that move and count rows, bit by bit against their torch twins."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcache.kernels.rows import put, put_ref, put_triton, take_ref, take_triton, tally_ref, tally_triton

KINDS = [torch.bool, torch.int64, torch.float16, torch.bfloat16, torch.float32]
# Heads and width; the last two are wider than a program's share.
ROWS = [((), 1), ((), 7), ((), 24), ((3,), 8), ((2,), 80), ((), 2050), ((2,), 2050)]
few = settings(max_examples=8)


def values(*shape: int, device: str, kind: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    whole = torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(seed))
    return (whole > 0 if kind == torch.bool else whole.to(kind)).to(device)


def places(batch: int, n: int, dump: int, device: str, seed: int = 0) -> Tensor:
    """Ascending distinct positions, padded with the dump slot; (batch, n), and not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.full((batch, n), dump)
    for row in rows:
        real = int(torch.randint(0, min(n, dump) + 1, (), generator=generator))
        row[:real] = torch.randperm(dump, generator=generator)[:real].sort().values
    return rows.T.contiguous().T.to(device)


@given(
    row=st.sampled_from(ROWS),
    kind=st.sampled_from(KINDS),
    n=st.sampled_from([0, 1, 7, 33]),
    laned=st.booleans(),
    seed=st.integers(0, 99),
)
@few
def test_taken_rows_are_those_of_the_twin(
    device: str, row: tuple[tuple[int, ...], int], kind: torch.dtype, n: int, laned: bool, seed: int
) -> None:
    heads, width = row
    store = values(2 + laned, *heads, 14, width, device=device, kind=kind, seed=seed)[..., 2:, :]
    rows = places(2, n, 11, device, seed)
    lanes = torch.tensor([2, 0], device=device) if laned else None
    assert torch.equal(take_triton(store, rows, lanes), take_ref(store, rows, lanes))


@given(
    row=st.sampled_from(ROWS),
    kind=st.sampled_from(KINDS),
    n=st.sampled_from([0, 1, 7, 33]),
    laned=st.booleans(),
    seed=st.integers(0, 99),
)
@few
def test_put_rows_are_those_of_the_twin_and_nothing_else_changes(
    device: str, row: tuple[tuple[int, ...], int], kind: torch.dtype, n: int, laned: bool, seed: int
) -> None:
    heads, width = row
    dump = 11
    around = values(4 + laned, *heads, dump + 5, width + 1, device=device, kind=kind, seed=seed)  # a guard on all sides
    expected = around.clone()
    rows = places(2, n, dump, device, seed)
    fresh = values(2, n, *heads, width, device=device, kind=kind, seed=seed + 1)
    fresh = fresh.transpose(1, 2) if heads else fresh
    lanes = torch.tensor([2, 0], device=device) if laned else None
    for write, whole in ((put_triton, around), (put_ref, expected)):
        write(whole[1:-1, ..., 2 : dump + 3, :-1], rows, fresh, lanes)
    for whole in (around, expected):  # whichever row won there
        whole[..., 2 + dump, :] = 0
    assert torch.equal(around, expected)


def test_a_moved_row_keeps_its_bits_even_where_it_is_nan(device: str) -> None:
    bits = torch.tensor([[[0x7FC1, -1, 0x7F80, -32768]]], dtype=torch.int16, device=device)
    row = torch.zeros(1, 1, dtype=torch.int64, device=device)
    store = torch.zeros(1, 2, 4, dtype=torch.bfloat16, device=device)
    put_triton(store, row, bits.view(torch.bfloat16))
    assert torch.equal(take_triton(store, row).view(torch.int16), bits)


def test_a_store_that_is_a_transposed_view_is_read_and_written_in_place(device: str) -> None:
    store = values(2, 5, 9, device=device)
    rows = torch.tensor([[0, 4], [8, 3]], device=device)
    view = store.transpose(1, 2)
    assert torch.equal(take_triton(view, rows), take_ref(view, rows))
    put_triton(view, rows, torch.zeros(2, 2, 5, device=device))
    assert torch.equal(take_ref(view, rows), torch.zeros(2, 2, 5, device=device))


@pytest.mark.parametrize("n", [0, 1, 7, 33, 2049])
@pytest.mark.parametrize("laned", [False, True])
def test_every_real_row_is_counted_once_in_its_class_and_added(device: str, n: int, laned: bool) -> None:
    rows = places(3, n, 3000, device)
    classes = torch.randint(0, 5, (4 if laned else 3, 3003), generator=torch.Generator().manual_seed(1))
    classes[:, 3000] = 4  # the dump slot; classes from 2 on are not counted
    lanes = torch.tensor([3, 0, 2], device=device) if laned else None
    kinds = classes.to(device=device, dtype=torch.uint8).T.contiguous().T
    counts = torch.full((2, 5, 3), 100, device=device)
    expected, twin = counts.clone(), counts.clone()
    tally_triton(counts[1, :3, :2], rows, kinds, lanes)
    tally_ref(twin[1, :3, :2], rows, kinds, lanes)
    for b, row in enumerate(rows.tolist()):
        for p in row:
            kind = int(classes[b if lanes is None else int(lanes[b]), p])
            if kind < 2:
                expected[1, b, kind] += 1
    assert torch.equal(counts, expected)
    assert torch.equal(twin, expected)


def test_values_of_another_shape_or_dtype_are_refused() -> None:
    rows = torch.zeros(1, 2, dtype=torch.int64)
    for y in (torch.ones(1, 2, 5), torch.ones(1, 3, 4), torch.ones(2, 2, 4), torch.ones(1, 2, 4, dtype=torch.int32)):
        with pytest.raises(ValueError, match="do not fit a store"):
            put(torch.ones(1, 3, 4), rows, y)


@pytest.mark.parametrize("shape", [(32, 16_448, 128), (1345, 4096)])
@pytest.mark.parametrize("device", ["cuda"])
def test_rows_of_a_full_store_are_moved_in_place(device: str, shape: tuple[int, ...]) -> None:
    sequences = 34 if len(shape) == 3 else 8  # more than 2**31 elements, or all rows of many sequences
    store = torch.zeros(sequences, *shape, dtype=torch.bfloat16, device=device)
    rows = places(2, 1280, shape[-2] - 1, device)
    lanes = torch.tensor([sequences - 1, 0], device=device)
    fresh = torch.randn(2, *shape[:-2], 1280, shape[-1], device=device).bfloat16()
    put_triton(store, rows, fresh, lanes)
    real = (rows < shape[-2] - 1).reshape(2, *([1] * (len(shape) - 2)), 1280, 1)
    for taken in (take_triton(store, rows, lanes), take_ref(store, rows, lanes)):
        assert torch.equal(taken * real, fresh * real)
    real_rows = (rows < shape[-2] - 1).sum()
    assert store[[0, -1]].any(-1).sum() <= (real_rows + 2) * (shape[0] if len(shape) == 3 else 1)
    assert not store[1:-1].any()
