"""Images of prompts: what each stage of the vision part takes, and how soon a request commits its first token.

A stage ends when the device is done with it. A request begins with an image in memory and the ids of its text, and ends
when the host knows the first commit: nothing in between is waited for that the request does not wait for itself.
Requests come in pairs, a new image and then the same one with another text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dcache.bench.e2e import free
from dcache.bench.prompts import pictures, places, prompt_of, random_prompts, vision_of, with_images
from dcache.bench.reports import STAGES, ImageSettings, Latency, RequestResult, StageResult
from dcache.conditions import written
from dcache.decode import decode
from dcache.errors import DCacheError
from dcache.generate import Runner, settings_from
from dcache.models.loading import Model
from dcache.models.vision import open_image
from dcache.plugins import make_policy
from dcache.reuse import ReuseCache

if TYPE_CHECKING:
    from PIL.Image import Image

Result = StageResult | RequestResult
WARM_UP = 2  # times that a stage runs outside the clock
LEAST_PAIRS, MOST_PAIRS = 2, 4  # of requests outside the clock: the first of a kind runs eagerly, the second records
FEATURES = 2**28  # bytes of image rows that are kept: eight images of 3,699 rows of 4,096 values


def results(model: Model, settings: ImageSettings) -> Iterator[Result]:
    """The stages of every size, then the requests of every policy at every size; one that fails says why."""
    lines: list[tuple[Callable[[], Result], Result]] = [
        (partial(stages, model, settings, size), StageResult(size=size)) for size in settings.sizes
    ]
    lines += [
        (partial(requests, model, settings, policy, size), RequestResult(policy=policy, size=size))
        for size in settings.sizes
        for policy in settings.policies
    ]
    for work, blank in lines:
        try:
            result = work()
        except (DCacheError, torch.OutOfMemoryError) as error:
            result = blank.model_copy(update={"failure": str(error)})
        free(model)  # here, where no traceback holds the tensors of the line any more
        yield result


def checked(settings: ImageSettings) -> ImageSettings:
    """The settings with policies as they are written in full; raises UsageError for one that is none."""
    return settings.model_copy(update={"policies": tuple(written(make_policy(name)) for name in settings.policies)})


# Stages


def stages(model: Model, settings: ImageSettings, size: int) -> StageResult:
    """Medians over images, each stage by itself; UsageError if an image has more rows than the model takes."""
    n = WARM_UP + settings.repeats
    ids = random_prompts(model.spec, settings.prompt, n, settings.seed)
    runs = [stage(model, ids[i], image) for i, image in enumerate(pictures(size, n, settings.seed))]
    ms = np.median([run.ms for run in runs[WARM_UP:]], axis=0).round(4).tolist()
    times = {f"{name}_ms": value for name, value in zip(STAGES, ms, strict=True)}
    return StageResult(size=size, tiles=runs[0].tiles, rows=runs[0].rows, **times)


class Stages(NamedTuple):
    """Milliseconds of `STAGES` of one image, its tiles, and its rows."""

    ms: list[float]
    tiles: int
    rows: int


@torch.inference_mode()
def stage(model: Model, ids: Sequence[int], image: Image) -> Stages:
    """From an image to a prompt, with a wait for the device behind every stage."""
    vision, times = vision_of(model), [now(model.device)]
    (tiles,) = vision.tiles([open_image(image)])
    times.append(now(model.device))
    keys = vision.keys([tiles])
    times.append(now(model.device))
    seen = vision.tower_rows(tiles.pixels(vision.newline.device))
    times.append(now(model.device))
    projected = vision.projector(seen)
    times.append(now(model.device))
    rows = vision.merge(projected, tiles)
    prompt_of(vision.splice(places(ids, 1), [rows]), keys)
    times.append(now(model.device))
    return Stages([(b - a) * 1e3 for a, b in pairwise(times)], len(tiles.raw), len(rows))


def now(device: torch.device) -> float:
    """Seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


# Requests


class First(NamedTuple):
    """How a request came to its first commit: milliseconds, passes, and mean rows of a layer."""

    ms: float
    passes: int
    rows: float


class Server:
    """A policy that gets one request after another, and what outlives a request.

    Args:
        model: with vision.
        policy: as written.
        settings: of the benchmark.

    Attributes:
        image_rows, canvas: rows of the latest request.

    Raises:
        UsageError: for a policy that does not run like this.
    """

    def __init__(self, model: Model, policy: str, settings: ImageSettings):
        self.model = model
        run = settings_from(
            gen_length=settings.gen, block_length=settings.block, after_end="decode", no_graphs=not settings.graphs
        )
        self.runner = Runner(model, policy, run)
        self.engine = self.runner.engine
        self.features = ReuseCache[Tensor](FEATURES)
        self.image_rows = self.canvas = 0

    def first_commit(self, ids: Sequence[int], image: Image) -> First:
        """A request from its beginning to its first commit, which every step makes; recording graphs is left out."""
        recorded, began = self.engine.recording, now(self.model.device)
        prompt = with_images(self.model, ids, [image], self.features)
        state = self.runner.state([prompt])
        (step,) = decode(self.engine, state, 1)
        seconds = perf_counter() - began - (self.engine.recording - recorded)
        assert step.commit.any()
        self.image_rows, self.canvas = len(prompt) - len(ids), int(state.lengths[0])
        return First(seconds * 1e3, 1 + (step.again is not None), float(step.row_layers.sum()) / state.spec.n_layers)


def requests(model: Model, settings: ImageSettings, policy: str, size: int) -> RequestResult:
    """Pairs of requests, a new image and the same again: some outside the clock, then those that count.

    Outside the clock pairs go on until one records no graph, since a first pass with what is known of an image differs
    from one without.
    """
    server, n = Server(model, policy, settings), MOST_PAIRS + settings.repeats
    texts = random_prompts(model.spec, settings.prompt, 2 * n, settings.seed)
    images = pictures(size, n, settings.seed)

    def pair(i: int) -> tuple[First, First]:
        return server.first_commit(texts[2 * i], images[i]), server.first_commit(texts[2 * i + 1], images[i])

    done = 0
    for done in range(1, MOST_PAIRS + 1):
        before = server.engine.captured
        pair(done - 1)
        if done >= LEAST_PAIRS and server.engine.captured == before:
            break
    before = server.engine.captured
    new, again = zip(*(pair(done + i) for i in range(settings.repeats)), strict=True)
    return RequestResult(
        policy=policy, size=size, image_rows=server.image_rows, canvas=server.canvas, graphs=server.engine.graphs,
        recorded=server.engine.captured - before, new=latency(new), again=latency(again),
    )  # fmt: skip


def latency(found: Sequence[First]) -> Latency:
    """What some requests of one kind say."""
    ms = [first.ms for first in found]
    return Latency(
        n=len(ms),
        p50=round(float(np.median(ms)), 4),
        least=round(min(ms), 4),
        most=round(max(ms), 4),
        passes=round(float(np.mean([first.passes for first in found])), 3),
        rows=round(float(np.mean([first.rows for first in found])), 2),
    )
