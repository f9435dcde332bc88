"""How fast the host is at the moment, and the CPU on which it is quickest.

Between two passes a GPU waits for the host. The CPUs of a rented machine often share their cores with other tenants;
while they use one, Python runs half as fast on it, for seconds, and a time says more of them than of the engine.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from time import perf_counter

import numpy as np
import torch


def probe(repeats: int = 15) -> float:
    """Microseconds of a fixed piece of Python and numpy, in the median of `repeats`."""
    mask, times = np.arange(1280) % 40 == 0, []
    for _ in range(repeats):
        began = perf_counter()
        for _ in range(20):
            both = mask & ~mask
            both.ravel().nonzero()
            [i * i for i in range(50)]
        times.append(perf_counter() - began)
    return float(np.median(times)) * 1e6


@contextmanager
def on_quickest_cpu(device: torch.device) -> Iterator[None]:
    """What drives a GPU runs inside on the CPU that is quickest now; the thread may go anywhere again afterwards.

    Threads that are born inside stay on that CPU, so let a first run be outside. Nothing is chosen where the system
    cannot or a container forbids it, and for a model on the CPU, which computes on all of them.
    """
    if device.type != "cuda" or not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    try:
        with suppress(OSError):
            _go_to_quickest(allowed)
        yield
    finally:
        with suppress(OSError):
            os.sched_setaffinity(0, allowed)


def _go_to_quickest(allowed: Iterable[int]) -> None:
    """Probe every CPU, and stay on the best."""
    times = {}
    for cpu in sorted(allowed):
        os.sched_setaffinity(0, {cpu})
        times[cpu] = probe(3)
    os.sched_setaffinity(0, {min(times, key=lambda cpu: times[cpu])})
