"""Whole policies: time of a denoising step beside the floor of the rows that it computed."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
import torch

from dcache.bench.activity import gaps, splits
from dcache.bench.floor import Floor, rows_of_passes
from dcache.bench.host import on_quickest_cpu
from dcache.bench.profile import Idle, idle_share, profiled_steps
from dcache.bench.prompts import pictures, random_prompts, with_images
from dcache.bench.reports import EndToEndSettings, PolicyResult, Times
from dcache.conditions import written
from dcache.decode import decode
from dcache.engine import Engine
from dcache.errors import DCacheError, MemoryLimitError, UsageError
from dcache.generate import Prompt
from dcache.models.loading import Model
from dcache.models.transformer import ModelSpec
from dcache.plugins import make_policy, make_unmasker
from dcache.policy import CachePolicy
from dcache.state import State
from dcache.trace import Step
from dcache.unmasking.base import Sampling, Unmasker

PROBE = 12  # steps by which the time of a decode is estimated
SHORTEST = 8  # steps of a decode that is stopped early


@dataclass(frozen=True)
class Task:
    """One line of the table: a policy, a batch size, a number of tokens per step.

    `prompts` are those with images, at least `batch` of the same length; without any they are random tokens.
    """

    policy: str
    batch: int
    tokens_per_step: int
    settings: EndToEndSettings
    prompts: tuple[Prompt, ...] = ()

    @property
    def unmask(self) -> str:
        """The unmasker, as written."""
        return f"low-confidence(tokens_per_step={self.tokens_per_step})"

    @property
    def image_rows(self) -> int:
        """Rows of each prompt that are of images."""
        return len(self.prompts[0]) - self.settings.prompt if self.prompts else 0

    @property
    def canvas(self) -> int:
        """Rows of a sequence: text, images, and what is generated."""
        return self.settings.prompt + self.image_rows + self.settings.gen

    def state(self, spec: ModelSpec) -> State:
        """A fresh canvas; all policies get the same prompts."""
        s = self.settings
        if not self.prompts:
            return State(spec, random_prompts(spec, s.prompt, self.batch, s.seed), s.gen, s.block)
        prompts = self.prompts[: self.batch]
        return State(spec, prompts, s.gen, s.block, embeddings=[prompt.embeddings for prompt in prompts])

    def plugins(self, spec: ModelSpec) -> tuple[CachePolicy, Unmasker]:
        """Policy and unmasker; raises UsageError where they do not go together."""
        policy = make_policy(self.policy)
        unmasker = make_unmasker(self.unmask, Sampling(after_end="decode"))
        reason = unmasker.refuses(spec) or policy.refuses(spec, unmasker)
        if reason is not None:
            raise UsageError(f"it cannot run like this: {reason}")
        return policy, unmasker


@dataclass(frozen=True)
class Timed:
    """A line with its times, and its idle share where that is wanted: what `profiles` goes on from."""

    line: Task
    result: PolicyResult
    idle: Idle | None = None


def tasks(policies: Sequence[str], settings: EndToEndSettings) -> list[Task]:
    """Every line, in the order in which they run."""
    return [
        Task(written(make_policy(policy)), batch, tokens, settings)
        for batch in settings.batch
        for tokens in settings.tokens_per_step
        for policy in policies
    ]


def shown(model: Model, lines: Sequence[Task]) -> list[Task]:
    """The lines with the images that their settings ask for, which pass the tower here, once for all lines.

    Raises:
        UsageError: for a model without vision, and for more rows than it takes.
    """
    s = lines[0].settings
    if not s.images:
        return list(lines)
    most = max(s.batch)
    images = pictures(s.image_size, most * s.images, s.seed)
    prompts = tuple(
        with_images(model, ids, images[b * s.images : (b + 1) * s.images])
        for b, ids in enumerate(random_prompts(model.spec, s.prompt, most, s.seed))
    )
    return [replace(line, prompts=prompts) for line in lines]


def floor_of(model: Model, settings: EndToEndSettings, image_rows: int = 0) -> Floor:
    """A floor that is exact where all rows of all sequences are computed, `image_rows` of each among them."""
    canvas = settings.prompt + image_rows + settings.gen
    return Floor(model.transformer, exact=[canvas * batch for batch in settings.batch])


def results(model: Model, lines: Sequence[Task], floor: Floor, idle: bool = False) -> Iterator[Timed]:
    """The times of every line, and its idle share if wanted; one that fails says why, and the next one runs.

    All of them come before the first of `profiles`: torch's profiler stays attached to a process once it has run there,
    and every later launch is slower, by up to a millisecond of a step (benchmarks/README.md).
    """
    for line in lines:
        blank = PolicyResult(
            policy=line.policy, batch=line.batch, tokens_per_step=line.tokens_per_step, unmask=line.unmask
        )
        try:
            timed = measure(model, line, floor, idle)
        except MemoryLimitError as error:
            timed = Timed(line, blank.model_copy(update={"failure": str(error), "peak_bytes": peak(model)}))
        except DCacheError as error:
            timed = Timed(line, blank.model_copy(update={"failure": str(error)}))
        except torch.OutOfMemoryError:  # not in a pass: what a policy prepares, the floor
            failed = {"failure": _out_of_memory(model, line), "peak_bytes": peak(model)}
            timed = Timed(line, blank.model_copy(update=failed))
        free(model)  # here, where no traceback holds the tensors of the run any more
        yield timed


def profiles(model: Model, timed: Sequence[Timed], split: bool, trace: bool) -> Iterator[tuple[int, PolicyResult]]:
    """Profile every line that has times: its place in `timed`, and its result with what the profile says.

    A profile that fails says why beside the times. None may begin before the last of `results`, which tells the reason.
    """
    for place, known in enumerate(timed):
        if known.result.failure is not None:
            continue
        try:
            found = profiled(model, known, split, trace)
        except DCacheError as error:
            found = {"unprofiled": str(error)}
        except torch.OutOfMemoryError:
            found = {"unprofiled": _out_of_memory(model, known.line)}
        free(model)  # as in `results`
        yield place, known.result.model_copy(update=found)


def profiled(model: Model, known: Timed, split: bool, trace: bool) -> dict[str, object]:
    """Fields of `PolicyResult` from a profile, on a new engine: memory would not hold those of all lines."""
    engine, line = _engine(model, known.line), known.line
    steps = profiled_steps(engine, lambda: line.state(model.spec))
    found: dict[str, object] = {"split": splits(steps)} if split else {}
    waits = gaps(steps) if trace else None
    if waits is not None:
        if (of := known.idle) is not None:
            idle = {"idle": of.median, "idle_mean": of.mean, "idle_decodes": of.decodes, "idle_probes": of.probes}
            waits = waits.model_copy(update=idle)
        found["gaps"] = waits
    return found


def measure(model: Model, line: Task, floor: Floor, idle: bool) -> Timed:
    """Decode once outside the clock, then as often as wanted; then, with the engine gone, measure the floor."""
    runs, seconds, found, share = _decodes(model, line, idle)
    free(model)
    return Timed(line, summary(line, model.spec, runs, seconds, floor).model_copy(update=found), share)


def _engine(model: Model, line: Task) -> Engine:
    """A new engine for a line; the peak of memory is counted from here."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    return Engine(model.transformer, *line.plugins(model.spec), graphs=None if line.settings.graphs else False)


