"""All layers of a pass at once: statistics that need no layer's result, in one launch instead of one per layer.

The batch axis is layers x sequences, layer by layer. A short kernel costs some microseconds however little it does, and
a model has some thirty layers; where a statistic is only reported, this is what makes it cheap.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dcache.kernels.attention_probs import probs, received
from dcache.kernels.drift import drift
from dcache.kernels.rows import take
from dcache.kernels.select import find

if TYPE_CHECKING:
    from dcache.engine.layer import Layer


class Across:
    """The stores of all layers, seen from one layer of a pass; `at.across` in a policy.

    Args:
        at: the layer that asks.
        tensors: name to a store of all layers: (layers, sequences, ...).
        found: layer to rows and log-sum-exps of its attention in this pass: `Boards.found`.

    Attributes:
        n_layers: layers of the model.
    """

    def __init__(self, at: Layer, tensors: dict[str, Tensor], found: Mapping[int, tuple[Tensor, Tensor]]):
        self._at, self._tensors, self._found, self.n_layers = at, tensors, found, at.spec.n_layers

    def each(self, x: Tensor) -> Tensor:
        """The same (batch, ...) for every layer: (layers * batch, ...)."""
        return x.expand(self.n_layers, *x.shape).flatten(0, 1)

    def stored(self, name: str, rows: Tensor) -> Tensor:
        """`Layer.stored` of all layers at `rows` (batch, n): (layers * batch, heads, n, head_dim) or (.., width)."""
        self._at.reading(name, every=True)
        return take(self._tensors[name].flatten(0, 1), self.each(rows), self._lanes)

    def probs(self, q: Tensor, of: Tensor | None = None) -> Tensor:
        """`Layer.probs` of all layers.

        Args:
            q: (layers * batch, heads, n, head_dim).
            of: (batch, n), if they are the queries of this very pass at these positions, padded with the dump slot.
                Every one of them must be among the rows that attended, in all layers and after the last write. What
                attention found for them is then used again. A padded row has numbers of no meaning.
        """
        return probs(q, self._keys, self._visible, self._lanes, self._lse_of(of))

    def received(self, q: Tensor, weight: Tensor, of: Tensor | None = None) -> Tensor:
        """`Layer.received` of all layers: `q` and `of` as for `probs`, `weight` (layers * batch, n)."""
        return received(q, self._keys, weight, self._visible, self._lanes, self._lse_of(of))

    def similarity(self, past: Tensor, now: Tensor, rows: Tensor, over: str) -> Tensor:
        """`Layer.similarity` of two results of `probs` for `rows` (batch, n): (layers * batch,)."""
        return drift(past, now, self.each(rows < self._at.dump), self._visible, over)

    def report(self, name: str, x: Tensor) -> None:
        """`Layer.report` of all layers: `x` (layers * batch, ...), for the sequences and layers that ran."""
        self._at.report_all(name, x.reshape(self.n_layers, len(self._at.lanes), *x.shape[1:]))

    def _lse_of(self, of: Tensor | None) -> Tensor | None:
        """Log-sum-exps (layers * batch, heads, n) of rows `of`, if every layer found those of the rows of the pass."""
        now, found = self._at.now, self._found
        if of is None or now.start is not None or len(found) < self.n_layers:
            return None
        if any(rows is not now.rows for rows, _ in found.values()):
            return None
        lse = torch.stack([found[layer][1] for layer in range(self.n_layers)])  # (layers, batch, heads, rows)
        place = find(now.rows, of)[:, None].expand(*lse.shape[:-1], -1)
        return lse.gather(-1, place).flatten(0, 1)

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
