"""Recompute everything now and then, and in between what a step cannot do without.

Change this: say in two sentences on which rows the policy bets and why, give the link to
its paper, and list what departs from it.
"""

from dcache import CachePolicy, Plan, PolicyConfig, State
from pydantic import Field


class Periodic(CachePolicy):
    """Recompute every row each `period` steps, and what the step needs in between."""

    # The line above is what `dcache policies` shows, with the paper and the knobs.
    paper = ""

    # The knobs with which it must decode as no cache does; the tests hold it to that.
    exact = "period=1"

    # The unmasker of the paper, such as "threshold(threshold=0.9)", for --unmask paired.
    pairs_with = None

    class Config(PolicyConfig):
        """The knobs, as in `periodic(period=4)`: each with a bound, a default and a unit."""

        period: int = Field(8, ge=1, description="denoising steps between two full refreshes")

    config: Config

    def plan(self, state: State) -> Plan:
        """Which rows this step computes; any other keeps its last key and value, in every layer.

        Masks are numpy arrays, (batch, slots) bool. Sequences of a batch may be at different
        steps, so what depends on the step has a batch axis. Rows that do not exist and finished
        sequences are taken out for you.
        """
        # (batch,). True in step 0, before which nothing is stored.
        full = state.step % self.config.period == 0
        # What predicts the window, and the tokens that the last step wrote: what is stored for
        # them is the key and value of the mask, so they must be computed once more.
        must = state.needed | state.changed
        # Change this: which other rows have moved so far that a stale key hurts?
        return Plan(must | full[:, None])
