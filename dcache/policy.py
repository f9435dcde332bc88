"""The contract of a cache policy.

The key/value store has one slot per position. A policy is a schedule of recomputed rows: a row that is not recomputed
keeps its last key and value; nothing is renumbered, moved or concatenated. There are two depths. On the host, between
steps, `plan` says *which rows* with boolean masks. On the device, inside a step, `layer` may say *what a layer does*,
by composing the same primitives as the default layer. ``docs/explanation/contract.md`` walks real methods through it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from dcache.arrays import Bools, Ints
from dcache.errors import UsageError
from dcache.models.transformer import ModelSpec
from dcache.state import Seen, State

if TYPE_CHECKING:
    from dcache.engine.layer import Layer
    from dcache.engine.network import Network, Weights
    from dcache.unmasking.base import Unmasker


class PolicyConfig(BaseModel):
    """Knobs of a policy: frozen, unknown fields refused; give each a bound and a description with its unit."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Plan:
    """Which rows a pass computes, and what its layers need to know. Masks are numpy arrays on the host.

    Attributes:
        row_mask: (batch, slots) bool. Rows that do not exist and finished sequences are taken out for you.
        kind: names every Python value that `CachePolicy.layer` branches on; each kind is captured once per shape.
        start: (batch,) int64: first layer of each sequence, whose input is read from the store "H"; the number of
            layers means that the sequence sits this pass out. None: all start from the embedding.
        sets: (batch, slots) bool masks that arrive in the layer as ascending positions ``at.sets[name]`` (batch, k).
        flags: arrays of shape (batch,), (batch, slots) or (batch, layers), bool, int64 or float32, that arrive as
            ``at.flags[name]``. A (batch, slots) flag gets a last column of 0 for the dump slot, so that
            ``flag.gather(1, rows)`` is always legal.
        visible: (batch, slots) or (layers, batch, 1 or kv_heads, slots) bool: the keys that computed rows attend to;
            a numpy array, or a tensor that already lives on the device. None: every key of the sequence.
        watch: (batch, slots) bool: positions whose confidence the policy wants beside those the unmasker reads.
        marks: like `kind`, for filters: each adds what its own layer branches on under its own name, and leaves the
            kind of the inner policy alone.
    """

    row_mask: Bools
    kind: Hashable = ""
    start: Ints | None = None
    sets: Mapping[str, Bools] = field(default_factory=dict)
    flags: Mapping[str, np.ndarray] = field(default_factory=dict)
    visible: Bools | Tensor | None = None
    watch: Bools | None = None
    marks: Mapping[str, Hashable] = field(default_factory=dict)

    @staticmethod
    def all(state: State) -> Plan:
        """Compute every row of every sequence that is not finished."""
        return Plan(state.valid)


