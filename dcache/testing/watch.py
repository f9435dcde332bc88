"""One run with every pass watched from outside: what was written, what was counted, what was read back.

Nothing here trusts the engine's books: rows are counted where `Layer.attend` and `Layer.write` are called, what a layer
sees is read when it attends, and stores are compared bit for bit around every pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from dcache.engine.layer import Layer
from dcache.engine.packet import Packet
from dcache.errors import NumericsError
from dcache.kernels.rows import put, take
from dcache.policy import Plan
from dcache.regions import REGIONS
from dcache.testing.runs import Canvas, Run, starts
from dcache.testing.subject import Subject

BUCKETS = (4, 16, 64)  # row lists are padded, so that padding which is not one shows
FRESH = 1e-4  # a projection in another shape of row list rounds differently

READS = {
    Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__bool__, Tensor.__int__, Tensor.__float__,
    Tensor.__index__, Tensor.__array__, Tensor.nonzero, torch.nonzero, Tensor.masked_select, torch.masked_select,
}  # fmt: skip


class HostReads(TorchFunctionMode):
    """Notes tensors whose values the host asks for, except those that it made itself: each is a sync on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._own: dict[int, Tensor] = {}  # kept alive, so that their ids stay theirs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        foreign = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and id(x) not in self._own]
        if foreign and func in READS:
            self.found.append(f"{func.__name__} of a tensor of shape {tuple(foreign[0].shape)}")
        out = func(*args, **kwargs)
        if not foreign and kwargs.get("device") is None:
            self._own.update((id(x), x) for x in tree_leaves(out) if isinstance(x, Tensor))
        return out


