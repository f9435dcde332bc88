"""The torch twins against their formulas in float64, with hidden and unwritten memory poisoned by NaN."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dcache.kernels.attend import attend
from dcache.kernels.attention_probs import head_mean, probs, products, received
from dcache.kernels.confidence import best_token, confidence_of
from dcache.kernels.drift import drift
from dcache.kernels.noise import uniform
from dcache.kernels.rms_norm import rms_norm
from dcache.kernels.rotary import rotary, rotary_table
from dcache.kernels.rows import put, take
from dcache.kernels.select import find, lowest
from dcache.kernels.swiglu import swiglu

CLOSE = {"atol": 2e-6, "rtol": 2e-5}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(q: Tensor, k: Tensor, visible: Tensor | None) -> Tensor:
    """Attention probabilities by the formula, in float64."""
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    score = torch.einsum("bhid,bhjd->bhij", q.double(), k) / math.sqrt(q.shape[-1])
    if visible is not None:
        shown = visible if visible.shape[1] == 1 else visible.repeat_interleave(q.shape[1] // visible.shape[1], dim=1)
        score = score.masked_fill(~shown[:, :, None], float("-inf"))
    weight = (score - score.amax(-1, keepdim=True)).exp()
    return weight / weight.sum(-1, keepdim=True)


@pytest.fixture(params=["all visible", "some hidden", "hidden by head"])
def scene(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    q, k, v = normal(2, 6, 5, 8), normal(2, 3, 11, 8, seed=1), normal(2, 3, 11, 8, seed=2)
    if request.param == "all visible":
        return q, k, v, None
    heads = 3 if request.param == "hidden by head" else 1
    visible = torch.rand(2, heads, 11, generator=torch.Generator().manual_seed(3)) > 0.4
    visible[:, :, 0] = True
    hidden = ~visible.expand(2, 3, 11)[..., None]
    return q, k.masked_fill(hidden, float("nan")), v.masked_fill(hidden, float("nan")), visible


def clean(x: Tensor) -> Tensor:
    return x.nan_to_num(0.0)


def with_dump(x: Tensor) -> Tensor:
    """One more column, that of the dump slot."""
    return torch.nn.functional.pad(x, (0, 1))


def test_attention_ignores_what_hidden_keys_hold(scene: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> None:
    q, k, v, visible = scene
    expected = torch.einsum(
        "bhij,bhjd->bhid", dense(q, clean(k), visible), clean(v).double().repeat_interleave(2, dim=1)
    )
    torch.testing.assert_close(attend(q, k, v, visible).double(), expected, **CLOSE)


def test_probabilities_and_their_sums_follow_the_formula(
    scene: tuple[Tensor, Tensor, Tensor, Tensor | None],
) -> None:
    q, k, _, visible = scene
    expected = dense(q, clean(k), visible)
    weight = torch.tensor([[True, True, False, True, True], [True, False, False, False, False]])
    torch.testing.assert_close(probs(q, k, visible).double(), with_dump(expected), **CLOSE)
    torch.testing.assert_close(head_mean(q, k, visible).double(), with_dump(expected.mean(1)), **CLOSE)
    raw = torch.einsum("bhid,bhjd->bij", q.double(), clean(k).double().repeat_interleave(2, dim=1)) / q.shape[1]
    raw = raw if visible is None or visible.shape[1] > 1 else raw.masked_fill(~visible, 0)
    if visible is None or visible.shape[1] == 1:
        torch.testing.assert_close(products(q, k, visible).double(), with_dump(raw), **CLOSE)
    summed = (expected * weight[:, None, :, None]).sum((1, 2))
    torch.testing.assert_close(received(q, k, weight, visible).double(), with_dump(summed), **CLOSE)


def test_half_precision_attention_statistics_are_taken_in_float32() -> None:
    q, k = normal(1, 2, 3, 8).bfloat16(), normal(1, 2, 5, 8, seed=1).bfloat16()
    assert probs(q, k).dtype == torch.float32
    torch.testing.assert_close(probs(q, k).sum(-1), torch.ones(1, 2, 3))


def test_norm_rounds_before_the_weight() -> None:
    x, weight = normal(4, 16).bfloat16(), normal(16, seed=1).bfloat16()
    wide = x.float()
    rounded = (wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()).bfloat16()
    assert torch.equal(rms_norm(x, weight, 1e-5), rounded * weight)


@given(shift=st.integers(0, 40), full=st.booleans())
def test_rotary_scores_depend_on_distance_alone(shift: int, full: bool) -> None:
    cos, sin = rotary_table(64, 8, 1e4, torch.device("cpu"))
    q, k = normal(1, 2, 3, 8), normal(1, 2, 3, 8, seed=1)
    place = torch.tensor([0, 5, 9])

    def scores(at: Tensor) -> Tensor:
        turned = [rotary(x, cos[at][None, None], sin[at][None, None], full) for x in (q, k)]
        return turned[0] @ turned[1].transpose(-1, -2)

    torch.testing.assert_close(scores(place), scores(place + shift), atol=1e-4, rtol=1e-4)


def test_rotary_turns_the_two_halves_by_the_angle_of_the_position() -> None:
    cos, sin = rotary_table(8, 4, 100.0, torch.device("cpu"))
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    angle = [3 * 100.0 ** (-2 * i / 4) for i in range(2)]
    expected = [1 * math.cos(angle[0]) - 3 * math.sin(angle[0]), 2 * math.cos(angle[1]) - 4 * math.sin(angle[1])]
    expected += [3 * math.cos(angle[0]) + 1 * math.sin(angle[0]), 4 * math.cos(angle[1]) + 2 * math.sin(angle[1])]
    turned = rotary(x, cos[3].reshape(1, 1, 1, 2), sin[3].reshape(1, 1, 1, 2), True).flatten()
    torch.testing.assert_close(turned, torch.tensor(expected))


def test_taken_rows_are_those_put_and_no_others_change() -> None:
    for shape in ((2, 9, 4), (2, 3, 9, 4)):
        store = torch.full(shape, float("nan"))
        rows = torch.tensor([[0, 4, 8], [2, 8, 8]])  # 8 is the dump slot
        fresh = normal(*shape[:-2], 3, 4)
        put(store, rows, fresh)
        assert torch.equal(take(store, rows)[..., 0, :], fresh[..., 0, :])
        untouched = [s for s in range(8) if s not in (0, 4)]
        assert store[0].index_select(-2, torch.tensor(untouched)).isnan().all()
        assert store[1].index_select(-2, torch.tensor([0, 1, 3, 4, 5, 6, 7])).isnan().all()


def test_the_gate_is_the_first_half() -> None:
    gate, up = normal(2, 3), normal(2, 3, seed=1)
    torch.testing.assert_close(swiglu(torch.cat([gate, up], -1)), gate * gate.sigmoid() * up)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_confidence_in_float32_is_that_of_a_float64_softmax(scale: float) -> None:
    logits = scale * normal(1, 4, 126_464)
    tokens = best_token(logits)
    expected = logits.double().softmax(-1).gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(confidence_of(logits, tokens).double(), expected, atol=0, rtol=1e-6)


def test_a_forbidden_token_is_never_best_and_ties_go_to_the_lowest_id() -> None:
    logits = torch.tensor([[[1.0, 5.0, 3.0, 3.0]]])
    assert best_token(logits).item() == 1
    assert best_token(logits, (1,)).item() == 2
    assert logits[0, 0, 1] == 5.0


@pytest.mark.parametrize("over", ["heads", "rows", "flat"])
def test_similarity_is_one_without_drift_and_counts_real_rows_and_visible_keys_alone(over: str) -> None:
    past, now = (with_dump(normal(2, 3, 4, 6, seed=seed).softmax(-1)) for seed in (0, 1))
    real = torch.tensor([[True, True, False, False], [True, False, False, False]])
    torch.testing.assert_close(drift(past, past, real, None, over), torch.ones(2))
    alone = drift(past[1:, :, :1], now[1:, :, :1], torch.ones(1, 1, dtype=torch.bool), None, over)
    spoiled = now.clone()
    spoiled[:, :, 2:] = float("nan")
    torch.testing.assert_close(drift(past, spoiled, real, None, over)[1:], alone)
    visible = torch.ones(2, 1, 6, dtype=torch.bool)
    visible[:, :, 4:] = False
    short = [with_dump(x[..., :4]) for x in (past, now)]
    hidden = [torch.nn.functional.pad(x, (0, 2)) for x in short]
    torch.testing.assert_close(drift(*hidden, real, visible, over), drift(*short, real, None, over))


def test_similarity_over_heads_is_the_mean_cosine_of_head_vectors() -> None:
    past, now = (with_dump(normal(1, 3, 2, 5, seed=seed).softmax(-1)) for seed in (0, 1))
    pairs = [torch.cosine_similarity(past[0, :, t, j], now[0, :, t, j], dim=0) for t in range(2) for j in range(5)]
    real = torch.ones(1, 2, dtype=torch.bool)
    torch.testing.assert_close(drift(past, now, real, None, "heads")[0], torch.stack(pairs).mean())


def test_similarity_without_a_real_row_is_below_no_threshold() -> None:
    past = with_dump(normal(1, 3, 2, 5).softmax(-1))
    value = drift(past, past, torch.zeros(1, 2, dtype=torch.bool), None)
    assert value.isnan().all()
    assert not (value < 2.0).any()


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=3, max_size=12), st.integers(0, 3))
def test_lowest_is_stable(scores: list[float], count: int) -> None:
    index, real = lowest(torch.tensor([scores]), torch.tensor([count]), 3)
    expected = sorted(range(len(scores)), key=lambda i: (scores[i], i))[:3]
    assert index[0].tolist() == expected
    assert real[0].tolist() == [i < count for i in range(3)]


def test_find_gives_the_place_in_an_ascending_list() -> None:
    rows = torch.tensor([[1, 4, 7, 9, 9]])
    assert find(rows, torch.tensor([[4, 9, 1]])).tolist() == [[1, 3, 0]]
    assert find(rows, torch.tensor([[100]])).max() <= 4


def test_noise_is_uniform_and_a_function_of_its_keys() -> None:
    seed, place = torch.tensor(5), torch.arange(200_000)
    draws = uniform(seed, place)
    assert torch.equal(draws, uniform(seed, place))
    assert torch.equal(draws[1000:2000], uniform(seed, place[1000:2000]))
    assert 0 < draws.min() < 1e-4
    assert 1 - 1e-4 < draws.max() < 1
    counts = torch.histc(draws.float(), bins=20, min=0, max=1)
    assert ((counts - 10_000).abs() < 5 * 100).all()  # five standard deviations
    other = uniform(torch.tensor(6), place)
    assert abs(float(torch.corrcoef(torch.stack([draws, other]))[0, 1])) < 0.01
