"""Everything that dcache claims of a cache policy, of this one: each claim is a test."""

from dcache.testing import Conformance, Exact


class TestPeriodic(Conformance):
    """On one layer a key depends on its own token alone, so there it must equal no cache."""

    # A refresh repairs a fault before it shows, so let there be hardly any.
    policy = "periodic(period=100)"
    exact = ("periodic(period=1)", Exact("periodic(period=100)", n_layers=1))
    patience = 1  # a committed row is computed with its token in the very next step
    examples = 5  # canvases that are drawn per claim; `dcache verify` takes 20
