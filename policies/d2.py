"""d²Cache: recompute the masks that will be decoded soon and the tokens that attention flows to.

Jiang et al., "d²Cache: Accelerating Diffusion-Based LLMs via Dual Adaptive Caching", arXiv 2509.23094; released code
Kamichanw/d2Cache. Masks settle shortly before they are decoded, which is likely where a mask is confident *and* has
known neighbours (stage 1, certainty prior); of the rest, the few tokens that the others attend to matter (stage 2,
attention rollout). The first pass computes everything; every later one the rows chosen after the pass before it.

====================  ===================================================================================
``M*``                ``Selection.prior``: up to ``current_k`` masked positions
``D(i)``, ``sigma``   `densities`: how much around a position is known
``s``                 ``Selection.score``: confidence times density
``N``                 ``state.changed``: committed by the previous step; the paper does not mention them
``C^L``, ``v``        report "importance": column sums of the rollout, one per key position
``U``, ``p``          ``Selection.nucleus``, ``rollout_p``
====================  ===================================================================================

Rollout (`_rollout`): ``C^L = W^L ... W^1`` with ``W`` half a row of head-averaged attention and half the identity for a
computed row, and the identity for another. Its column sums are ``1 W^L ... W^1``, one vector times one matrix per layer
from the last to the first, and a vector times attention is `Layer.received`: what is held is the queries of the pass,
never anything that grows with the square of the sequence.

The released code differs from the paper, and some of that is a slip which decides its output; it is the default. The
knobs ``confidence``, ``search`` and ``nucleus`` have the other reading. Departures: a masked position whose row was not
computed is no candidate (there it has a uniform guess), so a row that predicts the unmasker's window is forced in where
the selection has none; sequences of a batch are independent unless ``couple_batch``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from dcache.arrays import Bools, first, highest
from dcache.density import densities
from dcache.policy import CachePolicy, Plan, PolicyConfig, State

if TYPE_CHECKING:
    from dcache.engine.layer import Layer
    from dcache.engine.network import Network


@dataclass(frozen=True)
class Selection:
    """Rows of the next pass and what led to them, all (batch, slots).

    Attributes:
        score: float64, stage 1: confidence times density, plus the bias of the block.
        prior: positions that stage 1 wants predicted.
        early: rows that predict them, save the last of the prompt, and rows whose token is new.
        nucleus: rows that stage 2 adds.
        rows: all of it, with the rule for the last prompt row and gaps closed; before any top-up.
    """

    score: NDArray[np.float64]
    prior: Bools
    early: Bools
    nucleus: Bools
    rows: Bools


class D2Cache(CachePolicy):
    """Dual adaptive caching: certainty prior, then attention rollout."""

    class Config(PolicyConfig):
        """Knobs of `D2Cache`; defaults of the released configuration file."""

        rollout_p: float = Field(
            0.1, ge=0, le=1, description="share of the rollout mass of the remaining rows that is recomputed, 0 to 1"
        )
        current_k: int = Field(32, ge=1, le=2**31 - 1, description="masked positions predicted per step, at most")
        sigma: float = Field(10.0, gt=0, description="width of the certainty density, in positions")
        inflate_w: int = Field(
            0,
            ge=0,
            le=2**31 - 1,
            description="also compute what lies between two chosen rows at most this many positions apart; "
            "released with 0, and 4 for semi-autoregressive blocks",
        )
        confidence: Literal["first", "latest"] = Field(
            "first", description="scores use the confidences of the first step for ever, as released, or the latest"
        )
        search: Literal["released", "blocks", "all"] = Field(
            "released",
            description="masks that may be chosen: up to a multiple of the count still masked in the last step's "
            "block, as released; up to the end of a block, the current one first; or all (paper)",
        )
        nucleus: Literal["below", "above"] = Field(
            "below",
            description="rollout mass stays below rollout_p, one row at least, as released; or passes it (paper)",
        )
        couple_batch: bool = Field(
            False,
            description="as released: one bias for the batch, and rows topped up to those of its fullest sequence",
        )
        refresh: Literal["never", "always"] = Field(
            "never", description="always recomputes every row at every step: a debugging aid, equal to no cache"
        )

    paper = "d²Cache: Accelerating Diffusion-Based LLMs via Dual Adaptive Caching, arXiv 2509.23094"
    pairs_with = "certainty-prior(sigma=10)"
    exact = "refresh=always"
    config: Config

    def exempt(self) -> Mapping[str, str]:
        """As released, the sequences of a batch are not independent."""
        coupled = "couple_batch=true makes the rows of a sequence depend on its batch, as released"
        return {"a_batch_decodes_each_sequence_as_if_it_were_alone": coupled} if self.config.couple_batch else {}

    def begin(self, net: Network, state: State) -> None:
        """Nothing is known of any position."""
        self.selection: Selection | None = None
        self.confidence = np.zeros(state.valid.shape)  # of the masked positions
        self.masked, self.block = state.masked, state.block  # both as the previous `plan` saw them
        self._passed: list[tuple[Layer, Tensor, Tensor]] = []

    def plan(self, state: State) -> Plan:
        """Everything at first, then M*, N and U."""
        rows = state.valid
        if state.seen is not None and self.config.refresh == "never":
            self._recall(state)
            self.selection = self._select(state)
            rows = self.selection.rows | (state.step == 0)[:, None]
            if self.config.couple_batch:
                rows = rows | self._top_up(state, self.selection)
        self.masked, self.block = state.masked, state.block
        reread = state.step == 0 if self.config.confidence == "first" else state.active
        return Plan(rows, watch=_predicted(state, rows) & reread[:, None])

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """An ordinary layer; the last one multiplies the rollout."""
        out, h = at.compute(rows, h)
        if self.config.refresh == "never":
            self._passed = ([] if at.index == 0 else self._passed) + [(at, rows, at.q)]
            if at.last:
                at.report("importance", self._rollout(), per_layer=False)
                self._passed = []
        return out, h

    def _rollout(self) -> Tensor:
        """Column sums of the rollout of this pass: (batch, slots) float32, summing to the length of the sequence."""
        at, rows, _ = self._passed[0]
        sums = torch.ones(rows.shape[0], at.dump + 1, device=rows.device)
        for at, rows, q in reversed(self._passed):
            mine = sums.gather(1, rows)
            half = (mine / 2).masked_fill(rows == at.dump, 0)  # attention and identity: rows sum to 2 before division
            sums = sums.scatter(1, rows, mine - half) + at.received(q, half) / q.shape[1]
        return sums[:, :-1]

    def _recall(self, state: State) -> None:
        """Take over the confidences that the released code keeps, those of the first step, or all."""
        assert state.seen is not None
        fresh = self.masked & np.isfinite(state.seen.confidence)
        if self.config.confidence == "first":
            fresh &= (state.step == 1)[:, None]
        self.confidence = np.where(fresh, state.seen.confidence, self.confidence)

    def _select(self, state: State) -> Selection:
        """Both stages, for the pass to come."""
        score, prior = self._prior(state)
        reads = state.rows_for(prior)
        border = state.prompt & state.rows_for(_at(state, state.gen_start))  # last prompt row, if it predicts
        early = reads & ~border | state.changed
        nucleus = self._nucleus(state, state.valid & ~early)
        rows = (early | nucleus) & ~border | reads & border
        return Selection(score, prior, early, nucleus, inflate(rows, self.config.inflate_w))

    def _prior(self, state: State) -> tuple[NDArray[np.float64], Bools]:
        """Stage 1 (section 3.2): score of every position, and M*."""
        score = self.confidence * densities(state, state.known, self.config.sigma)
        search = state.masked
        if self.config.search != "all":
            block = self.block & self.masked if self.config.search == "released" else state.block
            top = score.max(1, keepdims=True)
            score = score + block * (top.max() if self.config.couple_batch else top)
            search = search & self._search(state, block)
        prior = highest(score, search, self.config.current_k)
        missed = ~(prior & state.window).any(1)  # nothing that may be committed: the run would stop here
        return score, prior | highest(score, state.window & missed[:, None], self.config.current_k)

    def _search(self, state: State, block: Bools) -> Bools:
        """From the first position of `block` over `current_k` masks, up to a multiple of its size."""
        begin, size = state.gen_start, block.sum(1).clip(1)
        reach = first(state.masked.cumsum(1) >= self.config.current_k, -1)
        reach = np.where(reach < 0, state.lengths - 1, reach) - begin
        end = begin + (reach // size + 1) * size
        place = np.arange(state.slots)
        start = np.where(block.any(1), first(block, 0), begin)
        return (place >= start[:, None]) & (place < end[:, None])

    def _nucleus(self, state: State, free: Bools) -> Bools:
        """Stage 2 (section 3.3): the most attended of the `free` rows, a share `rollout_p` of their mass."""
        importance = self._importance(state)
        mass = np.sort(np.where(free, importance, 0))[:, ::-1].cumsum(1)
        within = (mass <= self.config.rollout_p * (mass[:, -1:] + 1e-9)).sum(1)
        return highest(importance, free, within + 1 if self.config.nucleus == "above" else within.clip(1))

    def _top_up(self, state: State, selection: Selection) -> Bools:
        """Rows added so that all active sequences compute as many: generated ones first, then by importance."""
        importance, n_rows = self._importance(state), selection.rows.sum(1)
        absent = state.valid & ~selection.rows & state.active[:, None]
        bonus = importance[absent].max(initial=0) + selection.score
        lacking = n_rows[state.active].max(initial=0) - n_rows
        return highest(importance + np.where(state.prompt, 0, bonus), absent, lacking)

    @staticmethod
    def _importance(state: State) -> NDArray[np.float64]:
        """What the last pass reported."""
        assert state.seen is not None
        return state.seen.reports["importance"].astype(np.float64)


def _at(state: State, place: NDArray[np.int64]) -> Bools:
    """(batch, slots) mask of one position per sequence."""
    mask: Bools = np.arange(state.slots) == place[:, None]
    return mask


def _predicted(state: State, rows: Bools) -> Bools:
    """Masked positions that `rows` predict."""
    for _ in range(state.spec.shift):
        rows = np.concatenate([rows[:, :1], rows[:, :-1]], axis=1)
    return rows & state.masked


def inflate(rows: Bools, width: int) -> Bools:
    """Close gaps: whatever lies between two rows at most `width` apart."""
    place, far = np.arange(rows.shape[1]), rows.shape[1] + width + 1
    before = np.maximum.accumulate(np.where(rows, place, -far), axis=1)
    after = np.minimum.accumulate(np.where(rows, place, 2 * far)[:, ::-1], axis=1)[:, ::-1]
    return rows | (after - before <= width)
