"""What a batch needs on the device, from its sizes: so that an error can say what would fit."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from itertools import chain

import torch

from dcache.engine.network import ALIGN_SLOTS, store_width
from dcache.models.transformer import ModelSpec, Transformer
from dcache.state import State

POSITION_BYTES = torch.int64.itemsize


@dataclass(frozen=True)
class Needs:
    """Bytes of one batch, beside the weights and what the policy keeps in buffers.

    Attributes:
        stores: by name, exactly what `Stores` allocates.
        passes: an estimate of what a pass over all rows holds at its widest.
    """

    stores: dict[str, int]
    passes: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.stores.values()) + self.passes


def memory_needs(
    spec: ModelSpec,
    dtype_bytes: int,
    batch: int,
    slots: int,
    extra: dict[str, int],
    capacity: int | None,
    *,
    read: int = 0,
    on_gpu: bool = True,
) -> Needs:
    """What a batch needs.

    Args:
        spec: of the model.
        dtype_bytes: bytes of one number in weights, stores and hidden states.
        batch: sequences.
        slots: positions of the canvas.
        extra: stores of the policy, name to width.
        capacity: keys held per sequence and layer; None holds all.
        read: positions of a sequence whose logits a pass computes at most.
        on_gpu: whether the slots of a store are padded, as they are there.
    """
    each_slot = batch * store_width(slots, on_gpu) * dtype_bytes
    stores = {name: spec.n_layers * each_slot * width for name, width in extra.items()}
    if capacity is None:
        kv, table = spec.n_layers * each_slot * spec.kv_width, {}
    else:  # one workspace that all layers share, and what each of them holds
        held = spec.n_layers * batch * capacity
        kv, table = (each_slot + held * dtype_bytes) * spec.kv_width, {"positions": held * POSITION_BYTES}
    # A row in the MLP: layer input, sum and normed row, query and attention, gate, up and their product
    row = 3 * spec.d_model + 2 * spec.q_width + 3 * spec.mlp_size
    head = (slots + 1) * spec.d_model + read * spec.vocab_size
    return Needs({"K": kv, "V": kv, **stores, **table}, batch * dtype_bytes * (slots * row + head))


@dataclass(frozen=True)
class Batch:
    """The sizes that the memory of a batch follows from.

    Attributes:
        spec: of the model.
        dtype_bytes: as in `memory_needs`, like the three below.
        slots: positions of the canvas.
        extra: stores of the policy.
        capacity: keys held.
        texts: sequences, or with guidance pairs of them.
        per_text: 1 or 2.
        prompt: tokens of the longest prompt.
        read: positions to generate, whose logits may be wanted.
        graphs: whether passes are recorded: a recording keeps the memory of its pass beside that of an eager one.
        on_gpu: whether slots are padded.
    """

    spec: ModelSpec
    dtype_bytes: int
    slots: int
    extra: dict[str, int]
    capacity: int | None
    texts: int
    per_text: int
    prompt: int
    read: int
    graphs: bool
    on_gpu: bool

    @staticmethod
    def of(state: State, model: Transformer, extra: dict[str, int], capacity: int | None, graphs: bool) -> Batch:
        """The sizes of a canvas and of what runs on it."""
        return Batch(
            spec=state.spec,
            dtype_bytes=model.dtype.itemsize,
            slots=state.slots,
            extra=extra,
            capacity=capacity,
            texts=state.n_texts,
            per_text=state.batch // state.n_texts,
            prompt=int(state.gen_start.max()),
            read=int((state.lengths - state.gen_start).max()),
            graphs=graphs,
            on_gpu=model.device.type != "cpu",
        )

    @property
    def needs(self) -> Needs:
        """What it needs."""
        capacity = None if self.capacity is None or self.capacity >= self.slots else self.capacity
        sizes = self.texts * self.per_text, self.slots, self.extra, capacity
        found = memory_needs(self.spec, self.dtype_bytes, *sizes, read=self.read, on_gpu=self.on_gpu)
        return replace(found, passes=found.passes * (1 + self.graphs))

    def longest(self, n_bytes: int) -> int:
        """Slots of the longest canvas below this one of which one text fits into so much memory; 0 for none."""
        step = ALIGN_SLOTS if self.on_gpu else 1
        canvases = range(step, self.slots, step)
        fitting = bisect_right(canvases, n_bytes, key=lambda n: replace(self, texts=1, slots=n).needs.total)
        return fitting * step


@dataclass(frozen=True)
class Room:
    """Bytes on a device.

    Attributes:
        total: of the device.
        free: of these, what nobody has taken.
        weights: what the model takes.
        batch: left for a batch: what is free, and what this process took for anything but the weights.
    """

    total: int
    free: int
    weights: int
    batch: int


def room_on(model: Transformer) -> Room | None:
    """How much there is where the model is; None on a device that does not tell."""
    if model.device.type != "cuda":
        return None
    weights = sum(x.nbytes for x in chain(model.parameters(), model.buffers()))
    free, total = torch.cuda.mem_get_info(model.device)
    return Room(total, free, weights, max(0, free + torch.cuda.memory_reserved(model.device) - weights))


def does_not_fit(batch: Batch, device: torch.device, room: Room | None) -> str:
    """The message of an error: what there is, what the batch needs, and what would fit."""
    needs, one = batch.needs, replace(batch, texts=1).needs
    there = "" if room is None else f" ({gib(room.total)}, {gib(room.free)} free, weights {gib(room.weights)})"
    stores = ", ".join(f"{name} {gib(size)}" for name, size in needs.stores.items())
    return (
        f"out of memory on {device}{there}: batch_size {batch.texts} with {batch.slots} slots needs "
        f"{gib(sum(needs.stores.values()))} of stores ({stores}) and, by an estimate, {gib(needs.passes)} for a pass "
        f"over all rows; that is {gib(one.total)} per text; {_advice(batch, one.total, room)}"
    )


def _advice(batch: Batch, one: int, room: Room | None) -> str:
    smaller = f"choose a batch_size below {batch.texts}" if batch.texts > 1 else "choose a shorter prompt or gen_length"
    if room is None:
        return smaller
    if (most := room.batch // one) >= batch.texts:
        return f"by these numbers it would fit, so something that they leave out takes memory: {smaller}"
    if most > 0:
        return f"a batch_size of {most} would fit"
    slots = batch.longest(room.batch)
    if slots <= batch.prompt:
        return f"not even one fits, and prompts are longer than the {slots} positions that would: choose shorter ones"
    return f"not even one fits; with this prompt of {batch.prompt} tokens a gen_length of {slots - batch.prompt} would"


def gib(n_bytes: int) -> str:
    """A size to read, in GiB, or in MiB where that is too coarse."""
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 // 10 else f"{n_bytes / 2**20:.1f} MiB"
