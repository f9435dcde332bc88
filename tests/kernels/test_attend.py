"""The attention kernel against its formula in float64 and its twin; hidden and unwritten memory is NaN."""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcache.kernels import attend as attend_module
from dcache.kernels.attend import (
    Keys,
    Tiles,
    _launch,
    attend,
    attend_lse,
    attend_lse_ref,
    attend_lse_triton,
    attend_ref,
    attend_triton,
    visible_keys,
    visible_keys_ref,
    visible_keys_triton,
)

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
HIDDEN = ["none", "shared", "by head"]


class Shape(NamedTuple):
    """Sizes of one call; `sequences` in the stores, `batch` of them in the pass."""

    batch: int
    sequences: int
    heads: int
    kv_heads: int
    n: int
    slots: int
    dim: int

    def __str__(self) -> str:
        return "-".join(str(size) for size in self)


SHAPES = [
    Shape(1, 1, 1, 1, 1, 1, 8),
    Shape(2, 2, 6, 3, 5, 11, 8),
    Shape(2, 3, 7, 1, 7, 70, 16),
    Shape(1, 4, 4, 4, 33, 65, 80),
    Shape(2, 5, 4, 2, 16, 64, 64),
]
LLADA = Shape(1, 1, 32, 32, 64, 1280, 128)
DREAM = Shape(1, 1, 28, 4, 64, 1280, 128)
TRUE_SHAPES = [
    LLADA,
    LLADA._replace(n=1),
    LLADA._replace(n=16, slots=4096),
    LLADA._replace(n=33, slots=1281, sequences=8, batch=3),
    LLADA._replace(n=1280),
    DREAM,
    DREAM._replace(n=1000, slots=1111),
    DREAM._replace(n=64, sequences=8, batch=7),
    Shape(2, 2, 8, 2, 40, 300, 96),
    Shape(2, 2, 8, 8, 200, 300, 80),
]


class Scene(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    visible: Tensor | None
    lanes: Tensor | None


def scene(shape: Shape, hidden: str, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Scene:
    """Views of wider stores; all that may not be read is NaN: hidden keys, spare slots, other sequences."""
    source = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=source)

    q = normal(shape.batch, shape.n, shape.heads + 1, shape.dim)[:, :, 1:].transpose(1, 2)
    stores = [normal(shape.sequences, shape.kv_heads, shape.slots + 3, shape.dim) for _ in "KV"]
    lanes, picked = None, torch.arange(shape.sequences)
    if shape.batch < shape.sequences:
        picked = torch.randperm(shape.sequences, generator=source)[: shape.batch]
        lanes = picked.to(device)
    visible = None
    allowed = torch.zeros(shape.sequences, shape.kv_heads, shape.slots + 3, dtype=torch.bool)
    allowed[picked, :, : shape.slots] = True
    if hidden != "none":
        heads = shape.kv_heads if hidden == "by head" else 1
        visible = torch.rand(shape.batch, heads, shape.slots, generator=source) > torch.rand(1, generator=source)
        visible[:, :, shape.slots // 2] = True
        allowed[picked, :, : shape.slots] = visible.expand(-1, shape.kv_heads, -1)
        visible = visible.to(device)
    k, v = (x.masked_fill(~allowed[..., None], float("nan")).to(device, dtype)[:, :, : shape.slots] for x in stores)
    return Scene(q.to(device, dtype), k, v, visible, lanes)


def formula(at: Scene) -> tuple[Tensor, Tensor]:
    """o and lse in float64."""
    q, k, v = at.q.double(), at.k.double(), at.v.double()
    if at.lanes is not None:
        k, v = k[at.lanes], v[at.lanes]
    group = q.shape[1] // k.shape[1]
    k, v = (x.nan_to_num(0.0).repeat_interleave(group, dim=1) for x in (k, v))
    score = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if at.visible is not None:
        shown = at.visible.expand(-1, at.k.shape[1], -1).repeat_interleave(group, dim=1)
        score = score.masked_fill(~shown[:, :, None], float("-inf"))
    return score.softmax(-1) @ v, score.logsumexp(-1)


def row_major(o: Tensor) -> bool:
    return o.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_follows_the_formula_and_reads_no_hidden_key(shape: Shape, hidden: str, device: str) -> None:
    at = scene(shape, hidden, device)
    o, lse = attend_lse_triton(*at)
    expected = formula(at)
    torch.testing.assert_close(o.double(), expected[0], **CLOSE)
    torch.testing.assert_close(lse.double(), expected[1], **CLOSE)
    assert row_major(o)


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_twin_follows_the_formula_and_reads_no_hidden_key(shape: Shape, hidden: str) -> None:
    at = scene(shape, hidden, "cpu")
    o, lse = attend_lse_ref(*at)
    expected = formula(at)
    torch.testing.assert_close(o.double(), expected[0], **CLOSE)
    torch.testing.assert_close(lse.double(), expected[1], **CLOSE)
    assert row_major(o)
    assert torch.equal(attend_ref(*at), o)


@pytest.mark.parametrize("hidden", ["none", "shared"])
@pytest.mark.parametrize("splits", [1, 2, 5, 8])
def test_splits_over_keys_do_not_change_the_result(splits: int, hidden: str, device: str) -> None:
    at = scene(Shape(2, 3, 4, 2, 9, 75, 16), hidden, device)
    keys = None if at.visible is None else visible_keys_triton(at.visible)
    o, lse = _launch(at.q, at.k, at.v, keys, at.lanes, True, Tiles(16, 16, 4, 2, splits))
    expected = formula(at)
    torch.testing.assert_close(o.double(), expected[0], **CLOSE)
    assert lse is not None
    torch.testing.assert_close(lse.double(), expected[1], **CLOSE)


@pytest.mark.parametrize("splits", [1, 3])
def test_without_a_visible_key_attention_is_zero_and_its_sum_empty(splits: int, device: str) -> None:
    at = scene(Shape(2, 2, 2, 1, 3, 40, 8), "shared", device)
    assert at.visible is not None
    at.visible[1] = False
    at.k[1], at.v[1] = float("nan"), float("nan")
    o, lse = _launch(at.q, at.k, at.v, visible_keys_triton(at.visible), None, True, Tiles(16, 16, 4, 2, splits))
    assert lse is not None
    assert (o[1] == 0).all()
    assert (lse[1] == float("-inf")).all()
    torch.testing.assert_close(o[0].double(), formula(at)[0][0], **CLOSE)


def test_lists_may_be_parts_of_those_of_all_layers(device: str) -> None:
    at = scene(Shape(2, 2, 4, 2, 3, 21, 8), "by head", device)
    assert at.visible is not None
    every = visible_keys_triton(torch.stack([~at.visible, at.visible]))
    mine = Keys(every.index[1], every.count[1])
    assert torch.equal(attend_triton(*at, mine), attend_triton(*at))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 2, 1, 33), (2, 1, 64), (2, 2, 5000)], ids=str)
