"""Commit by confidence or at random, a scheduled number of rows per step; or all rows that are sure enough.

=================  ==============================================================================================
``low-confidence`` the most confident rows, as many as LLaDA's schedule says (LLaDA, section 2.4, "low-confidence
                   remasking": it declines to commit the least confident)
``random``         the same number of rows, drawn uniformly in every step (LLaDA's ``remasking="random"``)
``threshold``      every row whose confidence reaches a threshold, and always the best one (Fast-dLLM, arXiv
                   2505.22618, section 3.2; Elastic-Cache uses it on a sliding window)
=================  ==============================================================================================

Departures from the released code: the mask token is never a candidate; ties go to the leftmost row.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from dcache.arrays import Ints
from dcache.errors import UsageError
from dcache.state import State
from dcache.unmasking.base import MOST, Ask, Asked, Picks, Unmasker, UnmaskerConfig, ask_for, best, candidates

if TYPE_CHECKING:
    from dcache.engine.network import Network


class Schedule(UnmaskerConfig):
    """How many rows a step commits."""

    steps: int | None = Field(
        None, ge=1, le=MOST, description="denoising steps of the whole generation, split evenly over the blocks (LLaDA)"
    )
    tokens_per_step: int | None = Field(None, ge=1, le=MOST, description="rows per step; 1 unless steps is given")

    @model_validator(mode="after")
    def _one_of_two(self) -> Schedule:
        if self.steps is not None and self.tokens_per_step is not None:
            raise ValueError("give steps or tokens_per_step, not both")
        return self


class Quota:
    """LLaDA's ``get_num_transfer_tokens``: n masked rows over s steps, n // s each, the remainder to the first ones.

    It is fixed when a block begins. With more steps than rows the last steps would commit nothing; the released loop
    makes those forward calls all the same, this one does not. Rows that are left when the schedule is through (a window
    narrower than the quota, a row that was put back or not predicted) follow at the same pace, at least one per step.
    """

    def __init__(self, config: Schedule):
        self.config = config
        self.size = np.zeros(0, dtype=np.int64)

    def of(self, state: State) -> Ints:
        """(batch,) int64: rows to commit in this step."""
        if self.config.steps is None:
            return np.full(state.batch, self.config.tokens_per_step or 1, dtype=np.int64)
        length = None if self.config.window is not None else state.block_length  # a window knows no blocks
        whole = length is None
        blocks = 1 if length is None else state.gen_length // length
        step = state.step if whole else state.block_step
        if (self.config.steps % np.asarray(blocks)).any():
            raise UsageError(
                f"steps {self.config.steps} is not divisible by the {int(np.max(blocks))} blocks of the generation; "
                "every block takes the same number of steps"
            )
        if self.size.shape != (state.batch,):
            self.size = np.zeros(state.batch, dtype=np.int64)
        rows = state.masked if whole else state.masked & state.block
        self.size = np.where(step == 0, rows.sum(1), self.size)
        share, rest = np.divmod(self.size, self.config.steps // blocks)
        quota: Ints = np.maximum(share + (step < rest), 1)
        return quota


class Scheduled(Unmasker):
    """A scheduled number of rows per step, those of the highest score."""

    class Config(Schedule):
        """Knobs of a scheduled unmasker."""

    paper = "LLaDA, arXiv 2502.09992"
    config: Config

    def begin(self, net: Network, state: State) -> None:
        """Forget the schedule of the last batch."""
        super().begin(net, state)
        self.quota = Quota(self.config)

    def ask(self, state: State) -> Ask:
        """The masked rows of the block or window, and this step's quota."""
        quota = self.quota.of(state)
        return ask_for(state, self.config.window, quota=quota)

    def pick(self, logits: Tensor, at: Asked) -> Picks:
        """Commit the `quota` rows of highest score."""
        tokens, confidence = candidates(logits, at, self.sampling, self.noise)
        return Picks(tokens, confidence, best(self.score(confidence, at), at.eligible, at.flags["quota"]))

    @abstractmethod
    def score(self, confidence: Tensor, at: Asked) -> Tensor:
        """Score of every read position, (batch, w) float."""


class LowConfidence(Scheduled):
    """The most confident rows of the window."""

    def score(self, confidence: Tensor, at: Asked) -> Tensor:
        """The confidence itself."""
        return confidence


class Random(Scheduled):
    """Rows of the window drawn uniformly."""

    def score(self, confidence: Tensor, at: Asked) -> Tensor:
        """A fresh draw in every step."""
        return self.noise.positions(at)


class Threshold(Unmasker):
    """Every row of the window that is confident enough, and never none."""

    class Config(UnmaskerConfig):
        """Knobs of `Threshold`."""

        threshold: float = Field(0.9, description="commit rows whose confidence is at least this probability")
        at_least: int = Field(1, ge=1, le=MOST, description="rows that a step commits in any case, the surest")

    paper = "Fast-dLLM, arXiv 2505.22618; Elastic-Cache, arXiv 2510.14973"
    config: Config

    def ask(self, state: State) -> Ask:
        """The masked rows of the block, or of the window."""
        return ask_for(state, self.config.window)

    def pick(self, logits: Tensor, at: Asked) -> Picks:
        """Commit what reaches the threshold, and the most confident rows in any case."""
        tokens, confidence = candidates(logits, at, self.sampling, self.noise)
        least = torch.full_like(at.where[:, 0], self.config.at_least)
        sure = at.eligible & (confidence >= self.config.threshold)
        return Picks(tokens, confidence, sure | best(confidence, at.eligible, least))
