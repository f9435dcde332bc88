"""Profile some steps of a decode."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from dcache.bench.activity import DECODE, FIRST_PASS, SECOND_PASS, Step, steps_of
from dcache.decode import decode
from dcache.engine import Engine
from dcache.state import State

SKIPPED, PROFILED = 2, 16  # the first steps compute all rows with every policy
T = TypeVar("T")


def profiled_steps(engine: Engine, state: Callable[[], State]) -> list[Step]:
    """Steps of a decode, the first ones left out, after two decodes that make every graph they need.

    Args:
        engine: on a GPU.
        state: makes a fresh canvas.
    """
    device, limit = engine.model.device, SKIPPED + PROFILED
    for _ in range(2):  # a pass of a new kind runs as it stands once, and is recorded the next time
        decode(engine, state(), limit)
    with _profiler():  # the first profile of a process loads libraries
        torch.ones(1, device=device)
    with marked(engine), _profiler() as found:
        with record_function(DECODE):
            decode(engine, state(), limit)
        torch.cuda.synchronize(device)
    return steps_of(events_of(found))[SKIPPED:]


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
