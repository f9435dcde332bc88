"""The record of a run: what each denoising step computed and committed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dcache.arrays import Bools, Ints
from dcache.policy import Plan
from dcache.regions import REGIONS, Region
from dcache.state import Moment, Seen
from dcache.unmasking.base import Update

if TYPE_CHECKING:
    from dcache.engine.accounts import Count


@dataclass(frozen=True)
class Step:
    """One denoising step of a batch.

    Attributes:
        step: (batch,) int64 number of the step in each sequence, from 0.
        active: (batch,) bool: sequences that took part.
        refresh: (batch,) bool: every row of the sequence was computed in the last layer, those of a region in one pass.
        kind: of the plan.
        rows: (batch, slots) bool rows of the plan that were computed.
        again: (batch, slots) bool rows of the second pass; None without one.
        start: (batch,) int64 first layer of the second pass; None without one.
        commit: (batch, slots) bool rows that took a token, those that were overwritten with end-of-text among them.
        tokens: (batch, slots) int64 what was written, elsewhere the candidate, -1 where nothing was predicted.
        confidence: (batch, slots) float32 of the candidates.
        drop: (batch, slots) bool rows taken off the list undecoded.
        remask: (batch, slots) bool.
        row_layers: (layers, batch) int64 row-layers that ran a query, both passes; those of `calls` in `begin` too.
        kv_row_layers: (layers, batch) int64 row-layers whose V was projected.
        region_sizes: (batch, regions) int64 rows of the canvas in each region of `dcache.regions.REGIONS`.
        region_row_layers: (layers, batch, regions) int64: `row_layers`, by region.
        region_kv_row_layers: (layers, batch, regions) int64: `kv_row_layers`, by region.
        refreshed: (layers, batch, regions) bool: one pass computed every row of the region in the layer; False where
            the region has no rows.
        calls: (batch,) int64 forward calls: 1 for sequences that took part, whether the step was reviewed or not, and
            in the first step those that the policy made in `begin`.
        reports: what the policy's layers reported.
        maps: recompute maps, when asked for.
        seconds: wall time of the step, its sync included; what `begin` takes is no part of it.
        recording: seconds that went into recording graphs for this step and those to come; no part of `seconds`.
    """

    step: Ints
    active: Bools
    refresh: Bools
    kind: object
    rows: Bools
    again: Bools | None
    start: Ints | None
    commit: Bools
    tokens: Ints
    confidence: np.ndarray
    drop: Bools
    remask: Bools
    row_layers: Ints
    kv_row_layers: Ints
    region_sizes: Ints
    region_row_layers: Ints
    region_kv_row_layers: Ints
    refreshed: Bools
    calls: Ints
    reports: dict[str, np.ndarray] = field(default_factory=dict)
    maps: dict[str, Bools] = field(default_factory=dict)
    seconds: float = 0.0
    recording: float = 0.0

    @staticmethod
    def of(
        moment: Moment,
        plan: Plan,
        again: Plan | None,
        seen: Seen,
        update: Update,
        count: Count,
        seconds: float,
        recording: float,
    ) -> Step:
        """Record a step, any time after it; `moment` is that before it was applied."""
        part = moment.valid & moment.active[:, None]
        complete = (count.refreshed[-1] | (moment.region_sizes == 0)).all(1)
        commit, tokens = update.written(moment.eos_id)
        return Step(
            step=moment.step,
            active=moment.active,
            refresh=moment.active & complete,
            kind=plan.kind,
            rows=plan.row_mask & part,
            again=None if again is None else again.row_mask & part,
            start=None if again is None or again.start is None else again.start,
            commit=commit,
            tokens=tokens,
            confidence=seen.confidence,
            drop=update.drop,
            remask=update.remask,
            row_layers=count.rows.sum(-1),
            kv_row_layers=count.kv_rows.sum(-1),
            region_sizes=moment.region_sizes,
            region_row_layers=count.rows,
            region_kv_row_layers=count.kv_rows,
            refreshed=count.refreshed,
            calls=moment.active + count.calls,
            reports=seen.reports,
            maps=count.maps,
            seconds=seconds,
            recording=recording,
        )


@dataclass(frozen=True)
class Trace:
    """The steps of a batch, seen from one of its sequences.

    Attributes:
        steps: of the whole batch.
        index: row of the sequence in the batch.
        length: positions of its canvas, prompt included.
        n_layers: layers of the model.
        twin: row of the second sequence of a guided text, whose work counts as this one's; None without guidance.
    """

    steps: list[Step]
    index: int
    length: int
    n_layers: int
    twin: int | None = None

    @property
    def _rows(self) -> list[int]:
        return [self.index] if self.twin is None else [self.index, self.twin]

    @property
    def mine(self) -> list[Step]:
        """The steps that this sequence took part in."""
        return [s for s in self.steps if s.active[self.index]]

    @property
    def commits(self) -> list[dict[int, int]]:
        """Position to token of what each of these steps committed."""
        at = self.index
        return [{int(p): int(s.tokens[at, p]) for p in np.flatnonzero(s.commit[at])} for s in self.mine]

    @property
    def nfe(self) -> int:
        """Forward calls: one per step, a reviewed step included, and those that the policy made in `begin`."""
        return sum(int(s.calls[self.index]) for s in self.mine)

    @property
    def refreshes(self) -> int:
        """Steps that computed every row in the last layer."""
        return sum(bool(s.refresh[self.index]) for s in self.steps)

    @property
    def row_layers(self) -> int:
        """Row-layers that ran a query; a layer that a second pass computes again counts twice, as it was paid."""
        return sum(int(s.row_layers[:, self._rows].sum()) for s in self.steps)

    @property
    def kv_row_layers(self) -> int:
        """Row-layers whose value was projected."""
        return sum(int(s.kv_row_layers[:, self._rows].sum()) for s in self.steps)

    @property
    def full_row_layers(self) -> int:
        """Row-layers of the same number of steps without a cache."""
        return self.length * self.n_layers * len(self.mine) * len(self._rows)

    @property
    def row_share(self) -> float:
        """Row-layers computed, as a share of those without a cache in the same number of steps; 0 to 1, or above."""
        return self.row_layers / self.full_row_layers if self.full_row_layers else 0.0

    @property
    def regions(self) -> dict[str, Region]:
        """Rows and refreshes of images, of the rest of the prompt and of the generation; row-layers add up to ours."""
        return {name: self._region(number) for number, name in enumerate(REGIONS)}

    def _region(self, r: int) -> Region:
        mine, sequences = self.mine, self._rows
        rows = int(mine[0].region_sizes[self.index, r]) if mine else 0
        refreshed = sum(int(s.refreshed[:, sequences, r].sum()) for s in mine)
        return Region(
            rows=rows,
            row_layers=sum(int(s.region_row_layers[:, sequences, r].sum()) for s in mine),
            kv_row_layers=sum(int(s.region_kv_row_layers[:, sequences, r].sum()) for s in mine),
            full_row_layers=rows * self.n_layers * self.nfe * len(sequences),
            refreshed_row_layers=rows * refreshed,
            refreshes=sum(bool(s.refreshed[-1, self.index, r]) for s in mine),
        )

    @property
    def seconds(self) -> float:
        """Wall time of the steps that this sequence took part in."""
        return sum(s.seconds for s in self.mine)
