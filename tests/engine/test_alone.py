"""Forward calls of a policy's own, made in `begin`."""

import numpy as np
import pytest
import torch

from dcache import CachePolicy, Plan, State, UsageError
from dcache.decode import decode
from dcache.engine import Engine
from dcache.plugins import make_unmasker
from dcache.testing.models import random_model
from dcache.trace import Trace

MODEL = random_model(2)
IDS = {0: [[3, 1, 4, 1, 5], [9, 2]], 1: [[6]]}  # texts by the sequence that they are computed for


class Plain(CachePolicy):
    """No cache."""

    def plan(self, state):
        return Plan.all(state)


class Asking(Plain):
    """No cache, and forward calls in `begin`."""

    def begin(self, net, state):
        self.found = {b: [net.alone(b, net.embed(ids)) for ids in texts] for b, texts in IDS.items()}


def run(policy, **more):
    engine = Engine(MODEL, policy, make_unmasker("low-confidence"), **more)
    return decode(engine, State(MODEL.spec, [[7, 8, 9], [1, 2, 3], [4, 5, 6]], [4, 6, 2]))


def test_rows_by_themselves_have_the_keys_and_values_of_a_forward_pass():
    policy = Asking()
    run(policy, debug=True)
    for b, texts in IDS.items():
        for ids, found in zip(texts, policy.found[b], strict=True):
            keep = {}
            MODEL(torch.tensor([ids]), keep=keep)
            for name, mine in zip("kv", found, strict=True):
                expected = torch.cat([keep[f"{name}.{i}"] for i in range(MODEL.spec.n_layers)])
                torch.testing.assert_close(mine, expected)


def test_they_are_counted_with_the_first_step_of_their_sequence():
    steps, plain = run(Asking(), maps=True), run(Plain())
    rows, layers = np.array([7, 1, 0]), MODEL.spec.n_layers
    assert (steps[0].row_layers - plain[0].row_layers == [rows] * (layers - 1) + [rows * 0]).all()
    assert (steps[0].kv_row_layers - plain[0].kv_row_layers == [rows] * layers).all()
    assert steps[0].calls.tolist() == [3, 2, 1]
    for one, two in zip(steps[1:], plain[1:], strict=True):
        assert (one.row_layers == two.row_layers).all()
        assert one.calls.tolist() == two.calls.tolist() == one.active.tolist()
    found, expected = ([Trace(s, b, 9, layers) for b in range(3)] for s in (steps, plain))
    assert [x.nfe - y.nfe for x, y in zip(found, expected, strict=True)] == [2, 1, 0]
    assert [x.full_row_layers for x in found] == [x.full_row_layers for x in expected]
    assert [x.commits for x in found] == [x.commits for x in expected]


def test_they_are_counted_once_though_an_engine_runs_again():
    engine = Engine(MODEL, Asking(), make_unmasker("low-confidence"))
    for _ in range(2):
        (first, *_) = decode(engine, State(MODEL.spec, [[7, 8], [1, 2]], 2))
        assert first.calls.tolist() == [3, 2]


@pytest.mark.parametrize("n", [0, 129])
def test_rows_beyond_the_positions_of_the_model_are_refused(n):
    class Wide(Plain):
        def begin(self, net, state):
            net.alone(0, torch.zeros(n, net.spec.d_model))

    with pytest.raises(UsageError, match=f"{n} rows were to be computed by themselves; .* 1 to 128"):
        run(Wide())


def test_rows_of_images_count_apart_from_those_of_text():
    class Split(Plain):
        def begin(self, net, state):
            net.alone(0, torch.zeros(5, net.spec.d_model), images=slice(2, None))

    first, plain = (run(policy)[0] for policy in (Split(), Plain()))
    added = first.region_kv_row_layers - plain.region_kv_row_layers
    assert (added[:, 0] == [3, 2, 0]).all()
    assert (added[:, 1:] == 0).all()
