"""Train `tiny-llada-v` on scenes, tower and all, and save it in the published layout of LLaDA-V.

One run of eight minutes on one GPU::

    python -m dcache.models.tiny.train_v --out tiny-llada-v --seconds 480

Objective, optimizers and schedule are those of `train`, from random weights, with scenes for problems and their images
in the prompts. Tower, projector, newline row and transformer are trained together. An image is one tile, and the
published code gives it to the model twice, once as the squeezed whole and once line by line: the tower reads it once,
and its rows are laid out twice.

A tower from random weights has no reason to see: for long, the text alone is what the objective learns. So a
classifier, thrown away after the training, names what each cell holds from the mean of its rows, and its loss is added.
A published LLaDA-V has a pretrained tower in its place.

Every `--every` seconds the checkpoint is written, read back and measured on a few test scenes, with their images and
with a grey one. Beside it lies ``state.pt``: the same command continues from there if it was interrupted, on scenes not
yet seen. The clock of the schedule stands still meanwhile. ``--init`` starts a new schedule from the weights of a
checkpoint.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import Linear
from torch.nn.functional import cross_entropy, rms_norm
from torch.nn.init import zeros_
from torch.optim import AdamW
from torch.utils.data import DataLoader

from dcache.images import PLACEHOLDER
from dcache.models.tiny.data_v import Batch, Painter, SceneCanvases
from dcache.models.tiny.llada_v import LLaDAVFormat, Tower
from dcache.models.tiny.measure_v import measure
from dcache.models.tiny.optimizers import clip_scores, lr_scale, make_optimizers, score_cap
from dcache.models.tiny.recipe import Recipe
from dcache.models.tiny.train import (
    Images,
    Objective,
    chosen,
    descend,
    objective,
    origin,
    parser_of,
    rates,
    set_rates,
)
from dcache.models.transformer import Transformer
from dcache.models.vision import IMAGE, Vision
from dcache.tasks.scenes import SIDE

RECIPE = Recipe("llada-v", n_layers=6, mlp_size=640, vocab_size=464, batch=512, decay=0.8, score_cap_start=100.0)
STATE = "state.pt"
NAMING = 0.1
"""Weight of the loss of the classifier."""


def patch_rows(vision: Vision, pixels: Tensor) -> Tensor:
    """The projected rows of images of one tile: (batch, 3, side, side) -> (batch, patches, d)."""
    rows: Tensor = vision.projector(vision.tower_rows(pixels))
    return rows


def image_rows(vision: Vision, rows: Tensor) -> Tensor:
    """Rows of images, as `Vision.encode` lays them out one by one: (batch, patches, d) -> (batch, rows, d).

    The rows of the squeezed image, then those of the canvas, which is the same tile, with a newline row behind a line.
    """
    lines = rows.view(len(rows), vision.spec.side, vision.spec.side, -1)
    newlines = vision.newline.to(rows.dtype).expand(len(rows), vision.spec.side, 1, -1)
    return torch.cat([rows, torch.cat([lines, newlines], dim=2).flatten(1, 2)], dim=1)


def cell_rows(rows: Tensor) -> Tensor:
    """Mean of the rows of each cell, all of one size before: (batch, patches, d) -> (batch, 9, d)."""
    batch, n, d = rows.shape
    of_cell = int(n**0.5) // SIDE  # patches along a side
    cells: Tensor = rms_norm(rows.float(), (d,)).view(batch, SIDE, of_cell, SIDE, of_cell, d).mean((2, 4))
    return cells.flatten(1, 2)


@dataclass
class Training:
    """A training under way.

    Attributes:
        model: the text part.
        vision: the vision part.
        recipe: what decides the weights.
        at: the token that images stand before.
        loss_of: the objective.
        step: updates so far.
        seconds: training time so far.
        losses: mean loss of the text by step.
        accuracy: measurements by step.
    """

    model: Transformer
    vision: Vision
    recipe: Recipe
    at: int
    loss_of: Objective
    step: int = 0
    seconds: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    accuracy: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.painter = Painter(self.model.device)
        self.namer = Linear(self.recipe.d_model, self.painter.n_things, device=self.model.device)
        zeros_(self.namer.weight)
        zeros_(self.namer.bias)
        self.optimizers = make_optimizers(self.model, self.recipe, self.vision)
        self.optimizers.append(AdamW(self.namer.parameters(), self.recipe.adam_lr, weight_decay=0.0))
        self.base = rates(self.optimizers)

    def update(self, batch: Batch, progress: float) -> Tensor:
        """One step of the schedule at `progress` from 0 to 1; the losses of the text and of the classifier, (2,)."""
        device = self.model.device
        set_rates(self.optimizers, self.base, lr_scale(self.step, progress, self.recipe))
        tokens, n_prompt, sprites = (torch.from_numpy(part).to(device, non_blocking=True).long() for part in batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            rows = patch_rows(self.vision, self.painter(sprites))
            loss, bounds = self.loss_of(self.model, tokens, n_prompt, Images(image_rows(self.vision, rows), self.at))
        named = cross_entropy(self.namer(cell_rows(rows)).flatten(0, 1), self.painter.things(sprites).flatten())
        (loss + NAMING * named).backward()  # type: ignore[no-untyped-call]
        descend(self.optimizers)
        clip_scores(self.model, bounds, score_cap(progress, self.recipe))
        self.step += 1
        return torch.stack([loss, named]).detach()

    def record(self) -> dict[str, Any]:
        """What `training.json` says of it."""
        return {
            "steps": self.step,
            "seconds": round(self.seconds, 1),
            "loss_by_step": self.losses,
            "accuracy_by_step": self.accuracy,
        }

    def save(self, file: Path, sizes: dict[str, Any]) -> None:
        """Write everything that `load` needs to continue; `sizes` guards against continuing something else."""
        state = {
            "sizes": sizes,
            "model": self.model.state_dict(),
            "vision": self.vision.state_dict(),
            "namer": self.namer.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "masks": self.loss_of.generator.get_state(),
            "progress": {name: getattr(self, name) for name in ("step", "seconds", "losses", "accuracy")},
        }
        torch.save(state, file.with_suffix(".new"))
        file.with_suffix(".new").replace(file)  # never half a file

    def load(self, state: dict[str, Any]) -> None:
        """Continue from what `save` wrote."""
        self.model.load_state_dict(state["model"])
        self.vision.load_state_dict(state["vision"])
        self.namer.load_state_dict(state["namer"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.loss_of.generator.set_state(state["masks"])
        for name, value in state["progress"].items():
            setattr(self, name, value)


def train(
    training: Training,
    batches: Iterator[Batch],
    n_steps: int | None,
    seconds: float | None,
    every: float,
    keep: Callable[[], None],
) -> None:
    """Train until `n_steps` or `seconds` are over, whichever is first; call `keep` every so many seconds."""
    running = torch.zeros(2, device=training.model.device)
    since, kept, clock = training.step, training.seconds, time.monotonic() - training.seconds
    while True:
        training.seconds = time.monotonic() - clock
        progress = max(training.step / n_steps if n_steps else 0.0, training.seconds / seconds if seconds else 0.0)
        if progress >= 1:
            return
        running += training.update(next(batches), progress)
        step = training.step
        if step in (1, 10, 50) or step % 200 == 0:
            loss, named = (running / (step - since)).tolist()
            print(f"step {step}  {time.monotonic() - clock:.1f} s  loss {loss:.5f}  cells {named:.5f}", flush=True)
            training.losses[str(step)] = round(loss, 5)
            running.zero_()
            since = step
        if training.seconds - kept >= every:
            training.seconds = kept = time.monotonic() - clock
            keep()
            clock = time.monotonic() - kept


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, Recipe, Tower]:
    """The command line, the recipe, and the sizes of the tower."""
    parser = parser_of("Train a tiny LLaDA-V on scenes and save it in the published format.", {"llada-v": RECIPE})
    parser.add_argument("--every", type=float, default=120, help="seconds between two checkpoints (default 120)")
    parser.add_argument("--look", type=int, default=128, help="test scenes to measure a checkpoint on (default 128)")
    for size in fields(Tower):
        parser.add_argument(f"--{size.name.replace('_', '-')}", type=int, default=size.default)
    given = parser.parse_args(arguments)
    sizes = Tower(**{size.name: getattr(given, size.name) for size in fields(Tower)})
    return given, chosen(parser, given, RECIPE), sizes


def start_loading(
    layout: LLaDAVFormat, tokenizer: Tokenizer, recipe: Recipe, workers: int, start: int
) -> Iterator[Batch]:
    """Endless batches; starts the workers, so call it before this process opens the GPU."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    data = SceneCanvases(layout, tokenizer, recipe.batch, recipe.seed, start)
    return iter(DataLoader(data, batch_size=None, num_workers=workers, collate_fn=lambda batch: batch))


