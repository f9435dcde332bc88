"""The shipped model can do its task, and the default comparison shows it."""

import pytest

import dcache
from dcache.tasks.gsm_mini import GsmMini


@pytest.fixture(scope="module")
def model() -> dcache.Model:
    return dcache.load_model("tiny-llada", device="cpu")


def test_the_shipped_model_answers_problems_that_it_was_not_trained_on(model: dcache.Model) -> None:
    result = dcache.compare(model, ["elastic", "dkv"], limit=16, unmask="threshold(threshold=0.9)")
    accuracy = {row.policy: row.accuracy for row in result.standings}
    assert accuracy["none"] is not None
    assert accuracy["none"] >= 0.9
    assert set(accuracy) == {"none", "elastic", "dkv"}


def test_its_attention_is_spread_enough_for_a_drift_test_to_mean_something(model: dcache.Model) -> None:
    """With unbounded scores the released similarity falls under any gamma, and every step refreshes."""
    problem = GsmMini().problems("test", 1, seed=0)[0]
    out = dcache.generate(model, problem.prompt, policy="elastic(gamma=0.9)", gen_length=64, unmask="low-confidence")
    assert GsmMini().score(problem, out.text or "")
    assert out.trace.refreshes < out.trace.nfe / 4
    assert out.trace.row_share < 0.4
