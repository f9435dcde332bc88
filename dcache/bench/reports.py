"""What ``dcache bench`` writes down: one JSON file per command, its conditions first."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from dcache.errors import UsageError
from dcache.files import write_whole
from dcache.unmasking.base import MOST

WIDEST = 8192  # pixels of an image's side
STAGES = ("cut", "key", "tower", "projector", "splice")  # from an image to rows of a prompt
POINTS = re.compile(r"\[\s+(-?[\d.eE+-]+(?:,\s+-?[\d.eE+-]+)*)\s+\]")


class Record(BaseModel):
    """Part of a report."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Conditions(Record):
    """Under what something was measured.

    Attributes:
        dcache, python, torch, triton, cuda: versions; triton and cuda are None where there are none.
        commit: of the checkout, with a "+" if files differ from it; None for an installed package.
        device: "cpu" or "cuda".
        device_name: of the GPU, or of the CPU.
        driver: of the GPU, where ``nvidia-smi`` tells.
        threads: of torch, on a CPU.
        dtype: "bfloat16".
        model, n_parameters: None where shapes alone matter.
        started: UTC, ISO 8601.
    """

    dcache: str
    commit: str | None
    python: str
    torch: str
    triton: str | None
    cuda: str | None
    device: str
    device_name: str
    driver: str | None
    threads: int | None
    dtype: str
    model: str | None
    n_parameters: int | None
    started: str


class Ceilings(Record):
    """What the device was measured to do: a large copy, read and write counted; a square product of random data."""

    copy_tb_s: float
    product_tflop_s: float


class KernelResult(Record):
    """One op at one shape.

    Attributes:
        op, model, size: what ran.
        error: ||kernel - twin|| / ||twin||, the twin on inputs in float32; integers and booleans must be equal.
        failure: why there is no time: a wrong result, or an exception.
        us, twin_us: median microseconds, one call.
        n_bytes, n_flops: counted, each input read once and each output written once.
        share: of the ceiling that binds, which `bound` names.
        sets: input sets that take turns.
        cached: all sets together fit in the L2 cache twice, so that the time is that of warm inputs.
    """

    op: str
    model: str
    size: str
    error: float | None = None
    failure: str | None = None
    us: float | None = None
    twin_us: float | None = None
    n_bytes: int = 0
    n_flops: int = 0
    share: float | None = None
    bound: Literal["bytes", "flops"] = "bytes"
    sets: int = 1
    cached: bool = False


class KernelReport(Record):
    """``dcache bench kernels``."""

    kind: Literal["kernels"] = "kernels"
    conditions: Conditions
    ceilings: Ceilings
    results: list[KernelResult] = []


class FloorPoint(Record):
    """The linear layers for `rows` rows and the head for `head_rows`."""

    rows: int
    head_rows: int
    ms: float
    tflop_s: float
    tb_s: float


class FloorReport(Record):
    """``dcache bench floor``."""

    kind: Literal["floor"] = "floor"
    conditions: Conditions
    results: list[FloorPoint] = []


class Times(Record):
    """Steps of one kind, milliseconds, over all repeats.

    Attributes:
        n: how many steps that are.
        p5, p50, p95, mean: of their wall time.
        floor: mean floor of the rows they computed.
        efficiency: sum of floors over sum of times; 0 to 1.
    """

    n: int
    p5: float
    p50: float
    p95: float
    mean: float
    floor: float
    efficiency: float

    @staticmethod
    def of(ms: Sequence[float], floors: Sequence[float]) -> Times | None:
        """The summary of some steps; None of none."""
        if not len(ms):
            return None
        p5, p50, p95 = (round(float(x), 4) for x in np.percentile(ms, (5, 50, 95)))
        mean, floor = float(np.mean(ms)), float(np.mean(floors))
        return Times(
            n=len(ms), p5=p5, p50=p50, p95=p95, mean=round(mean, 4), floor=round(floor, 4),
            efficiency=round(floor / mean, 4) if mean else 0.0,
        )  # fmt: skip


class Split(Record):
    """Where the time of a step goes, milliseconds, mean over `steps` profiled steps with `passes` passes each.

    Attributes:
        wall: from the begin of a step to that of the next, under the profiler, which slows the host.
        groups: device time by kind of kernel.
        host: wall time in which the device was idle.
    """

    steps: int
    passes: int
    wall: float
    groups: dict[str, float]
    host: float