def test_lists_name_the_visible_keys_in_order_and_stay_in_range(sizes: tuple[int, ...], device: str) -> None:
    source = torch.Generator().manual_seed(len(sizes))
    visible = torch.rand(*sizes, generator=source) > torch.rand(*sizes[:-1], 1, generator=source)
    visible[0] = False
    visible[-1, -1] = True
    visible = visible.to(device)
    for made in (visible_keys_triton(visible), visible_keys_ref(visible)):
        assert made.index.dtype == made.count.dtype == torch.int32
        assert torch.equal(made.count, visible.sum(-1, dtype=torch.int32))
        assert made.index.min() >= 0
        assert made.index.max() < sizes[-1]
        listed = [x[:c].tolist() for x, c in zip(made.index.flatten(0, -2), made.count.flatten(), strict=True)]
        assert listed == [x.nonzero()[:, 0].tolist() for x in visible.flatten(0, -2)]


@settings(max_examples=8)
@given(
    heads=st.sampled_from([(1, 1), (2, 2), (3, 1), (4, 2)]),
    n=st.integers(1, 20),
    slots=st.integers(1, 50),
    dim=st.sampled_from([8, 24, 32]),
    hidden=st.sampled_from(HIDDEN),
    spare=st.integers(0, 2),
)
def test_kernel_and_twin_agree_on_odd_shapes(
    heads: tuple[int, int], n: int, slots: int, dim: int, hidden: str, spare: int, device: str
) -> None:
    at = scene(Shape(2, 2 + spare, *heads, n, slots, dim), hidden, device)
    for mine, twin in zip(attend_lse_triton(*at), attend_lse_ref(*at), strict=True):
        torch.testing.assert_close(mine, twin, **CLOSE)


def test_what_runs_by_itself_is_the_twin_or_the_kernel(device: str) -> None:
    for rows in (3, attend_module.SDPA_ROWS):
        at = scene(Shape(1, 1, 2, 1, rows, 9, 8), "none", device)
        with torch.inference_mode():
            for o in (attend(*at), attend_lse(*at)[0]):
                torch.testing.assert_close(o.double(), formula(at)[0], **CLOSE)
                assert row_major(o)
    with torch.inference_mode():
        assert visible_keys(torch.ones(1, 2, 5, dtype=torch.bool, device=device)).count.tolist() == [[5, 5]]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("shape", [*SHAPES, *TRUE_SHAPES], ids=str)
def test_half_precision_kernel_errs_no_more_than_its_twin(shape: Shape, hidden: str, dtype: torch.dtype) -> None:
    at = scene(shape, hidden, "cuda", dtype)
    expected, expected_lse = formula(at)
    o, lse = attend_lse_triton(*at)

    def error(x: Tensor) -> float:
        return float((x.double() - expected).norm() / expected.norm())

    assert error(o) <= max(2 * error(attend_ref(*at)), 1e-3)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=1e-4)
    assert torch.equal(o, attend_triton(*at)), "two runs, or a run without lse, differ"
    assert row_major(o)


@pytest.mark.gpu
def test_float32_products_are_not_rounded_on_a_gpu() -> None:
    at = scene(LLADA._replace(n=17, heads=8, kv_heads=4), "shared", "cuda")
    torch.testing.assert_close(attend_triton(*at).double(), formula(at)[0], **CLOSE)


@pytest.mark.gpu
def test_a_captured_graph_replays_with_new_lists_and_lanes() -> None:
    shape = Shape(2, 4, 8, 2, 16, 512, 64)
    at, other = (scene(shape, "shared", "cuda", torch.bfloat16, seed) for seed in (0, 1))
    assert at.visible is not None
    held = Scene(*(None if x is None else x.clone() for x in at))
    attend_triton(*held)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = attend_triton(*held)
    for now in (at, other):
        for mine, fresh in zip(held, now, strict=True):
            assert mine is not None
            assert fresh is not None
            mine.copy_(fresh)
        graph.replay()
        assert torch.equal(o, attend_triton(*held))
        torch.testing.assert_close(o.double(), formula(now)[0], atol=2e-2, rtol=2e-2)
