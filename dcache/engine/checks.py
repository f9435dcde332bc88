"""What the engine holds a policy to, on the host, at every step and without a sync."""

from __future__ import annotations

from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from dcache.arrays import Bools
from dcache.errors import PolicyError, UnmaskerError
from dcache.policy import Plan
from dcache.state import FLAG_DTYPES, State
from dcache.unmasking.base import Ask

STALLED_AFTER = 8  # steps without a commit, with commits due


class Checks:
    """Checks of one policy over one batch; each failure names the policy, the step, what was expected and found.

    Args:
        label: the policy as it should be named, e.g. ``'periodic' (my-package 0.1)``.
        state: the batch.
        stores: names of the policy's stores.
        device: of the model.
        compact: whether keys are freed between passes, so that one written by an earlier pass may be gone.
    """

    def __init__(self, label: str, state: State, stores: frozenset[str], device: torch.device, compact: bool = False):
        self.label, self.state, self.stores, self.device, self.compact = label, state, stores, device, compact
        self.written: Bools = np.zeros_like(state.valid)  # rows whose K and V some pass has written
        self._allowed = ((state.batch,), state.valid.shape, (state.batch, state.spec.n_layers))  # shapes of flags
        self._flag_shapes: dict[tuple[object, ...], dict[str, tuple[tuple[int, ...], np.dtype]]] = {}
        self._idle = np.zeros(state.batch, dtype=np.int64)

    def fail(self, message: str, cause: Exception | None = None) -> NoReturn:
        """Raise, naming policy and step."""
        raise PolicyError(f"policy {self.label}, step {int(self.state.step.max())}: {message}") from cause

    def preloaded(self, rows: Bools) -> None:
        """Take note of keys that the policy wrote in `begin`."""
        self.written |= rows

    def plan(self, plan: Plan, second: bool) -> None:
        """Shapes, dtypes and ranges of a plan; every visible key has been written."""
        if not isinstance(plan, Plan):
            self.fail(f"{'review' if second else 'plan'} returned a {type(plan).__name__}, expected a Plan")
        try:
            hash((plan.kind, *plan.marks.items()))
        except TypeError as error:
            self.fail(f"kind {plan.kind!r} or marks {dict(plan.marks)!r} cannot be part of a key: {error}")
        self._masks(plan)
        self._start(plan, second)
        self._flags(plan, second)
        self._shown(plan)
        if second:
            self._finished(plan)

    def keys(self, plan: Plan, ask: Ask) -> None:
        """Every visible key has been written; may run while the pass does."""
        self._restarted(plan)
        self._visible(plan)
        self.shadows(ask)

    def window(self, ask: Ask) -> None:
        """What may be committed is masked; may run while the pass does."""
        outside = ask.window & ~self.state.masked
        if outside.any():
            b, p = (int(i[0]) for i in np.nonzero(outside))
            raise UnmaskerError(
                f"step {self.state.step[b]}: the window of sequence {b} holds position {p}, which is not masked; "
                "ask for rows of State.masked alone"
            )

    def _masks(self, plan: Plan) -> None:
        shape = self.state.valid.shape
        masks = {"row_mask": plan.row_mask, **{f"sets[{k!r}]": v for k, v in plan.sets.items()}}
        if plan.watch is not None:
            masks["watch"] = plan.watch
        for name, mask in masks.items():
            if not isinstance(mask, np.ndarray):
                self.fail(
                    f"{name} is a {type(mask).__name__}, expected a numpy bool array (batch={shape[0]}, "
                    f"slots={shape[1]}); plans live on the host"
                )
            if mask.shape != shape:
                hint = "; add a batch axis" if mask.shape == shape[1:] else ""
                self.fail(f"{name} has shape {mask.shape}, expected (batch={shape[0]}, slots={shape[1]}){hint}")
            if mask.dtype != np.bool_:
                self.fail(f"{name} has dtype {mask.dtype}, expected bool")

    def _start(self, plan: Plan, second: bool) -> None:
        if plan.start is None:
            return
        state, layers = self.state, self.state.spec.n_layers
        start = plan.start
        if not isinstance(start, np.ndarray):
            self.fail(f"start is a {type(start).__name__}, expected a numpy array (batch={state.batch},) int64")
        if start.shape != (state.batch,) or not np.issubdtype(start.dtype, np.integer):
            self.fail(f"start has shape {start.shape} and dtype {start.dtype}, expected (batch={state.batch},) int64")
        if ((start < 0) | (start > layers)).any():
            self.fail(f"start is {start.tolist()}, expected layers in 0..{layers} ({layers} = sits this pass out)")
        late = (start > 0) & (start < layers) & state.active
        if late.any() and "H" not in self.stores:
            self.fail('a pass above layer 0 starts from the store "H"; return {"H": spec.d_model} from stores()')

    def _flags(self, plan: Plan, second: bool) -> None:
        state = self.state
        shapes = {}
        for name, flag in plan.flags.items():
            if not isinstance(flag, np.ndarray) or flag.shape not in self._allowed:
                found = flag.shape if isinstance(flag, np.ndarray) else type(flag).__name__
                self.fail(
                    f"flags[{name!r}] is {found}, expected a numpy array (batch={state.batch},), "
                    f"(batch, slots={state.slots}) or (batch, layers={state.spec.n_layers})"
                )
            if flag.dtype not in FLAG_DTYPES:
                self.fail(f"flags[{name!r}] has dtype {flag.dtype}, expected bool, int64 or float32")
            shapes[name] = (flag.shape, flag.dtype)
        known = self._flag_shapes.setdefault((plan.kind, *sorted(plan.marks.items()), second), shapes)
        if known != shapes:
            self.fail(f"flags of kind {plan.kind!r} are {shapes}, but were {known} in an earlier step of that kind")

    def _restarted(self, plan: Plan) -> None:
        if plan.start is None:
            return
        late = (plan.start > 0) & (plan.start < self.state.spec.n_layers) & self.state.active
        for b in np.flatnonzero(late):
            if (plan.row_mask[b] & self.state.valid[b] & ~self.written[b]).any():
                self.fail(f"sequence {b} starts at layer {plan.start[b]} but not all of its rows have had a pass yet")

    def _shown(self, plan: Plan) -> None:
        state, visible = self.state, plan.visible
        if visible is None:
            return
        if not isinstance(visible, np.ndarray | Tensor):
            self.fail(f"visible is a {type(visible).__name__}, expected a numpy array or a tensor on the device")
        shape = tuple(visible.shape)
        per_layer = (
            len(shape) == 4
            and shape[:2] == (state.spec.n_layers, state.batch)
            and shape[2] in (1, state.spec.n_kv_heads)
            and shape[3] == state.slots
        )
        if shape != state.valid.shape and not per_layer:
            self.fail(
                f"visible has shape {shape}, expected (batch={state.batch}, slots={state.slots}) or "
                f"(layers={state.spec.n_layers}, batch, 1 or kv_heads={state.spec.n_kv_heads}, slots)"
            )
        if visible.dtype not in (np.bool_, torch.bool):
            self.fail(f"visible has dtype {visible.dtype}, expected bool")
        if isinstance(visible, Tensor) and visible.device != self.device:
            self.fail(f"visible is a tensor on {visible.device}, expected numpy, or a tensor on {self.device}")

    def _visible(self, plan: Plan) -> None:
        state, visible = self.state, plan.visible
        if isinstance(visible, Tensor):
            return  # decided on the device: reading it here would be a sync
        seen = state.valid
        if visible is not None:
            seen = (visible if visible.ndim == 2 else visible.any((0, 2))) & state.valid
        missing = seen & ~plan.row_mask & self._takes_part(plan)[:, None]
        missing = missing if self.compact else missing & ~self.written
        if missing.any():
            b, p = (int(i[0]) for i in np.nonzero(missing))
            if self.compact:
                self.fail(
                    f"sequence {b} attends to position {p}, which this pass does not compute and a store with a "
                    "capacity may have freed; compute the row, or hide on the device what is not held"
                )
            self.fail(
                f"sequence {b} attends to position {p}, whose key and value nobody has written; compute the row in "
                "this pass or hide it"
            )

    def shadows(self, ask: Ask) -> None:
        """Shadow rows read the keys of all layers after the pass."""
        if self.compact and ask.shadow is not None:
            self.fail("the unmasker asks for shadow rows, which read keys that a store with a capacity has freed")

    def _takes_part(self, plan: Plan) -> Bools:
        active: Bools = self.state.active & (plan.row_mask & self.state.valid).any(1)
        return active if plan.start is None else active & (plan.start < self.state.spec.n_layers)

    def progress(self, ask: Ask) -> None:
        """Stop a sequence that commits nothing for several steps although commits are due."""
        state = self.state
        idle = state.active & ask.due & ~state.changed.any(1) & (state.step > 0)
        self._idle = np.where(idle, self._idle + 1, 0)
        if (self._idle >= STALLED_AFTER).any():
            b = int((self._idle >= STALLED_AFTER).argmax())
            assert state.seen is not None
            lost = np.flatnonzero(state.window[b] & ~state.seen.predicted[b]).tolist()
            self.fail(
                f"sequence {b} has committed nothing for {STALLED_AFTER} steps; of its window, positions {lost} were "
                "not predicted, because the rows that predict them (State.needed) did not reach the last layer"
            )

    def _finished(self, plan: Plan) -> None:
        """A review computes rows of active sequences alone."""
        idle = plan.row_mask.any(1) & ~self.state.active
        if idle.any():
            self.fail(f"review returned rows for sequence {int(idle.argmax())}, which is finished")

    def stream(self, index: int, stream: object, before: Tensor, fixed: bool, debug: bool) -> tuple[Tensor, Tensor]:
        """What `layer` returned, checked whenever Python runs the pass: shape and dtype; in debug mode values too."""
        width = self.state.spec.d_model
        if not (isinstance(stream, tuple) and len(stream) == 2 and all(isinstance(x, Tensor) for x in stream)):
            self.fail(f"layer {index} returned {type(stream).__name__}, expected a pair of tensors (rows, h)")
        rows, h = stream
        if rows.dtype != torch.int64 or rows.dim() != 2 or rows.shape[0] != before.shape[0]:
            self.fail(f"layer {index} returned rows {tuple(rows.shape)} {rows.dtype}, expected (batch, m) int64")
        if tuple(h.shape) != (*rows.shape, width) or h.dtype != before.dtype or h.device != before.device:
            self.fail(
                f"layer {index} returned h {tuple(h.shape)} {h.dtype} on {h.device}, expected "
                f"(batch={rows.shape[0]}, rows={rows.shape[1]}, d_model={width}) {before.dtype} on {before.device}"
            )
        if fixed and rows.shape[1] != before.shape[1]:
            self.fail(
                f"layer {index} changed the stream from {before.shape[1]} to {rows.shape[1]} rows in a pass with "
                "`start`; sequences that enter at different layers need one width"
            )
        if debug:
            table, slots = rows.cpu().numpy(), self.state.slots
            falls = (np.diff(table, axis=1) < 1) & (table[:, 1:] < slots)
            if falls.any() or (table < 0).any() or (table > slots).any():
                self.fail(
                    f"layer {index} returned rows {table.tolist()}, expected ascending positions in 0..{slots - 1}, "
                    f"padded with {slots}"
                )
        return rows, h
