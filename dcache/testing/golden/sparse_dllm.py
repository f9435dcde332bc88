"""Cases of the ``sparse_dllm`` folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcache.engine.layer import Layer
from dcache.policies.sparse_dllm import CANDIDATES, NAME, SparseDLLM
from dcache.policy import CachePolicy, Plan, State
from dcache.testing.golden.base import Watched, close, equal
from dcache.testing.golden.fast_dllm import FastDLLMCase, span
from dcache.trace import Step

TOLERANCE = 1e-3  # absolute, float32; of scores, stated in the folder's README


class Observed(SparseDLLM):
    """Also reports scores, and what it would keep; keeps what was recorded where that is given.

    Attributes:
        recorded: first position of a block to the kept positions of each layer.
    """

    recorded: Mapping[int, list[list[int]]] = {}

    def plan(self, state: State) -> Plan:
        """With the kept sets of the block at hand, of a batch of one."""
        layers = self.recorded.get(int(state.block[0].argmax()))
        self._kept = None if layers is None else torch.zeros(len(layers), state.slots, dtype=torch.bool)
        for index, positions in enumerate(layers or ()):
            assert self._kept is not None
            self._kept[index, positions] = True
        return super().plan(state)

    def scores(self, at: Layer) -> Tensor:
        """Report them by position."""
        scores = super().scores(at)
        board = torch.zeros(len(scores), at.dump + 1).scatter_(1, at.sets[CANDIDATES], scores)
        at.report(f"{NAME} scores", board[:, :-1])
        return scores

    def choose(self, at: Layer, scores: Tensor) -> Tensor:
        """Report the choice, and take it where none is recorded."""
        chosen = super().choose(at, scores)
        at.report(f"{NAME} chosen", chosen)
        return chosen if self._kept is None else self._kept[at.index].expand_as(chosen)


class SparseDLLMCase(FastDLLMCase):
    """A run of Sparse-dLLM's loops, as released.

    Where equal scores straddle the cutoff, which of them were kept follows from no rule: the recorded choice is then
    given to the policy, whose own must agree in number and in what lies above the cutoff.
    """

    def policy(self) -> CachePolicy:
        """Over a dual cache with two full passes per block."""
        s = self.settings
        policy = Observed(inner="fast-dllm(rows=block,full_passes=2)", keep=s["keep_ratio"], kernel=s["kernel_size"])
        if any(True in layer["tie_at_cutoff"] for step in self._selecting() for layer in step["layers"]):
            policy.recorded = {
                min(self.block(step)): [layer["kept"][0] for layer in step["layers"]] for step in self._selecting()
            }
        return policy

    def _selecting(self) -> list[Mapping[str, Any]]:
        return [step for step in self.steps if step["cache_state"] == 1]

    def _compare_passes(self, trace: list[Step], watched: Watched) -> None:
        super()._compare_passes(trace, watched)
        for step, recorded in zip(trace, self.steps, strict=True):
            place = f"step {recorded['step']}"
            if recorded["cache_state"] != 1:
                equal(f"{place}: selects", "kept" in step.reports, False)
                continue
            for layer, told in enumerate(recorded["layers"]):
                for b in range(self.data["batch"]):
                    self._compare_choice(f"{place}, layer {layer}, sequence {b}", step, recorded, told, layer, b)

    def _compare_choice(
        self, place: str, step: Step, recorded: Mapping[str, Any], told: Mapping[str, Any], layer: int, b: int
    ) -> None:
        """Scores, their number, and the kept set or what of it is determined."""
        kept = np.flatnonzero(step.reports["kept"][layer, b]).tolist()
        equal(f"{place}: kept", kept, sorted(told["kept"][b]))
        chosen = np.flatnonzero(step.reports[f"{NAME} chosen"][layer, b]).tolist()
        equal(f"{place}: number kept", len(chosen), told["keep"])
        block = set(span(recorded["block_range"]))
        candidates = [p for p in range(len(self.data["final"][b])) if p not in block]
        expected = torch.tensor(told["scores"][b])
        found = torch.from_numpy(step.reports[f"{NAME} scores"][layer, b])[candidates]
        close(f"{place}: scores", found, expected, TOLERANCE)
        if not told["tie_at_cutoff"][b]:
            equal(f"{place}: chosen", chosen, kept)
            return
        cutoff = min(told["scores"][b][candidates.index(p)] for p in told["kept"][b])
        above = {p for p, score in zip(candidates, told["scores"][b], strict=True) if score > cutoff + TOLERANCE}
        equal(f"{place}: above the cutoff, but not chosen", sorted(above - set(chosen)), [])