class Gaps(Record):
    """What a trace says of waiting.

    Attributes:
        steps: profiled steps, of which `second_passes` had a second pass.
        syncs: host syncs per step, mean and most.
        largest_gap_us: the longest time without work on the device inside a pass, from its first kernel on.
        idle_between: time without work outside that, as a share of all time; a profiler makes a graph slow to launch.
        idle: share of the time from the launch of one pass to that of the next in which the device ran none, by events
            in the recordings, before any profile: median of `idle_decodes`; None where it was not measured, and without
            graphs. Reports of earlier engines leave the upload and the launch out of it.
        idle_mean: the same in the mean, which a pause of the host decides; None in older reports too.
        idle_decodes: the median of each decode; empty in older reports, whose `idle` is of one.
        idle_probes: how slow the host was beside each, as a fixed piece of Python in microseconds.
    """

    steps: int
    second_passes: int
    syncs: float
    most_syncs: int
    largest_gap_us: float
    idle_between: float
    idle: float | None = None
    idle_mean: float | None = None
    idle_decodes: tuple[float, ...] = ()
    idle_probes: tuple[float, ...] = ()


class PolicyResult(Record):
    """One policy at one batch size and number of tokens per step.

    Attributes:
        policy, batch, tokens_per_step, unmask: what ran.
        failure: why there are no numbers.
        graphs: whether passes were captured; `captured` says how many.
        repeats: decodes that were measured.
        steps: of each; `cut` if they were stopped before the end.
        all, one_pass, two_passes: times of the steps, and apart by whether there was a second pass.
        repeat_p50: median of each repeat.
        tok_s: tokens committed over the wall time of the decodes, recording of graphs left out.
        rows: mean rows of a layer, all sequences and both passes together.
        row_share: of the rows without a cache, one pass per step.
        head_rows: mean rows of the head.
        nfe: passes of one decode, second ones among them.
        peak_bytes: most GPU memory in use, weights included; None on a CPU.
        store_bytes: held for the policy.
        split: by number of passes.
        unprofiled: why there is no profile, and so neither `split` nor `gaps`, though one was wanted.
        trace_ms, trace_floor, trace_rows, trace_passes: per step, medians over repeats, for the plot.
    """

    policy: str
    batch: int
    tokens_per_step: int
    unmask: str
    failure: str | None = None
    graphs: bool = False
    captured: int = 0
    repeats: int = 0
    steps: int = 0
    cut: bool = False
    all: Times | None = None
    one_pass: Times | None = None
    two_passes: Times | None = None
    repeat_p50: list[float] = []
    tok_s: float = 0.0
    rows: float = 0.0
    row_share: float = 0.0
    head_rows: float = 0.0
    nfe: float = 0.0
    peak_bytes: int | None = None
    store_bytes: int = 0
    split: list[Split] = []
    gaps: Gaps | None = None
    unprofiled: str | None = None
    trace_ms: list[float] = []
    trace_floor: list[float] = []
    trace_rows: list[float] = []
    trace_passes: list[int] = []


class EndToEndSettings(Record):
    """What ``dcache bench e2e`` decodes."""

    prompt: int = Field(1024, ge=1, le=MOST, description="random prompt tokens")
    gen: int = Field(256, ge=1, le=MOST, description="rows to generate")
    block: int | None = Field(32, ge=1, le=MOST, description="rows of a block")
    tokens_per_step: tuple[int, ...] = Field(
        (1,), min_length=1, description="tokens that a step commits; several give a run each"
    )
    batch: tuple[int, ...] = Field((1,), min_length=1, description="prompts decoded together; several give a run each")
    repeats: int = Field(3, ge=1, le=MOST, description="measured decodes, after one that is not")
    seconds: float | None = Field(
        None, gt=0, description="stop each decode early where a policy would take longer than this for all of them"
    )
    graphs: bool = Field(True, description="capture passes in CUDA graphs")
    seed: int = Field(0, ge=0, le=MOST, description="seed of the prompts")
    images: int = Field(0, ge=0, le=MOST, description="random images of every prompt, for a model with vision")
    image_size: int = Field(384, ge=1, le=WIDEST, description="their width and height in pixels")


class EndToEndReport(Record):
    """``dcache bench e2e``.

    Attributes:
        floor: the points that the efficiencies were interpolated from.
        image_rows: rows of each prompt that are of images, beside the `prompt` tokens of its text.
    """

    kind: Literal["e2e"] = "e2e"
    conditions: Conditions
    settings: EndToEndSettings
    image_rows: int = 0
    floor: list[FloorPoint] = []
    results: list[PolicyResult] = []


