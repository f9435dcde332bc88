"""Commit a scheduled number of rows per step, by a score or at random; or all rows that are sure enough.

=====================  ==========================================================================================
``low-confidence``     the most confident rows, as many as the schedule says (LLaDA, section 2.4, "low-confidence
                       remasking": it declines to commit the least confident; Dream's ``maskgit_plus``)
``margin``             those whose best token leads most (Dream's ``topk_margin``)
``entropy``            those of the lowest entropy (Dream's ``entropy``)
``random``             rows drawn uniformly in every step (LLaDA's ``remasking="random"``)
``threshold``          every row whose score reaches a threshold, and always the best one (Fast-dLLM, arXiv
                       2505.22618, section 3.2; Elastic-Cache uses it on a sliding window)
``certainty-prior``    by confidence times the density of what is known around a row (d2Cache, arXiv 2509.23094)
=====================  ==========================================================================================

Departures from the released code: the mask token is never a candidate; ties go to the leftmost row.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field
from torch import Tensor

from dcache.arrays import Ints
from dcache.state import State
from dcache.unmasking.base import MOST, Ask, Asked
from dcache.unmasking.rules import Judged, Judging, Scheduled, ScheduledByScore, reaches
from dcache.unmasking.sampling import Drawn
from dcache.unmasking.schedule import Schedule, Span
from dcache.unmasking.selection import best


class LowConfidence(ScheduledByScore):
    """The most confident rows of the window."""

    kind = "confidence"


class Margin(ScheduledByScore):
    """The rows of the window whose best token leads the second by most."""

    paper = "Dream, arXiv 2508.15487"
    kind = "margin"


class Entropy(ScheduledByScore):
    """The rows of the window whose distribution has the lowest entropy."""

    paper = "Dream, arXiv 2508.15487"
    kind = "entropy"


class Random(Scheduled):
    """Rows of the window drawn uniformly."""

    class Config(Schedule):
        """Knobs of `Random`."""

    config: Config

    def score(self, drawn: Drawn, at: Asked) -> Tensor:
        """A fresh draw in every step."""
        return self.noise.positions(at)


class Threshold(Judged):
    """Every row of the window that is sure enough, and never none."""

    class Config(Judging):
        """Knobs of `Threshold`."""

        threshold: float = Field(0.9, description="commit rows whose score is at least this")
        budget: int | None = Field(
            None,
            ge=1,
            le=MOST,
            description="steps over which the rows of the generation are spread: a step judges no more than its share "
            "and what earlier steps refused (Fast-dLLM on Dream without a cache); none: all rows",
        )

    paper = "Fast-dLLM, arXiv 2505.22618; Elastic-Cache, arXiv 2510.14973"
    config: Config

    def ask(self, state: State) -> Ask:
        """The masked rows of the block or window, and how many of them the budget allows."""
        if self.config.budget is None:
            return self.asking(state)
        return self.asking(state, budget=self._budget(state, self.config.budget))

    def _budget(self, state: State, steps: int) -> Ints:
        """Masked rows less those that belong to later steps."""
        span = Span(state, self.config.window)
        share = span.share(steps)
        later = span.size * (share - np.minimum(span.step + 1, share)) // share
        budget: Ints = np.maximum(span.masked.sum(1) - later, 1)
        return budget

    def choose(self, score: Tensor, drawn: Drawn, at: Asked) -> Tensor:
        """What reaches the threshold, among the surest rows that the budget allows."""
        sure = score >= self.config.threshold
        return sure if self.config.budget is None else sure & best(score, at.eligible, at.flags["budget"])


class CertaintyPrior(Judged):
    """The rows of the highest confidence times certainty density; or all rows whose product reaches a threshold."""

    class Config(Judging):
        """Knobs of `CertaintyPrior`."""

        sigma: float | None = Field(10.0, gt=0, description="width of the certainty density in rows; none: no density")
        threshold: float | None = Field(
            None, description="commit rows whose weighted score is at least this; none: at_least rows"
        )

    paper = "d2Cache, arXiv 2509.23094"
    config: Config

    def choose(self, score: Tensor, drawn: Drawn, at: Asked) -> Tensor:
        """What reaches the threshold."""
        return reaches(score, self.config.threshold)
