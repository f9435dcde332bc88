"""What decoding cost, added up over the texts of a task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dcache.generate import Output


@dataclass
class Counters:
    """Sums over decoded texts; `summary` has the means. The names are those of `dcache.report`.

    Attributes:
        texts: decoded ones. What the harness took from its own cache is not among them.
        tokens: up to the first end-of-text, before the task's stop texts cut.
        nfe: forward calls.
        row_layers: row-layers that ran a query.
        full_row_layers: row-layers of as many steps without a cache.
        refreshes: steps that computed every row in the last layer.
        seconds: wall time; that of a batch is divided evenly among its texts.
        truncated: prompts that lost tokens on the left because the model has too few positions.
    """

    texts: int = 0
    tokens: int = 0
    nfe: int = 0
    row_layers: int = 0
    full_row_layers: int = 0
    refreshes: int = 0
    seconds: float = 0.0
    truncated: int = 0

    def add(self, output: Output, seconds: float) -> None:
        """One text more."""
        trace = output.trace
        self.texts += 1
        self.tokens += len(output.tokens)
        self.nfe += trace.nfe
        self.row_layers += trace.row_layers
        self.full_row_layers += trace.full_row_layers
        self.refreshes += trace.refreshes
        self.seconds += seconds

    def summary(self) -> dict[str, Any]:
        """Means over texts, and rates; None where nothing was decoded."""

        def ratio(a: float, b: float, digits: int) -> float | None:
            return round(a / b, digits) if b else None

        return {
            "texts": self.texts,
            "tokens": self.tokens,
            "nfe": ratio(self.nfe, self.texts, 3),
            "tokens_per_forward": ratio(self.tokens, self.nfe, 4),
            "row_share": ratio(self.row_layers, self.full_row_layers, 6),
            "refreshes": ratio(self.refreshes, self.texts, 3),
            "tok_s": ratio(self.tokens, self.seconds, 3),
            "seconds": round(self.seconds, 3),
            "truncated": self.truncated,
        }
