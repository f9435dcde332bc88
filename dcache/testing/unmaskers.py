"""Two unmaskers that put a cache policy to the test: one that pauses, one that takes commits back.

They are not registered: a `dcache.testing.Canvas` names them like any other, and nothing else does.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor

from dcache.arrays import Bools, first
from dcache.state import Seen, State
from dcache.unmasking.base import Ask, Asked, Picks, Unmasker, Update, ask_for, best, candidates

REMASK_AT = (2, 4, 5)  # steps after which a row is put back: few, so that every run ends


class Pausing(Unmasker):
    """The most confident row, but none at all in two steps of three: nothing changes between two passes."""

    def ask(self, state: State) -> Ask:
        """The masked rows of the block, and whether this step commits."""
        quota = (state.step % 3 == 2).astype(np.int64)
        return replace(ask_for(state, self.config.window, quota=quota), commits=quota > 0)

    def pick(self, logits: Tensor, at: Asked) -> Picks:
        """Commit `quota` rows."""
        tokens, confidence = candidates(logits, at, self.sampling, self.noise)
        return Picks(tokens, confidence, best(confidence, at.eligible, at.flags["quota"]))


class Remasking(Unmasker):
    """The two most confident rows per step; after some steps the leftmost committed row is masked again."""

    def ask(self, state: State) -> Ask:
        """The masked rows of the block."""
        return ask_for(state, self.config.window, quota=np.full(state.batch, 2, dtype=np.int64))

    def pick(self, logits: Tensor, at: Asked) -> Picks:
        """Commit two rows."""
        tokens, confidence = candidates(logits, at, self.sampling, self.noise)
        return Picks(tokens, confidence, best(confidence, at.eligible, at.flags["quota"]))

    def settle(self, state: State, seen: Seen) -> Update:
        """Put back one row of an earlier step; an end of the text stays, as rows behind it may have been dropped."""
        update = super().settle(state, seen)
        free = state.block & state.known & ~state.prompt & ~np.isin(state.tokens, state.spec.end_ids)
        leftmost: Bools = free & (np.arange(state.slots) == first(free, -1)[:, None])
        due = np.isin(state.step, REMASK_AT) & (state.masked & ~update.commit & ~update.drop).any(1)
        return replace(update, remask=leftmost & (due & state.active)[:, None])
