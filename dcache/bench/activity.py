"""What a profile says: device time by kind of kernel, host syncs, and time without work.

A profile is a list of trace events, as ``torch.profiler`` exports them (Chrome's format, microseconds). A pass is the
span of `MARKS`, which the profiled engine sets around its passes; since a pass ends by waiting for its results, its
device work lies within its span. A step reaches from the begin of its first pass to that of the next step.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import pairwise
from typing import Any

from dcache.bench.reports import Gaps, Split

FIRST_PASS, SECOND_PASS, DECODE = "dcache first pass", "dcache second pass", "dcache decode"
MARKS = (FIRST_PASS, SECOND_PASS)
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
RUNTIME = ("cuda_runtime", "cuda_driver")
SYNCS = (
    *("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaMemcpy"),
    *("cuStreamSynchronize", "cuEventSynchronize", "cuCtxSynchronize"),
)

UPLOAD = "HtoD"  # in the name of a copy from the host
OTHER = "rest"
OURS = {  # by file of `dcache.kernels`
    "attend": "attention",
    "attention_drift": "statistics",
    "attention_probs": "statistics",
    "cosine": "statistics",
    "drift": "statistics",
    "rollout": "statistics",
    "scores": "statistics",
    "select": "statistics",
    "confidence": "unmasking",
    "product": "products",
    "rms_norm": "elementwise",
    "rotary": "elementwise",
    "swiglu": "elementwise",
    "rows": "copies",
}
EXCEPT = {"_rank_kernel": "unmasking", "_highest_kernel": "unmasking"}  # the unmasker's part of `select`
THEIRS = (  # the first that is found in the name
    ("attention", r"flash|fmha|sdpa|attention"),
    ("products", r"nvjet|gemm|gemv|cutlass|splitk|cublas"),
    ("copies", r"memcpy|memset|copy|gather|scatter|index_|indexselect|catarray|fillfunctor"),
)
GROUPS = ("products", "attention", "statistics", "unmasking", "elementwise", "copies", OTHER)


@cache
def our_kernels() -> dict[str, str]:
    """The group of every jitted function, by its name, which is that of the kernel."""
    found: dict[str, str] = {}
    for file, group in OURS.items():
        module = import_module(f"dcache.kernels.{file}")
        names = [name for name, value in vars(module).items() if hasattr(value, "fn")]
        found |= {name: EXCEPT.get(name, group) for name in names}
    return found


def group_of(name: str) -> str:
    """Which of `GROUPS` a kernel belongs to."""
    if name in our_kernels():
        return our_kernels()[name]
    return next((group for group, pattern in THEIRS if re.search(pattern, name.lower())), OTHER)


@dataclass(frozen=True, order=True)
class Span:
    """Something that lasted, in microseconds."""

    begin: float
    end: float
    name: str = ""


@dataclass(frozen=True)
class Step:
    """A profiled step: its passes, the device work that began in it, and when the host waited."""

    begin: float
    end: float
    passes: list[Span]
    work: list[Span]
    syncs: int


def steps_of(events: Iterable[Mapping[str, Any]]) -> list[Step]:
    """The steps of a profile, in order."""
    found: dict[str, list[Span]] = {"work": [], "passes": [], "syncs": [], "whole": []}
    for event in events:
        kind = _kind(event)
        if kind is not None:
            begin = float(event["ts"])
            found[kind].append(Span(begin, begin + float(event["dur"]), str(event["name"])))
    for spans in found.values():
        spans.sort()
    firsts = [i for i, span in enumerate(found["passes"]) if span.name == FIRST_PASS]
    ends = [found["passes"][i].begin for i in firsts[1:]]
    ends += [found["whole"][-1].end if found["whole"] else found["passes"][-1].end] if firsts else []
    steps = []
    for i, end in zip(firsts, ends, strict=True):
        begin = found["passes"][i].begin
        parts = {name: list(_within(spans, begin, end)) for name, spans in found.items()}
        steps.append(Step(begin, end, parts["passes"], parts["work"], len(parts["syncs"])))
    return steps


def _kind(event: Mapping[str, Any]) -> str | None:
    if event.get("ph") != "X":
        return None
    category, name = event.get("cat"), event.get("name")
    if category in DEVICE:
        return "work"
    if category in RUNTIME and name in SYNCS:
        return "syncs"
    if category == "user_annotation":
        return "passes" if name in MARKS else "whole" if name == DECODE else None
    return None


def _within(spans: Sequence[Span], begin: float, end: float) -> Iterator[Span]:
    """Those that begin in an interval."""
    for i in range(bisect_left(spans, Span(begin, begin)), len(spans)):
        if spans[i].begin >= end:
            return
        yield spans[i]


def merged(work: Iterable[Span]) -> list[Span]:
    """The intervals in which the device worked: sorted spans, joined where they overlap."""
    joined: list[Span] = []
    for span in work:
        if joined and span.begin <= joined[-1].end:
            joined[-1] = Span(joined[-1].begin, max(joined[-1].end, span.end))
        else:
            joined.append(span)
    return joined


def splits(steps: Sequence[Step]) -> list[Split]:
    """Where time goes, apart for steps with one pass and with two."""
    found = []
    for passes in sorted({len(step.passes) for step in steps}):
        mine = [step for step in steps if len(step.passes) == passes]
        groups = dict.fromkeys(GROUPS, 0.0)
        wall = busy = 0.0
        for step in mine:
            wall += step.end - step.begin
            busy += sum(span.end - span.begin for span in merged(step.work))
            for span in step.work:
                groups[group_of(span.name)] += span.end - span.begin
        scale = 1e-3 / len(mine)
        found.append(
            Split(
                steps=len(mine),
                passes=passes,
                wall=round(wall * scale, 4),
                groups={group: round(us * scale, 4) for group, us in groups.items()},
                host=round((wall - busy) * scale, 4),
            )
        )
    return found


def gaps(steps: Sequence[Step]) -> Gaps | None:
    """Syncs and time without work; None without steps."""
    if not steps:
        return None
    largest = between = 0.0
    for step in steps:
        work = merged(step.work)
        largest = max([largest, *(gap for span in step.passes for gap in _gaps_in(work, span))])
        busy = [inside for span in step.passes if (inside := _clip(work, span.begin, span.end))]
        edges = [step.begin, *(edge for inside in busy for edge in (inside[0].begin, inside[-1].end)), step.end]
        between += sum(b - a for a, b in zip(edges[::2], edges[1::2], strict=True))
    return Gaps(
        steps=len(steps),
        second_passes=sum(len(step.passes) > 1 for step in steps),
        syncs=round(sum(step.syncs for step in steps) / len(steps), 3),
        most_syncs=max(step.syncs for step in steps),
        largest_gap_us=round(largest, 2),
        idle_between=round(between / (steps[-1].end - steps[0].begin), 5),
    )


def _clip(work: Sequence[Span], begin: float, end: float) -> list[Span]:
    """The work of a pass behind its upload, which the kernels of a graph follow a millisecond late under a profiler."""
    inside = [span for span in work if begin <= span.begin < end]
    uploads = [i for i, span in enumerate(inside) if UPLOAD in span.name]
    return inside[uploads[0] + 1 :] if uploads else inside


def _gaps_in(work: Sequence[Span], span: Span) -> Iterator[float]:
    inside = _clip(work, span.begin, span.end)
    return (b.begin - a.end for a, b in pairwise(inside))
