"""What the passes of a step computed, by layer, sequence and region.

A layer that works on exactly the rows of the plan is counted here, on the host, which knows them; any other call was
counted on the device, and its counters come down with the results (``docs/explanation/engine.md``, "Accounting").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dcache.arrays import Bools, Bytes, Ints
from dcache.regions import NOWHERE, REGIONS
from dcache.state import State


@dataclass
class Count:
    """What the passes of one step computed.

    Attributes:
        rows: (layers, batch, regions) int64 row-layers that ran a query, by region: see `dcache.regions`.
        kv_rows: (layers, batch, regions) int64 row-layers whose V was projected.
        refreshed: (layers, batch, regions) bool: one pass computed every row of the region in the layer; False where
            the region has no rows.
        calls: (batch,) int64 forward calls beside the passes, made in `begin` for the first step.
        passes: 1, or 2 in a reviewed step.
        maps: "rows" and "kv_rows" to (layers, batch, slots) bool, when asked for.
    """

    rows: Ints
    kv_rows: Ints
    refreshed: Bools
    calls: Ints
    passes: int = 0
    maps: dict[str, Bools] = field(default_factory=dict)


class Accounts:
    """Counts for one batch, step by step.

    The network holds it, to count calls in `begin`. So it does not know the engine: one that it did would live on until
    garbage is collected, and its stores with it.

    Args:
        state: the batch.
        maps: whether to keep recompute maps.

    Attributes:
        count: of the step that runs; its passes are added when the host has time.
        regions: (batch, slots + 1) uint8: the region of every slot. The dump slot lies nowhere.
    """

    def __init__(self, state: State, maps: bool):
        self.state, self.maps = state, maps
        self.regions: Bytes = np.pad(state.region, ((0, 0), (0, 1)), constant_values=NOWHERE)
        self.count = self._ahead = self._nothing()

    def _nothing(self) -> Count:
        shape = (self.state.spec.n_layers, self.state.batch, len(REGIONS))
        rows, kv_rows = (np.zeros(shape, dtype=np.int64) for _ in range(2))
        return Count(rows, kv_rows, np.zeros(shape, dtype=np.bool_), np.zeros(self.state.batch, dtype=np.int64))

    def ahead(self, b: int, rows: Ints) -> None:
        """Count a call in `begin`, of so many `rows` (regions,) for sequence `b`; its last layer runs no query."""
        self._ahead.rows[:-1, b] += rows
        self._ahead.kv_rows[:, b] += rows
        self._ahead.calls[b] += 1

    def next_step(self) -> None:
        """A step begins, with what was counted ahead: for all but the first nothing."""
        self.count, self._ahead = self._ahead, self._nothing()

    def add(
        self,
        count: Count,
        planned: Mapping[str, Sequence[int]],
        found: Mapping[str, np.ndarray],
        arrays: Mapping[str, np.ndarray],
    ) -> None:
        """Add a pass to the count of its step.

        Args:
            count: of that step, which may have ended.
            planned: "rows" and "kv_rows" to calls with exactly the rows of the plan, by layer.
            found: "counted" and "map ..." as they came down.
            arrays: what the pass read.
        """
        lanes, layers = arrays["lanes"], np.arange(self.state.spec.n_layers)[:, None]
        sizes, n_rows = self.state.region_sizes[lanes], self._by_region(arrays["rows"], lanes)  # (lanes, regions)
        n_shadows = self._by_region(arrays["shadow"], lanes) if "shadow" in arrays else 0
        runs = layers >= arrays["start"] if "start" in arrays else np.ones_like(layers, dtype=bool)
        calls = {name: (np.array(n)[:, None] * runs)[..., None] for name, n in planned.items()}
        count.rows[:, lanes] += calls["rows"] * n_rows + n_shadows
        count.kv_rows[:, lanes] += calls["kv_rows"] * n_rows + n_shadows
        whole = (calls["rows"] > 0) & (n_rows == sizes)
        if "counted" in found:
            rows, kv_rows, repeated = found["counted"]  # in the order of `COUNTERS`
            count.rows[:, lanes] += rows
            count.kv_rows[:, lanes] += kv_rows
            whole |= rows - repeated == sizes
        count.refreshed[:, lanes] |= whole & (sizes > 0)
        self._map(count, found, lanes)
        count.passes += 1

    def _map(self, count: Count, found: Mapping[str, np.ndarray], lanes: Ints) -> None:
        for name in ("rows", "kv_rows") if self.maps else ():
            shape = (self.state.spec.n_layers, self.state.batch, self.state.slots)
            seen = count.maps.setdefault(name, np.zeros(shape, dtype=bool))
            seen[:, lanes] |= found[f"map {name}"][:, :, :-1].astype(bool)

    def _by_region(self, positions: Ints, lanes: Ints) -> Ints:
        """(lanes, regions) int64: how many of the positions (lanes, n) lie in each region; padding lies in none."""
        n, kinds = len(lanes), NOWHERE + 1
        codes = self.regions[lanes[:, None], positions] + kinds * np.arange(n)[:, None]
        return np.bincount(codes.ravel(), minlength=n * kinds).reshape(n, kinds)[:, :NOWHERE]
