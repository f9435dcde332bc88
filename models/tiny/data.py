"""Training data: canvases of fresh problems, and which of their rows are masked."""

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from dcache.models.tiny.formats import Format
from dcache.models.tiny.tokenizer import special_id
from dcache.tasks.base import Problem
from dcache.tasks.gsm_mini import GsmMini

CANVAS_STEP = 16


class Canvases(IterableDataset[tuple[np.ndarray, np.ndarray]]):
    """Endless batches of fresh train-split problems whose canvases have one length.

    Yields:
        tokens (batch, seq) int16 and n_prompt (batch,) int16. The response follows the prompt and fills the canvas.
    """

    def __init__(self, layout: Format, tokenizer: Tokenizer, batch: int, seed: int):
        self.layout, self.tokenizer, self.batch, self.seed = layout, tokenizer, batch, seed

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Worker w of n makes problems w, w + n, w + 2n, ... and collects them by canvas length."""
        worker = get_worker_info()
        index, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        task = GsmMini()
        waiting: dict[int, list[tuple[list[int], int]]] = defaultdict(list)
        while True:
            problems = [task.problem("train", index + i * stride, self.seed) for i in range(512)]
            index += 512 * stride
            for tokens, n_prompt in canvases(self.layout, self.tokenizer, problems):
                rows = waiting[len(tokens)]
                rows.append((tokens, n_prompt))
                if len(rows) == self.batch:
                    yield np.array([row for row, _ in rows], np.int16), np.array([n for _, n in rows], np.int16)
                    rows.clear()


def canvases(layout: Format, tokenizer: Tokenizer, problems: list[Problem]) -> Iterator[tuple[list[int], int]]:
    """The tokens of each problem's canvas and the length of its prompt.

    A problem whose solution does not fit `gen_length` is left out: none of tiny-llada's, some in a million of Dream's,
    whose splitting gives a number a token for its space and one for each digit.
    """
    eos, turn_end = special_id(tokenizer, layout.eos), special_id(tokenizer, layout.turn_end)
    prompts = tokenizer.encode_batch([layout.render(problem.prompt) for problem in problems], add_special_tokens=False)
    solutions = tokenizer.encode_batch([problem.solution or "" for problem in problems], add_special_tokens=False)
    for prompt, solution in zip(prompts, solutions, strict=True):
        response = [*solution.ids, turn_end]
        if len(response) <= GsmMini.gen_length:
            yield filled(prompt.ids, response, eos, GsmMini.gen_length), len(prompt.ids)


def filled(prompt: list[int], response: list[int], eos: int, gen_length: int) -> list[int]:
    """A canvas for `gen_length` rows behind the prompt, and for more of them up to a multiple of `CANVAS_STEP`."""
    seq = -(-(len(prompt) + gen_length) // CANVAS_STEP) * CANVAS_STEP
    tokens = [*prompt, *response]
    return tokens + [eos] * (seq - len(tokens))


def choose_masks(n_prompt: Tensor, seq: int, block_share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Choose what to mask and which of it to train on.

    Args:
        n_prompt: (batch,) int64.
        seq: length of the canvas.
        block_share: share of sequences masked as block decoding would.
        generator: on the device of `n_prompt`.

    Returns:
        masked (batch, seq) bool, and counted (batch, seq) bool, a part of it with at least one row per sequence.
    """
    batch, device = len(n_prompt), n_prompt.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    as_block = uniform(batch) < block_share
    length = seq - n_prompt
    start = torch.where(as_block, (uniform(batch) * length).long(), 0)
    width = torch.where(as_block, 8 + (uniform(batch) * 57).long(), length)
    end = torch.minimum(start + width, length)
    # One draw per stratum of (0, 1), strata in random order: the batch sees every share of masked rows evenly.
    stratum = torch.randperm(batch, generator=generator, device=device)
    n_masked = 1 + ((stratum + uniform(batch)) / batch * (end - start)).long().clamp(max=end - start - 1)
    place = torch.arange(seq, device=device) - n_prompt[:, None]  # (batch, seq), 0 at the first response row
    inside = (place >= start[:, None]) & (place < end[:, None])
    noise = uniform(batch, seq).masked_fill(~inside, 2.0)
    threshold = noise.sort(dim=1).values.gather(1, n_masked[:, None] - 1)
    counted = noise <= threshold
    return counted | (place >= end[:, None]), counted
