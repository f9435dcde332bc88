"""Profile some steps of a decode."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from dcache.bench.activity import DECODE, FIRST_PASS, SECOND_PASS, Step, steps_of
from dcache.bench.host import on_quickest_cpu, probe
from dcache.decode import decode
from dcache.engine import Engine
from dcache.engine.graphs import Graphs
from dcache.errors import UsageError
from dcache.state import State

SKIPPED, PROFILED = 2, 16  # the first steps compute all rows with every policy
TIMED = SKIPPED + 4 * PROFILED  # steps of a decode for an idle share, which costs no file of events
DECODES, LEAST, SECONDS = 8, 3, 6.0  # for an idle share: so many, or after three of them as fit into the time
T = TypeVar("T")


def require_gpu(device: torch.device) -> None:
    """Raises UsageError for a device that cannot be profiled."""
    if device.type != "cuda":
        raise UsageError("--split and --trace profile a GPU, and there is none; leave them out")


def profiled_steps(engine: Engine, state: Callable[[], State]) -> list[Step]:
    """Steps of a decode, the first ones left out, after decodes that make every graph they need.

    Args:
        engine: on a GPU; may be new.
        state: makes a fresh canvas.
    """
    device, limit = engine.model.device, SKIPPED + PROFILED
    for _ in range(3):  # a new pass runs as it stands once, then it is recorded; known images are new in the second
        decode(engine, state(), limit)
    with _profiler():  # the first profile of a process loads libraries
        torch.ones(1, device=device)
    with marked(engine), _profiler() as found:
        with record_function(DECODE):
            decode(engine, state(), limit)
        torch.cuda.synchronize(device)
    return steps_of(events_of(found))[SKIPPED:]


class Idle(NamedTuple):
    """Share of the time from the launch of one pass to that of the next in which the device ran none.

    Attributes:
        median: of the medians of several decodes.
        mean: all such time over all time, a mean of decodes; one long pause of the host shows here.
        decodes: median of each decode.
        probes: how slow the host was beside each decode: the longer `probe` of two, before and behind it, microseconds.
    """

    median: float
    mean: float
    decodes: tuple[float, ...]
    probes: tuple[float, ...]


def idle_share(engine: Engine, state: Callable[[], State], limit: int | None = None) -> Idle | None:
    """How long the device waits for the host between the passes of a decode; None of one pass, or without graphs.

    The passes are recorded again, with an event at either end: from the upload to the download. The first ones are
    left out. No profile may have been made in the process before: it would slow the host here too.

    Args:
        engine: on a GPU, after decodes that prepared every pass.
        state: makes a fresh canvas.
        limit: steps of those decodes, None for all; later ones may need other passes.
    """
    if not engine.graphs:
        return None
    steps = TIMED if limit is None else min(limit, TIMED)
    own, engine.executor = engine.executor, (timed := TimedGraphs(engine.model.device))
    shares: list[tuple[float, float]] = []
    probes: list[float] = []
    try:
        decode(engine, state(), steps)  # records
        began = perf_counter()
        while len(shares) < DECODES and (len(shares) < LEAST or perf_counter() - began < SECONDS):
            timed.restart()
            with on_quickest_cpu(engine.model.device):
                before = probe()
                decode(engine, state(), steps)
                probes.append(max(before, probe()))
            share = shares_of(timed.launches[SKIPPED:], timed.busy[SKIPPED:])
            if share is None:
                return None
            shares.append(share)
    finally:
        engine.executor = own
    return idle_of(shares, probes)


def shares_of(launches: Sequence[float], busy: Sequence[float]) -> tuple[float, float] | None:
    """Median and mean of the idle share of the passes of a decode; None of a single pass.

    Args:
        launches: when the host launched each pass, seconds.
        busy: how long the device ran each, seconds; that of the last one may be missing.
    """
    if len(launches) < 2:
        return None
    whole = np.diff(launches)
    waits = whole - busy[: len(whole)]
    return float(np.median(waits / whole)), float(waits.sum() / whole.sum())


def idle_of(decodes: Sequence[tuple[float, float]], probes: Sequence[float]) -> Idle:
    """The idle share of several decodes: of each the median and the mean, and its probe."""
    medians, means = zip(*decodes, strict=True)
    return Idle(float(np.median(medians)), float(np.mean(means)), medians, tuple(probes))


def _node() -> torch.cuda.Event:
    """An event that a recording keeps: every replay records it anew."""
    return torch.cuda.Event(enable_timing=True, external=True)  # type: ignore[no-untyped-call]  # torch leaves it so


class TimedGraphs(Graphs):
    """Graphs that know how long the device ran each replay.

    There are two recordings of each key, which take turns. So the events of a replay are read while the device runs the
    next one, and not before its launch, where the device would wait for that.

    Attributes:
        launches: when each was launched, seconds.
        busy: how long each ran, seconds, but for the last.
    """

    def __init__(self, device: torch.device):
        super().__init__(device)
        self._ends: dict[Hashable, tuple[torch.cuda.Event, torch.cuda.Event]] = {}
        self._turn = False
        self.restart()

    def restart(self) -> None:
        """Forget the times."""
        self.launches: list[float] = []
        self.busy: list[float] = []
        self._latest: Hashable | None = None

    def ready(self, key: Hashable) -> bool:
        """Whether there are recordings of this key."""
        return super().ready((key, True))

    def record(self, key: Hashable, work: Callable[[], None]) -> None:
        """Record `work` between two events, twice."""
        for turn in (False, True):
            self._record((key, turn), work)

    def _record(self, mine: Hashable, work: Callable[[], None]) -> None:
        begin, end = _node(), _node()

        def timed() -> None:
            begin.record()
            work()
            end.record()

        super().record(mine, timed)
        self._ends[mine] = begin, end

    def __call__(self, key: Hashable, work: Callable[[], None]) -> None:
        """Replay, then read the events of the replay before, which has ended."""
        self._turn = not self._turn
        before, self._latest = self._latest, (key, self._turn)
        self.launches.append(perf_counter())
        super().__call__(self._latest, work)
        if before is not None:
            begin, end = self._ends[before]
            self.busy.append(begin.elapsed_time(end) / 1e3)

    def forget(self, key: Hashable = None) -> None:
        """Drop the recordings of this key, or all of them."""
        for mine in [None] if key is None else [(key, False), (key, True)]:
            super().forget(mine)


def _profiler() -> profile:
    return profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True)


def events_of(found: profile) -> list[dict[str, Any]]:
    """The trace events of a profile."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        found.export_chrome_trace(str(file))
        events: list[dict[str, Any]] = json.loads(file.read_bytes())["traceEvents"]
    return events


@contextmanager
def marked(engine: Engine) -> Iterator[None]:
    """Within it the passes of `engine` stand in a profile under their names."""

    def mark(name: str, run: Callable[..., T]) -> Callable[..., T]:
        def passing(*given: Any) -> T:
            with record_function(name):
                return run(*given)

        return passing

    own = vars(engine)  # of the instance, before the methods of its class
    own.update(run=mark(FIRST_PASS, engine.run), rerun=mark(SECOND_PASS, engine.rerun))
    try:
        yield
    finally:
        del own["run"], own["rerun"]
