"""SPA-Cache: recompute, in each layer, the generated rows that moved most along a few singular directions.

Sun et al., "SPA-Cache: Singular Proxies for Adaptive Caching in Diffusion Language Models", arXiv 2602.02544; released
code wenhao728/spa-cache. As in dLLM-Cache a row whose value vector turned is recomputed and all others reuse their
last output. The turn is measured on a proxy of low rank, which is cheap; and each layer has a budget of its own, since
features drift most in the layers past the middle.

=====================  ====================================================================================
``W_r``                `value_proxies`: ``diag(S[:r]) Vh[:r]`` of the value projection ``U S Vh``
``Z``                  store "Z": ``W_r norm(x)``, of the previous step
``D``                  store "D": what the layer added to a row when the row was last computed
``rho(l)``             `Budget.of`: share of the generated rows that layer l recomputes
``R``, ``R_g``         ``interval``, ``gen_interval``
=====================  ====================================================================================

Departures: of rows whose similarities agree to 1e-6 the leftmost goes first; a ratio may be 0 or 1. The paper projects
keys and values of selected rows alone, the released code, followed here, those of every generated row. Where a row
predicts the next position, the released code scores the first generated one by its own row unless the step computes
everything; so does ``border=published``. ``docs/policies/spa.md`` has the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import linear

from dcache.budgets import Budget
from dcache.kernels.cosine import cosine
from dcache.kernels.rows import take
from dcache.kernels.select import ascending, lowest
from dcache.policy import CachePolicy, Plan, State
from dcache.proxies import value_proxies

if TYPE_CHECKING:
    from dcache.engine.layer import Layer
    from dcache.engine.network import Network, Weights
    from dcache.models.transformer import ModelSpec
    from dcache.unmasking.base import Unmasker

MOST = 2**31 - 1
RESOLUTION = 1e-6  # of similarities: rows that did not turn at all differ by rounding, which must not rank them


class Kind(NamedTuple):
    """Shapes of a pass.

    Attributes:
        width: rows that go on above layer 0, at most; None if every sequence goes on with all of them.
        bounds: rows that each layer recomputes, at most; None if all that reach it.
    """

    width: int | None
    bounds: tuple[int, ...] | None


def shapes(at: Layer) -> Kind:
    """Those of the pass."""
    assert isinstance(at.kind, Kind)
    return at.kind


class SPACache(CachePolicy):
    """Adaptive updates by singular proxies."""

    class Config(Budget):
        """Knobs of `SPACache`; defaults of the released evaluation."""

        rank: Annotated[int, Field(ge=1, le=MOST)] | Annotated[float, Field(gt=0, le=1)] | None = Field(
            None,
            description="directions of the proxy, or a share: 1 is full rank; none: 256, or 32 with a logit shift",
        )
        interval: int = Field(10000, ge=1, le=MOST, description="denoising steps between two full refreshes (R)")
        gen_interval: int = Field(10000, ge=1, le=MOST, description="steps between refreshes of generated rows (R_g)")
        warm_up: int | None = Field(
            None, ge=0, le=MOST, description="further full steps at the beginning; none: 0, or 1 with a logit shift"
        )
        border: Literal["published", "repaired"] = Field(
            "published",
            description="with a logit shift, what scores the first generated position in a step that is not full: its "
            "own row, as released, or the last prompt row, which then stays in all layers",
        )

    paper = "SPA-Cache: Singular Proxies for Adaptive Caching in Diffusion Language Models, arXiv 2602.02544"
    pairs_with = "low-confidence"
    exact = "interval=1"
    config: Config

    def exempt(self) -> Mapping[str, str]:
        """As released, a position is predicted by one row or another."""
        lent = "border=published scores the first generated position by another row once a full step is over"
        return {"an_idle_step_changes_no_logits": lent} if self.config.border == "published" else {}

    def refuses(self, spec: ModelSpec, unmasker: Unmasker) -> str | None:
        """A table of ratios has one for each layer."""
        given = self.config.ratios
        if isinstance(given, tuple) and len(given) != spec.n_layers:
            return f"ratios has {len(given)} entries, and the model {spec.n_layers} layers; give one for each, or one"
        return None

    def rank(self, spec: ModelSpec) -> int:
        """Directions of the proxies on this model."""
        rank = self.config.rank or (256, 32)[spec.shift > 0]
        return max(1, min(int(rank if rank > 1 else rank * spec.kv_width), spec.kv_width, spec.d_model))

    def stores(self, spec: ModelSpec) -> dict[str, int]:
        """Proxies of the previous step; increments of the residual stream."""
        return {"Z": self.rank(spec), "D": spec.d_model}

    def prepare(self, weights: Weights) -> None:
        """Proxies of all value projections but the first (section 3)."""
        self.proxies = value_proxies(weights, self.rank(weights.spec))

    def begin(self, net: Network, state: State) -> None:
        """Budgets of the model; the stores are written before they are read."""
        self.rho = self.config.of(state.spec.n_layers, state.spec.shift)  # (layers,)

    def plan(self, state: State) -> Plan:
        """Layer 0 computes every row; above it go all rows or the generated ones, as the step is due."""
        c, t = self.config, state.step
        warm_up = int(state.spec.shift > 0) if c.warm_up is None else c.warm_up
        full = (t % c.interval == 0) | (t <= warm_up)
        refresh = full | (t % c.gen_interval == 0)
        region = state.valid & ~state.prompt
        if c.border == "repaired":
            region = region | state.rows_for(region)
        stream = np.where(full[:, None], state.valid, region)
        n_rows, active = stream.sum(1), state.active
        due = (region.sum(1)[:, None] * self.rho).astype(np.int64)  # floor
        counts = np.where(refresh[:, None], n_rows[:, None], due)  # (batch, layers)
        kind = Kind(
            None if full[active].all() else int(n_rows[active].max()),
            None if refresh[active].all() else tuple(counts[active].max(0).tolist()),
        )
        flags = {"stream": stream, "refresh": refresh, "counts": counts, "begin": state.gen_start}
        return Plan(state.valid, kind, flags=flags)

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Layer 0 is an ordinary one and lets the prompt go; those above it add fresh and stored increments."""
        if at.index == 0:
            rows, h = self._narrow(at, *at.compute(rows, h))
        else:
            h = self._update(at, rows, h)
        return self._lend_border(at, rows, h) if at.last else (rows, h)

    def _narrow(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The rows that go on above layer 0."""
        width = shapes(at).width
        if width is None:
            return rows, h
        rows, order = ascending(rows.masked_fill(~at.flags["stream"].gather(1, rows), at.dump))
        return rows[:, :width], take(h, order[:, :width])

    def _update(self, at: Layer, rows: Tensor, h: Tensor) -> Tensor:
        """K, V and Z of every row, the rest of those that turned most: (batch, n, d_model)."""
        z, bounds = linear(at.normed(h), self.proxies[at.index]), shapes(at).bounds
        if bounds is None:
            self._recompute(at, rows, h, at.refresh(rows, h))
        else:
            at.write(rows, *at.project(rows, h, "kv"))
            if bounds[at.index] > 0:  # a budget may round to no row
                chosen, index = self._turned(at, rows, z, bounds[at.index])
                x = take(h, index)
                self._recompute(at, chosen, x, *at.project(chosen, x, "q"))
        at.store("Z", rows, z)
        return h + at.stored("D", rows)

    @staticmethod
    def _recompute(at: Layer, rows: Tensor, h: Tensor, q: Tensor) -> None:
        """Store what the layer adds to `rows`, given their inputs and queries."""
        a = at.output(at.attend(rows, q))
        at.store("D", rows, a + at.ffn(h + a))

    def _turned(self, at: Layer, rows: Tensor, z: Tensor, bound: int) -> tuple[Tensor, Tensor]:
        """The rows of lowest similarity, ascending, padded with the dump slot; and their places among `rows`."""
        steps = (self.similarity(at, rows, z) / RESOLUTION).round()
        score = torch.where(at.flags["refresh"][:, None], 0.0, steps)
        index, real = lowest(score.masked_fill(rows == at.dump, torch.inf), at.flags["counts"][:, at.index], bound)
        chosen, order = ascending(rows.gather(1, index).masked_fill(~real, at.dump))
        return chosen, index.gather(1, order)

    @staticmethod
    def similarity(at: Layer, rows: Tensor, z: Tensor) -> Tensor:
        """Cosine of each row's proxy with that of the previous step, (batch, n) float32."""
        return cosine(z, at.stored("Z", rows))

    def _lend_border(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The slip: a stream that begins with the first generated row lends it to the one that should predict it."""
        if at.spec.shift == 0 or shapes(at).width is None or self.config.border == "repaired":
            return rows, h
        begin = at.flags["begin"][:, None]
        border = torch.where(rows[:, :1] == begin, begin - at.spec.shift, at.dump)
        rows, order = ascending(torch.cat([border, rows], dim=1))
        return rows, take(torch.cat([h[:, :1], h], dim=1), order)
