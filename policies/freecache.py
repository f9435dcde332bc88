"""FreeCache: freeze the prompt after one pass and each block once it is done; compute what is left of the canvas.

Hu et al., "FlashDLM: Accelerating Diffusion Language Model Inference via Efficient KV Caching and Guided Diffusion",
arXiv 2505.21467, the half on caching. Keys and values of the prompt barely move while the rest is denoised, and those
of a generated token settle once it is decoded. So the first pass computes all rows, and each later one the current
block and everything behind it; what lies before is frozen for the rest of the request. The cost falls as decoding
goes on. Nothing is measured.

=====================  ======================================================
block ``i``            that of the leftmost masked row; it begins at ``start``
frozen                 the prompt, and blocks before ``i``: no rows any more
active window          ``[s, n)``, s the first row that is not frozen
=====================  ======================================================

What the paper leaves open, decided here: a block freezes after one more pass that holds its final tokens
(``freeze_delay=1``), since before it the keys of its last commits are those of the mask (``freeze_delay=0`` keeps
them). Where a row predicts the next position, the row before the active window is computed too. Rows put back to the
mask thaw their block and all behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from dcache.arrays import Ints, first
from dcache.policy import CachePolicy, Plan, PolicyConfig, State

if TYPE_CHECKING:
    from dcache.engine.network import Network


class FreeCache(CachePolicy):
    """An active window that shrinks from the left, and is never refreshed."""

    class Config(PolicyConfig):
        """Knobs of `FreeCache`."""

        block_length: int | None = Field(
            32,
            ge=1,
            le=2**31 - 1,
            description="rows that freeze together, from the end of the prompt on; none: the blocks of the loop, and "
            "where it has a single one only the prompt freezes",
        )
        freeze_prompt: bool = Field(True, description="compute the prompt in the first pass alone; off: in every pass")
        freeze_delay: int = Field(
            1, ge=0, le=2**31 - 1, description="passes of a block with its final tokens before it freezes"
        )
        refresh_every: int | None = Field(
            None, ge=1, le=2**31 - 1, description="steps between two passes of all rows; none: only the first"
        )

    paper = "FlashDLM (FreeCache), arXiv 2505.21467"
    pairs_with = "low-confidence"
    exact = "refresh_every=1"
    config: Config

    def exempt(self) -> Mapping[str, str]:
        """Keys frozen at once never hold the block's last tokens."""
        reason = "freeze_delay=0 freezes the keys of a block's last commits as those of the mask"
        return {"a_committed_row_is_computed_again_with_its_token": reason} if self.config.freeze_delay == 0 else {}

    def begin(self, net: Network, state: State) -> None:
        """No block is done."""
        self.passes = np.zeros(state.valid.shape, dtype=np.int64)  # with the final tokens of the row's block

    def plan(self, state: State) -> Plan:
        """All rows at first, then those from the first unfrozen block on."""
        done = ~state.prompt & (np.arange(state.slots) < self._start(state)[:, None])
        frozen = done & (self.passes >= self.config.freeze_delay)
        self.passes = np.where(done, self.passes + 1, 0)
        if self.config.freeze_prompt:
            frozen |= state.prompt
        window = state.valid & ~frozen
        every = self.config.refresh_every
        full = state.step == 0 if every is None else state.step % every == 0
        return Plan(window | state.rows_for(window) | full[:, None] & state.valid)

    def _start(self, state: State) -> Ints:
        """(batch,) int64: first row of the first block that is not done."""
        masked: Ints = first(state.masked, state.slots)
        if self.config.block_length is None:
            return np.minimum(first(state.block, state.slots), masked)
        return masked - (masked - state.gen_start) % self.config.block_length
