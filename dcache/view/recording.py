"""What a report needs beyond ``results.jsonl``: the steps of a few texts, decoded once more outside the clock.

``recordings.jsonl`` stands beside the results: a line of conditions, then one JSON object per (problem, policy),
written as soon as it exists. Maps cost time and memory, so nothing of this is recorded while a comparison is measured.
Once it is complete, each policy decodes the first problems twice more: by the engine that was measured, with a
stopwatch at the parts of a step, and by one of its own that keeps recompute maps.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import takewhile
from pathlib import Path
from typing import Literal, cast

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from dcache.compare import Run
from dcache.decode import decode
from dcache.engine import Engine
from dcache.errors import UsageError
from dcache.generate import Output, Prompt, Runner
from dcache.models.loading import Model
from dcache.results import Conditions, line_of
from dcache.trace import Step
from dcache.view.drift import MEASURES, WHERE, DriftMeter
from dcache.view.packed import Packed
from dcache.view.watch import NAMES, Stopwatch, Watched

FILE = "recordings.jsonl"
TEXTS = 2


class Candidates(BaseModel):
    """What a step predicted, in ascending order of position.

    Attributes:
        at: positions.
        tokens: their likeliest tokens.
        confidence: their probabilities, as the unmasker sees them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    at: list[int]
    tokens: list[int]
    confidence: list[float]


