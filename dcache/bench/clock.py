"""Times of device work: replays of a CUDA graph between events on a GPU, calls under the wall clock on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from time import perf_counter
from typing import Any

import numpy as np
import torch

cuda: Any = torch.cuda  # whose streams and events have no types
Work = Callable[[], object]
LEAST, MOST = 5, 200  # times that a work is run
SECONDS = 0.15  # after which it is not run again, once it ran LEAST times


def times_ms(work: Work, device: torch.device, seconds: float = SECONDS) -> list[float]:
    """Milliseconds of each run of `work`, which must not wait for the device; the first runs are not among them."""
    if device.type != "cuda":
        work()
        return [_wall_ms(work) for _ in range(_times(_wall_ms(work), seconds))]
    with cuda.device(device):
        replay = captured(work)
        replay()
        return _events_ms(replay, _times(_events_ms(replay, 1)[0], seconds))


def median_ms(work: Work, device: torch.device, seconds: float = SECONDS) -> float:
    """Median of `times_ms`."""
    return float(np.median(times_ms(work, device, seconds)))


def captured(work: Work) -> Callable[[], None]:
    """A CUDA graph of `work`, after two runs that compile kernels and create handles; returns its replay."""
    side = cuda.Stream()
    side.wait_stream(cuda.current_stream())
    with cuda.stream(side):
        work()
        work()
    cuda.current_stream().wait_stream(side)
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        work()
    replay: Callable[[], None] = graph.replay
    return replay


def _times(once_ms: float, seconds: float) -> int:
    return int(min(MOST, max(LEAST, seconds * 1e3 / max(once_ms, 1e-3))))


def _events_ms(replay: Callable[[], None], n: int) -> list[float]:
    events = [cuda.Event(enable_timing=True) for _ in range(n + 1)]
    events[0].record()
    for event in events[1:]:
        replay()
        event.record()
    events[-1].synchronize()
    return [float(a.elapsed_time(b)) for a, b in pairwise(events)]


def _wall_ms(work: Work) -> float:
    began = perf_counter()
    work()
    return (perf_counter() - began) * 1e3