class StageResult(Record):
    """What the vision part takes for an image of one size; milliseconds, medians.

    Attributes:
        size: width and height in pixels.
        failure: why there are no numbers.
        tiles: that the tower sees, the whole image squeezed into one among them.
        rows: of the prompt that are the image's.
        cut_ms: fit the image into a canvas and cut it into tiles; on the CPU.
        key_ms: the key of the image among features: a hash of its pixels, on the CPU.
        tower_ms: copy the tiles to the device; the tower.
        projector_ms: bring the tower's rows to the width of the transformer.
        splice_ms: merge the tiles to one map with newlines, and place its rows among those of the text.
    """

    what: Literal["stages"] = "stages"
    size: int
    failure: str | None = None
    tiles: int = 0
    rows: int = 0
    cut_ms: float | None = None
    key_ms: float | None = None
    tower_ms: float | None = None
    projector_ms: float | None = None
    splice_ms: float | None = None

    @property
    def times(self) -> list[float | None]:
        """Those of `STAGES`."""
        return [getattr(self, f"{name}_ms") for name in STAGES]

    @property
    def sum_ms(self) -> float | None:
        """All stages; None where they failed."""
        known = [ms for ms in self.times if ms is not None]
        return sum(known) if known else None


class Latency(Record):
    """Milliseconds from an image and token ids to the first committed token, over requests of one kind.

    Attributes:
        n: how many requests that are.
        p50, least, most: of their times.
        passes: of the first step, mean.
        rows: mean rows of a layer in them.
    """

    n: int
    p50: float
    least: float
    most: float
    passes: float
    rows: float


class RequestResult(Record):
    """Requests of one policy with images of one size.

    Attributes:
        policy, size: what ran.
        image_rows, canvas: rows of the image, and of the whole canvas.
        failure: why there are no numbers.
        graphs: whether passes were captured.
        recorded: graphs that were recorded among the measured requests; 0 if these are what they should be.
        new: requests with an image that was never seen.
        again: requests with the image of the request before, and another text.
    """

    what: Literal["request"] = "request"
    policy: str
    size: int
    image_rows: int = 0
    canvas: int = 0
    failure: str | None = None
    graphs: bool = False
    recorded: int = 0
    new: Latency | None = None
    again: Latency | None = None


class ImageSettings(Record):
    """What ``dcache bench images`` measures."""

    sizes: tuple[Annotated[int, Field(ge=1, le=WIDEST)], ...] = Field(
        (384, 768, 1152), min_length=1, description="widths and heights of the images, in pixels"
    )
    policies: tuple[str, ...] = Field(
        ("none", "fast-dllm", "vlcache", "vlcache(ratio=0)"), min_length=1, description="policies that get requests"
    )
    prompt: int = Field(64, ge=1, le=MOST, description="random prompt tokens beside the image")
    gen: int = Field(256, ge=1, le=MOST, description="rows to generate")
    block: int | None = Field(32, ge=1, le=MOST, description="rows of a block")
    repeats: int = Field(5, ge=1, le=MOST, description="measured requests of each kind, after some that are not")
    graphs: bool = Field(True, description="capture passes in CUDA graphs")
    seed: int = Field(0, ge=0, le=MOST, description="seed of the images and prompts")


class ImageReport(Record):
    """``dcache bench images``; `host` is the CPU that cut the images."""

    kind: Literal["images"] = "images"
    conditions: Conditions
    host: str
    settings: ImageSettings
    results: list[Annotated[StageResult | RequestResult, Field(discriminator="what")]] = []


Report = KernelReport | FloorReport | EndToEndReport | ImageReport
_ANY: TypeAdapter[Report] = TypeAdapter(Annotated[Report, Field(discriminator="kind")])


def write(report: Report, file: Path) -> None:
    """Write a report, lists of numbers on one line."""
    text = json.dumps(report.model_dump(mode="json"), indent=1)
    text = POINTS.sub(lambda found: "[" + ", ".join(re.split(r",\s+", found[1])) + "]", text)
    write_text(text + "\n", file)


def write_text(text: str, file: Path) -> None:
    """Write a text, as a whole or not at all: the results before the latest one are in the file that it replaces."""
    try:
        write_whole(file, text.encode())
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror}") from error


def read(file: Path) -> Report:
    """Read what `write` wrote."""
    try:
        return _ANY.validate_json(file.read_bytes())
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UsageError(f"{file} is not a report of dcache bench: {where}: {first['msg']}") from None
