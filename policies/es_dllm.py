"""ES-dLLM: within a block, rows that neither changed nor are about to be decoded stop early, after a few layers.

"ES-dLLM", arXiv 2603.10088. On top of dual caching: the first pass of a block computes all rows, those after it the
block. At two designated layers the better share of the rows goes on; the others stop: nothing deeper is computed for
them, their old K and V stay, they have no logits.

=============================  =======================================================================
``I_i``                        `importance`: ``alpha c + (1 - alpha) |H - H'|_1 / (sqrt(d) |H'|_2)``
``c_i(t-1)``                   flag "confidence": of the previous step, 0 where it predicted nothing
``H_i(t)``, ``H_i(t-1)``       the layer's input, and the one it had when it last ran (`before`)
layers ``L/8``, ``L/4``        ``first``, ``second``: they run for all that reach them, and then drop rows
ratio                          ``share``, rounded up
=============================  =======================================================================

Decided here, where the paper is open: only rows that reached the last layer may commit. If none that predicts a
position of the unmasker's window would go on, the most confident of them takes the place of the worst that would.
The share is of the rows that reach the layer. Decisions are per sequence: one in its full pass drops nothing, whatever
the others do. An order drawn beforehand may ask for any row, so it is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dcache.arrays import Bools
from dcache.kernels.rows import put, take
from dcache.kernels.select import ascending, rank
from dcache.models.transformer import ModelSpec
from dcache.policy import CachePolicy, Plan, PolicyConfig, State

if TYPE_CHECKING:
    from dcache.engine.layer import Layer
    from dcache.engine.network import Network
    from dcache.unmasking.base import Unmasker

TINY = 1e-12  # of a norm
NOISE = 1e-5  # a change below it is float32 rounding, which depends on the batch; as none it is a tie, which goes left
ROUNDS = 1e-9  # a share of 0.7 of 10 rows is 7 rows, not 8


class ESDLLM(CachePolicy):
    """Dual caching with early skipping."""

    class Config(PolicyConfig):
        """Knobs of `ESDLLM`."""

        first: int | Literal["auto"] | None = Field(
            "auto", description="layer, from 0, after which rows are dropped; auto: an eighth of the layers; none: none"
        )
        second: int | Literal["auto"] | None = Field(
            "auto", description="layer after which rows are dropped again; auto: a quarter of the layers; none: none"
        )
        share: float = Field(0.5, gt=0, le=1, description="share of the rows that goes on (0 to 1), rounded up")
        alpha: float = Field(
            0.5, ge=0, le=1, description="weight of the previous step's confidence against the change of the input"
        )
        refresh_every: int | None = Field(
            None, ge=1, le=2**31 - 1, description="passes between two full passes within a block; none: none"
        )

    paper = "ES-dLLM, arXiv 2603.10088"
    pairs_with = "low-confidence"
    exact = "refresh_every=1"
    config: Config

    def refuses(self, spec: ModelSpec, unmasker: Unmasker) -> str | None:
        """Layers that exist; and rows that are chosen by confidence."""
        for knob in ("first", "second"):
            layer = getattr(self.config, knob)
            if isinstance(layer, int) and not 0 <= layer < spec.n_layers:
                return f"{knob}={layer} is no layer of this model, which has {spec.n_layers}, numbered from 0"
        if unmasker.announces and self._layers(spec) and self.config.share < 1:
            return (
                f"rows are dropped by confidence, and unmasker {unmasker.name!r} commits those of an order drawn "
                "beforehand, which may have been dropped; give first=none,second=none, or choose by confidence"
            )
        return None

    def _layers(self, spec: ModelSpec) -> list[int]:
        """The designated layers; two that coincide are one."""
        auto = {"first": spec.n_layers // 8, "second": spec.n_layers // 4}
        told = {knob: getattr(self.config, knob) for knob in auto}
        return sorted({auto[knob] if layer == "auto" else layer for knob, layer in told.items() if layer is not None})

    def begin(self, net: Network, state: State) -> None:
        """Room for the inputs of the designated layers, not of all."""
        self.layers = self._layers(net.spec)
        shape = (net.batch, net.slots + 1, net.spec.d_model)
        self.before = {layer: net.buffer(f"es.{layer}", shape, net.dtype) for layer in self.layers}

    def plan(self, state: State) -> Plan:
        """All rows in the first pass of a block, then the block's; how many may go on at the most."""
        every = self.config.refresh_every
        full = (state.block_step if every is None else state.block_step % every) == 0
        rows = (state.rows_for(state.block) | state.needed | full[:, None]) & state.valid
        flags = {"full": full, "needed": state.needed, "confidence": confidence(state)}
        return Plan(rows, self._bounds(rows, full, state.active), flags=flags)

    def _bounds(self, rows: Bools, full: Bools, active: Bools) -> tuple[int, ...]:
        """Most rows of a sequence behind each designated layer; () if nothing is dropped in this pass."""
        if full[active].all():
            return ()
        count, bounds = rows.sum(1)[active].astype(np.float64), []
        for _ in self.layers:
            count = np.where(full[active], count, np.ceil(count * self.config.share - ROUNDS))
            bounds.append(int(count.max()))
        return tuple(bounds)

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """An ordinary layer; a designated one measures its input and lets the better share go on."""
        if at.index not in self.layers:
            return at.compute(rows, h)
        before = take(self.before[at.index], rows, at.lanes)
        put(self.before[at.index], rows, h, at.lanes)
        out, result = at.compute(rows, h)
        assert isinstance(at.kind, tuple)
        if not at.kind:
            return out, result
        bound = at.kind[self.layers.index(at.index)]
        importance = self.importance(at.flags["confidence"].gather(1, rows), h, before)
        return narrow(at, rows, result, self._survivors(at, rows, importance), bound)

    def importance(self, c: Tensor, now: Tensor, before: Tensor) -> Tensor:
        """``I``, (batch, n) float32, of confidences (batch, n) and layer inputs (batch, n, d_model)."""
        now, before = now.float(), before.float()
        norm: Tensor = torch.linalg.vector_norm(before, dim=-1).clamp_min(TINY)
        moved: Tensor = (now - before).abs().sum(-1) / (norm * now.shape[-1] ** 0.5)
        moved = moved.masked_fill(moved < NOISE, 0.0)
        return self.config.alpha * c.float() + (1 - self.config.alpha) * moved

    def _survivors(self, at: Layer, rows: Tensor, importance: Tensor) -> Tensor:
        """(batch, n) bool: the rows that go on."""
        fresh = among(rows, at.sets["fresh"]) if "fresh" in at.sets else torch.zeros_like(rows, dtype=torch.bool)
        real = (rows < at.dump) & ~fresh
        n = real.sum(-1)
        some = (n.double() * self.config.share - ROUNDS).ceil().long()
        count = torch.where(at.flags["full"], n, some)[:, None]
        place = places(importance.masked_fill(~real, float("-inf")))
        on = real & (place < count)
        needed = at.flags["needed"].gather(1, rows)
        sure = at.flags["confidence"].gather(1, rows).masked_fill(~needed, -1)
        best = needed & (places(sure) == 0)
        stuck = needed.any(-1, keepdim=True) & ~(needed & (on | fresh)).any(-1, keepdim=True)
        return torch.where(stuck, real & (place < count - 1) | best, on) | fresh