class Recording(BaseModel):
    """The steps of one text under one policy. Positions count from the first token of the prompt.

    Attributes:
        version: of this format.
        policy: `Entrant.policy`.
        problem: its id.
        prompt: fingerprint of the prompt, as in the results.
        question: what was asked.
        answer: the reference answer.
        prompt_ids: token ids of the prompt; those of image rows stand in for none.
        images: first position and end of each run of image rows.
        n_layers: of the model.
        block_length: rows of a block; None for one block.
        length: positions of the canvas.
        canvas: all generated ids.
        text: up to the first end-of-text; None without a tokenizer.
        ends: where each token of the text ends in it, in characters; empty without a tokenizer.
        pieces: the text of every token id that occurs here; empty without a tokenizer.
        same: whether the tokens are those that were measured.
        rows: bits (steps, layers, length): which rows each layer ran a query for, in either pass.
        kv_rows: likewise those whose keys and values were projected; None if they are the same.
        again: bits (steps, length): rows of the second pass; None if no step had one.
        refresh: of each step, whether it computed every row in the last layer.
        row_layers: of each step, row-layers that ran a query, both passes.
        commits: of each step, the positions that it committed.
        remasks: of each step, the positions that it put back to the mask.
        candidates: of each step.
        step_ms: wall time of each step, by the engine that was measured.
        begin_ms: wall time before the first step.
        split_ms: the same times by part of the step; see `dcache.view.watch.NAMES`.
        drift: (measures, steps, layers, where), see `dcache.view.drift`; None if it was not measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["recording"] = "recording"
    version: Literal[1] = 1
    policy: str
    problem: str
    prompt: str
    question: str
    answer: str | None
    prompt_ids: list[int]
    images: list[tuple[int, int]]
    n_layers: int
    block_length: int | None
    length: int
    canvas: list[int]
    text: str | None
    ends: list[int]
    pieces: dict[int, str]
    same: bool
    rows: Packed
    kv_rows: Packed | None
    again: Packed | None
    refresh: list[bool]
    row_layers: list[int]
    commits: list[list[int]]
    remasks: list[list[int]]
    candidates: list[Candidates]
    step_ms: list[float]
    begin_ms: float
    split_ms: dict[str, list[float]]
    drift: Packed | None

    @property
    def key(self) -> tuple[str, str]:
        """What identifies it within a comparison."""
        return self.problem, self.policy

    @property
    def n_prompt(self) -> int:
        """Positions of the prompt."""
        return len(self.prompt_ids)

    @property
    def n_steps(self) -> int:
        """Denoising steps."""
        return len(self.refresh)

    def piece(self, token: int) -> str:
        """A token as it is shown."""
        return self.pieces.get(token, f"#{token}")


class RecordingFile:
    """The recordings of one comparison on disk: what is there already, and room for more.

    Args:
        folder: that of the results, which keep other comparisons out of it.
        conditions: of the comparison.

    Attributes:
        found: recordings by (problem, policy); the latest of each.

    Raises:
        UsageError: if the file cannot be read or written, or holds recordings of other conditions.
    """

    def __init__(self, folder: str | os.PathLike[str], conditions: Conditions):
        self.path = Path(folder) / FILE
        earlier, self.found, n_bytes = read_recordings(self.path) if self.path.exists() else (None, {}, 0)
        difference = None if earlier is None else earlier.difference(conditions)
        if difference is not None:
            name, before, now = difference
            raise UsageError(
                f"{self.path} holds recordings of other conditions: {name} was {before!r} and is {now!r} now; "
                "delete the file, or choose another directory"
            )
        self._write(b"" if earlier else line_of(conditions), n_bytes)

    def write(self, recordings: Iterable[Recording]) -> None:
        """Append recordings, all at once."""
        fresh = list(recordings)
        self._write(b"".join(line.model_dump_json().encode() + b"\n" for line in fresh))
        self.found |= {recording.key: recording for recording in fresh}

    def _write(self, data: bytes, keep: int | None = None) -> None:
        """Append; with `keep`, drop first what lies behind so many bytes."""
        try:
            with self.path.open("ab", buffering=0) as stream:
                if keep is not None:
                    stream.truncate(keep)
                while data:
                    data = data[stream.write(data) :]
        except OSError as error:
            raise UsageError(f"recordings cannot be written to {self.path}: {error.strerror}") from error


def read_recordings(path: Path) -> tuple[Conditions | None, dict[tuple[str, str], Recording], int]:
    """Read a file of recordings; a last line without its end was being written, and is not read.

    Returns:
        conditions, None if there is no whole line; recordings by (problem, policy); bytes of whole lines.

    Raises:
        UsageError: naming the file and the line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    whole = data[: data.rfind(b"\n") + 1]
    conditions: Conditions | None = None
    found: dict[tuple[str, str], Recording] = {}
    for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
        try:
            if conditions is None:
                conditions = Conditions.model_validate_json(line)
                continue
            recording = Recording.model_validate_json(line)
            _check(recording)
        except (ValidationError, ValueError) as error:
            problem = error.errors()[0] if isinstance(error, ValidationError) else None
            where = ".".join(map(str, problem["loc"])) if problem else ""
            told = f"{where}: {problem['msg']}".removeprefix(": ").lower() if problem else str(error)
            raise UsageError(
                f"{path}, line {number}: not a recording of this version ({told}); delete the file, and record again "
                "with dcache compare --report"
            ) from None
        found[recording.key] = recording
    return conditions, found, len(whole)


def _check(recording: Recording) -> None:
    """Sizes that must agree; ValueError if they do not."""
    n, length = recording.n_steps, recording.length
    shape = [n, recording.n_layers, length]
    if recording.rows.shape != shape or (recording.kv_rows is not None and recording.kv_rows.shape != shape):
        raise ValueError(f"maps of shape {recording.rows.shape}, expected {shape}")
    if recording.again is not None and recording.again.shape != [n, length]:
        raise ValueError(f"second passes of shape {recording.again.shape}, expected {[n, length]}")
    sizes = [len(MEASURES), n, recording.n_layers, len(WHERE)]
    if recording.drift is not None and recording.drift.shape != sizes:
        raise ValueError(f"drift of shape {recording.drift.shape}, expected {sizes}")
    lists: tuple[Sized, ...] = (
        recording.row_layers, recording.commits, recording.remasks, recording.candidates, recording.step_ms,
        *recording.split_ms.values(),
    )  # fmt: skip
    if {*map(len, lists)} != {n}:
        raise ValueError(f"lists that do not have the {n} steps")
    if recording.n_prompt + len(recording.canvas) != length:
        raise ValueError(f"{recording.n_prompt} prompt and {len(recording.canvas)} generated tokens for {length} rows")
    positions = [p for step in (*recording.commits, *recording.remasks) for p in step]
    positions += [p for step in recording.candidates for p in step.at]
    if any(not recording.n_prompt <= p < length for p in positions):
        raise ValueError("a position outside the generated rows")


