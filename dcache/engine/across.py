"""All layers of a pass at once: statistics that need no layer's result, in one launch instead of one per layer.

The batch axis is layers x sequences, layer by layer. A short kernel costs some microseconds however little it does, and
a model has some thirty layers; where a statistic is only reported, this is what makes it cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dcache.kernels.attention_probs import probs, received
from dcache.kernels.drift import drift
from dcache.kernels.rows import take

if TYPE_CHECKING:
    from dcache.engine.layer import Layer


class Across:
    """The stores of all layers, seen from one layer of a pass; `at.across` in a policy.

    Args:
        at: the layer that asks.
        tensors: name to a store of all layers: (layers, sequences, ...).

    Attributes:
        n_layers: layers of the model.
    """

    def __init__(self, at: Layer, tensors: dict[str, Tensor]):
        self._at, self._tensors, self.n_layers = at, tensors, at.spec.n_layers

    def each(self, x: Tensor) -> Tensor:
        """The same (batch, ...) for every layer: (layers * batch, ...)."""
        return x.expand(self.n_layers, *x.shape).flatten(0, 1)

    def stored(self, name: str, rows: Tensor) -> Tensor:
        """`Layer.stored` of all layers at `rows` (batch, n): (layers * batch, heads, n, head_dim) or (.., width)."""
        self._at.reading(name, every=True)
        return take(self._tensors[name].flatten(0, 1), self.each(rows), self._lanes)

    def probs(self, q: Tensor) -> Tensor:
        """`Layer.probs` of queries (layers * batch, heads, n, head_dim)."""
        return probs(q, self._keys, self._visible, self._lanes)

    def received(self, q: Tensor, weight: Tensor) -> Tensor:
        """`Layer.received` of queries (layers * batch, heads, n, head_dim), `weight` (layers * batch, n)."""
        return received(q, self._keys, weight, self._visible, self._lanes)

    def similarity(self, past: Tensor, now: Tensor, rows: Tensor, over: str) -> Tensor:
        """`Layer.similarity` of two results of `probs` for `rows` (batch, n): (layers * batch,)."""
        return drift(past, now, self.each(rows < self._at.dump), self._visible, over)

    def report(self, name: str, x: Tensor) -> None:
        """`Layer.report` of all layers: `x` (layers * batch, ...), for the sequences and layers that ran."""
        self._at.report_all(name, x.reshape(self.n_layers, len(self._at.lanes), *x.shape[1:]))

    @property
    def _lanes(self) -> Tensor:
        """Where the lanes of each layer stand in a store whose layers and sequences are one axis."""
        lanes, sequences = self._at.lanes, self._tensors["K"].shape[1]
        layer = torch.arange(self.n_layers, device=lanes.device)[:, None]
        return (layer * sequences + lanes).flatten()

    @property
    def _keys(self) -> Tensor:
        self._at.reading("K", every=True)
        return self._tensors["K"].flatten(0, 1)[:, :, : self._at.dump]

    @property
    def _visible(self) -> Tensor | None:
        visible = self._at.now.visible
        if visible is None:
            return None
        return visible.flatten(0, 1) if visible.dim() == 4 else self.each(visible)
