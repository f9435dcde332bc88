"""Whole policies: the arithmetic on steps written by hand, and how a run that fails is told."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import dcache
from dcache.bench import e2e
from dcache.bench import profile as profiling
from dcache.bench.activity import steps_of
from dcache.bench.e2e import (
    Task,
    Timed,
    floor_of_step,
    head_rows,
    profiles,
    random_prompts,
    results,
    steps_within,
    summary,
    tasks,
)
from dcache.bench.profile import events_of, marked
from dcache.bench.reports import EndToEndSettings, PolicyResult, Times
from dcache.decode import decode
from dcache.engine import Engine

SMALL = Path(__file__).resolve().parents[1] / "golden" / "models" / "llada_mha"
SPEC = SimpleNamespace(n_layers=2)
SETTINGS = EndToEndSettings(prompt=6, gen=4, block=2, repeats=2)
LINE = Task("none", 1, 1, SETTINGS)


class Simple:
    """A floor of one millisecond per pass that runs any row, a tenth per row of the head."""

    def pass_ms(self, rows, head):
        return float(any(rows)) + 0.1 * head


def step(ms, rows, predicted, again=None):
    confidence = np.full((1, 10), -np.inf, dtype=np.float32)
    confidence[0, :predicted] = 0.5
    mask = None if again is None else np.arange(10)[None] < again
    total = rows + (0 if again is None else again)
    return SimpleNamespace(
        seconds=ms / 1e3,
        recording=0.0,
        row_layers=np.full((2, 1), total),
        again=mask,
        start=None if again is None else np.zeros(1, dtype=np.int64),
        confidence=confidence,
        commit=np.arange(10)[None] < 1,
    )


def result_of(line):
    return PolicyResult(policy=line.policy, batch=line.batch, tokens_per_step=1, unmask=line.unmask, steps=5)


RUN = [step(2.0, 10, 2), step(4.0, 3, 1, again=10), step(1.0, 3, 1)]
SLOWER = [step(4.0, 10, 2), step(8.0, 3, 1, again=10), step(2.0, 3, 1)]


def test_a_second_pass_reads_the_weights_and_the_head_again():
    assert head_rows(RUN[0]) == [2]
    assert head_rows(RUN[1]) == [1, 1]
    assert floor_of_step(RUN[0], Simple()) == pytest.approx(1.2)
    assert floor_of_step(RUN[1], Simple()) == pytest.approx(2.2)


def test_efficiency_is_the_sum_of_floors_over_the_sum_of_times():
    found = summary(LINE, SPEC, [RUN, SLOWER], 0.021, Simple())
    floors = 1.2 + 2.2 + 1.1
    assert found.all.efficiency == pytest.approx(2 * floors / 21, abs=1e-4)
    assert found.one_pass.efficiency == pytest.approx(2 * (1.2 + 1.1) / 9, abs=1e-4)
    assert found.two_passes.efficiency == pytest.approx(2 * 2.2 / 12, abs=1e-4)
    assert (found.all.n, found.one_pass.n, found.two_passes.n) == (6, 4, 2)


def test_a_summary_tells_steps_rows_and_rates():
    found = summary(LINE, SPEC, [RUN, SLOWER], 0.021, Simple())
    assert (found.repeats, found.steps, found.nfe) == (2, 3, 4)
    assert found.rows == pytest.approx((10 + 13 + 3) / 3, abs=0.01)
    assert found.row_share == pytest.approx(26 / 30, abs=1e-5)
    assert found.head_rows == pytest.approx((2 + 2 + 1) / 3, abs=0.01)
    assert found.tok_s == pytest.approx(6 / 0.021, abs=0.01)
    assert found.repeat_p50 == [2.0, 4.0]
    assert found.trace_ms == [3.0, 6.0, 1.5]
    assert found.trace_passes == [1, 2, 1]
    assert found.trace_rows == [10, 13, 3]


def test_times_of_no_steps_are_none():
    assert Times.of([], []) is None
    assert Times.of([1.0, 3.0], [1.0, 1.0]).model_dump() == {
        "n": 2, "p5": 1.1, "p50": 2.0, "p95": 2.9, "mean": 2.0, "floor": 1.0, "efficiency": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("affordable", "tokens", "limit"),
    [(300, 1, None), (256, 1, None), (255, 1, 224), (90, 1, 64), (31, 1, 31), (2, 1, 8), (88, 3, None), (80, 3, 77)],
)
def test_a_decode_that_takes_too_long_stops_after_whole_blocks(affordable, tokens, limit):
    assert steps_within(affordable, Task("none", 1, tokens, EndToEndSettings())) == limit


def test_lines_are_all_combinations_by_the_names_of_the_policies():
    settings = EndToEndSettings(batch=(1, 8), tokens_per_step=(1, 3))
    found = [(line.policy, line.batch, line.tokens_per_step) for line in tasks(["none", "dkv(interval=8)"], settings)]
    assert found[:4] == [("none", 1, 1), ("dkv", 1, 1), ("none", 1, 3), ("dkv", 1, 3)]
    assert len(found) == 8
    with pytest.raises(dcache.UsageError, match="elastic"):
        tasks(["elatsic"], settings)


def test_prompts_are_ordinary_tokens_and_the_same_for_all():
    spec = dcache.load_model("tiny-llada", device="meta").spec
    drawn = random_prompts(spec, 50, 3, seed=1)
    assert drawn == random_prompts(spec, 50, 3, seed=1) != random_prompts(spec, 50, 3, seed=2)
    assert not {spec.mask_id, spec.eos_id, *spec.end_ids} & {token for prompt in drawn for token in prompt}
    assert [len(prompt) for prompt in drawn] == [50] * 3


def test_a_line_that_fails_says_why_and_the_next_one_runs(monkeypatch):
    model = SimpleNamespace(device=torch.device("cpu"))

    def measure(model, line, floor, idle):
        if line.batch == 8:
            raise torch.OutOfMemoryError
        if line.batch == 2:
            raise dcache.UsageError("it cannot run like this: no blocks")
        return Timed(line, result_of(line))

    monkeypatch.setattr(e2e, "measure", measure)
    lines = tasks(["none"], EndToEndSettings(batch=(8, 2, 1)))
    found = [timed.result for timed in results(model, lines, Simple())]
    assert [(r.batch, r.steps) for r in found] == [(8, 0), (2, 0), (1, 5)]
    assert found[0].failure == "out of memory with batch 8, after 0.0 GiB; try a smaller batch"
    assert found[1].failure == "it cannot run like this: no blocks"


def test_a_policy_that_does_not_suit_the_unmasker_is_told_apart():
    model = dcache.load_model("tiny-llada", device="cpu")
    line = Task("dkv(variant=greedy)", 1, 1, SETTINGS)
    (found,) = results(model, [line], Simple(), idle=True)
    assert found.result.failure.startswith("it cannot run like this: ")
    assert found.idle is None


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (torch.OutOfMemoryError(), "out of memory with batch 8, after 0.0 GiB; try a smaller batch"),
        (dcache.PolicyError("d2, step 3: no rows"), "d2, step 3: no rows"),
    ],
)
def test_a_profile_that_fails_says_why_beside_the_times_and_the_next_one_runs(monkeypatch, error, why):
    model = SimpleNamespace(device=torch.device("cpu"))

    def profiled(model, known, split, trace):
        if known.line.batch == 8:
            raise error
        return {"gaps": "some"}

    monkeypatch.setattr(e2e, "profiled", profiled)
    lines = tasks(["none"], EndToEndSettings(batch=(8, 1)))
    timed = [Timed(line, result_of(line)) for line in lines]
    (first, failed), (second, good) = profiles(model, timed, split=True, trace=True)
    assert (first, second) == (0, 1)
    assert failed == timed[0].result.model_copy(update={"unprofiled": why})
    assert good == timed[1].result.model_copy(update={"gaps": "some"})


def test_a_line_without_times_is_not_profiled(monkeypatch):
    monkeypatch.setattr(e2e, "profiled", lambda *given: {})
    lines = tasks(["none"], EndToEndSettings(batch=(8, 1)))
    failed, good = (result_of(line) for line in lines)
    timed = [Timed(lines[0], failed.model_copy(update={"failure": "too large"})), Timed(lines[1], good)]
    assert list(profiles(SimpleNamespace(device=torch.device("cpu")), timed, True, True)) == [(1, good)]


@pytest.mark.parametrize(("limit", "steps"), [(None, 66), (8, 8), (224, 66)])
def test_an_idle_share_is_of_steps_that_were_decoded_before_and_the_recordings_stay(monkeypatch, limit, steps):
    class Timed:
        def __init__(self):
            self.restart()

        def restart(self):
            self.launches, self.busy = [], []

    def decode(engine, state, limit):
        asked.append(limit)
        engine.executor.launches += [float(i) for i in range(limit)]
        engine.executor.busy += [0.75] * (limit - 1)

    asked = []
    monkeypatch.setattr(profiling, "TimedGraphs", lambda device: Timed())
    monkeypatch.setattr(profiling, "decode", decode)
    probes = iter([50, 50, 51, 99, 52, 50, *[50] * 10])
    monkeypatch.setattr(profiling, "probe", lambda: next(probes))
    engine = SimpleNamespace(model=SimpleNamespace(device=torch.device("cpu")), graphs=True, executor="own")
    found = profiling.idle_share(engine, lambda: None, limit)
    assert found == (0.25, 0.25, (0.25,) * 8, (50, 99, 52, 50, 50, 50, 50, 50))
    assert asked == [steps] * 9  # once to record
    assert engine.executor == "own"


def test_slow_decodes_make_an_idle_share_of_three(monkeypatch):
    asked = []
    timed = SimpleNamespace(launches=[0.0, 1, 2, 3], busy=[0.5, 0.5, 0.5], restart=lambda: None)
    monkeypatch.setattr(profiling, "TimedGraphs", lambda device: timed)
    monkeypatch.setattr(profiling, "decode", lambda engine, state, limit: asked.append(limit))
    monkeypatch.setattr(profiling, "SECONDS", 0.0)
    engine = SimpleNamespace(model=SimpleNamespace(device=torch.device("cpu")), graphs=True, executor="own")
    assert len(profiling.idle_share(engine, lambda: None).decodes) == 3
    assert len(asked) == 4


def test_without_graphs_or_of_one_pass_there_is_no_idle_share():
    assert profiling.idle_share(SimpleNamespace(graphs=False), lambda: None) is None
    assert profiling.shares_of([1.0], []) is None


def test_one_pause_of_the_host_shows_in_the_mean_of_idle_shares_alone():
    median, mean = profiling.shares_of([0, 10, 20, 30, 70, 80], [8] * 5)  # 10 each, and a pause of 30
    assert median == pytest.approx(0.2)
    assert mean == pytest.approx((2 + 2 + 2 + 32 + 2) / 80)


def test_a_decode_beside_a_busy_host_shows_in_the_spread_of_idle_shares_and_not_in_the_median():
    found = profiling.idle_of([(0.03, 0.04), (0.09, 0.1), (0.02, 0.04)], [50, 100, 50])
    assert found == (0.03, pytest.approx(0.06), (0.03, 0.09, 0.02), (50, 100, 50))


def test_passes_are_found_in_a_real_profile():
    model = dcache.load_model(SMALL, device="cpu")
    line = Task("elastic", 1, 1, SETTINGS)
    engine = Engine(model.transformer, *line.plugins(model.spec))
    with marked(engine), profile(activities=[ProfilerActivity.CPU]) as found:
        decode(engine, line.state(model.spec), 3)
    steps = steps_of(events_of(found))
    assert len(steps) == 3
    assert all(a.end == b.begin for a, b in pairwise(steps))
    assert not {"run", "rerun"} & vars(engine).keys()
