"""Suffix pruning: masks far behind the current block are neither rows nor keys (Streaming-dLLM, DPad).

Streaming-dLLM, arXiv 2601.17917; DPad, arXiv 2508.14148. A mask far behind the block tells it little but how long the
text may get. So of the masks behind the block a hard window of the next ones and the last of the canvas stay
(Streaming-dLLM), or each stays with a probability that falls with its distance, drawn once per block (DPad).
Positions keep their numbers. What is computed among the rows that stay is the business of the inner policy.

=======================  ==================================================================
prefix, block            `end`: everything up to it stays
next ``w`` positions     knob ``window``
last position            knob ``tail``
distance decay           knobs ``decay``, ``sigma`` and ``seed``; it begins behind the window
=======================  ==================================================================

Whatever is known stays, and so does what a step needs. A key that is shown after it was hidden, or that nobody has
computed yet, is computed in that pass, whatever the inner policy plans; the set "fresh" names these rows to inner
layers that leave rows of a plan out. Streaming-dLLM's threshold and both early exits decide what is committed; they
are no part of a filter (see the page of this policy).

Departures: the window of an unmasker that slides over the generation takes the place of the block. DPad thins out the
window itself; here the decay is that of the positions behind it, and ``window=0`` leaves it alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dcache.arrays import Bools, Ints, first
from dcache.models.transformer import ModelSpec
from dcache.policy import Filter, FilterConfig, Plan, State

if TYPE_CHECKING:
    from dcache.engine.network import Network
    from dcache.unmasking.base import Unmasker


class Suffix(Filter):
    """Hides masks far behind the current block from the inner policy."""

    class Config(FilterConfig):
        """Knobs of `Suffix`."""

        inner: str = Field(
            "fast-dllm(mode=prefix)",
            description="the policy that is wrapped, written as everywhere: elastic(gamma=0.95)",
        )
        window: int = Field(96, ge=0, le=2**31 - 1, description="positions behind the block that stay, at least")
        tail: int = Field(1, ge=0, le=2**31 - 1, description="last positions of the canvas that stay")
        decay: Literal["gauss"] | None = Field(
            None, description="gauss: keep a position d behind the window with probability exp(-d^2 / (2 sigma^2))"
        )
        sigma: float = Field(64.0, gt=0, description="width of that decay, in positions")
        seed: int = Field(0, ge=0, description="of the draws, with the sequence's number and the start of its block")

    paper = "Streaming-dLLM, arXiv 2601.17917; DPad, arXiv 2508.14148"
    pairs_with = "threshold(threshold=0.9)"
    exact = "inner=none,window=1000000"
    config: Config

    def refuses(self, spec: ModelSpec, unmasker: Unmasker) -> str | None:
        """Outputs kept for every row are missing for one that was hidden."""
        own = set(self.inner.stores(spec)) - {"H", "Q"}
        if own:
            return (
                f"{self.inner.name} replays outputs of rows that it does not compute (stores {', '.join(sorted(own))}),"
                " and a row that was hidden has none; wrap a policy that computes the rows of its plans"
            )
        return super().refuses(spec, unmasker)

    def begin(self, net: Network, state: State) -> None:
        """Nothing has been computed, nothing drawn."""
        super().begin(net, state)
        self.shown: Bools = np.zeros_like(state.valid)  # visible since it was last computed
        self.drawn = np.ones(state.valid.shape)  # uniform, of the current block
        self.drawn_for: Ints = np.full(state.batch, -1, dtype=np.int64)

    def restrict(self, state: State, plan: Plan) -> Plan:
        """Rows, sets and keys of what stays; and a pass for what is shown anew."""
        keep = self.keep(state)
        fresh = keep & ~self.shown & state.active[:, None]
        rows = plan.row_mask & keep | fresh
        self.shown = (self.shown | rows) & keep
        sets = {name: mask & keep for name, mask in plan.sets.items()}
        return replace(plan, row_mask=rows, sets={**sets, "fresh": fresh}, visible=both(plan.visible, keep, state))

    def keep(self, state: State) -> Bools:
        """(batch, slots): positions that are visible in this step."""
        place, end = np.arange(state.slots), self.end(state)[:, None]
        near = place <= end + self.config.window
        tail = place >= (state.lengths - self.config.tail)[:, None]
        needed = state.needed | state.window | state.changed
        keep: Bools = (near | tail | needed | state.known | self._lucky(state, end)) & state.valid
        return keep

    @staticmethod
    def end(state: State) -> Ints:
        """(batch,) int64: last position of the block; of the unmasker's window where the block is the generation."""
        last = state.slots - 1 - first(state.block[:, ::-1], state.slots - 1)
        window = np.maximum(state.slots - 1 - first(state.window[:, ::-1], state.slots - 1), first(state.masked, 0))
        return np.where(state.block.sum(1) == state.gen_length, window, last)

    def _lucky(self, state: State, end: Ints) -> Bools:
        """Positions behind the window that were drawn; each draw holds for the block."""
        if self.config.decay is None:
            return np.zeros_like(state.valid)
        start = first(state.block, -1)
        for b in np.flatnonzero(start != self.drawn_for):
            random = np.random.default_rng([self.config.seed, state.ids[b], start[b]]) if start[b] >= 0 else None
            self.drawn[b] = 1 if random is None else random.random(state.slots)
        self.drawn_for = start
        behind = np.maximum(np.arange(state.slots) - end - self.config.window, 0)
        lucky: Bools = self.drawn < np.exp(-0.5 * (behind / self.config.sigma) ** 2)
        return lucky


def both(visible: Bools | Tensor | None, keep: Bools, state: State) -> Bools | Tensor | None:
    """What the inner policy shows and the filter keeps; a mask on the device stays there, and nothing is read back."""
    if visible is None:
        return None if keep[state.valid].all() else keep
    if isinstance(visible, Tensor):
        mask = torch.from_numpy(keep).to(visible.device)
        return visible & (mask if visible.dim() == 2 else mask[:, None])
    return visible & (keep if visible.ndim == 2 else keep[:, None])
