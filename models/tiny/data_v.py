"""Training data of scenes: canvases without the rows of the image, and what it shows, to be painted on the GPU."""

from collections import defaultdict
from collections.abc import Iterator
from functools import cache, partial

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from dcache.models.tiny.data import filled
from dcache.models.tiny.llada_v import LLaDAVFormat
from dcache.models.tiny.tokenizer import special_id
from dcache.models.vision import IMAGE
from dcache.tasks.scenes import (
    CELL,
    COLOURS,
    GLYPHS,
    GREY,
    KINDS,
    SIDE,
    WHITE,
    Placed,
    Scene,
    Scenes,
    Thing,
    mask,
    sizes,
)

Batch = tuple[np.ndarray, np.ndarray, np.ndarray]
Sprite = tuple[int, int, int]
THINGS = [
    Thing(colour, kind, digit)
    for colour in COLOURS
    for kind in KINDS
    for digit in (GLYPHS if kind == "digit" else (None,))
]
"""All that a cell may hold."""
SPRITES = {
    found: i
    for i, found in enumerate(
        ((thing, size) for thing in THINGS for size in range(sizes(thing)[0], sizes(thing)[1] + 1)), start=1
    )
}
"""Number of each thing at each of its sizes, from 1 on."""


class SceneCanvases(IterableDataset[Batch]):
    """Endless batches of fresh train-split scenes whose canvases have one length.

    Args:
        layout: of the checkpoint.
        tokenizer: of the checkpoint.
        batch: scenes in a batch.
        seed: of the scenes.
        start: number of the first scene.

    Yields:
        tokens (batch, seq) int16, n_prompt (batch,) int16, and sprites (batch, 9, 3) int16, see `Painter`.
    """

    def __init__(self, layout: LLaDAVFormat, tokenizer: Tokenizer, batch: int, seed: int, start: int = 0):
        self.layout, self.tokenizer, self.batch, self.seed, self.start = layout, tokenizer, batch, seed, start

    def __iter__(self) -> Iterator[Batch]:
        """Worker w of n makes scenes w, w + n, w + 2n, ... and collects them by canvas length."""
        worker = get_worker_info()
        index, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        index += self.start
        reader, task = self.layout.reader(self.tokenizer), Scenes()
        prompt = cache(partial(self.layout.prompt, reader))  # there are 221 questions, and a template takes its time
        waiting: dict[int, list[tuple[list[int], int, list[Sprite]]]] = defaultdict(list)
        while True:
            scene = task.scene("train", index, self.seed)
            index += stride
            tokens, n_prompt, _ = scene_canvas(self.layout, self.tokenizer, scene, prompt(scene.prompt))
            rows = waiting[len(tokens)]
            rows.append((tokens, n_prompt, [sprite(placed) for placed in scene.placed]))
            if len(rows) == self.batch:
                canvases, lengths, sprites = zip(*rows, strict=True)
                yield np.array(canvases, np.int16), np.array(lengths, np.int16), np.array(sprites, np.int16)
                rows.clear()


def scene_canvas(
    layout: LLaDAVFormat, tokenizer: Tokenizer, scene: Scene, prompt: list[int]
) -> tuple[list[int], int, int]:
    """The tokens of a scene's canvas, the length of its prompt, and the token that its image stands before."""
    at = prompt.index(IMAGE)
    text = [*prompt[:at], *prompt[at + 1 :]]
    solution = tokenizer.encode(scene.solution, add_special_tokens=False).ids
    response = [*solution, special_id(tokenizer, layout.turn_end)]
    # Filled with ends of a turn: published decoding never predicts end-of-text, and rows behind need a sure token.
    return filled(text, response, special_id(tokenizer, layout.turn_end), Scenes.gen_length), len(text), at


class Painter:
    """Paints scenes as `dcache.tasks.scenes.paint` does, many at once and as the tower is given them.

    A sprite is three numbers: the number of a thing at a size (0: nothing), and the top left corner within its cell.

    Attributes:
        n_things: classes of what a cell may hold, nothing among them.
    """

    n_things = len(THINGS) + 1

    def __init__(self, device: torch.device | str):
        shades = torch.tensor([(WHITE,) * 3, (GREY,) * 3, *COLOURS.values()])
        self.colours = ((shades.double() * (1 / 255)).float() - 0.5).to(device) / 0.5  # (shades, 3), from -1 to 1
        shapes = np.zeros((len(SPRITES) + 1, CELL, CELL), np.uint8)
        for (thing, size), i in SPRITES.items():
            shape = mask(thing.kind, thing.digit, size)
            shapes[i, : shape.shape[0], : shape.shape[1]] = shape * (2 + [*COLOURS].index(thing.colour))
        self.shapes = torch.from_numpy(shapes).to(device)
        self.of_sprite = torch.tensor([0, *(1 + THINGS.index(thing) for thing, _ in SPRITES)], device=device)

    def __call__(self, sprites: Tensor) -> Tensor:
        """Pixels (batch, 3, side, side) float32 of sprites (batch, 9, 3) int64."""
        line = torch.arange(CELL, device=sprites.device)
        y, x = (line - sprites[..., at, None] for at in (1, 2))  # (batch, 9, CELL)
        seen = self.shapes[sprites[..., 0, None, None], y.clamp_min(0)[..., None], x.clamp_min(0)[..., None, :]]
        seen = torch.where((y >= 0)[..., None] & (x >= 0)[..., None, :], seen, 0)
        cells = seen.view(-1, SIDE, SIDE, CELL, CELL).transpose(2, 3)  # (batch, line, y, column, x)
        shades = cells.reshape(-1, SIDE * CELL, SIDE * CELL).long()
        grid = torch.arange(SIDE * CELL, device=sprites.device)
        edge = (grid % CELL == 0) & (grid > 0)
        return self.colours[torch.where((shades == 0) & (edge[:, None] | edge), 1, shades)].permute(0, 3, 1, 2)

    def things(self, sprites: Tensor) -> Tensor:
        """Class of what each cell holds, (batch, 9) int64, 0 for nothing."""
        return self.of_sprite[sprites[..., 0]]


def sprite(placed: Placed | None) -> Sprite:
    """The numbers of a thing in its cell."""
    return (SPRITES[placed.thing, placed.size], placed.top, placed.left) if placed else (0, 0, 0)