class Attention(TorchFunctionMode):
    """Notes attention that a layer computes past `Layer.attend`, where nobody counts its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.counted, self.found = False, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= func is scaled_dot_product_attention and not self.counted
        return func(*args, **(kwargs or {}))


class Watch:
    """Watches the passes of one run.

    Attributes:
        faults: what was found, by the claim that it breaks; each a sentence with step, sequence and position.
        kept: keys and values that some pass reused, counted apart.
        embedded: per step, (batch, slots) bool: rows whose key and value layer 0 wrote. There they depend alone on what
            the row starts from.
    """

    def __init__(self, run: Run):
        self.run, self.faults, self.kept = run, defaultdict[str, list[str]](list), 0
        self.embedded: list[np.ndarray] = []
        self.waits = 0
        self._reads, self._attention = HostReads(), Attention()
        self._layer = run.policy.layer
        self._here: list[tuple[str, Tensor]] = []  # stores and rows written in the layer that runs
        self._written: dict[str, np.ndarray] = {}  # in this pass, by store
        self._counted: dict[str, np.ndarray] = {}
        self._mapped: dict[str, np.ndarray] = {}
        self._attended = np.zeros(self._shape, dtype=bool)  # in this pass
        self._refreshed = np.zeros((*self._shape[:2], len(REGIONS)), dtype=bool)  # in this step

    @property
    def _shape(self) -> tuple[int, int, int]:
        state = self.run.state
        return state.spec.n_layers, state.batch, state.slots

    def _blank(self) -> dict[str, np.ndarray]:
        """For K and V apart, (layers, batch, slots) bool."""
        return {name: np.zeros(self._shape, dtype=bool) for name in "KV"}

    def note(self, claim: str, message: str) -> None:
        """Keep a fault."""
        self.faults[claim].append(message)

    # -- the run --------------------------------------------------------------------------------------------------

    def go(self) -> Watch:
        """Decode, watching."""
        engine, policy = self.run.engine, self.run.policy
        run, rerun, plan, review = engine.run, engine.rerun, policy.plan, policy.review
        vars(engine).update(
            run=lambda plan, ask: self._step(plan, lambda: run(plan, ask)),
            rerun=lambda plan, ask, seen: self._pass(plan, lambda: rerun(plan, ask, seen)),
        )
        vars(policy).update(
            plan=self._on_host("plan", plan), review=self._on_host("review", review), layer=self._in_layer
        )
        try:
            with self._hooks():
                self.run.go()
        except NumericsError:  # what nobody wrote is NaN; the fault names the key
            if not self.faults["visible"]:
                raise
        finally:
            for owner, names in ((engine, ("run", "rerun")), (policy, ("plan", "review", "layer"))):
                for name in names:
                    vars(owner).pop(name, None)  # the engine, naming a layer, takes the hook away too
        return self

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        """Count at the doors of the engine's classes."""
        originals = {name: getattr(Layer, name) for name in ("attend", "write", "shadow", "refresh")}
        attend, write, shadow, refresh = originals.values()
        wait = Packet.wait

        def attending(at: Layer, rows: Tensor, q: Tensor) -> Tensor:
            real = self._count("rows", at, rows)
            _mark(self._mapped["rows"], at, real)
            _mark(self._attended, at, real)
            self._sees(at)
            self._attention.counted = True
            try:
                return cast(Tensor, attend(at, rows, q))
            finally:
                self._attention.counted = False

        def writing(at: Layer, rows: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> None:
            real = self._real(at, rows) if v is None else self._count("kv_rows", at, rows)
            if v is not None:
                _mark(self._mapped["kv_rows"], at, real)
            for name in [name for name, x in (("K", k), ("V", v)) if x is not None]:
                _mark(self._written[name], at, real)
                self._here.append((name, rows))
            write(at, rows, k, v)

        def refreshing(at: Layer, rows: Tensor, h: Tensor) -> Tensor:
            real = self._count("kv_rows", at, rows)
            for table in (self._mapped["kv_rows"], self._written["K"], self._written["V"]):
                _mark(table, at, real)
            self._here += [("K", rows), ("V", rows)]
            return cast(Tensor, refresh(at, rows, h))

        def shadowing(at: Layer, rows: Tensor, h: Tensor) -> Tensor:
            for name in ("rows", "kv_rows"):  # shadows have keys of their own, which no store keeps
                self._count(name, at, rows)
            return cast(Tensor, shadow(at, rows, h))

        def waiting(packet: Packet) -> None:
            self.waits += 1
            wait(packet)

        hooks = {"attend": attending, "write": writing, "shadow": shadowing, "refresh": refreshing}
        try:
            for name, hook in hooks.items():
                setattr(Layer, name, hook)
            setattr(Packet, "wait", waiting)  # noqa: B010 - a method, as mypy sees it
            yield
        finally:
            for name, original in originals.items():
                setattr(Layer, name, original)
            setattr(Packet, "wait", wait)  # noqa: B010

    def _on_host(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any) -> Any:
            with self._reads:
                out = call(*args)
            for read in self._reads.found:
                self.note("syncs", f"{self._step_text}: {name} asks for {read}, which waits for the device")
            self._reads.found.clear()
            return out

        return watched

    @property
    def _step_text(self) -> str:
        return f"step {int(self.run.state.step.max())}"

    # -- one step, one pass, one layer ----------------------------------------------------------------------------

    def _step(self, plan: Plan, call: Callable[[], Any]) -> Any:
        self._counted = {name: np.zeros(self._shape, dtype=np.int64) for name in ("rows", "kv_rows")}
        self._mapped = {name: np.zeros(self._shape, dtype=bool) for name in ("rows", "kv_rows")}
        self._refreshed = np.zeros_like(self._refreshed)
        self.embedded.append(np.zeros(self._shape[1:], dtype=bool))
        return self._pass(plan, call)

    def _pass(self, plan: Plan, call: Callable[[], Any]) -> Any:
        engine, state = self.run.engine, self.run.state
        before = {name: engine.stores.spread(name) for name in "KV"}
        self._written = self._blank()
        self._attended = np.zeros(self._shape, dtype=bool)
        self.waits = 0
        seen = call()
        engine.catch_up()
        if self.waits != 1:
            self.note("syncs", f"{self._step_text}: the pass waited for the device {self.waits} times, not once")
        rows = plan.row_mask & state.valid & state.active[:, None]
        for name, layers in before.items():
            for index, (old, new) in enumerate(zip(layers, engine.stores.spread(name), strict=True)):
                self._compare(name, index, old, new, rows)
        self.embedded[-1] |= self._written["K"][0] & self._written["V"][0]
        self._books()
        self._refreshes()
        return seen

    def _compare(self, name: str, index: int, old: Tensor, new: Tensor, rows: np.ndarray) -> None:
        """Bits of a store around a pass."""
        slots = self.run.state.slots
        bits = old[:, :, :slots].view(torch.int32) != new[:, :, :slots].view(torch.int32)
        moved = bits.any(-1).any(1).numpy()  # (batch, slots)
        self.kept += int((self.run.state.valid & self.run.state.active[:, None] & ~self._written[name][index]).sum())
        for claim, allowed, why in (
            ("kept", rows, "although the plan does not compute the row"),
            ("fresh", self._written[name][index], f"although the layer did not write {name} of the row with at.write"),
        ):
            for b, p in np.argwhere(moved & ~allowed)[:1]:
                self.note(
                    claim, f"{self._step_text}, sequence {b}, position {p}: {name} of layer {index} changed {why}"
                )

    def _books(self) -> None:
        """The engine's count and map of the step so far against the hooks'."""
        for name, mine in self._counted.items():
            for index, b, p in np.argwhere(self._mapped[name] != self.run.engine.count.maps[name])[:1]:
                was = "not " * bool(self._mapped[name][index, b, p])
                self.note(
                    "books",
                    f"{self._step_text}, sequence {b}, position {p}, layer {index}: the recompute map of {name} does "
                    f"{was}have it",
                )
            told = getattr(self.run.engine.count, name)
            count = np.stack([np.where(region, mine, 0).sum(-1) for region in self._regions()], axis=-1)
            for index, b, r in np.argwhere(count != told)[:1]:
                self.note(
                    "books",
                    f"{self._step_text}, sequence {b}, layer {index}: the engine reports {told[index, b, r]} {name} of "
                    f"the {REGIONS[r]}, but {count[index, b, r]} were computed",
                )
            for b in np.flatnonzero((count.sum((0, 2)) > 0) & ~self.run.state.active)[:1]:
                self.note(
                    "finished", f"{self._step_text}: {count[:, b].sum()} {name} of sequence {b}, which is finished"
                )

    def _regions(self) -> list[np.ndarray]:
        """For each region (batch, slots) bool, from what the canvas holds."""
        state = self.run.state
        return [state.embedded, state.prompt & ~state.embedded, state.valid & ~state.prompt]

    def _refreshes(self) -> None:
        """The engine's refreshes of the step so far against the rows that attended."""
        whole = [(self._attended | ~region).all(-1) & region.any(-1) for region in self._regions()]
        self._refreshed |= np.stack(whole, axis=-1)
        told = self.run.engine.count.refreshed
        for index, b, r in np.argwhere(self._refreshed != told)[:1]:
            self.note(
                "books",
                f"{self._step_text}, sequence {b}, layer {index}: the engine says that the {REGIONS[r]} was "
                f"{'not ' * (not told[index, b, r])}refreshed, but a pass computed {'not ' * bool(told[index, b, r])}"
                "all rows of it",
            )

    def _in_layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        self._here = []
        shown = None if at.visible is None else at.visible.clone()
        if at.index == 0:
            self._starts(at, rows, h)
        with self._attention:
            stream = self._layer(at, rows, h)
        if self._attention.found:
            self._attention.found = False
            self.note(
                "books", f"{self._step_text}, layer {at.index}: attention past at.attend, so its rows are not counted"
            )
        inputs = torch.full((h.shape[0], at.dump + 1, h.shape[-1]), float("nan"), dtype=h.dtype)
        put(inputs, rows, h)
        for name, written in self._here:
            self._projected(at, name, written, inputs)
        for b, p in np.argwhere(self._written["K"][at.index] & ~self._written["V"][at.index])[:1]:
            self.note(
                "books",
                f"{self._step_text}, sequence {b}, position {p}, layer {at.index}: its key was written without "
                "its value, so the row is not counted",
            )
        if shown is not None and at.visible is not None and not torch.equal(shown, at.visible):
            self.note(
                "visible",
                f"{self._step_text}, layer {at.index}: the layer changed at.visible, an input of the pass; write to a "
                "buffer of your own, which the next plan hands over",
            )
        return stream

    def _starts(self, at: Layer, rows: Tensor, h: Tensor) -> None:
        """What rows enter layer 0 with, against their tokens and the embeddings of their prompts."""
        expected = starts(self.run.canvas.model, self.run.state)[at.lanes[:, None], rows.clamp_max(at.dump - 1)]
        for lane, i in ((h != expected).any(-1) & (rows < at.dump)).nonzero()[:1].tolist():
            b, p = int(at.lanes[lane]), int(rows[lane, i])
            given = "the embedding of its prompt" if self.run.state.embedded[b, p] else "that of its token"
            self.note(
                "starts",
                f"{self._step_text}, sequence {b}, position {p}: layer 0 starts from {_told(h[lane, i])}, {given} is "
                f"{_told(expected[lane, i])}",
            )

    def _sees(self, at: Layer) -> None:
        """Every key that a live sequence attends to is there, and so is its value: what nobody wrote is NaN."""
        lanes, live = at.lanes.numpy(), at.live.numpy()[:, None]
        shown = self.run.state.valid[lanes] if at.visible is None else at.visible.any(1).numpy()  # (lanes, slots)
        for name in "KV":
            blank = at.stores[name][:, :, : at.dump].isnan().any(-1).any(1).numpy()[lanes]
            for lane, p in np.argwhere(shown & blank & live)[:1]:
                self.note(
                    "visible",
                    f"{self._step_text}, sequence {lanes[lane]}, position {p}: layer {at.index} attends to it, but "
                    f"nobody has written its {name} there; compute the row or hide it",
                )

    def _projected(self, at: Layer, name: str, rows: Tensor, inputs: Tensor) -> None:
        """K or V in the store against a projection of the layer's input by the model itself."""
        h = take(inputs, rows)
        if "H" in at.stores:
            h = torch.where(h.isnan(), at.stored("H", rows), h)
        model = self.run.canvas.model
        block = list(model.blocks())[at.index]
        (expected,) = block.project(block.normed(h), *model.angles(rows.clamp_max(at.dump - 1)), name.lower())
        off = ~torch.isclose(at.stored(name, rows), expected, rtol=FRESH, atol=FRESH)
        for lane, i in (off.any(-1).any(1) & (rows < at.dump)).nonzero()[:1].tolist():
            found, want = at.stored(name, rows)[lane, :, i].flatten(), expected[lane, :, i].flatten()
            place = f"{self._step_text}, sequence {int(at.lanes[lane])}, position {int(rows[lane, i])}"
            told = f"{place}: {name} of layer {at.index} is {_told(found)}, "
            told += f"a fresh projection of the layer's input is {_told(want)}"
            self.note("fresh", told)

    def _real(self, at: Layer, rows: Tensor) -> list[tuple[int, np.ndarray]]:
        """Real ones of `rows`, by number of the sequence in the batch; each may stand in a list once."""
        real = [(b, rows[lane][rows[lane] < at.dump].numpy()) for lane, b in enumerate(at.lanes.tolist())]
        for b, mine in real:
            values, often = np.unique(mine, return_counts=True)
            for p in values[often > 1][:1]:
                self.note(
                    "books",
                    f"{self._step_text}, sequence {b}, position {p}: layer {at.index} has the row twice in one call",
                )
        return real

    def _count(self, name: str, at: Layer, rows: Tensor) -> list[tuple[int, np.ndarray]]:
        """Count rows; returns the real ones."""
        real = self._real(at, rows)
        for b, mine in real:
            np.add.at(self._counted[name][at.index, b], mine, 1)
        return real


def _told(x: Tensor) -> str:
    """The beginning of a vector."""
    return f"[{x[0]:.4f}, {x[1]:.4f}, ...]"


def _mark(table: np.ndarray, at: Layer, real: list[tuple[int, np.ndarray]]) -> None:
    """Note rows of the canvas in a table (layers, batch, slots)."""
    for b, mine in real:
        table[at.index, b, mine] = True


@lru_cache(maxsize=64)
def watched(subject: Subject, canvas: Canvas) -> Watch:
    """The watched run of a subject on a canvas; several claims read it."""
    return Watch(Run(subject.policy, canvas, buckets=BUCKETS, maps=True)).go()
