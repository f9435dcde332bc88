"""Training data of scenes: canvases without the rows of the image, and the image in one byte per pixel."""

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
from dcache.tasks.base import Problem
from dcache.tasks.scenes import COLOURS, GREY, WHITE, Scenes

Batch = tuple[np.ndarray, np.ndarray, np.ndarray]


class SceneCanvases(IterableDataset[Batch]):
    """Endless batches of fresh train-split scenes whose canvases have one length.

    Args:
        layout: of the checkpoint.
        tokenizer: of the checkpoint.
        batch: scenes in a batch.
        seed: of the scenes.
        start: number of the first scene.

    Yields:
        tokens (batch, seq) int16, n_prompt (batch,) int16, and the red channel of the images (batch, side, side) uint8:
        a third of the pixels, and enough, since no two colours of a scene share their red.
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
        waiting: dict[int, list[tuple[list[int], int, np.ndarray]]] = defaultdict(list)
        while True:
            problem = task.problem("train", index, self.seed)
            index += stride
            tokens, n_prompt, _ = scene_canvas(self.layout, self.tokenizer, problem, prompt(problem.prompt))
            rows = waiting[len(tokens)]
            rows.append((tokens, n_prompt, np.asarray(problem.images[0])[..., 0]))
            if len(rows) == self.batch:
                canvases, lengths, reds = zip(*rows, strict=True)
                yield np.array(canvases, np.int16), np.array(lengths, np.int16), np.stack(reds)
                rows.clear()


def scene_canvas(
    layout: LLaDAVFormat, tokenizer: Tokenizer, problem: Problem, prompt: list[int]
) -> tuple[list[int], int, int]:
    """The tokens of a scene's canvas, the length of its prompt, and the token that its image stands before."""
    at = prompt.index(IMAGE)
    text = [*prompt[:at], *prompt[at + 1 :]]
    solution = tokenizer.encode(problem.solution or "", add_special_tokens=False).ids
    response = [*solution, special_id(tokenizer, layout.turn_end)]
    return filled(text, response, special_id(tokenizer, layout.eos), Scenes.gen_length), len(text), at


def palette(device: torch.device | str) -> Tensor:
    """What the tower sees of a pixel, by its red: (256, 3) float32 from -1 to 1, NaN for reds that no scene has."""
    table = torch.full((256, 3), torch.nan)
    for colour in ((WHITE,) * 3, (GREY,) * 3, *COLOURS.values()):
        table[colour[0]] = ((torch.tensor(colour).double() * (1 / 255)).float() - 0.5) / 0.5
    return table.to(device)
