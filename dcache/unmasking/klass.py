"""Commit the rows whose distribution has settled (KLASS, arXiv 2511.05664): stable over some steps, and confident.

A row is stable if the divergence ``KL(now || before)`` of its distribution was below a bound in each of the last steps.

The distributions live on the device, for every row of the generation: the last two of each row, so that `pick` may run
twice in a step. The row's step is stamped beside them; a call with the same stamp overwrites what the first wrote and
compares with the same predecessor. That is ``2 x batch x gen_length x vocab`` float32: at 126,464 ids and 256 rows
259 MB per sequence.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from dcache.state import State
from dcache.unmasking.base import Ask, Asked
from dcache.unmasking.rules import Judged, Judging, reaches
from dcache.unmasking.sampling import Drawn
from dcache.unmasking.selection import between

if TYPE_CHECKING:
    from dcache.engine.network import Network

TINY = 1e-12  # as released; keeps the logarithms finite


class KLASS(Judged):
    """Stable rows that are sure enough; if there is none, the surest."""

    class Config(Judging):
        """Knobs of `KLASS`."""

        threshold: float | None = Field(
            0.9,
            description="commit stable rows whose score is at least this; none: commit at_least rows, stable or not, "
            "as the released configuration does",
        )
        kl_threshold: float = Field(
            0.01, gt=0, description="a row is stable while its divergence from step to step stays below this, in nats"
        )
        history: int = Field(2, ge=1, le=64, description="steps for which a row must have been stable")
        watch: Literal["canvas", "window"] = Field(
            "canvas",
            description="rows whose distribution is followed: all masked ones, as released, or those that may be "
            "committed, which saves the logits of later blocks",
        )

    paper = "KLASS, arXiv 2511.05664"
    config: Config

    def begin(self, net: Network, state: State) -> None:
        """Make room for the rows of the generation and one that takes what does not count."""
        super().begin(net, state)
        rows = int(state.gen_length.max())
        self._dump = rows
        shape = (2, state.batch, rows + 1)
        self._before = net.buffer("klass.before", (*shape, net.spec.vocab_size), torch.float32)
        self._drifts = net.buffer("klass.drifts", (*shape, self.config.history), torch.float32)
        self._stamp = net.buffer("klass.stamp", shape, torch.int64)  # step + 1 of the entry; 0 is none

    def ask(self, state: State) -> Ask:
        """The masked rows of the block or window; reads all masked rows if all are followed."""
        ask = self.asking(state, start=state.gen_start)
        return ask if self.config.watch == "window" else replace(ask, read=state.masked)

    def choose(self, score: Tensor, drawn: Drawn, at: Asked) -> Tensor:
        """Stable rows that reach the threshold."""
        stable = self._follow(drawn.logits.to(torch.float32).softmax(-1), at)
        return stable & reaches(score, self.config.threshold)

    def commits(self, score: Tensor, chosen: Tensor, at: Asked) -> Tensor:
        """What was chosen; `at_least` of the surest rows only where nothing was."""
        none = ~(chosen & at.eligible).any(-1)
        least = torch.where(none, self.config.at_least, 0)
        return between(score, at.eligible, chosen, least, self.config.at_most)

    def _follow(self, now: Tensor, at: Asked) -> Tensor:
        """(batch, w) bool: stable rows; takes note of the distributions (batch, w, vocab) of this step.

        A row without a predecessor is compared with zeros, as released, which is far from any distribution.
        """
        row = at.where - at.flags["start"][:, None]
        row = torch.where(at.predicted & (row >= 0) & (row < self._dump), row, self._dump)
        lane, step = at.lanes[:, None], at.step + 1
        stamps = self._stamp[:, lane, row]  # (2, batch, w)
        side = torch.where((stamps[0] == step) | ((stamps[1] != step) & (stamps[0] < stamps[1])), 0, 1)
        before, past = self._before[1 - side, lane, row], self._drifts[1 - side, lane, row]
        drift = (now * ((now + TINY).log() - (before + TINY).log())).sum(-1)
        drifts = torch.cat([past[..., 1:], drift[..., None]], -1)
        stable = (drifts < self.config.kl_threshold).all(-1) & (row < self._dump)
        self._before[side, lane, row] = now
        self._drifts[side, lane, row] = drifts
        self._stamp[side, lane, row] = step.expand_as(row)
        return stable