def confidence(state: State) -> np.ndarray:
    """(batch, slots) float32: confidence of what each row predicted in the previous step, 0 where that was nothing."""
    if state.seen is None:
        return np.zeros(state.valid.shape, dtype=np.float32)
    told = np.where(state.seen.predicted, state.seen.confidence, 0).astype(np.float32)
    return np.pad(told, ((0, 0), (0, state.spec.shift)))[:, state.spec.shift :]


def places(score: Tensor) -> Tensor:
    """Place of each entry (batch, n) from the highest score down; ties go left."""
    return rank(score, torch.ones_like(score, dtype=torch.bool))[1]


def among(rows: Tensor, some: Tensor) -> Tensor:
    """(batch, n) bool: entries of `rows` that are in `some` (batch, k)."""
    return (rows[..., None] == some[:, None]).any(-1)


def narrow(at: Layer, rows: Tensor, h: Tensor, on: Tensor, bound: int) -> tuple[Tensor, Tensor]:
    """The rows marked in `on` (batch, n) with their hidden states, ascending; `bound` and the fresh ones at most."""
    width = min(bound + (at.sets["fresh"].shape[1] if "fresh" in at.sets else 0), rows.shape[1])
    kept, order = ascending(torch.where(on, rows, at.dump))
    return kept[:, :width], take(h, order[:, :width])