# Recording


class Recorder:
    """Decodes the first problems of a comparison once more, and writes down what their steps did.

    Args:
        run: the comparison, complete.
        folder: where its results are.
        texts: how many problems.
        drift: also compare the stores with a full recompute after each step.
    """

    def __init__(self, run: Run, folder: str | os.PathLike[str], texts: int = TEXTS, drift: bool = False):
        self.here, self.results, self.drift = run.here(), run.results, drift
        self.texts = min(texts, len(self.here.prompts))
        self.file = RecordingFile(folder, run.conditions)

    @property
    def missing(self) -> list[str]:
        """Policies of which a recording is missing."""
        return [name for name in self.here.runners if any(not self._has(name, i) for i in range(self.texts))]

    def _has(self, name: str, index: int) -> bool:
        found = self.file.found.get((self.here.experiment.problems[index].id, name))
        return found is not None and found.prompt == self.here.marks[index] and not (self.drift and found.drift is None)

    def __iter__(self) -> Iterator[str]:
        """Record what is missing; yields the name of each policy once its recordings are written."""
        size = self.here.experiment.settings.batch_size
        for name in self.missing:
            runner = Runner(
                self.here.model, self.here.experiment.policies[name], self.here.experiment.settings, maps=True
            )
            runner.reserve(self.here.prompts)
            for begin in range(0, self.texts, size):  # in the batches that were measured
                self.file.write(self._record(name, runner, range(begin, min(begin + size, len(self.here.prompts)))))
            yield name

    def _record(self, name: str, mapped: Runner, batch: range) -> list[Recording]:
        prompts, measured = [self.here.prompts[i] for i in batch], self.here.runners[name]
        watch, meter = Stopwatch(measured.engine), DriftMeter()
        timed = decode(watch.engine, measured.state(prompts, batch))
        engine = cast(Engine, Watched(mapped.engine, meter)) if self.drift else mapped.engine
        state = mapped.state(prompts, batch)
        steps = decode(engine, state)
        outputs = [mapped.output(state, steps, b) for b in range(state.n_texts)]
        return [
            self._of(name, i, output, Times(watch, timed, output.trace.index), meter)
            for i, output in zip(batch, outputs, strict=True)
            if i < self.texts
        ]

    def _of(self, name: str, index: int, output: Output, times: Times, meter: DriftMeter) -> Recording:
        problem, prompt, model = self.here.experiment.problems[index], self.here.prompts[index], self.here.model
        trace, at, n = output.trace, output.trace.index, output.trace.length
        mine = trace.mine
        rows, kv_rows = (np.stack([step.maps[kind][:, at, :n] for step in mine]) for kind in ("rows", "kv_rows"))
        measured = self.results.get((0, problem.id, name))
        candidates = [_candidates(step, at) for step in mine]
        used = {*prompt, *output.canvas, *(token for step in candidates for token in step.tokens)}
        drifts = [x[:, :, at] for x, step in zip(meter.steps, trace.steps, strict=False) if step.active[at]]
        return Recording(
            policy=name,
            problem=problem.id,
            prompt=self.here.marks[index],
            question=problem.prompt,
            answer=problem.answer,
            prompt_ids=list(prompt),
            images=_images(prompt),
            n_layers=trace.n_layers,
            block_length=self.here.experiment.settings.block_length,
            length=n,
            canvas=output.canvas,
            text=output.text,
            ends=ends(model, output.tokens, output.text),
            pieces=pieces(model, used),
            same=measured is not None and measured.canvas == output.canvas,
            rows=Packed.bits(rows),
            kv_rows=None if (rows == kv_rows).all() else Packed.bits(kv_rows),
            again=_again(mine, at, n),
            refresh=[bool(step.refresh[at]) for step in mine],
            row_layers=[int(step.row_layers[:, at].sum()) for step in mine],
            commits=[np.flatnonzero(step.commit[at]).tolist() for step in mine],
            remasks=[np.flatnonzero(step.remask[at]).tolist() for step in mine],
            candidates=candidates,
            step_ms=times.step_ms[: len(mine)],
            begin_ms=times.begin_ms,
            split_ms={part: ms[: len(mine)] for part, ms in times.split_ms.items()},
            drift=Packed.floats(np.stack(drifts, axis=1)) if drifts else None,
        )


