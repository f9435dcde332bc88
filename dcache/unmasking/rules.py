"""Unmaskers that judge rows by a score: what they share. Scores x selections x schedules are axes, not copies.

`Scheduled` commits a number of rows that the host knows beforehand; `Judged` lets a rule decide on the device.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from dcache.density import Densities
from dcache.state import State
from dcache.unmasking.base import MOST, Ask, Asked, Picks, Unmasker
from dcache.unmasking.sampling import Drawn, draw, gumbel
from dcache.unmasking.schedule import Opening, Quota, Schedule, ask_opening
from dcache.unmasking.scores import Score, score_of
from dcache.unmasking.selection import best, between

if TYPE_CHECKING:
    from dcache.engine.network import Network


class Ranked(Schedule):
    """A schedule, and how the rows of a step are drawn from their scores."""

    alg_temp: float = Field(
        0.0,
        ge=0,
        description="draw rows without replacement from softmax(score / alg_temp) instead of taking the highest scores "
        "(Dream); 0 takes the highest",
    )


class Scheduled(Unmasker):
    """A scheduled number of rows per step, those of the highest score."""

    paper = "LLaDA, arXiv 2502.09992"
    config: Schedule

    def begin(self, net: Network, state: State) -> None:
        """Forget the schedule of the last batch."""
        super().begin(net, state)
        self.quota = Quota(self.config)

    def ask(self, state: State) -> Ask:
        """The masked rows of the block or window, and this step's quota."""
        quota = self.quota.of(state)
        ask = ask_opening(state, self.config, quota=quota)
        if all(quota.tolist()):
            return ask
        return Ask(ask.window, block=ask.block, flags=ask.flags, commits=quota > 0)

    def pick(self, logits: Tensor, at: Asked) -> Picks:
        """Commit the `quota` rows of highest score."""
        drawn = draw(logits, at, self.sampling, self.noise)
        return Picks(drawn.tokens, drawn.confidence, best(self.score(drawn, at), at.eligible, at.flags["quota"]))

    @abstractmethod
    def score(self, drawn: Drawn, at: Asked) -> Tensor:
        """Score of every read position, (batch, w) float."""


class ScheduledByScore(Scheduled):
    """A scheduled number of rows, by one of the scores, or drawn in proportion to it."""

    class Config(Ranked):
        """Knobs of an unmasker that ranks rows by a score."""

    config: Config
    kind: ClassVar[Score] = "confidence"

    def score(self, drawn: Drawn, at: Asked) -> Tensor:
        """The score; with `alg_temp` Gumbel noise turns the highest into draws without replacement."""
        score = score_of(self.kind, drawn, at, self.noise)
        if self.config.alg_temp == 0:
            return score
        return score.to(torch.float64) / self.config.alg_temp + gumbel(self.noise.positions(at))


class Judging(Opening):
    """What a rule judges, and the bounds of what it commits."""

    score: Score = Field("confidence", description="what the rule judges: confidence, margin, entropy or random")
    sigma: float | None = Field(
        None,
        gt=0,
        description="multiply the score by the certainty density of this width in rows (d2Cache); none: do not",
    )
    at_least: int = Field(1, ge=1, le=MOST, description="rows that a step commits in any case, the surest")
    at_most: int | None = Field(None, ge=1, le=MOST, description="rows that a step commits at most; none: no bound")

    @model_validator(mode="after")
    def _makes_sense(self) -> Judging:
        if self.sigma is not None and self.score == "entropy":
            raise ValueError(
                "sigma weighs probabilities; a negative entropy times a density ranks the least known rows first"
            )
        if self.at_most is not None and self.at_most < self.at_least:
            raise ValueError(f"at_most={self.at_most} is below at_least={self.at_least}")
        return self


def reaches(score: Tensor, threshold: float | None) -> Tensor:
    """(batch, w) bool: scores of at least `threshold`; none without one."""
    return torch.zeros_like(score, dtype=torch.bool) if threshold is None else score >= threshold


class Judged(Unmasker):
    """As many rows as a rule finds sure enough, within bounds, and never none."""

    config: Judging

    def begin(self, net: Network, state: State) -> None:
        """Nothing is known but the prompt."""
        super().begin(net, state)
        if self.config.sigma is not None:
            self.density = Densities(state, self.config.sigma)

    def ask(self, state: State) -> Ask:
        """The masked rows of the block or window, and the density if it counts."""
        return self.asking(state)

    def asking(self, state: State, **flags: np.ndarray) -> Ask:
        """An `Ask` with the flags that `judged` needs."""
        if self.config.sigma is not None:
            flags["density"] = self.density.now().astype(np.float32)
        return ask_opening(state, self.config, **flags)

    def pick(self, logits: Tensor, at: Asked) -> Picks:
        """Commit what the rule chooses, and the surest rows in any case."""
        drawn = draw(logits, at, self.sampling, self.noise)
        score = self.judged(drawn, at)
        chosen = self.choose(score, drawn, at)
        return Picks(drawn.tokens, drawn.confidence, self.commits(score, chosen, at))

    def commits(self, score: Tensor, chosen: Tensor, at: Asked) -> Tensor:
        """(batch, w) bool: what was chosen, within the bounds."""
        return between(score, at.eligible, chosen, self.config.at_least, self.config.at_most)

    def judged(self, drawn: Drawn, at: Asked) -> Tensor:
        """Score of every read position, (batch, w) float, times the density if it counts."""
        score = score_of(self.config.score, drawn, at, self.noise)
        return score if self.config.sigma is None else score * at.flags["density"]

    @abstractmethod
    def choose(self, score: Tensor, drawn: Drawn, at: Asked) -> Tensor:
        """(batch, w) bool: rows that the rule finds sure enough."""
