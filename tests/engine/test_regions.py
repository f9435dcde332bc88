"""Rows and refreshes of images, prompt text and generation apart, against hooks that see which rows attended."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcache import CachePolicy, Plan, Sampling, State
from dcache.decode import decode
from dcache.engine import Engine
from dcache.engine.layer import Layer
from dcache.plugins import make_policy, make_unmasker
from dcache.regions import REGIONS
from dcache.state import Embeddings
from dcache.testing.models import random_model
from dcache.testing.recorder import Recorder
from dcache.testing.runs import Canvas, Refused, Run
from dcache.testing.watch import BUCKETS, Watch
from dcache.trace import Trace

MODEL = random_model(2)
NARROWING = ["spa(interval=4,gen_interval=2,rank=4)", "dllm-cache(prompt_interval=3,gen_interval=2)", "es-dllm"]
POLICIES = ["none", "elastic(gamma=0.97,track_num=2)", "dkv(interval=3)", "fast-dllm", "freecache", "suffix(window=1)"]
POLICIES += ["d2(current_k=3)", "sparse-dllm(inner=elastic)", *NARROWING]


class Halves(CachePolicy):
    """Two calls of attention per layer: even layers cover all rows, some of them twice, odd ones half of them twice."""

    def plan(self, state: State) -> Plan:
        return Plan.all(state)

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        q = at.refresh(rows, h)
        n, m = rows.shape[1], (rows.shape[1] + 2) // 2
        begin = n - m if at.index % 2 == 0 else 0
        first, second = (at.attend(rows[:, i : i + m], q[:, :, i : i + m]) for i in (0, begin))
        o = torch.zeros(*rows.shape, first.shape[-1])
        o[:, :m], o[:, begin : begin + m] = first, second
        return rows, at.finish(h, o)


@dataclass(frozen=True, repr=False)
class Pictured(Canvas):
    """A canvas whose prompts start from embeddings at some rows, at all, or at none."""

    def state(self, only: int | None = None, draw: int = 0) -> State:
        plain, random = super().state(only, draw), np.random.default_rng([self.seed, draw, 1])
        prompts = [row[:n].tolist() for row, n in zip(plain.tokens, plain.gen_start, strict=True)]
        given: list[Embeddings | None] = []
        for prompt in prompts:
            where = np.flatnonzero(random.random(len(prompt)) < random.choice([0, 0.5, 1]))
            given.append(Embeddings(where, self.model.embed(torch.tensor(prompt)[where])) if len(where) else None)
        gen = plain.gen_length.tolist()
        return State(plain.spec, prompts, gen, self.block_length, ids=plain.ids.tolist(), embeddings=given)


def trace_of(run: Run, b: int) -> Trace:
    return Trace(run.trace, b, int(run.state.lengths[b]), run.state.spec.n_layers)


def two_images(gen: int = 4, guided: bool = False) -> State:
    """Seven rows of prompt, of which four are images."""
    where = np.array([1, 2, 4, 5])
    values = MODEL.embed(torch.tensor([1, 5, 9, 2]))
    return State(MODEL.spec, [[3, 0, 0, 4, 0, 0, 6]], gen, embeddings=[Embeddings(where, values)], guided=guided)


@settings(max_examples=40)
@given(
    policy=st.sampled_from([*POLICIES, Halves]),
    lengths=st.lists(st.tuples(st.integers(1, 7), st.sampled_from([4, 8])), min_size=1, max_size=3),
    unmask=st.sampled_from(["low-confidence", "threshold(threshold=0.3)", "wino"]),
    seed=st.integers(0, 3),
)
def test_regions_equal_a_counting_hook_and_add_up(policy, lengths, unmask, seed) -> None:
    canvas = Pictured(seed=seed, lengths=tuple(lengths), block_length=4, unmask=unmask)
    try:
        watch = Watch(Run(policy, canvas, buckets=BUCKETS, maps=True)).go()
    except Refused:
        assume(False)
    assert not watch.faults["books"]
    for b in range(len(lengths)):
        trace = trace_of(watch.run, b)
        image, text, generated = parts = [trace.regions[name] for name in REGIONS]
        assert sum(part.row_layers for part in parts) == trace.row_layers
        assert sum(part.kv_row_layers for part in parts) == trace.kv_row_layers
        assert sum(part.full_row_layers for part in parts) == trace.full_row_layers
        assert (image.rows, text.rows + image.rows) == (watch.run.state.embedded[b].sum(), lengths[b][0])
        assert generated.rows == lengths[b][1]
        here = [part for part in parts if part.rows]
        assert all(0 <= part.refreshed_row_layers <= part.row_layers for part in parts)
        assert trace.refreshes <= min(part.refreshes for part in here)
        if policy == "none" and unmask != "wino":  # shadow rows are more than no cache computes
            assert all(part.row_share == part.refreshed_share == 1 for part in here)
            assert all(part.refreshes == trace.nfe for part in here)


def test_a_worked_example() -> None:
    trace = decode(Engine(MODEL, make_policy("fast-dllm"), make_unmasker("low-confidence")), two_images())
    assert len(trace) == 4  # the first computes all 11 rows, the others the block
    regions = Trace(trace, 0, 11, 3).regions
    assert {name: part.rows for name, part in regions.items()} == {"image": 4, "text": 3, "generated": 4}
    assert [part.row_layers for part in regions.values()] == [4 * 3, 3 * 3, 4 * 3 * 4]
    assert [part.kv_row_layers for part in regions.values()] == [4 * 3, 3 * 3, 4 * 3 * 4]
    assert [part.full_row_layers for part in regions.values()] == [4 * 3 * 4, 3 * 3 * 4, 4 * 3 * 4]
    assert [part.refreshed_row_layers for part in regions.values()] == [4 * 3, 3 * 3, 4 * 3 * 4]
    assert [part.refreshes for part in regions.values()] == [1, 1, 4]
    assert [part.row_share for part in regions.values()] == [0.25, 0.25, 1]


def test_a_refresh_from_a_layer_on_refreshes_the_layers_above() -> None:
    engine = Engine(MODEL, make_policy("elastic(gamma=0.95)"), make_unmasker("low-confidence"))
    trace = decode(engine, two_images(gen=12))
    begun = [int(s.start[0]) for s in trace if s.start is not None]
    assert set(begun) & {1, 2}, "no step refreshed the deep layers alone; choose another gamma"
    image = Trace(trace, 0, 19, 3).regions["image"]
    assert image.refreshes == len(begun) + 1  # the first step computes everything
    assert image.refreshed_row_layers == 4 * (3 + sum(3 - layer for layer in begun))


def test_rows_that_attend_twice_make_no_refresh() -> None:
    canvas = Pictured(seed=1, lengths=((6, 4),))
    run = Run(Halves, canvas).go()
    regions = trace_of(run, 0).regions
    assert run.trace[0].refreshed[0, 0, 2]
    assert not run.trace[0].refreshed[1, 0, 2]
    assert run.trace[0].region_row_layers[1].sum() >= 10  # as many as there are, some of them twice
    assert regions["generated"].refreshed_row_layers == 2 * 4 * len(run.trace)  # of layers 0 and 2


def test_a_masked_prompt_counts_in_the_regions_of_its_text() -> None:
    unmasker = make_unmasker("low-confidence", Sampling(guidance=1.0))
    state = two_images(guided=True)
    trace = decode(Engine(MODEL, make_policy("none"), unmasker), state)
    regions = Trace(trace, 0, 11, 3, twin=1).regions
    assert [part.full_row_layers for part in regions.values()] == [2 * n * 3 * len(trace) for n in (4, 3, 4)]
    assert all(part.row_share == part.refreshed_share == 1 for part in regions.values())


@pytest.mark.parametrize("policy", [*NARROWING, Halves])
def test_recorded_passes_count_as_those_that_run_as_they_stand(policy) -> None:
    traces = []
    for more in ({}, {"executor": Recorder(), "buckets": (8, 64)}):
        made = make_policy(policy) if isinstance(policy, str) else policy()
        traces.append(decode(Engine(MODEL, made, make_unmasker("low-confidence"), **more), two_images(gen=8)))
    for a, b in zip(*traces, strict=True):
        assert np.array_equal(a.region_row_layers, b.region_row_layers)
        assert np.array_equal(a.refreshed, b.refreshed)


def test_the_next_batch_is_counted_in_its_own_regions() -> None:
    engine = Engine(MODEL, Halves(), make_unmasker("low-confidence"))  # its layers are counted on the device
    whole = np.arange(7)
    values = MODEL.embed(torch.tensor([3, 1, 4, 1, 5, 9, 2]))
    for where, expected in (([1, 2], (2, 5)), (whole, (7, 0))):
        given = [Embeddings(np.asarray(where), values[where])]
        state = State(MODEL.spec, [[3, 1, 4, 1, 5, 9, 2]], 4, embeddings=given)
        first = decode(engine, state)[0]
        assert tuple(first.region_sizes[0, :2]) == expected
        assert (first.refreshed[0, 0] == (first.region_sizes[0] > 0)).all()
        assert (first.region_row_layers[0, 0] >= first.region_sizes[0]).all()