def start_state(given: argparse.Namespace, sizes: dict[str, Any]) -> dict[str, Any] | None:
    """What an interrupted training left in the folder, None if there is nothing."""
    file = given.out / STATE
    if not file.exists():
        return None
    state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    if state["sizes"] != sizes:
        raise SystemExit(f"{file} is of a training with other options: {state['sizes']}; remove it or repeat them")
    return state


def main(arguments: list[str] | None = None) -> None:
    """Train, measure and save."""
    given, recipe, tower = parse(arguments)
    layout, sizes = LLaDAVFormat(tower), asdict(recipe) | asdict(tower)
    state = start_state(given, sizes)
    source = given.out if state else given.init
    tokenizer = (
        layout.read_tokenizer(source) if source else layout.train_tokenizer(recipe.seed, recipe.vocab_size, 1000)
    )
    n_seen = state["progress"]["step"] * recipe.batch if state else 0
    batches = start_loading(layout, tokenizer, recipe, given.workers, n_seen)
    model = Transformer(layout.spec(recipe, tokenizer), given.device).init_random(recipe.seed)
    vision = Vision(layout.vision_spec(recipe, tokenizer), given.device).init_random(recipe.seed)
    at = layout.prompt(layout.reader(tokenizer), PLACEHOLDER).index(IMAGE)
    on_gpu = model.device.type == "cuda"
    loss_of = objective(recipe, model.device, on_gpu and not given.no_compile)
    training = Training(model, vision, recipe, at, loss_of)
    if state:
        training.load(state)
        print(f"continued from step {training.step}, {training.seconds:.1f} s", flush=True)
    elif given.init:
        layout.restore(model, given.init, vision)
    record = origin(model, recipe, given) | {"tower": asdict(tower)}
    record["n_parameters"] += sum(p.numel() for p in vision.parameters())

    def save() -> None:
        layout.save(model, tokenizer, recipe, record | training.record(), given.out, vision)

    def keep() -> None:
        save()
        training.save(given.out / STATE, sizes)
        found = measure(given.out, given.device, given.look)
        training.accuracy[str(training.step)] = {name: share["all"] for name, share in found.items()}

    train(training, batches, given.steps, given.seconds, given.every, keep)
    save()  # first of all: measuring may still fail
    record["accuracy"] = measure(given.out, given.device, given.problems)
    save()
    (given.out / STATE).unlink(missing_ok=True)
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    print(
        f"{training.step} steps in {training.seconds:.1f} s, {record['n_parameters']} parameters, peak {peak:.1f} GiB"
    )


if __name__ == "__main__":
    main()
