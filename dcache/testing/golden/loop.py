"""Cases in the format of the published loops: rows, commits and logits of every step, per sequence."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dcache.arrays import Bools, first
from dcache.decode import decode
from dcache.engine import Engine
from dcache.models.loading import Model
from dcache.policies.none import NoCache
from dcache.policy import CachePolicy
from dcache.state import State
from dcache.testing.golden.base import (
    CONFIDENCE_TOLERANCE,
    LOGITS_TOLERANCE,
    Case,
    Watched,
    close,
    equal,
    left_padding,
)
from dcache.testing.golden.unmaskers import recorded_unmasker, unknown_settings
from dcache.trace import Step

TINY_END = 126  # end-of-text of the tiny models of the recordings
OTHER_SCORES = ("topk_margin", "entropy", "random")  # recorded as the confidence, which dcache reports whatever ranks


class Together(State):
    """A canvas whose sequences wait at the end of a block until all have completed it, as d²Cache's loop does."""

    @property
    def active(self) -> Bools:
        """(batch,) bool: sequences in the earliest block that any of them is in."""
        left = super().active
        block = (first(self.masked, self.slots) - self.gen_start) // (self.block_length or self.slots)
        active: Bools = left & (block == block[left].min(initial=self.slots))
        return active


class LoopCase(Case):
    """A recorded decoding loop: a policy, and the unmasker that the settings describe."""

    @property
    def canvas(self) -> type[State]:
        """Stands for how the published loop takes its sequences through the blocks."""
        return State

    @property
    def unsupported(self) -> str | None:
        """Families, policies and unmaskers that are not installed, and programs that stop too early."""
        return super().unsupported or unknown_settings(self.data) or self._unfinished

    @property
    def _unfinished(self) -> str | None:
        if not self.settings.get("stop_until_eos") and any(self.data["mask_id"] in row for row in self.data["final"]):
            return "the released loop ran out of steps and left masks in its output, which is not reproduced"
        return None

    @property
    def pads(self) -> list[int]:
        """Left padding of each recorded sequence."""
        return left_padding(self.data)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a text; where the settings name none, that of the tiny models."""
        named = (self.settings.get(name) for name in ("eos_token_id", "eot_token_id"))
        return tuple(i for i in named if i is not None) or (TINY_END,)

    @property
    def gen_length(self) -> int:
        """Rows generated."""
        return int(self.settings.get("gen_length") or self.settings["max_new_tokens"])

    @property
    def block_length(self) -> int | None:
        """Rows of a block; None where the program knows none."""
        size: int | None = self.settings.get("block_length")
        return size

    @property
    def steps(self) -> Sequence[Mapping[str, Any]]:
        """The recorded steps that dcache makes: those in which a row of the block, or of the canvas, was masked."""
        steps: list[Mapping[str, Any]] = []
        done: list[set[int]] = [set() for _ in range(self.data["batch"])]
        for step in self.data["steps"]:
            if any(self.block(step) - known for known in done):
                steps.append(step)
            for known, commits in zip(done, step["commit"], strict=True):
                for p, token in commits or ():
                    (known.discard if token == self.data["mask_id"] else known.add)(p)
        return steps

    def block(self, step: Mapping[str, Any]) -> set[int]:
        """Recorded positions of the block of a step; those of the generation where it knows no blocks."""
        begin, end = len(self.data["prompt"][0]), len(self.data["final"][0])
        if (size := self.settings.get("block_length")) is None or "block" not in step:
            return set(range(begin, end))
        return set(range(begin + step["block"] * size, begin + (step["block"] + 1) * size))

    @abstractmethod
    def policy(self) -> CachePolicy:
        """The policy that was recorded."""

    def check(self) -> None:
        """Rows, commits and tokens of every step; confidences and logits where recorded; the final canvases."""
        model = self.model((self.file.parent / self.data["weights"]).resolve(), self.data["mask_id"], self.end_ids)
        state, watched = self._state(model, self.pads), Watched(recorded_unmasker(self.data, model.spec.vocab_size))
        trace = decode(Engine(model.transformer, self.policy(), watched, debug=True), state)
        self._compare_commits(trace)
        self._compare_final("final", state, self.pads)
        self._compare_passes(trace, watched)
        if self.data.get("no_cache_final"):
            self._check_uncached()

    def _state(self, model: Model, pads: Sequence[int]) -> State:
        """The canvas before the first step, without so much padding."""
        prompts = [row[pad:] for row, pad in zip(self.data["prompt"], pads, strict=True)]
        guided = bool(self.settings.get("cfg_scale"))
        return self.canvas(model.spec, prompts, self.gen_length, self.block_length, guided=guided)

    def _check_uncached(self) -> None:
        """The same decoder without a cache."""
        folder, pads = (self.file.parent / self.data["weights"]).resolve(), left_padding(self.data)
        model = Case.model(self, folder, self.data["mask_id"], self.end_ids)
        state = self._state(model, pads)
        unmasker = recorded_unmasker(self.data, model.spec.vocab_size)
        decode(Engine(model.transformer, NoCache(), unmasker, debug=True), state)
        self._compare_final("no_cache_final", state, pads)

    def _compare_final(self, name: str, state: State, pads: Sequence[int]) -> None:
        for b, pad in enumerate(pads):
            final = state.tokens[b, : state.lengths[b]].tolist()
            equal(f"sequence {b}: {name}", final, self.data[name][b][pad:])

    def _compare_commits(self, trace: list[Step]) -> None:
        for b, pad in enumerate(self.pads):
            recorded = [sorted((p - pad, t) for p, t in step["commit"][b] or ()) for step in self.steps]
            found = [self._written(step, b) for step in trace]
            for i, (now, then) in enumerate(zip(found, recorded, strict=False)):
                equal(f"step {i}, sequence {b}: commits", now, then)
            equal(f"sequence {b}: number of steps", len(found), len(recorded))

    def _written(self, step: Step, b: int) -> list[tuple[int, int]]:
        """Positions and tokens that a step wrote: commits, and masks where it put rows back."""
        commits = [(int(p), int(step.tokens[b, p])) for p in np.flatnonzero(step.commit[b])]
        return sorted(commits + [(int(p), self.data["mask_id"]) for p in np.flatnonzero(step.remask[b])])

    def _compare_passes(self, trace: list[Step], watched: Watched) -> None:
        known = np.zeros_like(trace[0].commit)  # before each step, of the generation
        for i, (step, recorded) in enumerate(zip(trace, self.steps, strict=True)):
            number = recorded["step"]
            for b, pad in enumerate(self.pads):
                if not step.active[b]:
                    continue  # the program goes on with a sequence that is through while another is not
                total = len(self.data["final"][b])
                rows = recorded["rows"][b] if "rows" in recorded else range(total)
                computed = [p - pad for p in rows if p >= pad]
                equal(f"step {number}, sequence {b}: rows", np.flatnonzero(step.rows[b]).tolist(), computed)
                if (logits := self.tensors.get(f"logits.{number}")) is not None:
                    for n, p in enumerate(p - pad for p in rows):
                        if p >= 0 and (now := watched.of_row(i, b, p)) is not None:
                            close(f"step {number}, row {p}", now, logits[b, n], LOGITS_TOLERANCE)
                self._compare_confidence(number, b, step, known[b])
            known = (known | step.commit) & ~step.remask

    def _compare_confidence(self, number: int, b: int, step: Step, known: Bools) -> None:
        """At the masked rows for which one was recorded, of the whole canvas or of the generation."""
        s = self.settings
        if s.get("remasking") == "random" or s.get("alg") in OTHER_SCORES or s.get("debias"):
            return  # the record holds the score that ranks
        recorded, pad = self.tensors["confidence"][number, b], self.pads[b]
        begin = max(len(self.data["final"][b]) - len(recorded), pad)
        recorded = recorded[len(recorded) - len(self.data["final"][b]) + begin :]
        here = slice(begin - pad, begin - pad + len(recorded))
        masked, now = torch.from_numpy(~known[here]), torch.from_numpy(step.confidence[b, here])
        close(f"step {number}, sequence {b}: confidence", now[masked], recorded[masked], CONFIDENCE_TOLERANCE)


class NoCacheCase(LoopCase):
    """A case of the ``none`` folder."""

    @property
    def canvas(self) -> type[State]:
        """The strategies were recorded from d²Cache's loop."""
        return Together if "strategy" in self.data else State

    def policy(self) -> CachePolicy:
        """No cache."""
        return NoCache()
