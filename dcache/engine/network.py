"""The model as the engine runs it: its weights, and the per-layer stores of one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dcache.arrays import Bools, positions
from dcache.kernels.rows import put
from dcache.models.transformer import Block, ModelSpec, Transformer

if TYPE_CHECKING:
    from dcache.engine.layer import Layer

ALIGN_SLOTS = 64  # keys per sequence are padded to this on a GPU: unaligned score products cost 0.7 to 0.9 ms a step


class Stores:
    """Every tensor that outlives a pass: (batch, heads, slots + 1, head_dim) or (batch, slots + 1, width) per layer.

    Slot `slots` is the dump slot: padded rows write there, it stays finite, and it is never visible.
    """

    def __init__(self, model: Transformer, batch: int, slots: int, extra: dict[str, int], poison: bool):
        spec, self.slots = model.spec, slots
        wide = slots + 1 if model.device.type == "cpu" else -(-(slots + 1) // ALIGN_SLOTS) * ALIGN_SLOTS
        heads = {"K": spec.n_kv_heads, "V": spec.n_kv_heads, "Q": spec.n_heads}
        widths = {"K": spec.kv_width, "V": spec.kv_width, **extra}
        self.tensors: dict[str, list[Tensor]] = {}
        for name, width in widths.items():
            split = name in heads
            shape = (batch, heads[name], wide, width // heads[name]) if split else (batch, wide, width)
            self.tensors[name] = [
                torch.zeros(shape, device=model.device, dtype=model.dtype) for _ in range(spec.n_layers)
            ]
        self.clear(poison)

    def clear(self, poison: bool = False) -> None:
        """Forget everything; with `poison`, fill with NaN so that reading what nobody wrote shows."""
        for layers in self.tensors.values():
            for x in layers:
                x.fill_(float("nan") if poison else 0)
                x.select(-2, self.slots).zero_()

    @property
    def n_bytes(self) -> dict[str, int]:
        """Bytes held, by store."""
        return {name: sum(x.numel() * x.element_size() for x in layers) for name, layers in self.tensors.items()}


class Weights:
    """What a policy may reach in `CachePolicy.prepare`: sizes and weights of the model.

    Attributes:
        spec: sizes and ids of the model.
        device: where everything lives.
        dtype: of weights, stores and hidden states.
    """

    def __init__(self, model: Transformer):
        self.spec: ModelSpec = model.spec
        self.device, self.dtype = model.device, model.dtype
        self._model = model

    def weight(self, layer: int, name: str) -> Tensor:
        """One weight matrix of a layer: "q", "k", "v" (heads * head_dim, d_model), "out", "gate", "up", "down"."""
        block = self._model.layers[layer]
        assert isinstance(block, Block)
        if name in ("q", "k", "v"):
            return block.qkv[block.slices(name)]
        if name in ("gate", "up"):
            return block.gate_up.chunk(2)[name == "up"]
        return {"out": block.out, "down": block.down}[name]


class Network(Weights):
    """What a policy may reach in `CachePolicy.begin`: the weights, and the stores of a batch.

    Attributes:
        batch: sequences of this batch.
        slots: width of the canvas; also the dump slot.
        layers: one `Layer` per transformer layer.
    """

    def __init__(self, model: Transformer, layers: list[Layer], batch: int, slots: int):
        super().__init__(model)
        self.batch, self.slots = batch, slots
        self.layers = layers
        self._buffers: dict[str, Tensor] = {}
        self._preloaded: Callable[[Bools], None] = lambda rows: None

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A device tensor of the policy's own, zeroed; ask for it in `begin` and write it in place.

        The same name and shape give the same tensor for every batch, so that a captured pass stays valid.
        """
        held = self._buffers.get(name)
        if held is None or held.shape != shape or held.dtype != dtype:
            held = self._buffers[name] = torch.empty(shape, dtype=dtype, device=self.device)
        return held.zero_()

    def on_preload(self, note: Callable[[Bools], None]) -> None:
        """Engine only: who keeps the list of written rows."""
        self._preloaded = note

    def preload(self, layer: int, rows: Bools, k: Tensor, v: Tensor) -> None:
        """Put keys and values of an earlier request into the store, in `begin`; they count as written, not as computed.

        Args:
            layer: number of the layer; rows become visible once the last layer has them.
            rows: (batch, slots) bool, with the same number of rows in every sequence.
            k: (batch, kv_heads, n, head_dim), rotated for these positions.
            v: (batch, kv_heads, n, head_dim).
        """
        where = torch.from_numpy(positions(rows, int(rows.sum(1).max()), self.slots)).to(self.device)
        put(self.layers[layer].stores["K"], where, k)
        put(self.layers[layer].stores["V"], where, v)
        if layer == self.spec.n_layers - 1:
            self._preloaded(rows)
