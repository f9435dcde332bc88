"""Profile some steps of a decode."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from dcache.bench.activity import DECODE, FIRST_PASS, SECOND_PASS, Step, steps_of
from dcache.decode import decode
from dcache.engine import Engine
from dcache.engine.packet import Packet
from dcache.errors import UsageError
from dcache.state import State

SKIPPED, PROFILED = 2, 16  # the first steps compute all rows with every policy
TIMED = SKIPPED + 4 * PROFILED  # steps of an idle share, which costs no file of events
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
    """Share of the time from one pass to the next in which the device waits for the host.

    Attributes:
        median: of all passes.
        mean: all waits over all time; one long pause of the host shows here.
    """

    median: float
    mean: float


def idle_share(engine: Engine, state: Callable[[], State], limit: int | None = None) -> Idle | None:
    """How long the device waits for the host between two passes of a decode, by events; None of one pass.

    From the end of the download of one pass to the upload of the next, the first passes left out. No profile may have
    been made in the process before: it would slow the host here too.

    Args:
        engine: on a GPU, after decodes that made every graph.
        state: makes a fresh canvas.
        limit: steps of those decodes, None for all; later ones may need other graphs.
    """
    with _timed_passes() as passes:
        decode(engine, state(), TIMED if limit is None else min(limit, TIMED))
    torch.cuda.synchronize(engine.model.device)
    passes = passes[SKIPPED:]
    if len(passes) < 2:
        return None
    waits = [a[1].elapsed_time(b[0]) for a, b in pairwise(passes)]
    whole = [a[0].elapsed_time(b[0]) for a, b in pairwise(passes)]
    return Idle(median(wait / all_ for wait, all_ in zip(waits, whole, strict=True)), sum(waits) / sum(whole))


@contextmanager
def _timed_passes() -> Iterator[list[list[torch.cuda.Event]]]:
    """Within it every pass leaves an event before its upload and one behind its download."""
    found: list[list[torch.cuda.Event]] = []
    upload, download = Packet.upload, Packet.download

    def note() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch leaves it so
        event.record()
        return event

    def uploading(packet: Packet) -> None:
        found.append([note()])
        upload(packet)

    def downloading(packet: Packet, meanwhile: Callable[[], None] = lambda: None) -> None:
        def after_the_copy() -> None:
            found[-1].append(note())
            meanwhile()

        download(packet, after_the_copy)

    try:
        setattr(Packet, "upload", uploading)  # noqa: B010 - a method, as mypy sees it
        setattr(Packet, "download", downloading)  # noqa: B010
        yield found
    finally:
        setattr(Packet, "upload", upload)  # noqa: B010
        setattr(Packet, "download", download)  # noqa: B010


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
