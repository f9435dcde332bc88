"""The kernels of attention statistics against their formulas in float64; what they must not read holds NaN."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dcache.kernels import attention_probs as ops
from dcache.kernels import scores

SHAPES = {  # batch, heads, kv_heads, rows, slots, head_dim
    "few rows": (2, 6, 3, 5, 11, 8),
    "one row": (1, 2, 2, 1, 150, 80),
    "some rows": (2, 2, 1, 33, 70, 16),
    "many rows": (1, 2, 1, 130, 40, 48),
    "rows of all layers": (2, 2, 2, 66, 70, 16),
}
TRUE_SHAPES = {
    "LLaDA-8B, tracked": (2, 32, 32, 16, 1_281, 128),
    "LLaDA-8B, all": (1, 32, 32, 1_280, 1_280, 128),
    "LLaDA-8B, rows of all layers": (4, 32, 32, 144, 1_280, 128),
    "Dream-7B": (2, 28, 4, 64, 4_096, 128),
}
# a product of bfloat16 numbers is exact in float32, and so is no score rounded: one tolerance for both
CLOSE = {"atol": 3e-6, "rtol": 5e-5}


@dataclass
class Scene:
    """Inputs of the ops, with NaN in hidden keys, and the results of the formulas in float64."""

    q: Tensor
    k: Tensor
    weight: Tensor
    visible: Tensor | None
    lanes: Tensor | None
    scores: Tensor  # (batch, heads, rows, slots), not scaled, 0 for hidden keys
    probs: Tensor  # (batch, heads, rows, slots)
    lse: Tensor  # (batch, heads, rows)

    @property
    def keys(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.k, self.visible, self.lanes

    def received(self) -> Tensor:
        return torch.einsum("bhij,bi->bj", self.probs, self.weight.double())


def build(
    shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32, hidden: str = "by head", lanes: bool = True
) -> Scene:
    batch, heads, kv_heads, n, slots, head_dim = shape
    draw = torch.Generator(device).manual_seed(sum(shape))

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw, device=device).to(dtype)

    q = normal(batch, n, heads, head_dim).transpose(1, 2)
    store = normal(batch + lanes, kv_heads, slots + 5, head_dim)
    k = store[:, :, :slots]
    order = torch.arange(batch, device=device) + 1 if lanes else None
    read = k.clone() if order is None else k[order]
    visible = None
    if hidden != "nothing":
        seen = (batch, kv_heads if hidden == "by head" else 1, slots)
        visible = torch.rand(seen, generator=draw, device=device) > 0.4
        visible[:, :, slots // 2] = True
        visible[:, :, slots // 2 + 1 :] &= batch > 1  # the last splits of the keys see nothing
    shown = torch.ones(batch, 1, slots, dtype=torch.bool, device=device) if visible is None else visible
    shown = shown.expand(batch, kv_heads, slots).repeat_interleave(heads // kv_heads, dim=1)[:, :, None]
    scores = torch.einsum("bhid,bhjd->bhij", q.double(), read.double().repeat_interleave(heads // kv_heads, dim=1))
    scaled = (scores / math.sqrt(head_dim)).masked_fill(~shown, -torch.inf)
    weight = torch.rand(batch, n, generator=draw, device=device)
    if visible is not None:
        read = read.masked_fill(~visible[..., None], torch.nan)
    store.fill_(torch.nan)  # the sequence of no lane, and the slots behind the view
    if order is None:
        k.copy_(read)
    else:
        k[order] = read
    return Scene(q, k, weight, visible, order, scores.masked_fill(~shown, 0), scaled.softmax(-1), scaled.logsumexp(-1))


@pytest.fixture(params=["spread", "in one program"])
def division(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys, rows and heads divided among many programs, or as few as can be."""
    if request.param == "in one program":
        monkeypatch.setattr(scores, "PROGRAMS", 1)


def assert_is(found: Tensor, expected: Tensor) -> None:
    """Equal but for rounding, and a last column of 0."""
    assert found.dtype == torch.float32
    assert (found[..., -1] == 0).all()
    torch.testing.assert_close(found[..., :-1].double(), expected, **CLOSE)


def check(scene: Scene) -> None:
    """All ops, with and without a known log-sum-exp, of one layer or of several."""
    assert_is(ops.products_triton(scene.q, *scene.keys), scene.scores.mean(1))
    mean, columns = scene.probs.mean(1), columns_of(scene)
    k, *rest = scene.keys
    for lse in (None, scene.lse.float()):
        assert_is(ops.probs_triton(scene.q, k, *rest, lse), scene.probs)
        assert_is(ops.received_triton(scene.q, k, scene.weight, *rest, lse), scene.received())
        assert_is(ops.head_mean_triton(scene.q, k, *rest, lse), mean)
        assert_is_of(columns, ops.head_mean_triton(scene.q, k, *rest, lse, columns), mean)
    if (layers := len(scene.q)) > 1:
        assert_is(ops.received_triton(scene.q, k, scene.weight, *rest, lse, layers), scene.received())
        assert_is_of(columns, ops.head_mean_triton(scene.q, k, *rest, lse, columns, layers), mean)


