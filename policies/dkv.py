"""dKV-Cache, variant Decode: cache a token's key and value one step after it was decoded.

Ma, Yu, Fang, Wang, "dKV-Cache: The Cache for Diffusion Language Models", arXiv 2505.15781, section 3; released code
horseee/dKV-Cache. While a token is masked its K and V move; when it is decoded they jump; afterwards they hardly
change. So only decoded tokens are cached, and only from the pass *after* their commit, the first that sees the token.

======================  =======================================================
``D_i``                 ``known``: decoded after step i of the block, and the prompt
``D_{i-2}``             ``self.before``: what was known at the previous `plan`
``R_i``                 ``row_mask``; its complement is read from the cache
``cache_reloading_step``  ``interval``
======================  =======================================================

As in the released code, the cache starts empty in every block, and its first two steps are full. Departures: keys are
stored after rotary embedding, which gives the same scores; a re-masked row leaves the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from dcache.policy import CachePolicy, Plan, PolicyConfig, State

if TYPE_CHECKING:
    from dcache.engine.network import Network


class DKVCache(CachePolicy):
    """Delayed caching of decoded tokens."""

    class Config(PolicyConfig):
        """Knobs of `DKVCache`."""

        interval: int = Field(
            8, ge=1, le=2**31 - 1, description="denoising steps between two full refreshes; 1 never uses the cache"
        )

    paper = "dKV-Cache: The Cache for Diffusion Language Models, arXiv 2505.15781"
    pairs_with = "low-confidence"
    exact = "interval=1"
    config: Config

    def begin(self, net: Network, state: State) -> None:
        """Start with nothing known."""
        self.before = np.zeros_like(state.valid)

    def plan(self, state: State) -> Plan:
        """Everything, except what was known two commits ago (section 3.2, delayed caching)."""
        known = state.valid & (state.tokens != state.spec.mask_id)  # a row dropped undecoded is never known
        cached = (state.block_step >= 2) & (state.block_step % self.config.interval != 0)
        # D_{i-2}: the last commit, D_{i-1} minus D_{i-2}, is computed once more with its real token
        reused = self.before & known & cached[:, None]
        self.before = known
        return Plan(state.valid & ~reused | state.needed)  # `needed` adds rows only under a logit shift
