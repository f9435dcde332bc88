"""The floor: the linear layers of a model alone, which every policy must run for the rows it computes.

``floor(rows) = sum over layers of the qkv, out, gate_up and down products for `rows` rows``, plus the head for the rows
whose logits are wanted; one CUDA graph, the engine's products, no norms, no gate, no attention, no bias. Times between
measured row counts are interpolated, and a layer with no rows costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from dcache.bench.clock import SECONDS, median_ms
from dcache.bench.reports import FloorPoint
from dcache.kernels.product import FEW_ROWS, product
from dcache.models.transformer import Transformer


class Floor:
    """Times of products of one model, measured when they are first wanted, and kept.

    Args:
        model: the weights.
        exact: row counts that are measured rather than interpolated, since they come up often.
        seconds: spent on one row count.
    """

    def __init__(self, model: Transformer, exact: Iterable[int] = (), seconds: float = SECONDS):
        self.model, self.exact, self.seconds = model, set(exact), seconds
        self._known: dict[tuple[int, int], float] = {}

    def measure(self, rows: int, head_rows: int) -> float:
        """Milliseconds for `rows` rows in all layers and `head_rows` rows of the head; either may be 0."""
        if (rows, head_rows) not in self._known:
            work = products(self.model, rows, head_rows)
            self._known[rows, head_rows] = median_ms(work, self.model.device, self.seconds)
        return self._known[rows, head_rows]

    def layer_ms(self, rows: int) -> float:
        """Milliseconds of one layer, interpolated."""
        return self._between(rows, lambda n: self.measure(n, 0)) / self.model.spec.n_layers

    def head_ms(self, rows: int) -> float:
        """Milliseconds of the head, interpolated."""
        return self._between(rows, lambda n: self.measure(0, n))

    def pass_ms(self, rows: Iterable[int], head_rows: int) -> float:
        """Milliseconds of a pass from the rows of each layer."""
        counts = list(rows)
        layers = {n: self.layer_ms(n) for n in set(counts)}
        return sum(layers[n] for n in counts) + self.head_ms(head_rows)

    def curve(self) -> list[FloorPoint]:
        """The row counts that were measured, without a head."""
        found = sorted((rows, ms) for (rows, head_rows), ms in self._known.items() if head_rows == 0)
        return [point(self.model, rows, 0, ms) for rows, ms in found]

    def _between(self, rows: int, ms: Callable[[int], float]) -> float:
        if rows <= 0:
            return 0.0
        low, high = bracket(rows, self.exact)
        if low == high:
            return ms(low)
        share = (rows - low) / (high - low)
        return (1 - share) * ms(low) + share * ms(high)


def bracket(rows: int, exact: Iterable[int] = ()) -> tuple[int, int]:
    """The measured row counts on both sides of `rows`: powers of two, once and a half of them, and `exact`."""
    power = 1 << (rows.bit_length() - 1)
    grid = {power, power + power // 2, 2 * power, *exact}
    return max(n for n in grid if n <= rows), min(n for n in grid if n >= rows)


def floor_ms(model: Transformer, rows: int, head_rows: int) -> float:
    """Median milliseconds of the linear layers for `rows` rows, and of the head for `head_rows`."""
    return Floor(model).measure(rows, head_rows)


def products(model: Transformer, rows: int, head_rows: int) -> Callable[[], None]:
    """The work whose time is the floor, on random inputs."""
    spec = model.spec

    def draw(n: int, width: int) -> Tensor:
        return torch.randn(n, width, device=model.device, dtype=model.dtype)

    x, heads, gated, top = draw(rows, spec.d_model), draw(rows, spec.q_width), draw(rows, spec.mlp_size), None
    if head_rows:
        top = draw(head_rows, spec.d_model)

    into_gate = product if rows <= FEW_ROWS else linear  # as `gated_product` multiplies, without its gate

    @torch.inference_mode()
    def work() -> None:
        for block in model.blocks() if rows else ():
            product(x, block.qkv)
            product(heads, block.out)
            into_gate(x, block.gate_up)
            product(gated, block.down)
        if top is not None:
            product(top, model.embedding if model.head is None else model.head)

    return work


def point(model: Transformer, rows: int, head_rows: int, ms: float) -> FloorPoint:
    """A time with its rates: weights, inputs and outputs moved once, two operations per weight and row."""
    spec = model.spec
    qkv = spec.q_width + 2 * spec.kv_width
    sizes = [(qkv, spec.d_model), (spec.d_model, spec.q_width)]
    sizes += [(2 * spec.mlp_size, spec.d_model), (spec.d_model, spec.mlp_size)]
    todo = [(rows, out, inn, spec.n_layers) for out, inn in sizes if rows]
    todo += [(head_rows, spec.vocab_size, spec.d_model, 1)] if head_rows else []
    flops = sum(2 * n * out * inn * times for n, out, inn, times in todo)
    moved = sum((out * inn + n * (out + inn)) * times for n, out, inn, times in todo) * model.dtype.itemsize
    return FloorPoint(
        rows=rows,
        head_rows=head_rows,
        ms=round(ms, 5),
        tflop_s=round(flops / ms / 1e9, 3),
        tb_s=round(moved / ms / 1e9, 4),
    )


def rows_of_passes(row_layers: np.ndarray, again: np.ndarray | None, start: np.ndarray | None) -> list[np.ndarray]:
    """Rows per layer of each pass of a step, all sequences together.

    Args:
        row_layers: (layers, batch) of both passes, as `dcache.trace.Step` has them.
        again: (batch, slots) rows of the second pass, or None without one.
        start: (batch,) its first layer; None when it ran through all.
    """
    total = row_layers.sum(1)
    if again is None:
        return [total]
    layers = np.arange(len(row_layers))[:, None]
    runs = np.ones_like(row_layers, dtype=bool) if start is None else layers >= start
    second = np.minimum((runs * again.sum(1)).sum(1), total)
    return [total - second, second]
