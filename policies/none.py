"""No cache: every row in every layer at every step, the reference that all policies are compared with.

It runs on the same engine, kernels and graphs as the others; a slow baseline would flatter every policy.
"""

import sys

from dcache.policy import CachePolicy, Plan, State


class NoCache(CachePolicy):
    """Recompute everything, always."""

    paper = "LLaDA: Large Language Diffusion Models, arXiv 2502.09992"
    exact = ""

    def plan(self, state: State) -> Plan:
        """All rows."""
        return Plan.all(state)

    def opening(self) -> int:
        """Every pass computes all rows."""
        return sys.maxsize
