"""Commit as many of the surest rows as a bound on their joint error allows.

==========  =====================================================================================================
``factor``  ranks of confidence while ``c_k >= 1 - factor / (k + 1)`` (Fast-dLLM, arXiv 2505.22618, theorem 1)
``eb``      the surest rows while their entropies, less the largest, sum to at most gamma (EB-Sampler, arXiv
            2505.24857)
==========  =====================================================================================================
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from dcache.unmasking.base import Asked
from dcache.unmasking.rules import Judged, Judging
from dcache.unmasking.sampling import Drawn
from dcache.unmasking.scores import certainty_of
from dcache.unmasking.selection import FactorVariant, prefix_by_entropy, prefix_by_factor


class Factor(Judged):
    """The surest rows, as many as the bound of parallel decoding allows.

    If each of n tokens has a probability above ``1 - e`` and ``(n + 1) e <= 1``, choosing all at once is choosing them
    one by one; `factor` relaxes the 1.
    """

    class Config(Judging):
        """Knobs of `Factor`."""

        factor: float = Field(1.0, ge=0, description="rank k passes if its score is at least 1 - factor / (k + 1)")
        variant: FactorVariant = Field(
            "repaired",
            description="'fast-dllm' commits the last row too if the first failure is the last rank; 'd2' leaves the "
            "last row out if none fails; 'repaired' does neither",
        )

    paper = "Fast-dLLM, arXiv 2505.22618"
    config: Config

    def choose(self, score: Tensor, drawn: Drawn, at: Asked) -> Tensor:
        """The ranks before the first that fails."""
        return prefix_by_factor(score, at.eligible, self.config.factor, self.config.variant)


class EntropyBounded(Judged):
    """The surest rows, as long as little is left to know about them together."""

    class Config(Judging):
        """Knobs of `EntropyBounded`."""

        gamma: float = Field(1.0, ge=0, description="bound on the joint entropy of the rows of a step, in nats")
        largest: Literal["paper", "published"] = Field(
            "paper",
            description="what is subtracted from the sum of entropies: the largest so far along the order, or, as in "
            "d2Cache's code, whose maximum runs over the batch, the latest",
        )

    paper = "EB-Sampler, arXiv 2505.24857"
    config: Config

    def choose(self, score: Tensor, drawn: Drawn, at: Asked) -> Tensor:
        """Rows in order of score while the bound holds."""
        entropy = -certainty_of(drawn.logits, drawn.summary)
        if drawn.held is not None:  # an end of the text that is to come last has no say in how many rows fit
            entropy = entropy.masked_fill(drawn.held, float("inf"))
        return prefix_by_entropy(score, at.eligible, entropy, self.config.gamma, self.config.largest == "published")
