"""All layers of a pass at once: statistics that need no layer's result, in one launch instead of one per layer.

The batch axis is layers x sequences, layer by layer. A short kernel costs some microseconds however little it does, and
a model has some thirty layers; where a statistic is only reported, this is what makes it cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dcache.kernels.attention_drift import Past, attention_drift, remember
from dcache.kernels.attention_probs import head_mean, probs, received
from dcache.kernels.backend import use_triton
from dcache.kernels.drift import drift
from dcache.kernels.rollout import rollout
from dcache.kernels.rows import take
from dcache.kernels.select import find

if TYPE_CHECKING:
    from dcache.engine.layer import Boards, Layer

MOST = 256  # rows of a sequence up to which there is a rollout, which holds layers x rows x rows numbers


class Across:
    """The stores of all layers, seen from one layer of a pass; `at.across` in a policy.

    Args:
        at: the layer that asks.
        tensors: name to a store of all layers: (layers, sequences, ...).
        boards: what attention found in this pass, and which keys were written.

    Attributes:
        n_layers: layers of the model.
    """

    def __init__(self, at: Layer, tensors: dict[str, Tensor], boards: Boards):
        self._at, self._tensors, self._boards, self.n_layers = at, tensors, boards, at.spec.n_layers

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
        lse = self._lse_of(of)
        return received(q, self._keys, weight, self._visible, self._lanes, lse, self.n_layers)

    def head_mean(self, q: Tensor, of: Tensor | None = None) -> Tensor:
        """`Layer.head_mean` of all layers: `q` and `of` as for `probs`."""
        return head_mean(q, self._keys, self._visible, self._lanes, self._lse_of(of), layers=self.n_layers)

    def rolls(self, rows: Tensor) -> bool:
        """Whether `rollout` can be had for `rows` (batch, n): they are few, and all that attended in every layer.

        Only where kernels run: torch computes all scores at once, and here it would do so twice.
        """
        return use_triton(rows) and rows.shape[1] <= MOST and rows is self._at.now.rows and self._known

    def rollout(self, queries: Sequence[Tensor], rows: Tensor) -> Tensor:
        """Column sums of the product of all layers' mixing matrices, last layer on the left: see `kernels/rollout.py`.

        Args:
            queries: of each layer of this very pass, (batch, heads, n, head_dim).
            rows: (batch, n), the rows they are of, for which `rolls` holds.

        Returns:
            (batch, slots) float32.
        """
        q, shape = self._together(queries), (self.n_layers, len(rows))
        k, rest = self._keys, (self._visible, self._lanes, self._lse_of(rows))
        flow = head_mean(q, k, *rest, self.each(rows), self.n_layers)
        passed, own = rollout(flow.view(*shape, *flow.shape[1:]), rows < self._at.dump)
        others = received(q, k, passed.flatten(0, 1), *rest, self.n_layers)
        total = 1 + others.view(*shape, -1).sum(0) / q.shape[1]
        return total.scatter(1, rows, own)[:, :-1]

    def similarity(self, past: Tensor, now: Tensor, rows: Tensor, over: str) -> Tensor:
        """`Layer.similarity` of two results of `probs` for `rows` (batch, n): (layers * batch,)."""
        return drift(past, now, self.each(rows < self._at.dump), self._visible, over)

    def remember(self, q: Tensor, rows: Tensor) -> Past:
        """The attention of some rows as it is, for `drift`; in layer 0, before anything is written.

        Neither map is ever in memory, which makes this the cheap way to what `probs` and `similarity` would find.

        Args:
            q: (layers * batch, heads, n, head_dim), their queries of now.
            rows: (batch, m), the argument of `layer`: the only rows whose keys any layer is going to write.
        """
        return remember(q, self._keys, rows, self.stored("K", rows), self._visible, self._lanes, self.n_layers)

    def drift(self, past: Past, q: Tensor, of: Tensor, over: str) -> Tensor:
        """Similarity of the attention of rows as it was and as it is: (layers * batch,), as `similarity` has it.

        Args:
            past: what `remember` returned in layer 0.
            q: (layers * batch, heads, n, head_dim), the queries of the same rows now.
            of: (batch, n), these rows; each of them must have attended in this pass, as for `probs`.
            over: "heads", "rows" or "flat".

        Raises:
            ValueError: if keys of other rows were written since.
        """
        for layer, each in self._boards.written.items():
            if not all(rows is past.rows for rows in each):
                raise ValueError(f"layer {layer} wrote keys at other rows than those that `remember` was given")
        real, lse = self.each(of < self._at.dump), self._lse_of(of)
        return attention_drift(past, q, self._keys, real, self._visible, self._lanes, over, lse, self.n_layers)

    def report(self, name: str, x: Tensor) -> None:
        """`Layer.report` of all layers: `x` (layers * batch, ...), for the sequences and layers that ran."""
        self._at.report_all(name, x.reshape(self.n_layers, len(self._at.lanes), *x.shape[1:]))

    def _together(self, queries: Sequence[Tensor]) -> Tensor:
        """Queries of all layers as one tensor (layers * batch, heads, n, head_dim), from the second run on uncopied."""
        self._at.now.books.together = True
        if self._boards.queries is not None:
            made = self._boards.queries.transpose(2, 3)
            if all(x.data_ptr() == y.data_ptr() and x.shape == y.shape for x, y in zip(queries, made, strict=True)):
                return made.flatten(0, 1)
        return torch.stack(list(queries)).flatten(0, 1)

    def _lse_of(self, of: Tensor | None) -> Tensor | None:
        """Log-sum-exps (layers * batch, heads, n) of rows `of`, if every layer found those of the rows of the pass."""
        if of is None or not self._known:
            return None
        found = self._boards.found
        lse = torch.stack([found[layer][1] for layer in range(self.n_layers)])  # (layers, batch, heads, rows)
        if of is self._at.now.rows:
            return lse.flatten(0, 1)
        place = find(self._at.now.rows, of)[:, None].expand(*lse.shape[:-1], -1)
        return lse.gather(-1, place).flatten(0, 1)

    @property
    def _known(self) -> bool:
        """Whether every layer found log-sum-exps of the rows of the pass, and no write has outdated them."""
        now, found = self._at.now, self._boards.found
        return now.start is None and len(found) == self.n_layers and all(x is now.rows for x, _ in found.values())

    @property
    def _lanes(self) -> Tensor | None:
        """Where the lanes of each layer stand in a store whose layers and sequences are one axis; None if all do."""
        if self._at.now.whole:
            return None
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
