"""A pass runs the sequences that take part in it: finished ones, and those without a refresh, stop costing work."""

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dcache.decode import decode
from dcache.engine import Engine, inputs
from dcache.engine.engine import GPU_BUCKETS
from dcache.engine.inputs import FEW_TOGETHER, padded_sizes
from dcache.engine.layer import Layer
from dcache.plugins import make_policy, make_unmasker
from dcache.policy import CachePolicy, Plan
from dcache.state import State
from dcache.testing.models import random_model
from dcache.trace import Step
from dcache.unmasking.base import Sampling

MODEL = random_model(1)
POLICIES = ["none", "elastic(gamma=0.97,track_num=2)", "dkv(interval=3)"]


class Widths:
    """How many sequences each layer call ran, by pass."""

    def __init__(self, policy: CachePolicy):
        self.seen: list[tuple[int, int]] = []  # (layer, lanes)
        inner = policy.layer

        def layer(at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            assert len(at.lanes) == len(rows) == len(h) == len(at.live)
            self.seen.append((at.index, len(rows)))
            return inner(at, rows, h)

        policy.layer = layer  # type: ignore[method-assign]


def go(policy: str, gens: list[int], buckets: tuple[int, ...] = (), **more: Any) -> tuple[list[Step], State, Widths]:
    prompts = [list(range(1, 4 + i)) for i in range(len(gens))]
    chosen = make_policy(policy)
    widths = Widths(chosen)
    state = State(MODEL.spec, prompts, gens)
    unmasker = make_unmasker(more.pop("unmask", "low-confidence"), Sampling(after_end="decode"))
    return decode(Engine(MODEL, chosen, unmasker, buckets=buckets, debug=True, **more), state), state, widths


@pytest.mark.parametrize("policy", POLICIES)
def test_finished_sequences_are_not_in_the_pass(policy: str) -> None:
    trace, _, widths = go(policy, [2, 4, 9])
    first = [n for layer, n in widths.seen if layer == 0]
    if policy.startswith("elastic"):
        assert set(first) <= {1, 2, 3}
    else:
        assert first == [int(s.active.sum()) for s in trace] == [3] * 2 + [2] * 2 + [1] * 5


def test_a_refresh_runs_the_sequences_that_drifted_alone() -> None:
    trace, _, widths = go("elastic(gamma=0.93)", [12, 12, 12])
    reviewed = [s for s in trace if s.again is not None]
    sizes = {int((s.start < MODEL.spec.n_layers).sum()) for s in reviewed if s.start is not None}
    assert sizes & {1, 2}, "no step refreshed a part of the batch; choose another gamma"
    assert {n for _, n in widths.seen} >= sizes


def test_lanes_are_padded_to_buckets_by_finished_sequences() -> None:
    _, _, widths = go("none", [2, 3, 4, 5, 9], buckets=(8, 64))
    assert [n for layer, n in widths.seen if layer == 0] == [5, 5, 4, 4, 2, *[1] * 4]


@given(
    gens=st.lists(st.integers(1, 14), min_size=1, max_size=5),
    policy=st.sampled_from(POLICIES),
    buckets=st.sampled_from([(), (8, 64), (8, 20, 64, 90)]),
    few=st.sampled_from([8, inputs.FEW_TOGETHER]),
)
def test_what_is_left_of_a_batch_decodes_as_it_would_alone(
    gens: list[int], policy: str, buckets: tuple[int, ...], few: int
) -> None:
    with patch.object(inputs, "FEW_TOGETHER", few):
        trace, state, _ = go(policy, gens, buckets, maps=True)
    for b in range(len(gens)):
        alone = State(MODEL.spec, [list(range(1, 4 + b))], gens[b], ids=[b])
        unmasker = make_unmasker("low-confidence", Sampling(after_end="decode"))
        own = decode(Engine(MODEL, make_policy(policy), unmasker, maps=True), alone)
        mine = [s for s in trace if s.active[b]]
        assert [np.flatnonzero(s.commit[b]).tolist() for s in mine] == [
            np.flatnonzero(s.commit[0]).tolist() for s in own
        ]
        assert (state.tokens[b, : state.lengths[b]] == alone.tokens[0]).all()
        for now, then in zip(mine, own, strict=True):
            assert (now.region_row_layers[:, b] == then.region_row_layers[:, 0]).all()
            assert (now.refreshed[:, b] == then.refreshed[:, 0]).all()
            assert (now.maps["rows"][:, b, : alone.slots] == then.maps["rows"][:, 0]).all()
        assert not any(s.row_layers[:, b].any() for s in trace if not s.active[b])


def test_a_report_of_a_pass_of_some_sequences_leaves_those_of_the_others() -> None:
    trace, _, _ = go("elastic(gamma=0.97,track_num=2)", [3, 12, 12])
    for step in trace:
        for name, report in step.reports.items():
            assert report.shape[:2] == (MODEL.spec.n_layers, 3), name
    assert not trace[-1].reports["picks"][:, 0].any()  # finished long ago: nothing stale


class Flagged(CachePolicy):
    """Reports a flag as the layers see it, with the column of the dump slot."""

    def plan(self, state: State) -> Plan:
        """All rows; the flag is true wherever it can be."""
        return Plan(state.valid, flags={"full": np.ones(state.valid.shape, dtype=bool)})

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The flag, reported once."""
        if at.last:
            at.report("full", at.flags["full"].to(torch.int64), per_layer=False)
        return at.compute(rows, h)


@pytest.mark.parametrize("buckets", [(), (8, 64)])
def test_a_flag_by_slot_is_0_for_the_dump_slot_in_every_pass(buckets: tuple[int, ...]) -> None:
    state = State(MODEL.spec, [[1, 2], [3, 4, 5, 6]], [6, 3])  # the second ends first, so lanes change
    trace = decode(Engine(MODEL, Flagged(), make_unmasker("low-confidence"), buckets=buckets), state)
    assert len(trace) == 6
    for step in trace:
        flag = step.reports["full"][step.active]
        assert (flag[:, :-1] == 1).all()
        assert (flag[:, -1] == 0).all()


def test_own_tensors_are_found_by_lane() -> None:
    """What a policy keeps by sequence is read through `at.lanes`; by the number of the lane it would be another's."""

    class Remembers(type(make_policy("none"))):  # type: ignore[misc]
        def begin(self, net: Any, state: State) -> None:
            self.marks = net.buffer("marks", (net.batch,), torch.int64)
            self.marks.copy_(torch.arange(net.batch))
            self.found: list[list[int]] = []

        def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            self.found.append(self.marks[at.lanes].tolist())
            return at.compute(rows, h)  # type: ignore[no-any-return]

    policy = Remembers()
    unmasker = make_unmasker("low-confidence", Sampling(after_end="decode"))
    decode(Engine(MODEL, policy, unmasker), State(MODEL.spec, [[1], [2], [3]], [5, 1, 3]))
    layers = MODEL.spec.n_layers
    assert policy.found[::layers] == [[0, 1, 2], [0, 2], [0, 2], [0], [0]]


@given(slots=st.integers(1, 40), buckets=st.lists(st.integers(1, 50), unique=True).map(sorted))
def test_a_list_gets_the_first_bucket_that_holds_it_and_no_more_than_the_slots(slots: int, buckets: list[int]) -> None:
    sizes = padded_sizes(slots, buckets)
    assert len(sizes) == slots + 1
    assert sizes[0] == 0
    for n in range(1, slots + 1):
        assert sizes[n] == (min([b for b in buckets if b >= n] + [slots]) if buckets else n)
        assert n <= sizes[n] <= slots


@given(slots=st.integers(1, 3000), lanes=st.integers(1, 64), data=st.data())
def test_the_rows_of_several_lanes_fill_a_bucket_together(slots: int, lanes: int, data: st.DataObject) -> None:
    own = padded_sizes(slots, GPU_BUCKETS)
    sizes = padded_sizes(slots, GPU_BUCKETS, lanes)
    assert len(sizes) == slots + 1
    assert sizes[0] == 0
    n = data.draw(st.integers(1, slots))
    together = [b // lanes for b in GPU_BUCKETS if b >= max(n * lanes, FEW_TOGETHER)]
    assert sizes[n] == min([own[n], *together])
    assert sizes[n] >= n
    if lanes == 1:
        assert sizes == own


def test_lanes_have_no_more_rows_than_the_bucket_of_them_all() -> None:
    sizes = padded_sizes(1280, GPU_BUCKETS, 8)
    assert [sizes[n] for n in (5, 20, 53, 190, 240)] == [16, 20, 54, 192, 240]
    assert padded_sizes(4, (), 8) == [0, 1, 2, 3, 4]
    few = padded_sizes(100, (8, 64), 2)  # no bucket of `FEW_TOGETHER`, so each has its own
    assert [few[n] for n in (5, 9, 70)] == [8, 64, 100]
