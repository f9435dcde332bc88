"""Fast-dLLM: within a block, read everything before it (prefix), or everything around it (dual), from the cache.

Wu et al., "Fast-dLLM: Training-free Acceleration of Diffusion LLM by Enabling KV Cache and Parallel Decoding", arXiv
2505.22618, section 3.2 and algorithm 1; released code NVlabs/Fast-dLLM. While a block is decoded, what lies before it
hardly changes, and the masks behind it say little. So the first pass of a block computes all rows, and those after it
compute the block, with the rest of the canvas (prefix) or without (dual). ``full_passes`` has more than one pass begin
a block like that, as Sparse-dLLM does (arXiv 2508.02558).

==================  ===========================================================
``[s, e)``          ``state.block``
``[s, T)``          ``state.block`` and all that follows it
``use_cache``       this policy
``dual_cache``      ``mode``: dual or prefix
==================  ===========================================================

Departures: the paper computes the cache on the fully masked canvas and updates it after each block; the released code,
followed here, makes the first step of the next block that update. It also passes the model once more when that step
has completed its block; this loop does not. A row that predicts the window is always computed. Where a row predicts
the next position, the released code computes ``[s, e)`` all the same, which leaves the first position of the block
without a predictor, and so decodes that one, alone, in the first pass (``rows=block``). The default computes the rows
that predict the block instead, ``[s-1, e-1)`` (``rows=predicting``), as later implementations do (d2Cache, dInfer).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from dcache.policy import CachePolicy, Plan, PolicyConfig, State

if TYPE_CHECKING:
    from dcache.models.transformer import ModelSpec
    from dcache.unmasking.base import Unmasker


class FastDLLM(CachePolicy):
    """Block-wise caching, refreshed when a block begins."""

    class Config(PolicyConfig):
        """Knobs of `FastDLLM`."""

        mode: Literal["dual", "prefix"] = Field(
            "dual", description="what is computed within a block: the block, or the block and all behind it (prefix)"
        )
        rows: Literal["predicting", "block"] = Field(
            "predicting",
            description="where a row predicts the next position: compute the rows that predict the block, or those of "
            "the block itself, as released",
        )
        interval: int | None = Field(
            None, ge=1, le=2**31 - 1, description="passes between two refreshes within a block (dInfer); none: none"
        )
        full_passes: int = Field(
            1, ge=1, le=2**31 - 1, description="passes at the beginning of a block that compute all rows"
        )

    paper = "Fast-dLLM: Training-free Acceleration of Diffusion LLM, arXiv 2505.22618"
    pairs_with = "threshold(threshold=0.9)"
    exact = "interval=1"
    config: Config

    def refuses(self, spec: ModelSpec, unmasker: Unmasker) -> str | None:
        """The released rows of a shifted model predict a block but for its first position."""
        if self.config.rows == "block" and spec.shift and not unmasker.first_alone:
            return (
                "rows=block leaves the first position of a block without a predictor after the block's first pass, and "
                f"unmasker {unmasker.name!r} does not commit it, alone, in that pass; use rows=predicting, or an "
                "unmasker with first=alone"
            )
        return None

    def opening(self) -> int:
        """Whatever the other knobs are."""
        return self.config.full_passes

    def plan(self, state: State) -> Plan:
        """All rows in the first passes of a block, then the block's."""
        span = state.block
        if self.config.mode == "prefix":
            span = np.logical_or.accumulate(span, axis=1)
        rows = state.rows_for(span | state.window) if self.config.rows == "predicting" else span | state.needed
        full = state.block_step < self.config.full_passes
        if self.config.interval is not None:
            full |= state.block_step % self.config.interval == 0
        return Plan(rows | full[:, None] & state.valid if np.count_nonzero(full) else rows)
