"""Everything that dcache claims of a policy, of this one."""

from dcache.testing import Conformance, Exact


class TestPeriodic(Conformance):
    """Every claim is a test; on one layer the policy must equal no cache for every period."""

    policy = "periodic(period=4)"
    exact = ("periodic(period=1)", Exact("periodic(period=100)", n_layers=1))
    examples = 5
