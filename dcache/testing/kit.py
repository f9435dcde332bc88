"""The conformance kit under pytest: one class per policy, one test per claim."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from dcache.errors import UsageError
from dcache.testing.claims import CLAIMS, Claim, find
from dcache.testing.runs import Canvas, Maker, unmaskers
from dcache.testing.search import judge
from dcache.testing.subject import PATIENCE, Exacts, Subject


class Conformance:
    """Everything that holds for every cache policy, as tests of one policy; subclass it in a test module.

    .. code-block:: python

        class TestPeriodic(Conformance):
            policy = "periodic(period=4)"
            exact = "periodic(period=1)"

    Attributes:
        policy: what is tested: text, or a callable that makes a fresh policy (a class, a lambda).
        exact: configurations equal to no cache: text, a callable, an `Exact` with a condition, or a list of them. None
            takes what the policy's class declares as `CachePolicy.exact`.
        equals: pairs of configurations that must decode alike.
        exempt: claims that are not made, by name, each with the reason; the test is skipped with it.
        unmask: unmaskers to decode with; None takes all that are installed, and two of the kit's own.
        patience: steps within which a committed row is computed with its token.
        examples: canvases that are drawn per claim; some claims take fewer.
        seed: of the drawing.
    """

    policy: ClassVar[Maker]
    exact: ClassVar[Exacts | None] = None
    equals: ClassVar[Sequence[tuple[Maker, Maker]]] = ()
    exempt: ClassVar[Mapping[str, str]] = {}
    unmask: ClassVar[Sequence[str] | None] = None
    patience: ClassVar[int] = PATIENCE
    examples: ClassVar[int] = 20
    seed: ClassVar[int] = 0

    def __init_subclass__(cls) -> None:
        """Check what can be checked before anything runs."""
        super().__init_subclass__()
        for name, reason in cls.exempt.items():
            find(name)
            if not (isinstance(reason, str) and reason.strip()):
                raise UsageError(f"{cls.__name__} is exempt from {name} without a reason; write why it cannot hold")

    @classmethod
    def subject(cls) -> Subject:
        """What the claims are asked about; made once per class, so that they share their runs."""
        if "_subject" not in cls.__dict__:
            own = vars(cls)
            unmask = unmaskers() if cls.unmask is None else cls.unmask
            policy, exact = own.get("policy", cls.policy), own.get("exact", cls.exact)
            cls._subject = Subject(policy, exact, cls.equals, cls.exempt, unmask, cls.patience)  # type: ignore[attr-defined]
        subject: Subject = cls.__dict__["_subject"]
        return subject


def hold(name: str, policy: Maker | Subject, canvas: Canvas) -> None:
    """Check one claim on one canvas; raises what a failing verdict told."""
    find(name).holds(policy if isinstance(policy, Subject) else Subject(policy), canvas)


def _test(claim: Claim) -> Callable[[Conformance], None]:
    def test(self: Conformance) -> None:
        __tracebackhide__ = True
        verdict = judge(claim, self.subject(), self.examples, self.seed)
        if verdict.status == "n/a":
            import pytest

            pytest.skip(verdict.detail)
        if verdict.status == "fail":
            raise AssertionError(str(verdict)) from None

    test.__name__, test.__doc__ = f"test_{claim.name}", claim.holds.__doc__
    test.__qualname__ = f"Conformance.test_{claim.name}"
    return test


for _claim in CLAIMS.values():
    setattr(Conformance, f"test_{_claim.name}", _test(_claim))
