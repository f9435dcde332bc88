"""Commit in an order that does not depend on scores: one drawn beforehand, or left to right.

================  ===============================================================================================
``random-order``  the order of a block is drawn when the block begins, and each step commits the next rows of it
                  (dKV-Cache-Greedy, arXiv 2505.15781, whose policy must know the picks before the pass)
``ar``            only the leftmost run of masked rows may be committed (d2Cache's ``ar``)
================  ===============================================================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dcache.arrays import Ints, first
from dcache.state import State
from dcache.unmasking.base import Ask, Asked, Picks, Unmasker
from dcache.unmasking.rules import Judged, Judging, reaches
from dcache.unmasking.sampling import Drawn, draw
from dcache.unmasking.schedule import Quota, Schedule, ask_opening
from dcache.unmasking.selection import leftmost_run

if TYPE_CHECKING:
    from dcache.engine.network import Network


class RandomOrder(Unmasker):
    """The next rows of an order that was drawn when the block began.

    The draw of a row is a hash of seed, sequence, first row of the block and row. A row that was not predicted when its
    turn came stays first in the order.
    """

    class Config(Schedule):
        """Knobs of `RandomOrder`."""

    paper = "dKV-Cache, arXiv 2505.15781"
    announces = True
    config: Config

    def begin(self, net: Network, state: State) -> None:
        """Forget the schedule of the last batch."""
        super().begin(net, state)
        self.quota = Quota(self.config)

    def ask(self, state: State) -> Ask:
        """The rows whose turn it is: exactly those that this step commits."""
        quota = self.quota.of(state)
        ask = ask_opening(state, self.config)
        order = self._order(state, state.block if ask.block is None else ask.block)
        turn = np.where(ask.window, order, state.slots)
        place = turn.argsort(1, kind="stable").argsort(1, kind="stable")  # of each row among the masked ones
        return Ask(ask.window & (place < quota[:, None]), block=ask.block, commits=quota > 0, order=order)

    def _order(self, state: State, block: np.ndarray) -> Ints:
        """(batch, slots) int64: place of each row in the order of its block."""
        start = torch.from_numpy(first(block, 0))[:, None]
        drawn = self.noise.order(torch.from_numpy(state.ids)[:, None], start, state.slots).numpy()
        order: Ints = (-drawn).argsort(1, kind="stable").argsort(1, kind="stable")
        return order

    def pick(self, logits: Tensor, at: Asked) -> Picks:
        """All of the window."""
        drawn = draw(logits, at, self.sampling, self.noise)
        return Picks(drawn.tokens, drawn.confidence, at.eligible)


class LeftToRight(Judged):
    """The leftmost masked rows: a fixed number, or as many in a run as reach a threshold."""

    class Config(Judging):
        """Knobs of `LeftToRight`."""

        threshold: float | None = Field(
            None,
            description="commit the leftmost run up to its first row whose score is below this; none: at_least rows",
        )

    paper = "d2Cache (released code), arXiv 2509.23094"
    config: Config

    def pick(self, logits: Tensor, at: Asked) -> Picks:
        """Commit the longest prefix of the leftmost run that reaches the threshold, within the bounds."""
        drawn = draw(logits, at, self.sampling, self.noise)
        run = leftmost_run(at.eligible, at.where)
        place = run.cumsum(-1) - 1
        sure = run & self.choose(self.judged(drawn, at), drawn, at)
        prefix = run & ((run & ~sure).cumsum(-1) == 0)
        commit = prefix | (run & (place < self.config.at_least))
        if self.config.at_most is not None:
            commit &= place < self.config.at_most
        return Picks(drawn.tokens, drawn.confidence, commit)

    def choose(self, score: Tensor, drawn: Drawn, at: Asked) -> Tensor:
        """What reaches the threshold."""
        return reaches(score, self.config.threshold)
