"""The model as the engine runs it: its weights, and the per-layer stores of one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dcache.arrays import Bools, Ints, positions
from dcache.errors import UsageError
from dcache.kernels.rows import put, take
from dcache.kernels.select import ascending
from dcache.models.transformer import Block, ModelSpec, Transformer

if TYPE_CHECKING:
    from dcache.engine.layer import Layer

NO_ROWS = slice(0)
ALIGN_SLOTS = 64  # keys per sequence are padded to this on a GPU: unaligned score products cost 0.7 to 0.9 ms a step


def store_width(slots: int, on_gpu: bool) -> int:
    """Places per sequence in a store: a canvas and its dump slot, padded on a GPU."""
    return -(-(slots + 1) // ALIGN_SLOTS) * ALIGN_SLOTS if on_gpu else slots + 1


class Stores:
    """Every tensor that outlives a pass: (batch, heads, slots + 1, head_dim) or (batch, slots + 1, width) per layer.

    Slot `slots` is the dump slot: padded rows write there, it stays finite, and it is never visible.

    With a capacity, the K and V of `tensors` are one workspace that all layers share. What a layer holds between two
    passes is in `held`; `unpack` spreads it over the workspace before the layer runs, `pack` collects it after that.

    Args:
        model: gives sizes, device and dtype.
        batch: sequences.
        slots: positions of the canvas.
        extra: stores of the policy, name to width.
        poison: fill with NaN what nobody wrote, or holds, so that reading it shows.
        capacity: keys and values held per sequence and layer; None holds all.

    Attributes:
        tensors: name to one tensor per layer, as layers read and write it.
        whole: name to the same memory as one tensor (layers, ...), where each layer has its own.
        held: with a capacity, "K" and "V" to (batch, kv_heads, capacity, head_dim) per layer.
        positions: (layers, batch, capacity) int64: which they are, ascending, padded with the dump slot; or None.
    """

    def __init__(
        self,
        model: Transformer,
        batch: int,
        slots: int,
        extra: dict[str, int],
        poison: bool,
        capacity: int | None = None,
    ):
        spec, self.slots, self.capacity, self.poison = model.spec, slots, capacity, poison
        wide = store_width(slots, model.device.type != "cpu")
        heads = {"K": spec.n_kv_heads, "V": spec.n_kv_heads, "Q": spec.n_heads}
        widths = {"K": spec.kv_width, "V": spec.kv_width, **extra}
        n = spec.n_layers

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=model.device, dtype=model.dtype)

        self.whole: dict[str, Tensor] = {}
        self.tensors: dict[str, list[Tensor]] = {}
        self.held: dict[str, list[Tensor]] = {}
        self.positions: Tensor | None = None
        for name, width in widths.items():
            split = name in heads
            shape = (batch, heads[name], wide, width // heads[name]) if split else (batch, wide, width)
            if capacity is not None and name in ("K", "V"):
                self.tensors[name] = [zeros(*shape)] * n
                self.held[name] = [zeros(batch, spec.n_kv_heads, capacity, spec.head_dim) for _ in range(n)]
            else:
                self.whole[name] = zeros(n, *shape)
                self.tensors[name] = list(self.whole[name].unbind())
        if capacity is not None:
            self.positions = torch.empty(n, batch, capacity, dtype=torch.int64, device=model.device)
        self.clear(poison)

    def clear(self, poison: bool = False) -> None:
        """Forget everything; with `poison`, fill with NaN so that reading what nobody wrote shows."""
        self.poison = poison
        for layers in self.tensors.values():
            for x in layers:
                self._wipe(x)
        for layers in self.held.values():
            for x in layers:
                x.zero_()
        if self.positions is not None:
            self.positions.fill_(self.slots)

    def _wipe(self, x: Tensor) -> None:
        x.fill_(float("nan") if self.poison else 0)
        x.select(-2, self.slots).zero_()

    def unpack(self, layer: int, lanes: Tensor | None) -> None:
        """Before a layer runs: what it holds goes to its place in the workspace. Device work; `lanes` as in `take`."""
        if self.positions is None:
            return
        where = pick(self.positions[layer], lanes)
        for name, layers in self.held.items():
            if self.poison:
                self._wipe(self.tensors[name][layer])
            put(self.tensors[name][layer], where, pick(layers[layer], lanes), lanes)

    def pack(self, layer: int, lanes: Tensor | None) -> None:
        """After a layer ran: keep what it holds from now on."""
        if self.positions is None:
            return
        where = pick(self.positions[layer], lanes)
        for name, layers in self.held.items():
            values = take(self.tensors[name][layer], where, lanes)
            if lanes is None:
                layers[layer].copy_(values)
            else:
                layers[layer].index_copy_(0, lanes, values)

    def hold(self, layer: int, mask: Tensor, which: Tensor, lanes: Tensor | None) -> None:
        """Change what a layer holds: `mask` (batch, slots) bool for the sequences `which` (batch,) bool."""
        if self.positions is None:
            return
        slot = torch.arange(self.slots, device=mask.device)
        chosen = ascending(torch.where(mask, slot, self.slots))[0][:, : self.capacity]
        table = self.positions[layer]
        chosen = torch.where(which[:, None], chosen, pick(table, lanes))
        if lanes is None:
            table.copy_(chosen)
        else:
            table.index_copy_(0, lanes, chosen)

    @torch.inference_mode()
    def spread(self, name: str) -> list[Tensor]:
        """Copies of a store, one per layer, with a place for each slot; NaN or 0 where nothing is held."""
        copies = []
        for layer in range(len(self.tensors[name])):
            self.unpack(layer, None)
            copies.append(self.tensors[name][layer].clone())
        return copies

    @property
    def all(self) -> dict[str, list[Tensor]]:
        """Every tensor once, by store; "positions" is the table of a store with a capacity."""
        found = {
            name: list({id(x): x for x in (*layers, *self.held.get(name, ()))}.values())
            for name, layers in self.tensors.items()
        }
        return found if self.positions is None else {**found, "positions": [self.positions]}

    @property
    def n_bytes(self) -> dict[str, int]:
        """Bytes held, by store."""
        return {name: sum(x.numel() * x.element_size() for x in tensors) for name, tensors in self.all.items()}


def pick(x: Tensor, lanes: Tensor | None) -> Tensor:
    """The lanes of a tensor (sequences, ...)."""
    return x if lanes is None else x.index_select(0, lanes)


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
        self._asked: set[str] = set()
        self._replaced = False
        self._preloaded: Callable[[Bools], None] = lambda rows: None
        self._called: Callable[[int, Ints], None] = lambda b, n: None

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A device tensor of the policy's own, zeroed; ask for it in `begin` and write it in place.

        The same name and shape give the same tensor for every batch, so that a captured pass stays valid.
        """
        self._asked.add(name)
        held = self._buffers.get(name)
        if held is None or held.shape != shape or held.dtype != dtype:
            self._replaced |= held is not None
            held = self._buffers[name] = torch.empty(shape, dtype=dtype, device=self.device)
        return held.zero_()

    def asked(self) -> dict[str, Tensor]:
        """Engine only: the buffers that were asked for since the last call."""
        found = {name: self._buffers[name] for name in sorted(self._asked)}
        self._asked = set()
        return found

    def replaced(self) -> bool:
        """Engine only: whether a buffer of an earlier batch gave way to one of another shape since the last call."""
        found, self._replaced = self._replaced, False
        return found

    def on_preload(self, note: Callable[[Bools], None]) -> None:
        """Engine only: who keeps the list of written rows."""
        self._preloaded = note

    def on_alone(self, note: Callable[[int, Ints], None]) -> None:
        """Engine only: who counts forward calls beside the passes, by sequence and number of rows per region."""
        self._called = note

    def embed(self, ids: Sequence[int]) -> Tensor:
        """What rows of these tokens start from: (n, d_model)."""
        return self._model.embed(torch.tensor(ids, dtype=torch.int64, device=self.device))

    def alone(self, b: int, h: Tensor, images: slice = NO_ROWS) -> tuple[Tensor, Tensor]:
        """Keys and values of rows by themselves, in `begin`: they see each other and nothing else.

        A forward call of its own, by ordinary layers; no store is read or written. It counts as one of sequence `b`,
        with its row-layers in the first step. It takes no part in a recording.

        Args:
            b: the sequence that it is made for.
            h: (n, d_model), what the rows start from; they stand at positions from 0.
            images: which of them stand for images, for the accounts; the others count as text.

        Returns:
            keys after rotary embedding and values, each (layers, kv_heads, n, head_dim).
        """
        n, most = len(h), self.spec.max_positions
        if not 0 < n <= most:
            raise UsageError(f"{n} rows were to be computed by themselves; the model has positions for 1 to {most}")
        k, v = self._model.keys(h.to(self.device, self.dtype)[None])
        n_image = len(range(*images.indices(n)))
        self._called(b, np.array([n_image, n - n_image, 0]))  # in the order of `REGIONS`
        return k[:, 0], v[:, 0]

    def preload(self, layer: int, rows: Bools, k: Tensor, v: Tensor) -> None:
        """Put keys and values of an earlier request into the store, in `begin`; they count as written, not as computed.

        Args:
            layer: number of the layer; rows become visible once the last layer has them.
            rows: (batch, slots) bool.
            k: (batch, kv_heads, n, head_dim), rotated for these positions; n is the number of rows of the sequence that
                has most, and others have zeros behind theirs.
            v: (batch, kv_heads, n, head_dim), likewise.
        """
        if self.layers[layer].compact:
            raise UsageError("keys cannot be preloaded into a store that holds some of them; return None from capacity")
        where = torch.from_numpy(positions(rows, self.slots)).to(self.device)
        put(self.layers[layer].stores["K"], where, k)
        put(self.layers[layer].stores["V"], where, v)
        if layer == self.spec.n_layers - 1:
            self._preloaded(rows)
