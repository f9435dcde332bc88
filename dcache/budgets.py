"""How many rows each layer may recompute: a two-sided Gaussian over depth (SPA-Cache, arXiv 2602.02544).

Layer l of L stands at depth ``u = l / L``. The share of rows rises from `start` at u = 0 to `peak` at ``u = peak_at``
and falls to `end` at u = 1, each side a Gaussian of its own width. Since a profile knows no number of layers, it can be
stretched over a model of any depth.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from dcache.policy import PolicyConfig

DEFAULT_RATIO = 0.25
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Profile:
    """A curve over depth. Heights have no unit: it is scaled to the ratio that is asked for.

    Attributes:
        peak_at: depth of the peak, 0 to 1 (mu).
        start: height at layer 0, below `peak` (p0).
        peak: height of the peak (p).
        end: height behind the last layer, below `peak` (p1).
    """

    peak_at: float
    start: float
    peak: float
    end: float

    def heights(self, n_layers: int) -> NDArray[np.float64]:
        """(layers,) the curve at every layer."""
        depth = np.arange(n_layers) / n_layers
        left = depth < self.peak_at
        reach = np.where(left, self.peak_at, 1 - self.peak_at)
        fall = np.log(np.where(left, self.start, self.end) / self.peak)  # of the exponent, over the whole reach
        heights: NDArray[np.float64] = self.peak * np.exp(fall * ((depth - self.peak_at) / reach) ** 2)
        return heights


PROFILES = {
    "llada-8b": Profile(peak_at=0.75, start=0.03, peak=0.25, end=0.13),
    "llada-1.5": Profile(peak_at=0.80, start=0.03, peak=0.25, end=0.13),
    "dream-7b": Profile(peak_at=0.50, start=0.05, peak=0.30, end=0.25),
}
"""Where features drift in LLaDA-8B-Instruct, LLaDA-1.5 (32 layers) and Dream-v0-Instruct-7B (28), as published."""


class Budget(PolicyConfig):
    """Knobs of a budget per layer."""

    budget: Literal["gaussian", "uniform"] = Field(
        "gaussian", description="how the update ratio varies over layers: by the profile, or not at all"
    )
    profile: Literal["auto", "llada-8b", "llada-1.5", "dream-7b"] = Field(
        "auto",
        description="published curve over depth, stretched over the layers of the model; auto: dream-7b where a row "
        "predicts the next position, else llada-8b",
    )
    max_ratio: Share | None = Field(
        None,
        description=f"update ratio at the peak of the curve, 0 to 1; none: {DEFAULT_RATIO}, unless avg_ratio is given",
    )
    avg_ratio: Share | None = Field(
        None, description="mean update ratio over layers, min_ratio not counted; unused where max_ratio is given"
    )
    min_ratio: Share = Field(1 / 16, description="least update ratio of the layers before the peak, 0 to 1")
    peak_at: Share | None = Field(None, description="depth of the peak, 0 to 1 (mu); none: the profile's")
    start: float | None = Field(None, gt=0, description="height of the curve at layer 0 (p0); none: the profile's")
    peak: float | None = Field(None, gt=0, description="height of the curve at its peak (p); none: the profile's")
    end: float | None = Field(
        None, gt=0, description="height of the curve behind the last layer (p1); none: the profile's"
    )
    ratios: tuple[Share, ...] | Share | None = Field(
        None, description="the update ratio itself, one for all layers or, from Python, one for each; none: the budget"
    )

    @model_validator(mode="after")
    def _peaked(self) -> Budget:
        for shift in (0, 1):
            curve = self.curve(shift)
            if max(curve.start, curve.end) >= curve.peak:
                raise ValueError(f"start {curve.start:g} and end {curve.end:g} must be below the peak {curve.peak:g}")
        return self

    def curve(self, shift: int) -> Profile:
        """The profile on a model of this logit shift, with what the knobs change in it."""
        auto = "dream-7b" if shift else "llada-8b"
        base = PROFILES[auto if self.profile == "auto" else self.profile]
        own = {f.name: getattr(self, f.name) for f in fields(Profile)}
        return Profile(**{name: getattr(base, name) if value is None else value for name, value in own.items()})

    def of(self, n_layers: int, shift: int) -> NDArray[np.float64]:
        """(layers,) share of the generated rows that each layer recomputes, 0 to 1."""
        if self.ratios is not None:
            return np.broadcast_to(np.array(self.ratios, dtype=np.float64), (n_layers,))
        largest = DEFAULT_RATIO if self.avg_ratio is None else self.avg_ratio
        largest = largest if self.max_ratio is None else self.max_ratio
        if self.budget == "uniform":
            return np.full(n_layers, largest)
        curve = self.curve(shift)
        heights = curve.heights(n_layers)
        by_mean = self.max_ratio is None and self.avg_ratio is not None
        ratios = largest / (heights.mean() if by_mean else curve.peak) * heights
        left = np.arange(n_layers) / n_layers < curve.peak_at  # the least ratio is not applied right of the peak
        return np.minimum(np.where(left, np.maximum(ratios, self.min_ratio), ratios), 1.0)
