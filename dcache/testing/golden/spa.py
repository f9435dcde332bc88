"""Cases of the ``spa`` folder: rows, keys written, similarities and selections of every layer, at every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcache.arrays import Bools, first
from dcache.decode import decode
from dcache.engine import Engine
from dcache.engine.layer import Layer
from dcache.policies.spa import SPACache
from dcache.proxies import proxy
from dcache.state import State
from dcache.testing.golden.base import LOGITS_TOLERANCE, Watched, close, equal
from dcache.testing.golden.loop import LoopCase
from dcache.testing.golden.unmaskers import recorded_unmasker
from dcache.trace import Step

SIMILARITY_TOLERANCE = 1e-5  # stated in the README of the folder
RATIO_TOLERANCE = 1e-9
HEIGHT = 1e-9  # least height of the released curve
VALUES_TOLERANCE = 1e-4  # of singular values, about 3, written with 8 digits
GAUSSIAN = {
    "max_ratio": "max_update_ratio",
    "avg_ratio": "avg_update_ratio",
    "min_ratio": "min_update_ratio",
    "peak_at": "peak_pos",
    "start": "freq_start",
    "peak": "freq_peak",
    "end": "freq_end",
}  # knob to recorded setting


class InStep(State):
    """A canvas whose sequences all stand in the earliest block that any of them is in; those ahead are computed too."""

    def _fixed_block(self) -> Bools:
        left = self.masked.any(1)
        if self.block_length is None or not left.any():
            return super()._fixed_block()
        earliest = ((first(self.masked, self.slots) - self.gen_start) // self.block_length)[left].min()
        place = np.arange(self.slots) - self.gen_start[:, None] - earliest * self.block_length
        block: Bools = (place >= 0) & (place < self.block_length)
        return self.block if (block == self.block).all() else block


class SPACase(LoopCase):
    """A run of SPA-Cache."""

    @property
    def canvas(self) -> type[State]:
        """Sequences of a batch stand in one block, and none waits."""
        return InStep

    @property
    def unsupported(self) -> str | None:
        """After an early stop, Dream's loop spreads the commits of a batch by the mean of what is left."""
        if "alg" in self.settings and not self._in_step:
            return "the released schedule commits by the mean number of masks in the batch, and they differ"
        return super().unsupported

    @property
    def _in_step(self) -> bool:
        """Whether the sequences that are not finished have equally many masks before every step."""
        left = [self.gen_length] * self.data["batch"]
        for step in self.data["steps"]:
            if len(set(left) - {0}) > 1:
                return False
            for b, commits in enumerate(step["commit"]):
                left[b] -= sum(-1 if token == self.data["mask_id"] else 1 for _, token in commits or ())
        return True

    @property
    def end_ids(self) -> tuple[int, ...]:
        """What a text is padded with comes first."""
        s = self.settings
        return tuple(dict.fromkeys((s["pad_id"], *s["eot_ids"])))

    def policy(self) -> SPACache:
        """The recorded settings."""
        s = self.settings
        knobs: dict[str, Any] = {
            "rank": s["proxy_rank"],
            "interval": s["refresh_steps"],
            "gen_interval": s["refresh_gen_steps"],
            "warm_up": s["n_warmup_steps"],
        }
        if "update_ratio" in s:
            table = s["update_ratio"]
            return SPACache(**knobs, ratios=tuple(table) if isinstance(table, list) else table)
        knobs["budget"] = s.get("update_ratio_dist", "gaussian")
        given = {knob: s[name] for knob, name in GAUSSIAN.items() if s.get(name) is not None}
        heights = {knob: max(given[knob], HEIGHT) for knob in ("start", "peak", "end") if knob in given}
        return SPACache(**knobs, **given | heights)

    @cached_property
    def similarities(self) -> list[dict[int, tuple[list[int], Tensor, Tensor]]]:
        """By step and layer: sequences, rows (batch, n) and cosines (batch, n)."""
        return []

    def check(self) -> None:
        """Budgets, proxies, and all of every step; the final canvases."""
        model = self.model((self.file.parent / self.data["weights"]).resolve(), self.data["mask_id"], self.end_ids)
        policy, spec = self.policy(), model.spec
        close("ratios", torch.tensor(policy.config.of(spec.n_layers, spec.shift)), self._ratios, RATIO_TOLERANCE)
        state, watched = self._state(model, self.pads), Watched(recorded_unmasker(self.data, spec.vocab_size))
        self._observe(policy)
        engine = Engine(model.transformer, policy, watched, maps=True, debug=True)
        for layer, values in enumerate(self.data["proxy_singular_values"]):
            block = list(model.transformer.blocks())[layer]
            found = proxy(block.qkv[block.slices("v")], len(values)).norm(dim=1)
            close(f"layer {layer}: singular values", found, torch.tensor(values), VALUES_TOLERANCE)
        trace = decode(engine, state)
        self._compare_commits(trace)
        self._compare_final("final", state, self.pads)
        self._compare_passes(trace, watched)
        if self.data.get("no_cache_final"):
            self._check_uncached()

    @property
    def _ratios(self) -> Tensor:
        return torch.tensor(self.data["update_ratio_per_layer"], dtype=torch.float64)

    def _observe(self, policy: SPACache) -> None:
        """Keep the similarities that the layers of a policy choose by."""
        similarity, plan, kept = policy.similarity, policy.plan, self.similarities
        kept.clear()

        def planning(state: State) -> Any:
            kept.append({})
            return plan(state)

        def measured(at: Layer, rows: Tensor, z: Tensor) -> Tensor:
            found = similarity(at, rows, z)
            kept[-1][at.index] = (at.lanes.tolist(), rows, found)
            return found

        vars(policy).update(plan=planning, similarity=measured)

    def _compare_passes(self, trace: list[Step], watched: Watched) -> None:
        for i, (step, recorded) in enumerate(zip(trace, self.steps, strict=True)):
            number = recorded["step"]
            for b in np.flatnonzero(step.active):
                for layer in recorded["layers"]:
                    self._compare_layer(i, step, layer, int(b))
                if (logits := self.tensors.get(f"logits.{number}")) is not None:
                    rows = positions(self.data["logits_rows"][str(number)])
                    for row, expected in zip((p - self.pads[b] for p in rows), logits[b], strict=True):
                        if row >= 0 and (found := watched.of_row(i, int(b), row)) is not None:
                            close(f"step {number}, sequence {b}, row {row}", found, expected, LOGITS_TOLERANCE)

    def _compare_layer(self, i: int, step: Step, recorded: Mapping[str, Any], b: int) -> None:
        layer, pad = recorded["layer"], self.pads[b]

        def told(key: str) -> list[int]:
            return sorted(p - pad for p in positions(recorded[key][b]) if p >= pad)

        where = f"step {i}, sequence {b}, layer {layer}"
        for name, key in (("rows", "q_rows"), ("kv_rows", "kv_written")):
            found = np.flatnonzero(step.maps[name][layer, b]).tolist()
            equal(f"{where}: {key}", found, told(key))
        if not any(recorded.get("selected", ())):
            return  # all rows are recomputed, or none: there is nothing to compare them by
        equal(f"{where}: selected", told("selected"), told("q_rows"))
        lanes, rows, measured = self.similarities[i][layer]
        lane = lanes.index(b)
        begin, expected = len(self.data["prompt"][b]) - pad, torch.tensor(recorded["similarity"][b])
        n = len(expected)  # behind them rows that pad the sequence to the longest
        equal(f"{where}: rows compared", rows[lane, :n].tolist(), list(range(begin, begin + n)))
        close(f"{where}: similarity", measured[lane, :n], expected, SIMILARITY_TOLERANCE)


def positions(told: str | Sequence[int]) -> list[int]:
    """A list of positions, or "a:b" for a to b - 1."""
    if isinstance(told, str):
        begin, end = told.split(":")
        return list(range(int(begin), int(end)))
    return list(told)
