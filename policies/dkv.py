"""dKV-Cache: cache a token's key and value one step after it was decoded.

Ma, Yu, Fang, Wang, "dKV-Cache: The Cache for Diffusion Language Models", arXiv 2505.15781, section 3; released code
horseee/dKV-Cache. While a token is masked its K and V move; when it is decoded they jump; afterwards they hardly
change. So only decoded tokens are cached, and only from the pass *after* their commit, the first that sees the token.

=========================  ====================================================================================
``i``                      ``state.block_step``: the cache starts empty in every block
``D_{i-1}``                ``state.known`` at the `plan` of step i: decoded by earlier steps, and the prompt
``S_i``, ``S_{i-1}``       ``now``, ``self.before``: rows that may be cached as of this `plan` and of the last one
``R_i``                    ``row_mask``; its complement is read from the cache
``cache_reloading_step``   ``interval`` (Dream: ``cache_steps``)
``shift_type``             ``cacheable``: how S follows from D where a row predicts the next position
``window_size``            ``neighbours``
=========================  ====================================================================================

Departures: keys are stored after rotary embedding, which gives the same scores; a row that is put back to the mask is
computed again; a row that predicts the window is always computed, without which ``right`` commits noise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field, model_validator

from dcache.arrays import Bools
from dcache.policy import CachePolicy, Plan, PolicyConfig, State

if TYPE_CHECKING:
    from dcache.engine.network import Network
    from dcache.models.transformer import ModelSpec
    from dcache.unmasking.base import Unmasker


class DKVCache(CachePolicy):
    """Delayed caching of decoded tokens."""

    class Config(PolicyConfig):
        """Knobs of `DKVCache`."""

        variant: Literal["decode", "greedy", "prefill", "pd"] = Field(
            "decode",
            description="decode reuses decoded rows; greedy all but those decoded now and by the last step; prefill "
            "the prompt, for ever; pd the prompt for ever and decoded rows between refreshes",
        )
        interval: int = Field(
            8, ge=1, le=2**31 - 1, description="denoising steps between two full refreshes; prefill has none"
        )
        neighbours: int = Field(
            0, ge=0, le=2**31 - 1, description="greedy: masked rows computed around each row decoded now, nearest first"
        )
        cacheable: Literal["un", "un_right", "right"] = Field(
            "un",
            description="decode and pd, where a row predicts the next position: cache it once that is decoded, so that "
            "the row is needed no more (un), once its own token is (right), or once both are (un_right)",
        )

        @model_validator(mode="after")
        def _of_greedy(self) -> DKVCache.Config:
            if self.neighbours and self.variant != "greedy":
                raise ValueError(f"neighbours belongs to variant=greedy; variant={self.variant} does not use it")
            return self

    paper = "dKV-Cache: The Cache for Diffusion Language Models, arXiv 2505.15781"
    pairs_with = "low-confidence"
    exact = "variant=decode,interval=1"
    config: Config

    def refuses(self, spec: ModelSpec, unmasker: Unmasker) -> str | None:
        """Greedy computes the rows that are decoded now, so it must know them before the pass."""
        if self.config.variant == "greedy" and not unmasker.announces:
            return (
                f"variant=greedy computes the rows that a step decodes, and unmasker {unmasker.name!r} chooses "
                "them after the pass; use one that fixes the order beforehand, such as random-order"
            )
        return None

    def begin(self, net: Network, state: State) -> None:
        """Nothing may be cached before the first step."""
        self.prefix = prefix(state)
        self.before = np.zeros_like(state.valid)
        self.known = np.zeros_like(state.valid)

    def plan(self, state: State) -> Plan:
        """Everything, except what the variant reads from the cache."""
        begins = (state.step == 0)[:, None]
        between = (state.block_step % self.config.interval != 0)[:, None]  # two refreshes
        match self.config.variant:
            case "decode":
                reused = self._decoded(state, begins) & between
            case "greedy":
                reused = ~near(state, self.config.neighbours) & between
            case "prefill":
                reused = self.prefix & ~begins
            case "pd":
                reused = self.prefix & ~begins | self._decoded(state, begins) & between
        replaced = state.changed & self.known  # put back or overwritten: stored with a token that it no longer has
        self.known = state.known
        return Plan(state.valid & ~reused | state.needed | replaced)

    def _decoded(self, state: State, begins: Bools) -> Bools:
        """``S_{i-1}``: what could be cached one step ago and still can (section 3.2, delayed caching)."""
        now = cacheable(state, self.config.cacheable)
        now = np.where(begins, self.prefix, now) if np.count_nonzero(begins) else now
        reused = self.before & now
        self.before = now
        if state.spec.shift == 0:  # the released LLaDA loop keeps nothing of step 0, Dream's keeps the prompt
            reused = reused & (state.block_step > 1)[:, None]
        return reused


def prefix(state: State) -> Bools:
    """Prompt rows that predict nothing: all of them, or all but the last where a row predicts the next position."""
    return state.prompt & ~state.rows_for(~state.prompt)


def cacheable(state: State, rule: str) -> Bools:
    """``S``: rows that may be cached, given what is known (table 4: un, right, un & right shift).

    Where a row predicts the next position, a row cached by ``un`` may still hold the mask, and the last row counts as
    cached at once: the released code shifts in a circle. Both last until the next refresh.
    """
    own = state.known
    if state.spec.shift == 0 or rule == "right":
        return own
    following = (np.arange(state.slots) + state.spec.shift) % state.lengths[:, None]
    following_known = np.take_along_axis(own, following, axis=1) & state.valid
    if rule == "un":
        return following_known
    both = own & following_known
    each, last = np.arange(state.batch), state.lengths - 1
    both[each, last] = both[each, last - 1]
    return both


def near(state: State, neighbours: int) -> Bools:
    """Rows of greedy: decoded now, decoded by the last step, and masked neighbours (the window of the released code).

    Each row decoded now, in decoding order, adds the `neighbours` nearest masked rows that are not chosen yet, the left
    one first; they may lie in later blocks.
    """
    chosen = state.window | state.changed
    for b in np.flatnonzero(state.window.any(1)) if neighbours else ():
        now = np.flatnonzero(state.window[b])
        for centre in now[np.argsort(state.order[b, now], kind="stable")]:
            free = np.flatnonzero(state.masked[b] & ~chosen[b])
            distance = 2 * np.abs(free - centre) + (free > centre)
            chosen[b, free[np.argsort(distance)[:neighbours]]] = True
    return chosen
