"""The kernels of the drift of attention against its formula in float64; what they must not read holds NaN."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dcache.kernels import attention_drift as ops
from dcache.kernels import scores
from dcache.kernels.drift import AXES

SHAPES = {  # layers, sequences, heads, kv_heads, rows, written rows, slots, head_dim
    "few rows": (1, 2, 6, 3, 5, 4, 11, 8),
    "one row, written everywhere": (2, 1, 2, 2, 1, 70, 70, 16),
    "two tiles of rows, many keys": (2, 1, 2, 1, 33, 3, 150, 24),
}
TRUE_SHAPES = {
    "LLaDA-8B": (4, 2, 32, 32, 32, 54, 1_280, 128),
    "Dream-7B": (2, 1, 28, 4, 24, 64, 4_096, 128),
}
CLOSE = {"atol": 2e-6, "rtol": 2e-5}


class Scene(NamedTuple):
    """Inputs of the op, with the mean of the formula for every variant."""

    past: ops.Past
    q: Tensor
    k: Tensor
    real: Tensor
    visible: Tensor | None
    lanes: Tensor | None
    lse: Tensor
    layers: int
    expected: dict[str, Tensor]


def build(shape: tuple[int, ...], device: str, hidden: bool, lanes: bool, dtype: torch.dtype = torch.float32) -> Scene:
    layers, sequences, heads, kv_heads, n, written, slots, head_dim = shape
    batch, group = layers * sequences, heads // kv_heads
    draw = torch.Generator(device).manual_seed(sum(shape))

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw, device=device).to(dtype)

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=draw, device=device)

    q = {when: normal(batch, n, heads, head_dim).transpose(1, 2) for when in ("then", "now")}
    k = {"then": normal(batch, kv_heads, slots + 1, head_dim)}
    rows = torch.argsort(uniform(sequences, slots))[:, :written].sort().values
    rows[0, -1] = slots  # padding
    each = rows.repeat(layers, 1)[:, None, :, None].expand(batch, kv_heads, written, head_dim)
    k["now"] = k["then"].scatter(2, each, normal(batch, kv_heads, written, head_dim))
    real = uniform(sequences, n) > 0.4
    real[:, 0] = True
    real = real.expand(layers, sequences, n).flatten(0, 1)  # of one sequence without a step from layer to layer
    visible = None
    if hidden:
        visible = uniform(batch, kv_heads, slots) > 0.4
        visible[:, :, slots // 2] = True
    shown = torch.ones(batch, 1, slots, dtype=torch.bool, device=device) if visible is None else visible
    shown = shown.expand(batch, kv_heads, slots)
    maps, lse = {}, {}
    for when in ("then", "now"):
        keys = k[when][:, :, :slots].double().repeat_interleave(group, dim=1)
        score = torch.einsum("bhid,bhjd->bhij", q[when].double(), keys) / math.sqrt(head_dim)
        score = score.masked_fill(~shown.repeat_interleave(group, dim=1)[:, :, None], -torch.inf)
        maps[when], lse[when] = score.softmax(-1), score.logsumexp(-1)
    expected = {over: formula(maps["then"], maps["now"], real, shown[:, 0], over) for over in AXES}

    kept = k["then"].gather(2, each).masked_fill((each == slots), torch.nan)
    order = torch.randperm(batch, generator=draw, device=device) + 1 if lanes else None
    store = torch.full((batch + lanes, kv_heads, slots + 3, head_dim), torch.nan, dtype=dtype, device=device)
    read = k["now"][:, :, :slots]
    if visible is not None:
        read = read.masked_fill(~visible[..., None], torch.nan)
        place = each.clamp_max(slots - 1)
        kept = kept.masked_fill(~visible[..., None].expand(*visible.shape, head_dim).gather(2, place), torch.nan)
    store[slice(None) if order is None else order, :, :slots] = read
    past = ops.Past(q["then"], lse["then"].float()[:, None], kept, rows)
    return Scene(past, q["now"], store[:, :, :slots], real, visible, order, lse["now"].float(), layers, expected)


def formula(then: Tensor, now: Tensor, real: Tensor, shown: Tensor, over: str) -> Tensor:
    """The mean by its definition in float64, lane by lane."""
    found = []
    for lane in range(len(then)):
        keys = shown[lane] if over == "heads" else slice(None)  # elsewhere what is hidden has no weight anyway
        a, b = (x[lane][:, real[lane]][:, :, keys] for x in (then, now))
        axes = [axis - 1 for axis in AXES[over]]
        norms = [x.pow(2).sum(axes).sqrt().clamp_min(1e-8) for x in (a, b)]
        found.append(((a * b).sum(axes) / (norms[0] * norms[1])).mean())
    return torch.stack(found)


def check(scene: Scene, over: str) -> None:
    past, q, k, real, visible, lanes, lse, layers, expected = scene
    padding = ~real[:, None, :, None]
    for now, known in ((q.masked_fill(padding, torch.nan), lse), (q, None)):
        found = ops.attention_drift_triton(past, now, k, real, visible, lanes, over, known, layers)
        torch.testing.assert_close(found.double(), expected[over], **CLOSE)


@pytest.mark.parametrize("over", AXES)
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_the_kernel_compares_what_was_with_what_is(name: str, hidden: bool, over: str, device: str) -> None:
    scene = build(SHAPES[name], device, hidden, lanes=name != "one row, written everywhere")
    check(scene, over)
    found = ops.attention_drift_ref(*scene[:6], over)
    torch.testing.assert_close(found.double(), scene.expected[over], **CLOSE)


@pytest.mark.parametrize("over", AXES)
def test_what_is_remembered_before_a_write_is_enough(over: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the log-sum-exps of then, and with those of several parts of the keys."""
    monkeypatch.setattr(ops, "use_triton", lambda x: True)
    monkeypatch.setattr(scores, "PROGRAMS", 16)
    scene = build(SHAPES["few rows"], device, hidden=False, lanes=False)
    before, rows = scene.k.clone(), scene.past.rows.repeat(scene.layers, 1)[:, None, :, None].expand(scene.past.k.shape)
    before = torch.cat([before, before[:, :, :1]], 2).scatter(2, rows, scene.past.k)[:, :, :-1]
    past = ops.remember(scene.past.q, before, scene.past.rows, scene.past.k, layers=scene.layers)
    torch.testing.assert_close(past.lse.logsumexp(1), scene.past.lse[:, 0], atol=1e-5, rtol=1e-5)
    found = ops.attention_drift(past, scene.q, scene.k, scene.real, over=over, lse=scene.lse, layers=scene.layers)
    torch.testing.assert_close(found.double(), scene.expected[over], **CLOSE)


@pytest.mark.parametrize("over", AXES)
def test_a_lane_without_a_real_row_is_nan_and_the_others_are_not(over: str, device: str) -> None:
    scene = build(SHAPES["few rows"], device, hidden=True, lanes=True)
    scene.real[0] = False  # of a single layer
    found = ops.attention_drift_triton(*scene[:6], over, scene.lse, scene.layers)
    assert found.isnan().tolist() == [True, False]


@pytest.mark.gpu
@pytest.mark.parametrize("over", AXES)
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TRUE_SHAPES)
def test_the_kernel_follows_the_formula_at_true_sizes(name: str, dtype: torch.dtype, hidden: bool, over: str) -> None:
    check(build(TRUE_SHAPES[name], "cuda", hidden, lanes=True, dtype=dtype), over)
