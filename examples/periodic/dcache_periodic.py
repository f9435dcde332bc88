"""A cache policy in a package of its own: reuse decoded rows, and refresh everything now and then."""

from pydantic import Field

from dcache import CachePolicy, Plan, PolicyConfig, Register, State, hookimpl


class Periodic(CachePolicy):
    """Delayed caching of decoded rows, with a full refresh every `period` steps."""

    class Config(PolicyConfig):
        """Knobs of `Periodic`."""

        period: int = Field(8, ge=1, description="denoising steps between two full refreshes")

    paper = "none; an example"
    exact = "period=1"
    config: Config

    def plan(self, state: State) -> Plan:
        """Masked rows, rows written by the last step, rows that predict the window; all of them when it is due."""
        full = (state.step % self.config.period == 0)[:, None]
        return Plan(state.valid & (state.masked | state.changed | state.needed | full))


@hookimpl
def register_policies(register: Register) -> None:
    """Called by dcache when it starts."""
    register("periodic", Periodic)
