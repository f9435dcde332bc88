"""What a cache policy composes a layer from: every method is fixed-shape device work, safe under capture."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import ref

import torch
from torch import Tensor

from dcache.engine.across import Across
from dcache.engine.aside import Aside
from dcache.engine.network import Stores
from dcache.engine.packet import NUMPY
from dcache.kernels.attend import Keys, attend, attend_each, attend_lse, finds_lse, hide
from dcache.kernels.attention_probs import head_mean, probs, products, received
from dcache.kernels.drift import drift
from dcache.kernels.product import product
from dcache.kernels.rms_norm import rms_norm_keep
from dcache.kernels.rotary import rotary, rotary_scatter
from dcache.kernels.rows import put, take, tally
from dcache.models.transformer import Block, Transformer
from dcache.regions import NOWHERE, REGIONS

# What the device counts: rows that attended, rows that were projected, and those of the first that an earlier call of
# the same layer had attended with in the same pass.
COUNTERS = ("rows", "kv_rows", "repeated")


@dataclass
class Books:
    """What one kind of pass is known to compute, found out at its first, eager run.

    `planned` counts the calls that worked on exactly the rows of the plan, which the host knows; the rows of the other
    calls are counted by the device in `Boards.counted`. `together` says that the queries of all layers were asked for
    as one tensor: from the next run on they are made in one place.
    """

    planned: dict[str, list[int]]
    on_device: bool = False
    together: bool = False
    reports: list[str] = field(default_factory=list)
    per_layer: dict[str, bool] = field(default_factory=dict)

    def counted(self, maps: bool) -> list[str]:
        """Names of the results of a pass that accounts are made of."""
        names = ["counted"] if self.on_device else []
        return [*names, *(f"map {name}" for name in self.planned)] if maps else names


@dataclass
class Pass:
    """The device side of one pass; the same tensors at every replay.

    Attributes:
        kind: of the plan.
        marks: of the plan.
        lanes: (batch,) int64 sequences of the pass, ascending; its batch may be smaller than that of the stores.
        whole: whether the lanes are all sequences.
        rows: (batch, n) int64, padded with the dump slot.
        live: (batch,) bool: sequences that take part.
        all_live: whether that is every lane, from the first layer on.
        start: (batch,) int64 first layer of each sequence, or None when all start from the embedding.
        first: lowest layer that any sequence starts at; the layers below it do not run.
        sets: name to (batch, k) int64.
        flags: name to tensor.
        visible: (batch, 1, slots) or (layers, batch, 1 or kv_heads, slots) bool, or None when no key is hidden.
        books: the accounts of this kind of pass.
        keys: the visible keys as lists, made of `visible` at the start of the pass.
    """

    kind: Hashable
    marks: Mapping[str, Hashable]
    lanes: Tensor
    whole: bool
    rows: Tensor
    live: Tensor
    all_live: bool
    start: Tensor | None
    first: int
    sets: Mapping[str, Tensor]
    flags: Mapping[str, Tensor]
    visible: Tensor | None
    books: Books
    keys: Keys | None = None


class Boards:
    """Device buffers that layers write and the engine reads: reports, and counters of computed rows.

    Reports are kept by sequence, since a second pass adds to those of the first; counters by lane of the pass.

    Attributes:
        reports: name to (layers, batch, ...) or (batch, ...).
        counted: (counters, layers, batch, regions) int64, in the order of `COUNTERS`.
        regions: (batch, slots + 1) uint8: the region of every position, by sequence; see `dcache.regions`.
        maps: "rows" and "kv_rows" to (layers, batch, slots + 1) bool when the recompute map was asked for.
        found: layer to what its attention found in this pass and no write has outdated: rows (batch, n), and
            log-sum-exps (batch, heads, n). Only where a kernel attended.
        written: layer to the rows (batch, n) of every write of its keys in this pass.
        queries: (layers, batch, n, heads, head_dim), the queries of a pass that makes them in one place; else None.
    """

    def __init__(self, layers: int, batch: int, slots: int, device: torch.device, maps: bool):
        self.layers, self.batch = layers, batch
        self.reports: dict[str, Tensor] = {}
        self.found: dict[int, tuple[Tensor, Tensor]] = {}
        self.written: dict[int, list[Tensor]] = {}
        self.queries: Tensor | None = None
        self.counted = torch.zeros(len(COUNTERS), layers, batch, len(REGIONS), dtype=torch.int64, device=device)
        self.regions = torch.full((batch, slots + 1), NOWHERE, dtype=torch.uint8, device=device)
        self.maps = (
            {
                name: torch.zeros(layers, batch, slots + 1, dtype=torch.bool, device=device)
                for name in ("rows", "kv_rows")
            }
            if maps
            else {}
        )

    def clear(self, second: bool) -> None:
        """Device work at the start of a pass; a `second` one of a step adds to the reports of the first."""
        self.found.clear()
        self.written.clear()
        self.queries = None
        for x in (self.counted, *self.maps.values(), *(() if second else self.reports.values())):
            x.zero_()

    def room(self, layer: int, like: Tensor, heads: int, head_dim: int) -> Tensor:
        """Where the queries of a layer go: (batch, n, heads, head_dim), for `like` (batch, n, width).

        Those of a second write of the layer, or of another number of rows, go elsewhere.
        """
        if self.queries is None:
            self.queries = like.new_empty(self.layers, *like.shape[:2], heads, head_dim)
        if layer in self.written or self.queries.shape[1:3] != like.shape[:2]:
            return like.new_empty(*like.shape[:2], heads, head_dim)
        return self.queries[layer]

    def wrote(self, layer: int, rows: Tensor) -> None:
        """Note a write of keys."""
        self.written.setdefault(layer, []).append(rows)


class Layer:
    """One transformer layer over the stores; `at` in a policy.

    The batch of a pass are the sequences that take part in it, `lanes`; methods find their part of the stores by
    themselves. Positions are int64 (batch, n), padded with the dump slot. Statistics run over the visible keys and
    have a last column for the dump slot, always 0, so that they can be gathered by padded positions.

    Attributes:
        index: number of the layer, from 0.
        last: whether it is the last one.
        dump: number of the dump slot.
        q: (batch, heads, n, head_dim) queries of the latest `refresh` or `attend` in this layer, while it runs.
        q_rows: (batch, n) int64, the rows they are of.
        stores: this layer's part of every store, all sequences; `stored` and `store` read and write rows of it.
    """

    def __init__(self, model: Transformer, block: Block, index: int, stores: Stores, boards: Boards, beside: Aside):
        self.index, self.last, self.dump = index, index == model.spec.n_layers - 1, stores.slots
        self.spec = model.spec
        self._model, self._block, self._boards, self._beside = model, block, boards, beside
        self.stores = {name: layers[index] for name, layers in stores.tensors.items()}
        self._held = stores
        self._pass: Pass | None = None
        self._stream: Tensor | None = None
        self._live: Tensor | None = None
        self._attended: list[Tensor] = []  # rows that attended here in this pass, as far as the device counts them
        self.q: Tensor | None = None
        self.q_rows: Tensor | None = None
        # Queries, as long as somebody keeps them, and the logarithm of their softmax's denominator
        self._lse: tuple[ref[Tensor], Tensor] | None = None

    def enter(self, current: Pass, rows: Tensor, live: Tensor) -> None:
        """Engine only: the pass this layer takes part in, the rows of its plan here, and the live sequences."""
        self._pass, self._stream, self._live, self.q, self.q_rows, self._lse = current, rows, live, None, None, None
        self._attended = []

    def leave(self, rows: Tensor, h: Tensor) -> None:
        """Engine only: the layer has run on `rows` and `h`; what runs beside it may still read them, and `q`."""
        self._beside.hold(rows, h, self.q, self._lse)
        self.q = self.q_rows = None
        self._attended = []

    @property
    def compact(self) -> bool:
        """Whether keys and values are freed between passes: see `hold`."""
        return self._held.capacity is not None

    def unpack(self) -> None:
        """Engine only: bring back what this layer holds, to where another layer's keys are, which may be read aside."""
        if self.compact:
            self._beside.join()
        self._held.unpack(self.index, self._lanes)

    def pack(self) -> None:
        """Engine only: keep what this layer holds, after it ran."""
        self._held.pack(self.index, self._lanes)

    @property
    def now(self) -> Pass:
        """The pass that runs."""
        assert self._pass is not None, "a layer was used outside a pass"
        return self._pass

    @property
    def kind(self) -> Hashable:
        """`Plan.kind` of this pass."""
        return self.now.kind

    @property
    def marks(self) -> Mapping[str, Hashable]:
        """`Plan.marks` of this pass."""
        return self.now.marks

    @property
    def sets(self) -> Mapping[str, Tensor]:
        """`Plan.sets` as ascending positions (batch, k), padded with the dump slot."""
        return self.now.sets

    @property
    def flags(self) -> Mapping[str, Tensor]:
        """`Plan.flags` as tensors; (batch, slots) flags have a last column of 0 for the dump slot."""
        return self.now.flags

    @property
    def lanes(self) -> Tensor:
        """(batch,) int64: number of each sequence of this pass in the batch that `begin` saw.

        Index a tensor of your own with a batch axis by it: ``take(mine, rows, at.lanes)``, ``mine[at.lanes]``.
        """
        return self.now.lanes

    @property
    def live(self) -> Tensor:
        """(batch,) bool: sequences that run this layer in this pass."""
        assert self._live is not None
        return self._live

    @property
    def visible(self) -> Tensor | None:
        """(batch, 1 or kv_heads, slots) bool, or None when no key is hidden."""
        visible = self.now.visible
        return visible[self.index] if visible is not None and visible.dim() == 4 else visible

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is computed inside is only reported: on a GPU it runs beside the rest of the pass.

        It sees what was written before it, and a store that it reads by a method is not written again before it is
        done. Inside, read stores, sets and flags, the arguments of `layer`, `at.q`, and tensors that live until the
        next pass. What is made inside may be used in a later ``with at.aside()`` of the same pass, and nowhere else.
        """
        with self._beside.run():
            yield

    @property
    def across(self) -> Across:
        """All layers at once, for statistics: in layer 0, before its `refresh`, of old keys; in the last of new ones.

        Raises:
            ValueError: if keys are freed between passes, see `hold`.
        """
        if self.compact:
            raise ValueError(
                "the keys of other layers are freed where a policy has a capacity; use one layer at a time"
            )
        return Across(self, self._held.whole, self._boards)

    # -- an ordinary layer is these three calls -------------------------------------------------------------------

    def compute(self, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The default layer: fresh K and V at `rows`, attention over all visible keys, MLP."""
        q = self.refresh(rows, h)
        return rows, self.finish(h, self.attend(rows, q))

    def refresh(self, rows: Tensor, h: Tensor) -> Tensor:
        """Project rows and overwrite their K and V; keep H and Q if the policy stores them.

        Args:
            rows: (batch, n).
            h: (batch, n, d_model), input of the layer.

        Returns:
            queries (batch, heads, n, head_dim), rotated.
        """
        block, spec, stores = self._block, self.spec, self.stores
        if "H" in stores:
            self._beside.writes(self.index, "H")
            y = rms_norm_keep(h, block.norm1, spec.norm_eps, stores["H"], rows, self._lanes)
        else:
            y = block.normed(h)
        qkv = product(y, block.qkv)
        self._beside.writes(self.index, "K", "V", "Q")
        q = rotary_scatter(
            qkv,
            block.qkv_bias,
            rows,
            self._model.cos,
            self._model.sin,
            spec.rope_full_precision,
            stores["K"],
            stores["V"],
            self._lanes,
            stores.get("Q"),
            self._model.positions(rows),
            self._boards.room(self.index, qkv, spec.n_heads, spec.head_dim) if self.now.books.together else None,
        )
        self._count("kv_rows", rows)
        self._forget()
        self._boards.wrote(self.index, rows)
        self.q, self.q_rows = q, rows
        return q

    def attend(self, rows: Tensor, q: Tensor) -> Tensor:
        """Attention of `q` (batch, heads, n, head_dim) over the visible keys: (batch, n, heads * head_dim).

        Counts `rows` as computed.
        """
        self._count("rows", rows)
        self._forget()
        self.q, self.q_rows = q, rows
        given = q, *self._keys(), self.visible, self._lanes, self._listed()
        if not finds_lse(q, self.visible, self._lanes):
            return attend(*given).transpose(1, 2).flatten(2)
        o, lse = attend_lse(*given)
        self._lse, self._boards.found[self.index] = (ref(q), lse), (rows, lse)
        return o.transpose(1, 2).flatten(2)

    def finish(self, h: Tensor, o: Tensor) -> Tensor:
        """Output projection, residual, MLP, residual: (batch, n, d_model)."""
        return self._block.finish(h, o)

    def shadow(self, rows: Tensor, h: Tensor) -> Tensor:
        """Engine only: one layer of shadow rows, which see the store without their own position, and each other.

        Args:
            rows: (batch, k) positions that the shadows stand for, padded with the dump slot.
            h: (batch, k, d_model).

        Returns:
            h (batch, k, d_model); the stores are left alone.
        """
        q, k, v = self.project(rows, h)
        stored = tuple(x if self._lanes is None else x.index_select(0, self._lanes) for x in self._keys())
        slots = torch.arange(self.dump, device=rows.device)
        others = (slots != rows[..., None])[:, None]  # (batch, 1, k, slots)
        if self.visible is not None:
            stored = hide(stored[0], self.visible), hide(stored[1], self.visible)
            others = others & self.visible[:, :, None]
        real = (rows < self.dump)[:, None, None].expand(*others.shape[:-1], -1)
        own = torch.arange(rows.shape[1], device=rows.device)
        real = real | (own == own[:, None])  # a padded shadow sees itself, so that no row sees nothing
        keys, values = (torch.cat(pair, dim=2) for pair in zip(stored, (k, v), strict=True))
        o = attend_each(q, keys, values, torch.cat([others, real], dim=-1))
        return self.finish(h, o.transpose(1, 2).flatten(2))

    # -- the pieces, for layers that keep some outputs ------------------------------------------------------------

    def normed(self, h: Tensor) -> Tensor:
        """Input of the attention projections."""
        return self._block.normed(h)

    def project(self, rows: Tensor, h: Tensor, parts: str = "qkv") -> tuple[Tensor, ...]:
        """q (batch, heads, n, head_dim), k and v (batch, kv_heads, n, head_dim) of layer inputs; q and k rotated.

        Args:
            rows: (batch, n).
            h: (batch, n, d_model), input of the layer.
            parts: which of the three, in their order and side by side: "qkv", "kv", "q", ...
        """
        return self._block.project(self._block.normed(h), *self._model.angles(rows), parts)

    def rope(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate heads (batch, heads, n, head_dim) by `positions` (batch, n)."""
        return rotary(x, *self._model.angles(positions), self.spec.rope_full_precision)

    def write(self, rows: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> None:
        """Overwrite K and V at `rows`, or one of them; counts as projected the rows whose V is given.

        A layer that writes more values than keys writes the values first. Keys alone are not counted, since their
        rows were, with their values.
        """
        self._beside.writes(self.index, "K", "V")
        self._forget()
        if v is not None:
            self._count("kv_rows", rows)
            put(self.stores["V"], rows, v, self._lanes)
        if k is not None:
            self._boards.wrote(self.index, rows)
            put(self.stores["K"], rows, k, self._lanes)

    def hold(self, mask: Tensor, which: Tensor) -> None:
        """From the end of this layer on, hold the keys and values of `mask` alone, until this is said anew.

        Without a `CachePolicy.capacity` all are held, and this does nothing.

        Args:
            mask: (batch, slots) bool, in each sequence no more than the capacity.
            which: (batch,) bool: the sequences to change.
        """
        self._held.hold(self.index, mask, which, self._lanes)

    def output(self, o: Tensor) -> Tensor:
        """Output projection: (batch, n, heads * head_dim) -> (batch, n, d_model)."""
        return self._block.output(o)

    def ffn(self, h: Tensor) -> Tensor:
        """Increment of the MLP, its norm included."""
        return self._block.ffn(h)

    def stored(self, name: str, rows: Tensor) -> Tensor:
        """Stored values at `rows`: "K", "V", "Q" as (batch, heads, n, head_dim), others as (batch, n, width)."""
        self.reading(name)
        return take(self.stores[name], rows, self._lanes)

    def store(self, name: str, rows: Tensor, x: Tensor) -> None:
        """Overwrite a store of the policy's own at `rows`, in the shape that `stored` returns."""
        self._beside.writes(self.index, name)
        put(self.stores[name], rows, x, self._lanes)

    # -- statistics over visible keys -----------------------------------------------------------------------------

    def probs(self, q: Tensor) -> Tensor:
        """Attention probabilities of queries: (batch, heads, n, slots + 1) float32; for small sets."""
        return probs(q, self._keys()[0], self.visible, self._lanes, self._lse_of(q))

    def received(self, q: Tensor, weight: Tensor) -> Tensor:
        """Attention per key, summed over heads and weighted rows: `weight` (batch, n) -> (batch, slots + 1) float32."""
        return received(q, self._keys()[0], weight, self.visible, self._lanes, self._lse_of(q))

    def head_mean(self, q: Tensor) -> Tensor:
        """Attention rows averaged over heads: (batch, n, slots + 1) float32."""
        return head_mean(q, self._keys()[0], self.visible, self._lanes, self._lse_of(q))

    def products(self, q: Tensor) -> Tensor:
        """Dot products of queries with keys, not scaled, averaged over heads: (batch, n, slots + 1) float32."""
        return products(q, self._keys()[0], self.visible, self._lanes)

    def similarity(self, past: Tensor, now: Tensor, rows: Tensor, over: str) -> Tensor:
        """Mean cosine of two results of `probs` for the real ones of `rows`: (batch,); see `dcache.kernels.drift`."""
        return drift(past, now, rows < self.dump, self.visible, over)

    def reading(self, *names: str, every: bool = False) -> None:
        """Engine only: stores are read, of this layer or of every one; what runs aside must be done before a write."""
        for layer in range(self.spec.n_layers) if every else (self.index,):
            self._beside.reads(layer, *names)

    def report(self, name: str, x: Tensor, per_layer: bool = True) -> None:
        """Hand `x` (batch, ...) to the host with the picks, for the sequences that run this layer.

        It arrives as ``seen.reports[name]``: (layers, batch, ...), or (batch, ...) with ``per_layer=False``.
        """
        place = self._board(name, x, per_layer)
        place = place[self.index] if per_layer else place
        if self._lanes is None and self.now.all_live:
            place.copy_(x)
            return
        live = self.live.reshape(-1, *([1] * (x.dim() - 1)))
        if self._lanes is None:
            place.copy_(torch.where(live, x, place))
        else:
            old = place.index_select(0, self._lanes)
            place.index_copy_(0, self._lanes, torch.where(live, x.to(place.dtype), old))

    def report_all(self, name: str, x: Tensor) -> None:
        """Engine only, for `across`: `x` (layers, batch, ...), for the sequences that run each layer."""
        board = self._board(name, x[0], per_layer=True)
        lanes, now = self.lanes, self.now
        if now.whole and now.all_live:
            board.copy_(x)
            return
        live = now.live.expand(len(x), -1)
        if now.start is not None:
            live = live & (now.start <= torch.arange(len(x), device=x.device)[:, None])
        live = live.reshape(*live.shape, *([1] * (x.dim() - 2)))
        board.index_copy_(1, lanes, torch.where(live, x.to(board.dtype), board.index_select(1, lanes)))

    def _board(self, name: str, x: Tensor, per_layer: bool) -> Tensor:
        """Where a report of one layer's `x` (batch, ...) is kept; the eager run before any capture allocates it."""
        kind = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype  # numpy knows no bfloat16
        shape = (self._boards.batch, *x.shape[1:])
        shape = (self._boards.layers, *shape) if per_layer else shape
        if kind not in NUMPY:
            raise ValueError(
                f"report {name!r} has dtype {kind}, which does not go to the host; give bool, int32, int64 or floats"
            )
        board = self._boards.reports.get(name)
        if board is None:
            board = self._boards.reports[name] = torch.zeros(shape, dtype=kind, device=x.device)
        if (board.shape, board.dtype) != (shape, kind):
            raise ValueError(
                f"report {name!r} has shape {tuple(x.shape)} and dtype {kind} in layer {self.index}, but its first "
                f"had {tuple(board.shape[per_layer:])} and {board.dtype}; a report has one shape per name"
            )
        if name not in self.now.books.reports:
            self.now.books.reports.append(name)
            self.now.books.per_layer[name] = per_layer
        return board

    # -------------------------------------------------------------------------------------------------------------

    @property
    def _lanes(self) -> Tensor | None:
        """The lanes where they select something."""
        return None if self.now.whole else self.now.lanes

    def _keys(self) -> tuple[Tensor, Tensor]:
        """K and V of all sequences, without the dump slot: (sequences, kv_heads, slots, head_dim)."""
        self.reading("K", "V")
        k, v = (self.stores[name] for name in "KV")
        return k[:, :, : self.dump], v[:, :, : self.dump]

    def _listed(self) -> Keys | None:
        """The visible keys of this layer as lists."""
        keys = self.now.keys
        if keys is None or keys.index.dim() == 3:  # the same for all layers
            return keys
        return Keys(keys.index[self.index], keys.count[self.index])

    def _lse_of(self, q: Tensor) -> Tensor | None:
        """What the attention of these very queries found in this layer, if anything did."""
        return self._lse[1] if self._lse is not None and self._lse[0]() is q else None

    def _forget(self) -> None:
        """What attention found holds no longer."""
        self._beside.hold(self.q, self._lse)
        self._lse = None
        self._boards.found.pop(self.index, None)

    def _count(self, name: str, rows: Tensor) -> None:
        books = self.now.books
        if rows is self._stream:  # exactly the rows of the plan: the host counts them
            books.planned[name][self.index] += 1
        else:
            books.on_device = True
            self._tally(name, rows)
            if name == "rows":
                if self._attended:
                    self._tally("repeated", self._again(rows))
                self._attended.append(rows)
        if self._boards.maps:
            self._boards.maps[name][self.index, : len(rows)].scatter_(1, rows, True)

    def _tally(self, name: str, rows: Tensor) -> None:
        """Add rows to a counter, by region."""
        counter = self._boards.counted[COUNTERS.index(name), self.index, : len(rows)]
        tally(counter, rows, self._boards.regions, self._lanes)

    def _again(self, rows: Tensor) -> Tensor:
        """The rows that attended here before, in this pass; the others replaced by the dump slot."""
        before = torch.zeros(len(rows), self.dump + 1, dtype=torch.bool, device=rows.device)
        for earlier in self._attended:
            before.scatter_(1, earlier, True)
        return rows.masked_fill(~before.gather(1, rows), self.dump)
