"""What of ``dcache bench`` only a GPU can show: ``pytest -m gpu``."""

from pathlib import Path
from time import perf_counter

import pytest
import torch

import dcache
from dcache.bench import clock
from dcache.bench.cases import OPS, Draw, Size
from dcache.bench.e2e import Task, floor_of, profiles, results, tasks
from dcache.bench.images import requests, stages
from dcache.bench.kernels import ceilings, measure
from dcache.bench.profile import TimedGraphs
from dcache.bench.reports import Ceilings, EndToEndSettings, ImageSettings
from dcache.decode import decode
from dcache.engine import Engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
SEEING = Path(__file__).resolve().parents[1] / "golden" / "models" / "llada_v"
CUDA = torch.device("cuda")
LIMITS = Ceilings(copy_tb_s=4.0, product_tflop_s=700.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_every_case_is_right_and_gets_a_time(name: str, dtype: torch.dtype) -> None:
    spec = dcache.load_model("tiny-llada", device="meta").spec
    variants = {size.variant for size in OPS[name].of("llada-8b:random")}
    for variant in variants:
        size = Size(7, slots=65, batch=2, variant=variant)
        found = measure(name, lambda seed, size=size: Draw(spec, size, CUDA, dtype, seed), LIMITS)
        assert "failure" not in found, (variant, found)
        assert found["us"] > 0
        assert found["cached"]


def test_twice_the_work_takes_twice_as_long() -> None:
    x = torch.randn(4096, 4096, device=CUDA)
    by_turns = [  # and the best of some, since tests may run side by side
        [clock.median_ms(work, CUDA) for work in (lambda: x @ x, lambda: (x @ x, x @ x))] for _ in range(10)
    ]
    once, twice = map(min, zip(*by_turns, strict=True))
    assert 1.5 < twice / once < 2.5


def test_ceilings_are_those_of_a_gpu() -> None:
    found = ceilings(CUDA, torch.bfloat16)
    assert 0.1 < found.copy_tb_s < 20
    assert 10 < found.product_tflop_s < 5000


def test_a_policy_is_timed_split_and_traced() -> None:
    model = dcache.load_model("tiny-llada", device="cuda")
    settings = EndToEndSettings(prompt=40, gen=32, block=32, repeats=2)

    timed = list(results(model, [Task("none", 1, 1, settings)], floor_of(model, settings), idle=True))
    ((place, found),) = profiles(model, timed, split=True, trace=True)
    assert place == 0
    assert (found.failure, found.unprofiled) == (None, None)
    assert found.graphs
    assert found.captured > 0
    assert found.peak_bytes > 0
    assert 0 < found.all.efficiency < 1.2
    (split,) = found.split
    assert split.steps == 16
    assert split.groups["products"] > 0
    assert split.groups["attention"] > 0
    assert split.groups["unmasking"] > 0
    assert 0 < split.host < split.wall
    assert found.gaps.syncs == 1
    assert found.gaps.largest_gap_us > 0
    assert 0 < found.gaps.idle < 1
    g = found.gaps
    assert (g.idle, g.idle_mean, g.idle_decodes, g.idle_probes) == timed[0].idle
    assert found.all == timed[0].result.all


def test_timed_graphs_tell_how_long_the_device_ran_and_change_no_token() -> None:
    model = dcache.load_model("tiny-llada", device="cuda")
    line = Task("elastic(gamma=0.9)", 1, 1, EndToEndSettings(prompt=40, gen=32, block=32))
    own = Engine(model.transformer, *line.plugins(model.spec))
    engine = Engine(model.transformer, *line.plugins(model.spec), executor=(timed := TimedGraphs(CUDA)))
    for _ in range(2):
        expected = decode(own, line.state(model.spec))
        found = decode(engine, line.state(model.spec))
    assert all(
        (a.commit == b.commit).all() and (a.tokens == b.tokens).all() for a, b in zip(expected, found, strict=True)
    )
    timed.restart()
    began = perf_counter()
    decode(engine, line.state(model.spec))
    seconds = perf_counter() - began
    assert len(timed.launches) == len(timed.busy) + 1 == sum(1 + (step.again is not None) for step in found)
    assert min(timed.busy) > 0
    assert sum(timed.busy) < seconds


def test_every_policy_is_profiled_on_a_new_engine_whose_passes_are_recorded() -> None:
    model = dcache.load_model("tiny-llada", device="cuda")
    settings = EndToEndSettings(prompt=40, gen=32, block=32, repeats=1)
    lines = tasks(["none", "elastic(gamma=0)", "d2"], settings)
    timed = list(results(model, lines, floor_of(model, settings), idle=True))
    assert all(0 < share < 1 for known in timed for share in (*known.idle[:2], *known.idle.decodes))
    for place, found in profiles(model, timed, split=True, trace=True):
        assert found.policy == lines[place].policy
        assert found.unprofiled is None
        assert found.gaps.steps == 16
        assert found.gaps.syncs == pytest.approx(1 + found.gaps.second_passes / 16, abs=1e-3)  # one a pass


def test_a_step_that_refreshes_has_two_passes_and_two_syncs() -> None:
    model = dcache.load_model("tiny-llada", device="cuda")
    settings = EndToEndSettings(prompt=40, gen=32, block=32, repeats=1)
    lines = tasks(["elastic(gamma=1.01)"], settings)  # no similarity is above 1
    timed = list(results(model, lines, floor_of(model, settings)))
    ((_, found),) = profiles(model, timed, split=False, trace=True)
    assert (found.gaps.steps, found.gaps.second_passes, found.gaps.syncs, found.gaps.most_syncs) == (16, 16, 2, 2)


def test_requests_with_images_are_timed_on_recorded_passes() -> None:
    pytest.importorskip("PIL.Image")
    model = dcache.load_model(SEEING, device="cuda")
    settings = ImageSettings(sizes=(30,), prompt=40, gen=32, block=32, repeats=2)
    assert all(ms > 0 for ms in stages(model, settings, 30).times)
    for policy in ("none", "vlcache"):
        found = requests(model, settings, policy, 30)
        assert found.graphs
        assert found.recorded == 0
        assert found.new.p50 > 0
        assert found.again.p50 > 0
