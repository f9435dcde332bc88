"""Drift is nothing without a cache, and is found where a cache is stale."""

import numpy as np
import pytest
import torch

from dcache.decode import decode
from dcache.generate import Runner, settings_from
from dcache.regions import REGIONS
from dcache.view.drift import MEASURES, WHERE, DriftMeter, cosine, distance
from dcache.view.watch import Watched

PROMPTS = [[5, 6, 7, 8, 9], [11, 12, 13]]


def measured(model, policy, **settings):
    run = settings_from(**({"gen_length": 8, "block_length": 4, "after_end": "decode"} | settings))
    runner, meter = Runner(model, policy, run), DriftMeter()
    steps = decode(Watched(runner.engine, meter), runner.state(PROMPTS))
    return steps, np.stack(meter.steps)  # (steps, measures, layers, batch, where)


@pytest.mark.parametrize("policy", ["none", "dkv(interval=1)", "fast-dllm(mode=prefix,full_passes=8)"])
@pytest.mark.parametrize("settings", [{}, {"guidance": 0.5}])
def test_a_policy_that_computes_every_row_has_none(model, policy, settings):
    steps, found = measured(model, policy, **settings)
    assert found.shape[0] == len(steps)
    assert np.nanmax(found[:, :2]) < 1e-5
    assert np.nanmin(found[:, 2:]) > 1 - 1e-5


def test_it_grows_while_rows_are_reused_and_ends_with_a_refresh(model):
    steps, found = measured(model, "dkv(interval=4)", block_length=8)
    k = found[:, 0, -1, 0, 0]
    refresh = np.array([step.refresh[0] for step in steps])
    assert refresh[0]
    assert refresh[4]
    assert k[refresh].max() < 1e-5
    assert k[3] > k[2] > 1e-4
    assert (found[~refresh, 2, -1, 0, 0] < 1).all()


def test_the_first_layer_drifts_only_where_a_token_changed(model):
    """Its keys follow from the token of the row alone, and the prompt's do not change."""
    _, found = measured(model, "dkv(interval=8)", block_length=8)
    assert np.nanmax(found[:, :2, 0, :, WHERE.index("text")]) < 1e-5


def test_regions_are_told_apart(model):
    _, found = measured(model, "dkv")
    assert len(WHERE) == 1 + len(REGIONS)
    assert np.isnan(found[..., WHERE.index("image")]).all()
    assert np.isfinite(found[..., WHERE.index("generated")]).all()


@pytest.mark.parametrize("compact", ["false", "true"])
def test_hidden_and_freed_keys_do_not_count(model, compact):
    _, found = measured(model, f"sparse-dllm(compact={compact})")
    assert np.isfinite(found[-1, ..., 0]).all()  # while nothing has been evicted yet, freeing holds nothing either
    assert (found[-1, :2, :, :, 0] < 2).all()
    assert np.isfinite(found[0, ..., 0]).all() == (compact == "false")


def test_a_reviewed_step_is_measured_once_after_its_second_pass(model):
    steps, found = measured(model, "elastic(gamma=0.999999)")
    assert any(step.again is not None for step in steps)
    assert len(found) == len(steps)


def test_the_measures_are_those_of_the_formulas():
    x, y = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([3.0, 0.0, 4.0])
    assert MEASURES == ("K distance", "V distance", "K cosine", "V cosine")
    assert float(distance(x, y)) == pytest.approx(32**0.5 / 5)
    assert float(cosine(x, y)) == pytest.approx(9 / 25)
    assert float(distance(y, y)) == 0
