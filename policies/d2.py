"""d²Cache: recompute the masks that will be decoded soon and the tokens that attention flows to.

Jiang et al., "d²Cache: Accelerating Diffusion-Based LLMs via Dual Adaptive Caching", arXiv 2509.23094; released code
Kamichanw/d2Cache. A mask changes most shortly before it is decoded, likely where it is confident *and* has known
neighbours (stage 1, certainty prior); of the rest, what others attend to matters (stage 2, attention rollout). The
first pass computes everything, each later one the rows chosen after the pass before it.

====================  ===================================================================================
``M*``                ``Selection.prior``: up to ``current_k`` masked positions
``D(i)``, ``sigma``   `Densities`: how much around a position is known
``N``                 ``state.changed``: committed by the previous step; the paper does not mention them
``C^L``, ``v``        report "importance": column sums of the rollout, one per key position; "falling": their order
``U``, ``p``          ``Selection.nucleus``, ``rollout_p``
====================  ===================================================================================

The released code differs from the paper, and some of that is a slip which decides its output; it is the default, and
the knobs ``confidence``, ``search`` and ``nucleus`` have the other reading. Departures: a masked position whose row was
not computed is no candidate (there it has a uniform guess), so one of the unmasker's window is predicted in any case;
sequences of a batch are independent unless ``couple_batch``. ``docs/policies/d2.md`` has the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from dcache.arrays import Bools, Floats, close_gaps, heaviest, highest
from dcache.density import Densities
from dcache.policy import CachePolicy, Plan, PolicyConfig, Seen, State

if TYPE_CHECKING:
    from dcache.engine.layer import Layer
    from dcache.engine.network import Network


class Selection(NamedTuple):
    """Rows of the next pass and what led to them, all (batch, slots).

    Attributes:
        score: confidence times density, plus the bias of the block.
        prior: M*, positions that stage 1 wants predicted.
        importance: column sums of the rollout.
        early: rows that predict M*, save the last of the prompt, and rows whose token is new.
        nucleus: rows that stage 2 adds.
        rows: all of it, with the rule for the last prompt row and gaps closed; before any top-up.
    """

    score: NDArray[np.float64]
    prior: Bools
    importance: Floats
    early: Bools
    nucleus: Bools
    rows: Bools


class D2Cache(CachePolicy):
    """Dual adaptive caching: certainty prior, then attention rollout."""

    class Config(PolicyConfig):
        """Knobs of `D2Cache`; defaults of the released configuration file."""

        rollout_p: float = Field(0.1, ge=0, le=1, description="share of the other rows' importance that is recomputed")
        current_k: int = Field(32, ge=1, le=2**31 - 1, description="masked positions predicted per step, at most")
        sigma: float = Field(10.0, gt=0, description="width of the certainty density, in positions")
        inflate_w: int = Field(
            0, ge=0, le=2**31 - 1, description="fill gaps between rows at most this far apart; released: 0, in blocks 4"
        )
        confidence: Literal["first", "latest"] = Field(
            "first", description="scores use the confidences of the first step for ever, as released, or the latest"
        )
        search: Literal["released", "blocks", "all"] = Field(
            "released", description="masks to choose from: a multiple of what is left of a block, whole blocks, or all"
        )
        nucleus: Literal["below", "above"] = Field(
            "below", description="the share chosen stays below rollout_p, but for one row; or passes it (paper)"
        )
        couple_batch: bool = Field(False, description="one bias and one row count for all sequences, as released")
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
        self.border = state.prompt & state.rows_for(~state.prompt)  # the last prompt row, where it predicts
        self.inside = ~self.border
        self.density = Densities(state, self.config.sigma)
        self.confidence = np.zeros(state.valid.shape)  # of the masked positions
        self.masked, self.block, self.ran = state.masked, state.block, state.active  # as the previous `plan` saw them
        self._passed: list[tuple[Layer, Tensor, Tensor]] = []  # of the running pass: layer, rows, queries

    def plan(self, state: State) -> Plan:
        """Everything at first, then M*, N and U."""
        rows, begins, latest = state.valid, 0 in state.step.tolist(), self.config.confidence == "latest"
        if state.seen is not None and self.config.refresh == "never":
            if latest or 1 in state.step.tolist():
                self._recall(state.seen, (latest | (state.step == 1))[:, None])
            selection = self._select(state, state.seen.reports)
            if self.selection is not None and not all(self.ran.tolist()):  # what has not run keeps its own
                both: Iterable[tuple[np.ndarray, np.ndarray]] = zip(selection, self.selection, strict=True)
                selection = Selection(*(np.where(self.ran[:, None], now, before) for now, before in both))
            self.selection = selection
            rows = selection.rows | (state.step == 0)[:, None] if begins else selection.rows
            rows = rows | self._top_up(state, selection) if self.config.couple_batch else rows
        self.masked, self.block, self.ran = state.masked, state.block, state.active
        if begins or latest:
            return Plan(rows, watch=state.predicted_by(rows) & state.masked & (latest | (state.step == 0))[:, None])
        return Plan(rows)

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """An ordinary layer; the last one multiplies the rollout."""
        out, h = at.compute(rows, h)
        if self.config.refresh == "never":
            assert at.q is not None
            self._passed = [*(self._passed if at.index else ()), (at, rows, at.q)]
            if at.last:
                with at.aside():
                    importance = self._rollout()
                    at.report("importance", importance, per_layer=False)
                    at.report("falling", importance.argsort(dim=1, descending=True, stable=True), per_layer=False)
        return out, h

    def _rollout(self) -> Tensor:
        """Column sums of ``W^L ... W^1``: half attention and half identity for a computed row, else the identity."""
        at, rows, q = self._passed[-1]
        if not at.compact and at.across.rolls(rows):  # the same, with the attention of all layers in one launch
            return at.across.rollout([q for _, _, q in self._passed], rows)
        sums = torch.ones(rows.shape[0], at.dump + 1, device=rows.device)  # times one matrix after the other
        factor = torch.ones_like(sums).scatter_(1, rows, 0.5 * (rows < at.dump))  # attention and identity, half each
        for at, rows, q in reversed(self._passed):
            sums.add_(at.received(q, sums.mul_(factor).gather(1, rows)), alpha=1 / q.shape[1])
        return sums[:, :-1]

    def _recall(self, seen: Seen, wanted: Bools) -> None:
        """Take over the confidences that the released code keeps, those of the first step, or all."""
        fresh = self.masked & np.isfinite(seen.confidence) & wanted
        self.confidence = np.where(fresh, seen.confidence, self.confidence)

    def _select(self, state: State, reports: Mapping[str, np.ndarray]) -> Selection:
        """Both stages, for the pass to come."""
        score, prior = self._prior(state)
        reads = state.rows_for(prior)
        early = reads & self.inside | state.changed
        importance, falling, above = reports["importance"], reports["falling"], self.config.nucleus == "above"
        # stage 2 (section 3.3): the most attended of the other rows (valid, and not early), a share of their mass
        nucleus = heaviest(importance, falling, state.valid > early, self.config.rollout_p, beyond=above)
        rows = close_gaps(reads | state.changed | nucleus & self.inside, self.config.inflate_w)
        return Selection(score, prior, importance, early, nucleus, rows)

    def _prior(self, state: State) -> tuple[NDArray[np.float64], Bools]:
        """Stage 1 (section 3.2): score of every position, and M*."""
        score, search = self.confidence * self.density.now(), state.masked
        if self.config.search != "all":
            block = self.block & self.masked if self.config.search == "released" else state.block
            top = score[self.ran].max() if self.config.couple_batch else score.max(1, keepdims=True)
            np.add(score, top, out=score, where=block)
            search = self._search(state, block)
        prior = highest(score, search, self.config.current_k)
        met = prior & state.window
        if np.count_nonzero(met.any(1)) < state.batch:  # nothing to commit would be predicted, and the run would stop
            prior = prior | highest(score, state.window & ~met.any(1, keepdims=True), self.config.current_k)
        return score, prior

    def _search(self, state: State, block: Bools) -> Bools:
        """Masks from the first position of `block` over `current_k` of them, up to a multiple of its size."""
        search: Bools = np.zeros(block.shape, dtype=bool)
        for b, (begin, length) in enumerate(zip(state.gen_start.tolist(), state.lengths.tolist(), strict=True)):
            masks = state.masked[b].nonzero()[0][: self.config.current_k]
            last = int(masks[-1]) if len(masks) == self.config.current_k else length - 1
            left = block[b].nonzero()[0]  # nothing, in a sequence that is finished
            size, start = (len(left), int(left[0])) if len(left) else (1, begin)
            end = begin + ((last - begin) // size + 1) * size
            search[b, start:end] = state.masked[b, start:end]
        return search

    def _top_up(self, state: State, selection: Selection) -> Bools:
        """Rows added so that all active sequences compute as many: generated ones first, then by importance."""
        n_rows, absent = selection.rows.sum(1), state.valid & ~selection.rows & state.active[:, None]
        bonus = selection.importance[absent].max(initial=0) + selection.score
        lacking = n_rows[state.active].max(initial=0) - n_rows
        return highest(selection.importance + np.where(state.prompt, 0, bonus), absent, lacking)