class CachePolicy(ABC):
    """One cache method. A class is a contract or final: share code through functions.

    Args:
        config: the knobs; or give them by name, ``Elastic(gamma=0.95)``.
    """

    class Config(PolicyConfig):
        """A policy without knobs."""

    name: ClassVar[str] = ""
    """What users write; set when the policy is registered."""
    label: ClassVar[str] = ""
    """Name and distribution, for errors; set when the policy is registered."""
    paper: ClassVar[str] = ""
    """Title and address of the paper, for `dcache policies`."""
    pairs_with: ClassVar[str | None] = None
    """The unmasker of the paper, e.g. ``"threshold(threshold=0.9,window=16)"``; used by ``--unmask paired``."""

    exact: ClassVar[str | None] = None
    """Knobs that make it equal to no cache, e.g. ``"interval=1"``; "" if every configuration is. Checked by
    `dcache.testing` and ``dcache verify``."""

    remembers: ClassVar[str | None] = None
    """Knobs with which something outlives a request and changes the tokens of later ones, e.g. ``"fill=first"``; "" if
    it always does. The requests of such a policy are not spread over several processes."""

    config: PolicyConfig

    def __init_subclass__(cls, **more: Any) -> None:
        """A subclass is not what its parent is registered as."""
        super().__init_subclass__(**more)
        for attribute in ("name", "label"):
            if attribute not in cls.__dict__:
                setattr(cls, attribute, "")

    def __init__(self, config: PolicyConfig | None = None, **knobs: object):
        self.config = self.Config.model_validate(knobs) if config is None else config

    def stores(self, spec: ModelSpec) -> dict[str, int]:
        """Stores beside K and V, name to width; "H" (layer input) and "Q" (rotated queries) fill themselves."""
        return {}

    def refuses(self, spec: ModelSpec, unmasker: Unmasker) -> str | None:
        """Why this configuration makes no sense with a model or an unmasker, as a sentence; None if it does.

        Asked before anything is decoded; the caller gets a `UsageError` with the sentence.
        """
        return None

    def capacity(self, state: State) -> int | None:
        """How many keys and values per sequence and layer outlive a pass, chosen by `Layer.hold`; None: all.

        With a capacity, a pass may attend to the keys that it computes and to those that are held; the rest is freed.
        """
        return None

    def opening(self) -> int:
        """For filters that free keys: how many passes, from the first of each block on, compute all rows at least.

        A policy with any gives its word that its layers read the keys and values of earlier passes in `Layer.attend`
        alone, so that what a filter hides may be gone.
        """
        return 0

    def exempt(self) -> Mapping[str, str]:
        """Claims of `dcache.testing` that this configuration does not make, by name, each with the reason."""
        return {}

    def prepare(self, weights: Weights) -> None:  # noqa: B027 - few policies make anything of the weights
        """Host, once per model, before anything is decoded or timed: what follows from the weights alone."""

    def begin(self, net: Network, state: State) -> None:  # noqa: B027 - most policies remember nothing
        """Host, once per batch: forget the past, allocate device tensors. Nothing survives between requests."""

    @abstractmethod
    def plan(self, state: State) -> Plan:
        """Host, once per step: which rows are computed."""

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Device, captured: what one layer does with its stream; the pair returned is the stream of the next layer.

        Anything read from Python is frozen at capture: branch only on ``at.index``, ``at.kind``, shapes and knobs.

        Args:
            at: the layer's weights, stores, sets and flags.
            rows: (batch, n) int64 positions, ascending, padded with the dump slot ``at.dump``.
            h: (batch, n, d_model), their hidden states.

        Returns:
            rows (batch, m) and h (batch, m, d_model).
        """
        return at.compute(rows, h)

    def review(self, state: State, plan: Plan, seen: Seen) -> Plan | None:
        """Host, after the pass was read: a plan to run in the same step, before anything is committed; or None."""
        return None


class FilterConfig(PolicyConfig):
    """Knobs of a filter: what it wraps, and those of its own."""

    inner: str = Field("none", description="the policy that is wrapped, written as everywhere: elastic(gamma=0.95)")

    @field_validator("inner", mode="before")
    @classmethod
    def _named_none(cls, value: object) -> object:
        """``inner=none`` names the policy."""
        return "none" if value is None else value


class Filter(CachePolicy):
    """A policy about visibility wrapped around a policy about rows: both plans pass through `restrict`.

    Args:
        inner: the wrapped policy: an instance, or how it is written; None takes the knob ``inner``.
        config: the knobs; or give them by name.
    """

    class Config(FilterConfig):
        """A filter without knobs of its own."""

    def __init__(self, inner: CachePolicy | str | None = None, config: PolicyConfig | None = None, **knobs: object):
        super().__init__(config, **(knobs if not isinstance(inner, str) else {**knobs, "inner": inner}))
        given = getattr(self.config, "inner", None) if inner is None else inner
        self.inner = given if isinstance(given, CachePolicy) else self._make_inner(given)

    def _make_inner(self, text: object) -> CachePolicy:
        from dcache.plugins import make_policy

        name = self.name or type(self).__name__
        if not isinstance(text, str):
            raise UsageError(
                f"policy {name!r} wraps another policy, and was given {text!r}; give inner as an instance of "
                "CachePolicy or as text such as 'elastic(gamma=0.95)', or let its Config derive from FilterConfig"
            )
        try:
            return make_policy(text)
        except UsageError as error:
            raise UsageError(f"policy {name!r}: inner={text}: {error}") from None

    @abstractmethod
    def restrict(self, state: State, plan: Plan) -> Plan:
        """Narrow what `plan` computes and sees; `dataclasses.replace` keeps the rest of it."""

    def stores(self, spec: ModelSpec) -> dict[str, int]:
        """Those of the inner policy."""
        return self.inner.stores(spec)

    def refuses(self, spec: ModelSpec, unmasker: Unmasker) -> str | None:
        """What the inner policy refuses."""
        return self.inner.refuses(spec, unmasker)

    def capacity(self, state: State) -> int | None:
        """That of the inner policy."""
        return self.inner.capacity(state)

    def exempt(self) -> Mapping[str, str]:
        """What the inner policy is exempt from."""
        return self.inner.exempt()

    def prepare(self, weights: Weights) -> None:
        """Prepare the inner policy."""
        self.inner.prepare(weights)

    def begin(self, net: Network, state: State) -> None:
        """Begin the inner policy."""
        self.inner.begin(net, state)

    def plan(self, state: State) -> Plan:
        """The inner plan, restricted."""
        return self.restrict(state, self.inner.plan(state))

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The inner layer."""
        return self.inner.layer(at, rows, h)

    def review(self, state: State, plan: Plan, seen: Seen) -> Plan | None:
        """The inner review, restricted: a filter that forgot it would switch a refresh off."""
        again = self.inner.review(state, plan, seen)
        return None if again is None else self.restrict(state, again)


__all__ = ["CachePolicy", "Filter", "FilterConfig", "Plan", "PolicyConfig", "Seen", "State"]
