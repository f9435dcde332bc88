"""Cases of the ``d2`` folder.

The published code lets left padding be selected like any other row and couples the sequences of a batch, so these cases
keep their padding: it is part of the prompt, its keys are hidden, and where the family does not count it, it is rotated
to position 0 as recorded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcache.engine.layer import Layer
from dcache.models.loading import Model
from dcache.models.transformer import ModelSpec, Transformer
from dcache.policies.d2 import D2Cache, Selection
from dcache.policy import CachePolicy, Filter, Plan
from dcache.state import State
from dcache.testing.golden.base import CONFIDENCE_TOLERANCE, LOGITS_TOLERANCE, Watched, close, equal, left_padding
from dcache.testing.golden.loop import LoopCase, Together
from dcache.trace import Step

IMPORTANCE_TOLERANCE = 1e-4  # column sums of the rollout, which sum to the length of the sequence
DENSITY_TOLERANCE = 1e-5  # the reference convolves by FFT in float32


class LeftPadded(Transformer):
    """A transformer that rotates slots to the positions `places`: 0 for padding, then counting from 0."""

    def __init__(self, spec: ModelSpec, pads: list[int]):
        super().__init__(spec)
        counted = torch.arange(spec.max_positions + 1)
        self.places = (counted - torch.tensor(pads)[:, None]).clamp(0, spec.max_positions - 1)
        self.lanes = torch.arange(len(pads))

    def positions(self, slots: Tensor) -> Tensor:
        """The places, for the sequences that the pass runs."""
        return self.places[self.lanes].gather(1, slots)


class Recorded(Filter):
    """Keeps every selection of a d2 policy; hides the keys of left padding."""

    def __init__(self, inner: D2Cache, pads: list[int]):
        super().__init__(inner)
        self.d2, self.pads = inner, np.array(pads)[:, None]
        self.padded: LeftPadded | None = None
        self.shift = 0
        self.selections: list[tuple[Selection, np.ndarray]] = []  # with the density, from the second step on

    def restrict(self, state: State, plan: Plan) -> Plan:
        """All that the policy plans, without padding among the keys."""
        self.shift = state.spec.shift
        if self.d2.selection is not None:
            self.selections.append((self.d2.selection, self.d2.density.now().copy()))
        return replace(plan, visible=state.valid & (np.arange(state.slots) >= self.pads)) if self.pads.any() else plan

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The inner layer, on the right lanes."""
        if self.padded is not None:
            self.padded.lanes = at.lanes
        return self.inner.layer(at, rows, h)


