"""Elastic-Cache: recompute a window and the most-attended token, and refresh deep layers when attention drifts.

Nguyen-Tri, Ranjan, Shen, "Attention Is All You Need for KV Cache in Diffusion LLMs", arXiv 2510.14973; released code
VILA-Lab/Elastic-Cache. Rows outside the window barely matter to it (distant masks are a length prior), keys drift more
in deep layers, and the most-attended token drifts least: when even *its* attention changes, everything has.

=======================  ======================================================================
``M``                    ``state.masked``: still to decode, before this step's commit
``W``                    set "window": rows that predict the leftmost masked positions
``D``                    ``state.changed``: committed by the previous step
``T``                    set "tracked": union over layers of the most-attended positions
``S^{t-1}, S^t``         attention of T before and after this step's write: `remember`, and `drift` from it
``sigma < gamma``        report "similarity", compared in `review`
``l*``                   ``start``: refresh from the layer above the first that drifted
=======================  ======================================================================

Departures: the released code tests after each layer and widens the stream in place; here the reuse pass runs through,
the test is read with the picks, and all rows are recomputed from ``start`` on in the same step. The layers above the
one that drifted are overwritten either way, so the result is the same, with no sync inside a pass. Every quantity is
per sequence. Where fewer positions than ``track_num`` may be tracked, fewer are; the released code fills up with masked
ones. The released similarity is a cosine over *heads* (variant "published"); the paper's formula reads as one
over keys ("paper").
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from dcache.arrays import Bools, Ints, leftmost
from dcache.kernels.select import lowest
from dcache.models.transformer import ModelSpec
from dcache.policy import CachePolicy, Plan, PolicyConfig, Seen, State

if TYPE_CHECKING:
    from dcache.engine.layer import Layer
    from dcache.kernels.attention_drift import Past
    from dcache.unmasking.base import Unmasker


AXIS = {"published": "heads", "paper": "rows", "flat": "flat"}  # what the cosine runs over


class ElasticCache(CachePolicy):
    """Attention-aware, depth-aware refresh."""

    class Config(PolicyConfig):
        """Knobs of `ElasticCache`; defaults of the released scripts."""

        gamma: float = Field(0.9, description="refresh when the tracked rows' attention similarity (0 to 1) is below")
        track_num: int = Field(
            1, ge=0, le=2**31 - 1, description="most-attended positions tracked per layer; 0 never refreshes"
        )
        window: int | None = Field(
            None,
            ge=1,
            le=2**31 - 1,
            description="masked rows computed per step, leftmost first (beta, 16 in the scripts); none: those the "
            "unmasker may commit. To bound commits too, which a full pass does not, give the unmasker a window",
        )
        block_caching: bool = Field(True, description="freeze masks outside the window; off computes every mask")
        track_dropped: bool = Field(True, description="masks dropped behind an end-of-text may be tracked, as released")
        variant: Literal["published", "paper", "flat"] = Field(
            "published", description="similarity: cosine over heads, over keys, or over both"
        )
        refresh: Literal["drift", "always"] = Field(
            "drift", description="always recomputes every layer at every step: a debugging aid, equal to no cache"
        )

    paper = "Attention Is All You Need for KV Cache in Diffusion LLMs, arXiv 2510.14973"
    pairs_with = "threshold(threshold=0.9,window=16)"
    exact = "refresh=always"
    config: Config
    _past: Past  # of a pass: attention of the tracked rows before it, in all layers

    def refuses(self, spec: ModelSpec, unmasker: Unmasker) -> str | None:
        """A window of the leftmost masks may hold none of the rows of an order drawn beforehand."""
        if self.config.window is not None and unmasker.announces:
            return (
                f"window={self.config.window} computes the leftmost masked rows, and unmasker {unmasker.name!r} "
                "commits rows of an order drawn beforehand, anywhere; leave the window out, and those rows are computed"
            )
        return None

    def stores(self, spec: ModelSpec) -> dict[str, int]:
        """Layer inputs, to restart from a layer; rotated queries, for the attention of rows not computed now."""
        return {"H": spec.d_model, "Q": spec.q_width}

    def plan(self, state: State) -> Plan:
        """Step 0 computes all; then T, D and W (Algorithm 1)."""
        tracked, window = self._tracked(state), self._window(state)
        rows = tracked | state.changed | window
        if 0 in state.step.tolist():
            tracked[state.step == 0], rows[state.step == 0] = False, True
        return Plan(rows, "reuse", sets={"tracked": tracked, "window": window}, flags=self._excluded(state))

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """An ordinary layer; around all of them the drift test of the tracked rows (section 3.3), and the picks."""
        if at.index == 0 and self._tests(at):  # old queries on old keys: before any write
            with at.aside():
                self._past = at.across.remember(at.across.stored("Q", at.sets["tracked"]), rows)
        rows, h = at.compute(rows, h)
        if at.last:
            with at.aside():
                if self._tests(at):
                    self._compare(at)
                self._pick(at)
        return rows, h

    @staticmethod
    def _tests(at: Layer) -> bool:
        """Whether this is a pass with tracked rows."""
        return at.kind == "reuse" and at.sets["tracked"].shape[1] > 0

    def _compare(self, at: Layer) -> None:
        """Attention of the tracked rows after the write, compared with that before it."""
        every, tracked = at.across, at.sets["tracked"]
        now = every.stored("Q", tracked)
        every.report("similarity", every.drift(self._past, now, tracked, AXIS[self.config.variant]))
        del self._past  # keys of all layers

    def _pick(self, at: Layer) -> None:
        """Of each layer, the positions that the window attends to most; the dump slot where too few may be tracked."""
        every, window = at.across, at.sets["window"]
        received = every.received(every.stored("Q", window), every.each(window < at.dump), of=window)
        cost = (-received).masked_fill(every.each(at.flags["excluded"]), 1)[:, :-1]
        picks, _ = lowest(cost, self.config.track_num, self.config.track_num)
        every.report("picks", picks.masked_fill(cost.gather(1, picks) > 0, at.dump))

    def review(self, state: State, plan: Plan, seen: Seen) -> Plan | None:
        """Recompute all rows from the layer above the first that drifted; no test at layer L-1 can matter."""
        layers = state.spec.n_layers
        if self.config.refresh == "always":
            return self._refresh(state, plan, np.zeros(state.batch, dtype=np.int64))
        similarity = seen.reports.get("similarity")  # (layers, batch); NaN without tracked rows: not below gamma
        if similarity is None:
            return None
        drifted = similarity < np.float32(self.config.gamma)
        if not np.count_nonzero(drifted):  # which is the rule
            return None
        drifted = drifted & state.active & plan.sets["tracked"].any(1)
        if not drifted.any():
            return None
        start = np.where(drifted.any(0), drifted.argmax(0) + 1, layers)
        return None if (start >= layers).all() else self._refresh(state, plan, start)

    @staticmethod
    def _refresh(state: State, plan: Plan, start: Ints) -> Plan:
        """All rows of the sequences that have a layer to start from; the window and the exclusions stay."""
        rows = state.valid & state.active[:, None] & (start < state.spec.n_layers)[:, None]
        return Plan(rows, "refresh", start, sets={"window": plan.sets["window"]}, flags=plan.flags)

    def _window(self, state: State) -> Bools:
        """Rows W: of the unmasker's window, of the leftmost masked positions, or of all of them."""
        if not self.config.block_caching:
            chosen = state.masked
        elif self.config.window is None:
            chosen = state.window
        else:
            chosen = leftmost(state.masked, self.config.window)
        return state.rows_for(chosen)

    def _tracked(self, state: State) -> Bools:
        """Positions T: what any layer picked in the previous step."""
        tracked = np.zeros((state.batch, state.slots + 1), dtype=bool)
        if state.seen is not None and "picks" in state.seen.reports:
            picks = state.seen.reports["picks"]  # (layers, batch, track_num)
            if state.batch > 1:  # one sequence needs no offset, and the device waits for each call
                picks = picks + tracked.shape[1] * np.arange(state.batch)[:, None]
            tracked.put(picks, True)
        return tracked[:, :-1]

    def _excluded(self, state: State) -> dict[str, np.ndarray]:
        """Positions that may not be tracked: masked before this step's commit, or not part of the sequence."""
        excluded = state.masked >= state.valid  # masked, or not valid
        if not self.config.track_dropped:
            excluded |= state.valid & ~state.prompt & (state.tokens == state.spec.mask_id)
        return {"excluded": excluded}
