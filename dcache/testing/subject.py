"""What the conformance kit is asked about: a policy, and what its author says about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from dcache.calls import Call, parse_call
from dcache.config import VerifySettings
from dcache.errors import UsageError
from dcache.testing.runs import Canvas, Maker, policy_of, refusal, unmaskers

PATIENCE: int = VerifySettings.model_fields["patience"].default


class Exact:
    """A configuration that must decode exactly as `none` does.

    Args:
        policy: the configuration: text, or a callable that makes a fresh policy.
        on: fields of the canvas on which it is claimed, e.g. ``n_layers=1`` or ``shift=0``; any canvas without.
    """

    def __init__(self, policy: Maker, **on: Any):
        self.policy, self.on = policy, on
        Canvas(**on)

    def __repr__(self) -> str:
        """As it is written."""
        told = [maker_repr(self.policy), *(f"{name}={value!r}" for name, value in self.on.items())]
        return f"Exact({', '.join(told)})"

    def __str__(self) -> str:
        """The configuration, and where it is claimed."""
        told = ", ".join(f"{name}={value}" for name, value in self.on.items())
        return maker_text(self.policy) + (f" with {told}" if told else "")


Exacts: TypeAlias = Maker | Exact | Sequence["Maker | Exact"]


@dataclass(frozen=True, eq=False)
class Subject:
    """A policy under test.

    Attributes:
        policy: how it is written, or what makes a fresh one.
        exact: configurations equal to no cache; by default what the policy's class declares as `CachePolicy.exact`.
        equals: pairs of configurations that must decode alike, e.g. a filter that hides nothing and its inner policy.
        exempt: claims that the policy does not make, each with the reason; added to those of `CachePolicy.exempt`.
        unmask: the unmaskers to decode with; by default all that are installed, and two of the kit's own.
        patience: steps within which a committed row is computed with its token.
    """

    policy: Maker
    exact: Exacts | None = None
    equals: Sequence[tuple[Maker, Maker]] = ()
    exempt: Mapping[str, str] = field(default_factory=dict)
    unmask: Sequence[str] = field(default_factory=unmaskers)
    patience: int = PATIENCE

    def __str__(self) -> str:
        """How it is written."""
        return maker_text(self.policy)

    def __repr__(self) -> str:
        """As it is written, without what follows from the policy."""
        usual = self.exact is None and not self.equals and self.patience == PATIENCE
        if isinstance(self.policy, str) and usual:
            return repr(self.policy)
        told = [maker_repr(self.policy)]
        if self.exact is not None:
            told.append(f"exact=[{', '.join(map(repr, self.exacts))}]")
        if self.equals:
            told.append(f"equals=[{', '.join(f'({maker_repr(a)}, {maker_repr(b)})' for a, b in self.equals)}]")
        if self.patience != PATIENCE:
            told.append(f"patience={self.patience}")
        return f"Subject({', '.join(told)})"

    @property
    def exacts(self) -> list[Exact]:
        """The configurations that must equal no cache."""
        told = declared(self.policy) if self.exact is None else self.exact
        each = told if isinstance(told, Sequence) and not isinstance(told, str) else [told]
        return [one if isinstance(one, Exact) else Exact(one) for one in each]

    def reason_not(self, name: str) -> str | None:
        """Why a claim is not made; None if it is."""
        return {**policy_of(self.policy).exempt(), **self.exempt}.get(name)

    def pairs(self, unmask: Sequence[str] | None = None) -> list[tuple[int, str]]:
        """Logit shifts and unmaskers that the policy takes."""
        every = [(shift, text) for shift in (0, 1) for text in (self.unmask if unmask is None else unmask)]
        policy = policy_of(self.policy)
        return [(shift, text) for shift, text in every if refusal(policy, Canvas(shift=shift, unmask=text)) is None]


def maker_text(maker: Maker) -> str:
    """How a policy is written, or the name of what makes it."""
    return maker if isinstance(maker, str) else getattr(maker, "__qualname__", repr(maker))


def maker_repr(maker: Maker) -> str:
    """A policy as an expression: text in quotes, or the name of what makes it."""
    return repr(maker) if isinstance(maker, str) else maker_text(maker)


def declared(maker: Maker) -> list[Exact]:
    """The exact configuration that a policy's class declares, the other knobs as they are."""
    policy = policy_of(maker)
    knobs = type(policy).exact
    if knobs is None:
        return []
    wanted = parse_call(f"exact({knobs})").knobs
    if not isinstance(maker, str):
        config = {**policy.config.model_dump(), **wanted}
        return [Exact(_named(lambda: type(policy)(**config), f"{type(policy).__name__} with {knobs or 'any knobs'}"))]
    call = parse_call(maker).replace(**wanted)
    try:
        policy_of(str(call))
    except UsageError:  # a knob of the call does not go with the exact ones
        call = Call(call.name, wanted)
    return [Exact(str(call))]


def _named(maker: Any, name: str) -> Any:
    maker.__qualname__ = name
    return maker