class D2Case(LoopCase):
    """A run of d²Cache."""

    @property
    def canvas(self) -> type[State]:
        """One that waits."""
        return Together

    @property
    def unsupported(self) -> str | None:
        """What the policy does not do as released: see ``docs/policies/d2.md``."""
        s = self.settings
        if (alg := s.get("alg", "maskgit_plus")) != "maskgit_plus":
            return f"alg {alg!r} takes the place of the confidences that the rows are chosen by; here it does not"
        if s.get("stop_until_eos") and self._ends:
            return "rows behind the end of the text stay candidates in the released code; here they do not"
        if self._guesses:
            return "a row that was not computed is committed, by its uniform guess, which is not reproduced"
        return super().unsupported

    @property
    def _ends(self) -> bool:
        """Whether an end of the text was committed."""
        committed = (c for step in self.data["steps"] for commits in step["commit"] for c in commits or ())
        return any(token in self.end_ids for _, token in committed)

    @property
    def _guesses(self) -> bool:
        """Whether a position was committed although the row that predicts it was not computed."""
        shift = int(str(self.data["model"]).startswith("dream"))
        return any(
            p - shift not in rows
            for step in self.data["steps"]
            for rows, commits in zip(step["rows"], step["commit"], strict=True)
            for p, _ in commits or ()
        )

    @property
    def fragile(self) -> bool:
        """Which rows a cumulative sum near 1 leaves out is not portable; the tokens are."""
        return bool(self.data["fragile"]) or self.settings["rollout_p"] == 1

    @property
    def pads(self) -> list[int]:
        """Nothing is stripped."""
        return [0] * self.data["batch"]

    @property
    def padding(self) -> list[int]:
        """Left padding of each recorded sequence."""
        return left_padding(self.data)

    def model(self, folder: Path, mask_id: int, end_ids: tuple[int, ...]) -> Model:
        """The tiny model; LLaDA's reference does not count padding, Dream's does."""
        model = super().model(folder, mask_id, end_ids)
        if any(self.padding) and model.spec.family == "llada":
            padded = self.recorded.padded = LeftPadded(model.spec, self.padding)
            padded.load_state_dict(model.transformer.state_dict(), assign=True)
            model = replace(model, transformer=padded)
        return model

    @cached_property
    def recorded(self) -> Recorded:
        """The policy, under observation."""
        s = self.settings
        knobs = {name: s[name] for name in ("rollout_p", "current_k", "inflate_w")}
        policy = D2Cache(sigma=s["cache_sigma"], couple_batch=True, **knobs)
        return Recorded(policy, self.padding)

    def policy(self) -> CachePolicy:
        """The recorded settings."""
        return self.recorded

    def _compare_commits(self, trace: list[Step]) -> None:
        if not self.fragile:
            super()._compare_commits(trace)

    def _compare_passes(self, trace: list[Step], watched: Watched) -> None:
        if self.fragile:
            return
        for i, (step, recorded) in enumerate(zip(trace, self.data["steps"], strict=True)):
            for n, b in enumerate(recorded["active"]):
                where = f"step {i}, sequence {b}"
                equal(f"{where}: rows", np.flatnonzero(step.rows[b]).tolist(), recorded["rows"][b])
                importance = torch.from_numpy(step.reports["importance"][b])
                close(f"{where}: importance", importance, self.tensors["rollout_colsum"][i, b], IMPORTANCE_TOLERANCE)
                begin = len(self.data["prompt"][b])
                confidence = self.tensors["confidence"][i, b]
                now = torch.from_numpy(step.confidence[b, begin:])
                scored = confidence.isfinite() & now.isfinite()  # the reference guesses where no row was computed
                close(f"{where}: confidence", now[scored], confidence[scored], CONFIDENCE_TOLERANCE)
                if (logits := self.tensors.get(f"logits.{i}")) is not None:
                    for row, expected in zip(recorded["rows"][b], logits[n], strict=True):
                        if (read := watched.logits[i][b].get(row + self.recorded.shift)) is not None:
                            close(f"{where}, row {row}", read, expected, LOGITS_TOLERANCE)
        for i, (selection, density) in enumerate(self.recorded.selections):
            self._compare_selection(i, selection, density)

    def _compare_selection(self, i: int, selection: Selection, density: np.ndarray) -> None:
        """The selection after step `i`, for the step behind it."""
        recorded: Mapping[str, Any] = self.data["steps"][i]
        for b in recorded["active"]:
            if not any(b in later["active"] for later in self.data["steps"][i + 1 :]):
                continue  # finished: it is never used
            where, begin = f"after step {i}, sequence {b}", len(self.data["prompt"][b])
            found = torch.from_numpy(density[b, begin:])
            close(f"{where}: density", found, self.tensors["density"][i, b], DENSITY_TOLERANCE)
            score = torch.from_numpy(selection.score[b, begin:])
            close(f"{where}: score", score, self.tensors["stage1_score"][i, b], CONFIDENCE_TOLERANCE)
            for name, mask in (
                ("stage1", selection.early),
                ("rollout_selected", selection.nucleus),
                ("next_before_topup", selection.rows),
            ):
                equal(f"{where}: {name}", np.flatnonzero(mask[b]).tolist(), recorded[name][b])
