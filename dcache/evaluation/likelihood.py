"""Log-likelihood of an answer under a masked diffusion model, by LLaDA's estimate (arXiv 2502.09992, appendix).

With n answer tokens, l drawn uniformly from 1 to n, and a uniformly drawn set of l of them masked, it is

    E[ n/l * sum over the masked tokens i of log p(token i | prompt, the answer with the set masked) ],

a lower bound of the log-likelihood that becomes tight for the best model. It needs whole forward passes with nothing
to reuse between them, so no cache policy takes part, and none changes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import comb

import numpy as np
import torch
from torch import Tensor

from dcache.arrays import Bools
from dcache.conditions import fingerprint
from dcache.decode import decode
from dcache.engine import Engine
from dcache.errors import UsageError
from dcache.models.loading import Model
from dcache.plugins import make_policy, make_unmasker
from dcache.state import State
from dcache.unmasking.base import Sampling


def every_mask(n: int) -> tuple[Bools, np.ndarray]:
    """All ways to mask some of n tokens, (2**n - 1, n) bool, and the weight of each in the expectation, float64."""
    masks = np.zeros((2**n - 1, n), dtype=bool)
    chosen = [set_ for size in range(1, n + 1) for set_ in combinations(range(n), size)]
    for row, positions in zip(masks, chosen, strict=True):
        row[list(positions)] = True
    return masks, np.array([1 / (len(positions) * comb(n, len(positions))) for positions in chosen])


def some_masks(n: int, count: int, rng: np.random.Generator) -> tuple[Bools, np.ndarray]:
    """`count` random ways to mask some of n tokens, (count, n) bool, and the weight of each in the mean, float64.

    How many are masked is drawn once for all: the numbers are spread evenly over 1 to n from a random start, as in
    LLaDA's evaluation. Each number is as likely as any other, and the mean varies less.
    """
    sizes = 1 + ((rng.random() + np.arange(count)) * n / count).astype(np.int64)
    sizes = np.minimum(sizes, n)  # a start within rounding of 1
    ranks = rng.random((count, n)).argsort(1).argsort(1)
    return ranks < sizes[:, None], n / sizes / count


class Likelihood:
    """Log-likelihoods of answers; what was computed once is kept.

    Args:
        model: weights.
        count: masked copies of an answer. One that has no more ways to be masked gets the exact expectation.
        batch_size: copies that share a pass.
        sampling: the seed of the masks, and classifier-free guidance.

    Attributes:
        calls: forward calls of one sequence so far: one for each masked copy, two with guidance.
    """

    def __init__(self, model: Model, count: int, batch_size: int = 1, sampling: Sampling | None = None):
        self.model, self.count, self.batch_size = model, count, batch_size
        self.sampling = sampling or Sampling()
        self.calls = 0
        self._kept: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
        self._greedy: Engine | None = None

    def of(self, context: Sequence[int], answer: Sequence[int]) -> float:
        """The estimate for token ids, in nats; 0 for an answer without tokens. The same ids give the same number."""
        key = tuple(context), tuple(answer)
        if key not in self._kept:
            self._check(context, answer)
            self._kept[key] = self._estimate(*key) if answer else 0.0
        return self._kept[key]

    def masks(self, context: Sequence[int], n: int) -> tuple[Bools, np.ndarray]:
        """The masks and weights for n answer tokens: the same for answers of one length to one context."""
        if 2**n - 1 <= self.count:
            return every_mask(n)
        mark = int(fingerprint(repr((list(context), n)).encode()), 16)
        return some_masks(n, self.count, np.random.default_rng([self.sampling.seed, mark]))

    @torch.inference_mode()
    def _estimate(self, context: tuple[int, ...], answer: tuple[int, ...]) -> float:
        masks, weights = self.masks(context, len(answer))
        total = 0.0
        for begin in range(0, len(masks), self.batch_size):
            part = slice(begin, begin + self.batch_size)
            hidden = torch.from_numpy(masks[part]).to(self.model.device)
            found = self._log_probs(context, answer, hidden).masked_fill(~hidden, 0).sum(1)
            total += float(found.double().cpu().numpy() @ weights[part])
        return total

    def _log_probs(self, context: tuple[int, ...], answer: tuple[int, ...], hidden: Tensor) -> Tensor:
        """Log-probability of each answer token where `hidden` (copies, n) are masked: (copies, n) float32."""
        spec, n = self.model.spec, len(answer)
        ids = torch.tensor([*context, *answer], device=self.model.device).repeat(len(hidden), 1)
        ids[:, -n:].masked_fill_(hidden, spec.mask_id)
        logits = self._logits(ids, n)
        if self.sampling.guidance > 0:
            ids[:, : len(context)] = spec.mask_id
            free = self._logits(ids, n)
            logits = free + (1 + self.sampling.guidance) * (logits - free)
        target = torch.tensor(answer, device=logits.device).expand(len(hidden), n)[..., None]
        return torch.log_softmax(logits, dim=-1).gather(2, target)[..., 0]

    def _logits(self, ids: Tensor, n: int) -> Tensor:
        """Logits that predict the last n positions: (copies, n, vocab) float32."""
        self.calls += len(ids)
        transformer = self.model.transformer
        length, shift = ids.shape[1], self.model.spec.shift
        rows = torch.arange(length - n - shift, length - shift, device=ids.device).clamp(min=0)
        return transformer.logits(transformer.hidden(ids)[:, rows]).float()

    def is_greedy(self, context: Sequence[int], answer: Sequence[int]) -> bool:
        """Whether decoding without a cache, the surest token first, one per step, writes exactly this answer."""
        if not answer:
            return True
        self._check(context, answer)
        if self._greedy is None:  # its batches have every shape, so recording them as graphs would not pay
            sampling = Sampling(guidance=self.sampling.guidance, after_end="decode")
            unmasker = make_unmasker("low-confidence", sampling)
            self._greedy = Engine(self.model.transformer, make_policy("none"), unmasker, graphs=False)
        spec, guided = self.model.spec, self.sampling.guidance > 0
        state = State(spec, [list(context)], len(answer), None, guided=guided)
        decode(self._greedy, state)
        return bool(state.tokens[0, len(context) : len(context) + len(answer)].tolist() == list(answer))

    def _check(self, context: Sequence[int], answer: Sequence[int]) -> None:
        if (rows := len(context) + len(answer)) > (most := self.model.spec.max_positions):
            raise UsageError(f"prompt and answer have {rows} tokens, but the model was built for {most}; shorten them")
