"""Commit widely, and take back what no longer looks right (WINO, "wide in, narrow out", arXiv 2507.18578).

Every step commits all masked rows above a low threshold, and puts back committed rows of the block whose token has
become unlikely. How likely a committed token is, is read from shadow rows: one mask per row of the block, which sees
the whole canvas but its own position and is seen by other shadows alone (`Ask.shadow`).

Departure from the code that was released with d2Cache: there the eligibility check shrinks the block in place, so that
a row that was put back may never be decoded; here the extent of the block stays.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from pydantic import Field
from torch import Tensor

from dcache.arrays import Bools, first
from dcache.kernels.select import find
from dcache.models.transformer import ModelSpec
from dcache.state import Seen, State
from dcache.unmasking.base import MOST, Ask, Asked, Picks, Unmasker, UnmaskerConfig, ask_for
from dcache.unmasking.sampling import draw, probability
from dcache.unmasking.selection import best, between

SHARE, FEWEST, MANY = 0.7, 5, 20  # a step commits at most this share of the masked rows, within these bounds


class WINO(Unmasker):
    """All rows above a low threshold; committed rows below a high one go back to the mask."""

    class Config(UnmaskerConfig):
        """Knobs of `WINO`."""

        wide_in: float = Field(0.6, description="commit masked rows whose confidence is at least this")
        narrow_out: float = Field(
            0.9, description="put back committed rows of the block whose token's probability is below this"
        )
        at_least: int = Field(1, ge=1, le=MOST, description="net progress of a step in rows")

    paper = "WINO, arXiv 2507.18578"
    shadows = True
    config: Config

    def refuses(self, spec: ModelSpec) -> str | None:
        """A shadow row predicts the position it stands for; other models read a position from the row before."""
        if spec.shift == 0:
            return None
        return (
            f"wino judges a committed token by a masked copy of its row, but this model predicts a position from the "
            f"row {spec.shift} to the left, whose copy would show the next token; use a model that predicts in place"
        )

    def ask(self, state: State) -> Ask:
        """The masked rows of the block or window; shadows for them and for the committed rows beside them."""
        ask = ask_for(state, self.config.window)
        block = state.block if ask.block is None else ask.block
        known = state.known & ~state.prompt & block
        masked = (state.masked & block).sum(1)
        most = np.maximum(np.clip((SHARE * masked).astype(np.int64), FEWEST, MANY), self.config.at_least)
        return replace(
            ask,
            read=ask.window | known,
            shadow=ask.window | known,
            flags={"tokens": state.tokens, "known": known, "most": most},
        )

    def pick(self, logits: Tensor, at: Asked) -> Picks:
        """Commit by the low threshold; then put back, of what fails the high one, less than was committed."""
        drawn = draw(logits, at, self.sampling, self.noise)
        sure = drawn.confidence >= self.config.wide_in
        commit = between(drawn.confidence, at.eligible, sure, self.config.at_least, at.flags["most"])
        doubt = self._probability(at)
        unsure = at.flags["known"] & (doubt < self.config.narrow_out)
        spare = (commit.sum(-1) - self.config.at_least).clamp_min(0)
        return Picks(drawn.tokens, drawn.confidence, commit, best(-doubt, unsure, spare))

    def _probability(self, at: Asked) -> Tensor:
        """(batch, w) float32: probability of each committed token, from its shadow row."""
        assert at.shadow is not None
        assert at.shadow_logits is not None
        tokens = at.flags["tokens"].gather(1, find(at.where, at.shadow))
        return probability(at.shadow_logits, tokens, at, self.sampling).gather(1, find(at.shadow, at.where))

    def _drop(self, state: State, seen: Seen, commit: Bools) -> Bools:
        """Masked rows behind an end of the text that is settled: one in a finished block is not put back any more."""
        if self.sampling.after_end in ("decode", "fill"):
            return np.zeros_like(commit)
        left = (state.masked & ~commit) | seen.remask
        finished: Bools = np.asarray(~(left & state.block).any(1))
        tokens = np.where(commit, seen.tokens, state.tokens)
        settled = (state.known | commit) & ~state.prompt & finished[:, None]
        end = first(settled & np.isin(tokens, state.spec.end_ids), -1)
        behind: Bools = np.arange(state.slots) > np.where(end >= 0, end, state.slots)[:, None]
        return behind & state.masked & ~commit