def columns_of(scene: Scene) -> Tensor:
    """Ascending columns of each lane, padded with the dump slot: (batch, odd number)."""
    batch, _, _, slots = scene.probs.shape
    draw = torch.Generator(scene.q.device).manual_seed(slots)
    order = torch.rand(batch, slots, generator=draw, device=scene.q.device).argsort(-1)[:, : slots // 2 | 1]
    order[-1, -2:] = slots
    return order.sort(-1).values


def assert_is_of(columns: Tensor, found: Tensor, mean: Tensor) -> None:
    """Equal but for rounding to those columns of `mean` (batch, rows, slots), 0 in that of the dump slot."""
    assert found.dtype == torch.float32
    expected = torch.nn.functional.pad(mean, (0, 1)).gather(-1, columns[:, None].expand(-1, mean.shape[1], -1))
    torch.testing.assert_close(found.double(), expected, **CLOSE)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.usefixtures("division")
def test_statistics_follow_the_formulas_at_odd_sizes(name: str, device: str) -> None:
    check(build(SHAPES[name], device))


@pytest.mark.parametrize("hidden", ["nothing", "for all heads"])
@pytest.mark.parametrize("lanes", [False, True])
def test_statistics_read_the_keys_that_a_lane_sees(hidden: str, lanes: bool, device: str) -> None:
    check(build(SHAPES["few rows"], device, hidden=hidden, lanes=lanes))


def test_the_twins_follow_the_formulas_with_lanes() -> None:
    scene = build(SHAPES["few rows"], "cpu")
    k, visible, lanes = scene.keys
    assert_is(ops.probs(scene.q, k, visible, lanes, scene.lse.float()), scene.probs)
    assert_is(ops.products(scene.q, k, visible, lanes), scene.scores.mean(1))
    assert_is(ops.received(scene.q, k, scene.weight, visible, lanes, scene.lse.float()), scene.received())
    assert_is(ops.head_mean(scene.q, k, visible, lanes, scene.lse.float()), scene.probs.mean(1))
    columns = columns_of(scene)
    chosen = ops.head_mean(scene.q, k, visible, lanes, scene.lse.float(), columns)
    assert_is_of(columns, chosen, scene.probs.mean(1))


def test_a_row_without_weight_adds_nothing_whatever_it_holds(device: str) -> None:
    scene = build(SHAPES["few rows"], device)
    k, *rest = scene.keys
    real = torch.tensor([[True, False, True, True, False], [False, True, False, False, False]], device=device)
    scene.weight = real
    q = scene.q.masked_fill(~real[:, None, :, None], torch.nan)
    assert_is(ops.received_triton(q, k, real, *rest, None), scene.received())
    assert_is(ops.received_ref(q, k, real, *rest), scene.received())
    assert not ops.received_triton(q, k, torch.zeros_like(real), *rest, None).any()


def test_products_of_float32_queries_are_not_rounded_to_the_dtype_of_the_keys(device: str) -> None:
    scene = build(SHAPES["few rows"], device, torch.float16)
    q = scene.q.float() + 2**-14
    k = scene.k.nan_to_num(0.0)[scene.lanes].double().repeat_interleave(2, dim=1)
    expected = torch.einsum("bhid,bhjd->bij", q.double(), k) / q.shape[1]
    assert_is(ops.products_triton(q, scene.k.nan_to_num(0.0), None, scene.lanes), expected)


def test_a_lane_has_the_same_bits_alone_and_among_others(device: str) -> None:
    scene = build(SHAPES["some rows"], device)
    assert scene.visible is not None
    assert scene.lanes is not None
    both = scene.q, scene.k, scene.weight, scene.visible, scene.lanes
    alone = [x if x is scene.k else x[1:] for x in both]
    assert torch.equal(ops.received_triton(*both, None)[1:], ops.received_triton(*alone, None))
    q, k, _, visible, lanes = both
    for op, more in ((ops.probs_triton, (None,)), (ops.products_triton, ())):
        assert torch.equal(op(q, k, visible, lanes, *more)[1:], op(alone[0], k, alone[3], alone[4], *more))
    columns = columns_of(scene)
    together = ops.head_mean_triton(q, k, visible, lanes, None, columns)
    assert torch.equal(together[1:], ops.head_mean_triton(alone[0], k, alone[3], alone[4], None, columns[1:]))


def test_queries_whose_numbers_lie_apart_are_refused() -> None:
    q, k = torch.zeros(1, 1, 4, 8).transpose(2, 3), torch.zeros(1, 1, 3, 4)
    with pytest.raises(ValueError, match="contiguous"):
        ops.probs_triton(q, k, None, None, None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", [*SHAPES, *TRUE_SHAPES])
def test_statistics_follow_the_formulas_at_true_sizes(name: str, dtype: torch.dtype) -> None:
    check(build({**SHAPES, **TRUE_SHAPES}[name], "cuda", dtype))
