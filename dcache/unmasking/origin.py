"""Commit each masked row by the toss of a coin: Dream's original rule.

With ``t`` falling evenly from 1 to eps over the steps, every masked row is committed in step i with probability
``1 - t[i + 1] / t[i]``, independently; the last step commits all. This is the reverse of the noising process that
masked diffusion models are trained on (Dream, arXiv 2508.15487, ``alg="origin"``).
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from dcache.state import State
from dcache.unmasking.base import MOST, Ask, Asked, Picks, Unmasker, UnmaskerConfig, ask_for
from dcache.unmasking.sampling import draw
from dcache.unmasking.schedule import Span, linear_share


class Origin(Unmasker):
    """Each masked row independently, with a probability that the schedule sets."""

    class Config(UnmaskerConfig):
        """Knobs of `Origin`."""

        steps: int | None = Field(
            None,
            ge=1,
            le=MOST,
            description="denoising steps of the whole generation, the same number for each block; none: one per row",
        )
        eps: float = Field(0.001, gt=0, lt=1, description="where the schedule's t ends")

    paper = "Dream, arXiv 2508.15487"
    config: Config

    def ask(self, state: State) -> Ask:
        """The masked rows of the block or window; only the last step must commit something."""
        span = Span(state, self.config.window)
        share = linear_share(span.step, span.share(self.config.steps), self.config.eps)
        ask = ask_for(state, self.config.window, share=share)
        return Ask(ask.window, block=ask.block, flags=ask.flags, commits=share >= 1)

    def pick(self, logits: Tensor, at: Asked) -> Picks:
        """Commit the rows whose draw falls below the step's share."""
        taken = at.eligible & (self.noise.positions(at) < at.flags["share"][:, None])
        drawn = draw(logits, at, self.sampling, self.noise)
        return Picks(drawn.tokens, drawn.confidence, taken)
