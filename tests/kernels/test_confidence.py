"""The kernels over the vocabulary against formulas in float64; fresh outputs are filled with nonsense beforehand."""

import pytest
import torch
from torch import Tensor

from dcache.kernels.confidence import (
    all_finite_triton,
    best_token_ref,
    best_token_triton,
    certainty_ref,
    certainty_triton,
    confidence_of_triton,
    summarize_ref,
    summarize_triton,
)

SHAPES = [((1, 1, 30), (7,)), ((2, 3, 33), ()), ((1, 2, 1000), (7, 21)), ((1, 2, 9001), (8999,))]  # the last in chunks
TRUE_SHAPES = [(1, 32, 126_464), (2, 33, 152_064)]
NAN, INF = float("nan"), float("inf")
SMALLEST = torch.finfo(torch.float32).tiny


def random_logits(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 3.0, device: str = "cpu") -> Tensor:
    draws = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    return (scale * draws).to(device, dtype)


def check(logits: Tensor, forbidden: tuple[int, ...]) -> None:
    """All results against float64."""
    found = summarize_triton(logits, forbidden)
    wide = logits.double()
    p = wide.softmax(-1)
    two = p.topk(2).values
    token = best_token_ref(logits, forbidden)
    assert torch.equal(found.token, token)
    assert torch.equal(best_token_triton(logits, forbidden), token)
    expected = p.gather(-1, token[..., None])[..., 0]
    torch.testing.assert_close(found.confidence.double(), expected, rtol=1e-6, atol=SMALLEST)
    torch.testing.assert_close(confidence_of_triton(logits, token).double(), expected, rtol=1e-6, atol=SMALLEST)
    torch.testing.assert_close(found.margin.double(), two[..., 0] - two[..., 1], rtol=1e-6, atol=2e-7)
    torch.testing.assert_close(found.peak.double(), wide.amax(-1), rtol=0, atol=0)
    torch.testing.assert_close(found.mass.double(), 1 / two[..., 0], rtol=1e-6, atol=0)
    assert torch.equal(found.finite, logits.isfinite().all(-1))
    entropy = (p * (p + 1e-10).log()).sum(-1)
    for summary in (None, found):
        torch.testing.assert_close(certainty_triton(logits, summary).double(), entropy, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "forbidden"), SHAPES)
def test_one_pass_tells_what_a_float64_softmax_does(
    device: str, shape: tuple[int, ...], dtype: torch.dtype, forbidden: tuple[int, ...]
) -> None:
    check(random_logits(*shape, dtype=dtype, device=device), forbidden)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_the_kernel_keeps_its_precision_over_a_whole_vocabulary(device: str, scale: float) -> None:
    check(random_logits(1, 2, 126_464, scale=scale, device=device), (126_336,))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", TRUE_SHAPES)
