"""Cases of the ``fast_dllm`` folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dcache.policies.fast_dllm import FastDLLM
from dcache.policies.none import NoCache
from dcache.policy import CachePolicy
from dcache.state import State
from dcache.testing.golden.base import Watched, close, equal
from dcache.testing.golden.loop import LoopCase, Together
from dcache.trace import Step

TOLERANCE = 1e-3  # absolute, float32; stated in the folder's README


class FastDLLMCase(LoopCase):
    """A run of Fast-dLLM's loops: without a cache, with prefix or dual cache, as released or with shifted rows.

    A forward that the released loop makes after the first one of a block completed it commits nothing and is not made
    here: such steps are left out of the comparison.
    """

    @property
    def canvas(self) -> type[State]:
        """The shifted rows were recorded from d²Cache's loop, whose sequences wait for each other."""
        return Together if self.settings.get("variant") == "shifted" else State

    @property
    def block_length(self) -> int | None:
        """Dream's own loop, without a cache, knows no blocks, whatever is given."""
        plain = self.settings.get("cache") == "none" and "alg" in self.settings and "variant" not in self.settings
        return None if plain else super().block_length

    def policy(self) -> CachePolicy:
        """The recorded cache."""
        if self.settings["cache"] == "none":
            return NoCache()
        shifted = self.settings.get("variant") == "shifted"
        return FastDLLM(mode=self.settings["cache"], rows="predicting" if shifted else "block")

    def block(self, step: Mapping[str, Any]) -> set[int]:
        """Positions of the block of a step."""
        return set(span(step["block_range"]))

    def _compare_passes(self, trace: list[Step], watched: Watched) -> None:
        for i, (step, recorded) in enumerate(zip(trace, self.steps, strict=True)):
            number = recorded["step"]
            for b, rows in enumerate(recorded["rows"]):
                if not step.active[b]:
                    continue
                equal(f"step {number}, sequence {b}: rows", np.flatnonzero(step.rows[b]).tolist(), span(rows))
                if (logits := self.tensors.get(f"logits.{number}")) is not None:
                    for n, p in enumerate(span(self.data["logits_rows"][str(number)])):
                        if (now := watched.of_row(i, b, p)) is not None:
                            close(f"step {number}, row {p}", now, logits[b, n], TOLERANCE)


def span(positions: str | list[int]) -> list[int]:
    """Positions written as a list, or as ``"a:b"``: a to b - 1."""
    if isinstance(positions, str):
        start, end = positions.split(":")
        return list(range(int(start), int(end)))
    return positions
