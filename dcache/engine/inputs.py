"""What a pass reads, as host arrays: masks become padded positions, batch arrays those of the lanes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Literal

import numpy as np
from torch import Tensor

from dcache.arrays import Bools, Ints, positions
from dcache.policy import Plan
from dcache.state import State
from dcache.unmasking.base import Ask

# Rows, of all lanes together, up to which a product costs little more than reading its weights
FEW_TOGETHER = 128
LANE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Inputs:
    """Turns plans and asks over one batch into the arrays of a pass.

    Args:
        state: the batch.
        buckets: sizes to which row lists are padded, and with them the number of lanes; () takes exact sizes.
    """

    def __init__(self, state: State, buckets: Sequence[int]):
        self.state, self.buckets = state, sorted(buckets)
        self._everyone = np.arange(state.batch)
        self._complete = bool(state.valid.all())
        self._sizes: dict[int, list[int]] = {}  # by the number of lanes that share a bucket

    def arrays(self, plan: Plan, ask: Ask) -> dict[str, np.ndarray]:
        """Every array that the pass reads, by lane. Positions are padded with the number of slots."""
        state = self.state
        part = state.active if plan.start is None else state.active & (plan.start < state.spec.n_layers)
        lanes = self.lanes(part)
        # if every sequence has a lane, which is the rule at batch 1, no array is copied
        by_lane: slice | Ints = slice(None) if len(lanes) == state.batch else lanes
        present = None  # where nothing has to be left out
        if lanes is not self._everyone:
            present = (state.valid & part[:, None])[by_lane]
        elif not self._complete:
            present = state.valid
        read = self._read(plan, ask)
        where = self._positions(read[by_lane], least=1)
        rows = self._positions(_within(plan.row_mask[by_lane], present), least=1, lanes=len(lanes))
        arrays: dict[str, np.ndarray] = {
            "lanes": lanes,
            "rows": rows,
            "tokens": _at(state.tokens[by_lane], rows, "wrap"),  # of the dump slot any will do
            "live": part[by_lane],
            "where": where,
            "sequence": state.ids[by_lane, None],
            "step": state.step[by_lane, None],
        }
        if read is not ask.window:  # else all that is read is in it
            arrays["window"] = _at(wider(ask.window[by_lane]), where)
        if plan.start is not None:
            arrays["start"] = plan.start[by_lane].astype(np.int64)
        for name, mask in plan.sets.items():
            arrays[f"set {name}"] = self._positions(_within(mask[by_lane], present))
        for name, flag in plan.flags.items():
            arrays[f"flag {name}"] = flag[by_lane]
        for name, flag in ask.flags.items():
            mine = flag[by_lane]
            arrays[f"ask {name}"] = _at(wider(mine), where) if flag.ndim == 2 else mine
        if ask.shadow is not None:
            shadow = ask.shadow & state.valid & state.active[:, None]
            arrays["shadow"] = self._positions(shadow[by_lane], least=1)
        if (shown := self._visible(plan, lanes)) is not None:
            arrays["visible"] = shown
        return arrays

    def flags_by_slot(self, arrays: Mapping[str, np.ndarray]) -> list[str]:
        """Arrays of a plan's flags with an entry for every slot, to which the pass adds one for the dump slot: 0."""
        return [name for name, x in arrays.items() if name.startswith("flag ") and x.shape[1:] == (self.state.slots,)]

    def key(self, plan: Plan, arrays: dict[str, np.ndarray]) -> tuple[Hashable, ...]:
        """Kind, marks, first layer, whether all lanes are live, and all shapes: what a recording depends on.

        With the shapes of the masks themselves, since positions do not show that a mask was too wide: a plan whose key
        is known has nothing out of range.
        """
        shapes = tuple([(name, value.shape, value.dtype) for name, value in arrays.items()])
        masks = plan.row_mask.shape, *[mask.shape for mask in plan.sets.values()]
        v = plan.visible
        device_mask = (v.shape, v.dtype, v.device) if isinstance(v, Tensor) else None
        live = arrays["lanes"] is self._everyone or bool(arrays["live"].all())
        return plan.kind, *sorted(plan.marks.items()), self.first_layer(plan), live, device_mask, masks, shapes

    def lanes(self, part: Bools) -> Ints:
        """The sequences of a pass: those that take part, and as many of the others as fill the bucket.

        A guided text takes part with both of its sequences, so that their logits can be combined.

        Args:
            part: (batch,) bool. If it is empty, all active sequences run without rows.
        """
        if np.count_nonzero(part) == self.state.batch:
            return self._everyone
        n_texts = self.state.n_texts
        part = part if part.any() else self.state.active
        texts: Bools = np.asarray(part.reshape(-1, n_texts).any(0))  # one row, or two of a guided batch
        n = int(texts.sum())
        if self.buckets and n < n_texts:
            size = min(next(size for size in (*LANE_BUCKETS, n_texts) if size >= n), n_texts)
            texts = texts.copy()
            texts[np.flatnonzero(~texts)[: size - n]] = True
        return np.flatnonzero(np.tile(texts, self.state.batch // n_texts))

    def first_layer(self, plan: Plan) -> int:
        """The lowest layer that a sequence of the plan starts at."""
        if plan.start is None:
            return 0
        return int(plan.start[self.state.active].min(initial=self.state.spec.n_layers))

    def _read(self, plan: Plan, ask: Ask) -> Bools:
        """(batch, slots): positions whose logits are wanted; the same for both sequences of a guided text.

        That is ``ask.window`` itself where nothing is added to it: what it holds is masked, so of active sequences.
        """
        state = self.state
        read = ask.window if ask.read is None else ask.read
        if read is ask.window and plan.watch is None and not state.guided:
            return read
        if plan.watch is not None:
            read = read | (plan.watch & state.valid)
        if state.guided:
            read = np.tile(read.reshape(2, -1, state.slots).any(0), (2, 1))
        return read & state.active[:, None]

    def _visible(self, plan: Plan, lanes: Ints) -> np.ndarray | None:
        """(lanes, 1, slots) or (layers, lanes, 1 or kv_heads, slots); None if no key is hidden, or on the device."""
        if isinstance(plan.visible, Tensor) or (plan.visible is None and self._complete):
            return None
        valid = self.state.valid[lanes]
        if plan.visible is None and valid.all():
            return None
        shown = self.state.valid if plan.visible is None else plan.visible
        shown = shown[lanes, None] if shown.ndim == 2 else shown[:, lanes]
        return np.asarray(shown & valid[:, None])

    def _positions(self, mask: Bools, least: int = 0, lanes: int = 1) -> Ints:
        """Ascending positions (lanes, n), n padded to a bucket; a list may be empty unless `least` is 1.

        With `lanes`, the lists of so many lanes may share one.
        """
        sizes = self._sizes.get(lanes)
        if sizes is None:
            sizes = self._sizes[lanes] = padded_sizes(self.state.slots, self.buckets, lanes)
        return positions(mask, self.state.slots, sizes.__getitem__, least)


def padded_sizes(slots: int, buckets: Sequence[int], lanes: int = 1) -> list[int]:
    """To how many places a list of 0, 1, ... `slots` positions is padded; an empty one stays empty.

    That is the first bucket that holds it, or `slots`. Where all `lanes` together fill a smaller bucket, it is their
    share of that: a product sees the rows of all of them, and from `FEW_TOGETHER` on its time grows with them. Below, a
    smaller size would save nothing and be one more shape to record.

    Args:
        slots: of the canvas; no list is longer.
        buckets: ascending; none takes exact sizes.
        lanes: how many lists there are, of which the longest counts.
    """
    if not buckets:
        return list(range(slots + 1))
    n = np.arange(1, slots + 1)
    sizes = _first_of(buckets, n, otherwise=slots)
    if lanes > 1:
        large = [b for b in buckets if b >= FEW_TOGETHER]
        sizes = np.minimum(sizes, _first_of(large, n * lanes, otherwise=slots * lanes) // lanes)
    return [0, *sizes.tolist()]


def _first_of(buckets: Sequence[int], n: Ints, otherwise: int) -> Ints:
    """The first bucket that is no smaller than `n` (k,); `otherwise` where there is none, and at most."""
    first: Ints = np.array([*buckets, otherwise])[np.searchsorted(buckets, n)]
    return np.minimum(first, otherwise)


def wider(x: np.ndarray) -> np.ndarray:
    """(n, slots) with a last column of 0 for the dump slot; a tenth of the time of `np.pad`."""
    table = np.zeros((x.shape[0], x.shape[1] + 1), x.dtype)
    table[:, :-1] = x
    return table


def _within(mask: Bools, present: Bools | None) -> Bools:
    """`mask` without what is not present; None leaves nothing out."""
    return mask if present is None else mask & present


def _at(table: np.ndarray, where: Ints, outside: Literal["raise", "wrap"] = "raise") -> np.ndarray:
    """Entries (lanes, w) of a table (lanes, slots) or (lanes, slots + 1); with "wrap", any entry for one outside."""
    n, width = table.shape
    return table.take(where if n == 1 else where + np.arange(0, n * width, width)[:, None], mode=outside)
