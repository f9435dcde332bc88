"""Device to host: what a pass found, by position and by sequence.

Results come down by lane and read position. The tables that they go to are made while the pass runs; behind it, when
the device waits, they are only written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dcache.arrays import Ints
from dcache.engine.layer import Books
from dcache.state import Seen, State

# What is seen of a position that was not read
UNSEEN: dict[str, tuple[float, type]] = {
    "tokens": (-1, np.int64),
    "commit": (False, np.bool_),
    "confidence": (-np.inf, np.float32),
    "remask": (False, np.bool_),
}


@dataclass(frozen=True)
class Landing:
    """Where the results of a pass go.

    Attributes:
        arrays: what the pass reads, by name.
        before: what the first pass of a reviewed step saw; None for a first pass.
        at: (lanes, w) int64 places of the read positions in a flattened table.
        tables: (batch, slots + 1), the last column for the dump slot, by result.
        shown: (batch, slots), the tables without that column.
    """

    arrays: dict[str, np.ndarray]
    before: Seen | None
    at: Ints
    tables: dict[str, np.ndarray]
    shown: dict[str, np.ndarray]

    def spread(self, name: str, out: Mapping[str, np.ndarray]) -> np.ndarray:
        """(batch, slots): a result (lanes, w), by position."""
        self.tables[name].put(self.at, out[name])
        return self.shown[name]


class Results:
    """Turns the results of passes over one batch into what `State.seen` holds.

    Args:
        state: the batch.
    """

    def __init__(self, state: State):
        self._state = state
        table = (state.batch, state.slots + 1)
        self._unseen: dict[str, np.ndarray] = {name: np.full(table, *blank) for name, blank in UNSEEN.items()}

    def landing(self, arrays: dict[str, np.ndarray], before: Seen | None) -> Landing:
        """Tables for the results of a pass; sequences that sit a second pass out keep what the first found."""
        lanes = arrays["lanes"]
        tables = {name: blank.copy() for name, blank in self._unseen.items()}
        shown = {name: table[:, :-1] for name, table in tables.items()}
        if before is not None:
            for name, table in tables.items():
                shown[name][...] = before.taken if name == "commit" else getattr(before, name)
                table[lanes] = self._unseen[name][lanes]
        return Landing(arrays, before, arrays["where"] + lanes[:, None] * (self._state.slots + 1), tables, shown)

    def seen(self, landing: Landing, out: Mapping[str, np.ndarray], books: Books) -> Seen:
        """What came down of a pass; `out` may be overwritten by the next one."""
        return Seen(
            tokens=landing.spread("tokens", out),
            taken=landing.spread("commit", out),
            confidence=landing.spread("confidence", out),
            remask=landing.spread("remask", out) if "remask" in out else landing.shown["remask"],
            reports=self._reports(landing, out, books),
        )

    def _reports(self, landing: Landing, out: Mapping[str, np.ndarray], books: Books) -> dict[str, np.ndarray]:
        """Reports by sequence; 0 for sequences that did not take part in the step."""
        arrays, before, batch = landing.arrays, landing.before, self._state.batch
        reports, lanes = {} if before is None else dict(before.reports), arrays["lanes"]
        for name in books.reports:
            fresh, axis = out[f"report {name}"].copy(), int(books.per_layer[name])
            if "start" in arrays and name not in reports:  # what the second pass did not run is of an older step
                layers = np.arange(self._state.spec.n_layers)[:, None]
                fresh[(~arrays["live"] | (arrays["start"] > layers)) if axis else ~arrays["live"]] = 0
            if len(lanes) == batch:
                reports[name] = fresh
                continue
            shape = (*fresh.shape[:axis], batch, *fresh.shape[axis + 1 :])
            table = reports[name].copy() if name in reports else np.zeros(shape, fresh.dtype)
            table[(slice(None),) * axis + (lanes,)] = fresh
            reports[name] = table
        return reports