def _decodes(model: Model, line: Task, idle: bool) -> tuple[list[list[Step]], float, dict[str, object], Idle | None]:
    """The steps of every repeat, the seconds of all, fields of `PolicyResult` that the engine tells, the idle share."""
    engine = _engine(model, line)
    limit = _warm_up(engine, line, model.spec)
    runs, seconds = [], 0.0
    for _ in range(line.settings.repeats):
        state = line.state(model.spec)
        with on_quickest_cpu(model.device):
            began = perf_counter()
            runs.append(decode(engine, state, limit))
            seconds += perf_counter() - began - sum(step.recording for step in runs[-1])
    found: dict[str, object] = {
        "graphs": engine.graphs,
        "captured": engine.captured,
        "cut": limit is not None,
        "peak_bytes": peak(model),
        "store_bytes": sum(engine.store_bytes.values()),
    }
    share = None
    if idle:
        with suppress(DCacheError, torch.OutOfMemoryError):  # the times stand without it
            share = idle_share(engine, lambda: line.state(model.spec), limit)
    return runs, seconds, found, share


def _warm_up(engine: Engine, line: Task, spec: ModelSpec) -> int | None:
    """Decode outside the clock; returns after how many steps a measured decode stops, None for none."""
    settings = line.settings
    if settings.seconds is None:
        decode(engine, line.state(spec))
        return None
    for _ in range(2):  # the first makes kernels and graphs
        probe = decode(engine, line.state(spec), PROBE)
    step_s = float(np.mean([step.seconds for step in probe]))
    limit = steps_within(settings.seconds / (settings.repeats + 1) / step_s, line)
    decode(engine, line.state(spec), limit)
    return limit