def test_true_shapes_agree_as_well(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(random_logits(*shape, dtype=dtype, device="cuda"), (126_336,))


def test_equal_logits_go_to_the_lowest_id_across_chunks(device: str) -> None:
    logits = random_logits(1, 8, 9001, device=device).clamp_max(1.0)  # many ids share the maximum
    found = summarize_triton(logits, (int(logits[0, 0].argmax()),))
    assert torch.equal(found.token, best_token_ref(logits, (int(logits[0, 0].argmax()),)))
    assert (found.margin == 0).all()
    late = torch.zeros(1, 1, 9001, device=device)
    late[..., [4999, 8000]] = 2.0
    assert summarize_triton(late, ()).token.item() == 4999
    assert summarize_triton(late, (4999,)).token.item() == 8000
    assert summarize_triton(late, (4999, 8000)).token.item() == 0


def test_a_forbidden_id_keeps_its_share_however_large_and_is_counted_once(device: str) -> None:
    logits = random_logits(1, 3, 9001, device=device)
    logits[0, :, 6000] = torch.tensor([500.0, 8.0, -500.0])
    check(logits, (6000, 3, 6000))
    assert summarize_triton(logits, (6000,)).confidence[0, 0] == 0


def test_tokens_that_were_filtered_out_have_no_weight(device: str) -> None:
    logits = random_logits(2, 3, 9001, device=device)
    logits[..., 100:8500] = -INF  # a whole chunk among them
    found, expected = summarize_triton(logits, (5,)), summarize_ref(logits, (5,))
    assert torch.equal(found.token, expected.token)
    assert not found.finite.any()
    torch.testing.assert_close(found.confidence, expected.confidence, rtol=2e-6, atol=0)
    torch.testing.assert_close(found.margin, expected.margin, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(certainty_triton(logits, found), certainty_ref(logits), rtol=1e-5, atol=1e-6)
    logits[...] = -INF
    logits[..., 8700] = 1.5
    alone = summarize_triton(logits, ())
    assert (alone.token == 8700).all()
    assert (alone.confidence == 1).all()
    assert (alone.margin == 1).all()


@pytest.mark.parametrize("spoiled", [NAN, INF, -INF])
@pytest.mark.parametrize("where", [3, 4500, 9000])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's NumPy says so
def test_a_logit_that_is_not_finite_is_told_and_stays_in_its_row(device: str, spoiled: float, where: int) -> None:
    logits = random_logits(1, 3, 9001, device=device)
    logits[0, 1, where] = spoiled
    expected = torch.tensor([[True, False, True]], device=device)
    for forbidden in ((), (where,)):
        found = summarize_triton(logits, forbidden)
        assert torch.equal(found.finite, expected)
        assert torch.equal(found.token[0, ::2], best_token_ref(logits, forbidden)[0, ::2])
        assert found.confidence[0, ::2].isfinite().all()
    assert torch.equal(all_finite_triton(logits), expected)


@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN):RuntimeWarning")
def test_a_row_without_a_number_still_gives_an_id_of_the_vocabulary(device: str) -> None:
    logits = torch.full((1, 2, 9001), NAN, device=device)
    logits[0, 1] = -INF
    for token in (summarize_triton(logits, (1,)).token, best_token_triton(logits, (1,))):
        assert ((token >= 0) & (token < 9001)).all()


def test_near_certain_rows_have_the_entropy_of_their_other_tokens(device: str) -> None:
    logits = torch.zeros(1, 3, 5000, device=device)
    logits[0, :, 4500] = torch.tensor([18.0, 25.0, 60.0])
    p = logits.double().softmax(-1)
    expected = (p * (p + 1e-10).log()).sum(-1)
    torch.testing.assert_close(certainty_triton(logits, None).double(), expected, rtol=1e-4, atol=3e-7)


def test_noised_logits_are_compared_in_float64(device: str) -> None:
    logits = torch.zeros(1, 1, 9001, dtype=torch.float64, device=device)
    logits[..., 40], logits[..., 8000] = 1.0, 1.0 + 1e-12
    assert best_token_triton(logits, ()).item() == 8000
    assert best_token_triton(logits, (8000,)).item() == 40


def test_views_are_read_in_place_and_rows_do_not_depend_on_each_other(device: str) -> None:
    whole = random_logits(3, 4, 4500, device=device)
    everything = summarize_triton(whole, (7,))
    for view, rows in (
        (whole[::2, 1::2], (slice(None, None, 2), slice(1, None, 2))),
        (whole[1:2, :1], (slice(1, 2), slice(1))),
    ):
        found = summarize_triton(view, (7,))
        assert all(torch.equal(x, y[rows]) for x, y in zip(found, everything, strict=True))
        assert torch.equal(confidence_of_triton(view, found.token), confidence_of_triton(whole, everything.token)[rows])
        assert torch.equal(certainty_triton(view, found), certainty_triton(whole, everything)[rows])
    swapped = whole[:, :, :200].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(best_token_triton(swapped, ()), best_token_ref(swapped, ()))