class Times:
    """What a stopwatch found, in milliseconds, for one sequence of a batch.

    Args:
        watch: the stopwatch.
        steps: that it timed.
        at: the sequence.
    """

    def __init__(self, watch: Stopwatch, steps: Sequence[Step], at: int):
        mine = [(step, laps) for step, laps in zip(steps, watch.steps, strict=True) if step.active[at]]
        self.begin_ms = _ms(watch.begin)
        self.step_ms = [_ms(step.seconds) for step, _ in mine]
        parts = [_parts(step, laps) for step, laps in mine]
        self.split_ms = {name: [_ms(part[name]) for part in parts] for name in NAMES}


def _parts(step: Step, laps: dict[str, float]) -> dict[str, float]:
    """Seconds by part, the rest of the step as "other"; what recording a graph took is no part of it."""
    found = dict.fromkeys(NAMES, 0.0) | laps
    found["pass"] = max(0.0, found["pass"] - step.recording)
    found["other"] = max(0.0, step.seconds - sum(found.values()))
    return found


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)


def _candidates(step: Step, at: int) -> Candidates:
    """The positions that a step predicted for a sequence. A commit of end-of-text by rule alone has no confidence."""
    where = np.flatnonzero(np.isfinite(step.confidence[at]) & (step.tokens[at] >= 0))
    confidence = step.confidence[at, where].astype(float).round(4)
    return Candidates(at=where.tolist(), tokens=step.tokens[at, where].tolist(), confidence=confidence.tolist())


def _again(steps: Sequence[Step], at: int, n: int) -> Packed | None:
    """Rows of second passes."""
    nothing = np.zeros(n, dtype=bool)
    rows = np.stack([nothing if step.again is None else step.again[at, :n] for step in steps])
    return Packed.bits(rows) if rows.any() else None


def _images(prompt: Prompt) -> list[tuple[int, int]]:
    """Runs of image rows."""
    if prompt.embeddings is None:
        return []
    mask = np.zeros(len(prompt) + 2, dtype=np.int8)
    mask[prompt.embeddings.positions + 1] = 1
    edges = np.flatnonzero(np.diff(mask)).reshape(-1, 2)
    return [(int(begin), int(end)) for begin, end in edges]


def pieces(model: Model, ids: Iterable[int]) -> dict[int, str]:
    """The text of each token, special ones by their names; empty without a tokenizer."""
    tokenizer = model.tokenizer
    return {} if tokenizer is None else {i: tokenizer.decode([i], skip_special=False) for i in sorted(ids)}


def ends(model: Model, tokens: Sequence[int], text: str | None) -> list[int]:
    """Where each token of a text ends in it, in characters; a character of several tokens ends with the last."""
    if text is None:
        return []
    found = []
    for n in range(1, len(tokens) + 1):
        pairs = zip(model.text(tokens[:n]), text, strict=False)
        found.append(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)))
    return [*found[:-1], len(text)] if found else []