def steps_within(affordable: float, line: Task) -> int | None:
    """Steps that a decode may take: None for all, whole blocks if it can be one."""
    block = line.settings.block or line.settings.gen
    per_block = -(-block // line.tokens_per_step)
    if affordable >= per_block * (line.settings.gen // block):
        return None
    steps = max(SHORTEST, int(affordable))
    return steps - steps % per_block if steps >= per_block else steps


def summary(line: Task, spec: ModelSpec, runs: Sequence[Sequence[Step]], seconds: float, floor: Floor) -> PolicyResult:
    """What the steps of some equal decodes say."""
    steps = [step for run in runs for step in run]
    ms = np.array([step.seconds * 1e3 for step in steps])
    floors = np.array([floor_of_step(step, floor) for step in steps])
    rows = np.array([step.row_layers.sum() / spec.n_layers for step in steps])
    twice = np.array([step.again is not None for step in steps])
    n = len(runs[0])
    full = line.batch * line.canvas

    def apart(which: np.ndarray) -> Times | None:
        return Times.of(ms[which].tolist(), floors[which].tolist())

    def per_step(values: np.ndarray) -> list[float]:
        return [round(float(x), 4) for x in np.median(values.reshape(len(runs), n), axis=0)]

    return PolicyResult(
        policy=line.policy,
        batch=line.batch,
        tokens_per_step=line.tokens_per_step,
        unmask=line.unmask,
        repeats=len(runs),
        steps=n,
        all=apart(np.ones_like(twice)),
        one_pass=apart(~twice),
        two_passes=apart(twice),
        repeat_p50=[round(float(x), 4) for x in np.median(ms.reshape(len(runs), n), axis=1)],
        tok_s=round(sum(int(step.commit.sum()) for step in steps) / seconds, 2),
        rows=round(float(rows.mean()), 2),
        row_share=round(float(rows.mean()) / full, 5),
        head_rows=round(float(np.mean([sum(head_rows(step)) for step in steps])), 2),
        nfe=round((len(steps) + int(twice.sum())) / len(runs), 2),
        trace_ms=per_step(ms),
        trace_floor=per_step(floors),
        trace_rows=per_step(rows),
        trace_passes=[1 + int(x) for x in twice[:n]],
    )


def floor_of_step(step: Step, floor: Floor) -> float:
    """Milliseconds of the products of a step: each pass for itself, since a second one reads the weights again."""
    passes = rows_of_passes(step.row_layers, step.again, step.start)
    return sum(floor.pass_ms(rows.tolist(), head) for rows, head in zip(passes, head_rows(step), strict=True))


def head_rows(step: Step) -> list[int]:
    """Rows of the head, by pass: positions with a candidate; in the second pass those of its sequences."""
    predicted = np.isfinite(step.confidence)
    first = [int(predicted.sum())]
    return first if step.again is None else [*first, int(predicted[step.again.any(1)].sum())]


def peak(model: Model) -> int | None:
    """Most bytes that were in use on the GPU since the line began."""
    return int(torch.cuda.max_memory_allocated(model.device)) if model.device.type == "cuda" else None


def _out_of_memory(model: Model, line: Task) -> str:
    gib = (peak(model) or 0) / 2**30
    smaller = "; try a smaller batch" if line.batch > 1 else "; try a shorter prompt or generation"
    return f"out of memory with batch {line.batch}, after {gib:.1f} GiB{smaller}"


def free(model: Model) -> None:
    """Give memory that nothing holds any more back to the device."""
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
