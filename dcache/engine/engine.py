"""Runs plans: masks in, one captured-style pass on the device, one sync, results out.

Everything a pass reads is in static buffers that one upload fills, and everything it produces comes back in one
download; between the two there is no host decision. `Executor` is the place where a pass is run: eagerly, or recorded
once per key and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from time import perf_counter
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from dcache.arrays import Ints
from dcache.engine.accounts import Accounts, Count
from dcache.engine.aside import Aside
from dcache.engine.checks import Checks
from dcache.engine.graphs import MOST_GRAPHS, Graphs
from dcache.engine.inputs import Inputs, wider
from dcache.engine.layer import Boards, Books, Layer, Pass
from dcache.engine.memory import Batch, does_not_fit, room_on
from dcache.engine.network import ALIGN_SLOTS, Network, Stores, Weights
from dcache.engine.packet import Packet, fields_of
from dcache.engine.results import Landing, Results
from dcache.errors import MemoryLimitError, NumericsError, PolicyError, UsageError
from dcache.kernels.attend import visible_keys
from dcache.kernels.confidence import all_finite
from dcache.kernels.rows import put, take
from dcache.models.transformer import ModelSpec, Transformer
from dcache.policy import CachePolicy, Plan
from dcache.state import Seen, State
from dcache.unmasking.base import Ask, Asked, Unmasker

T = TypeVar("T")
P = ParamSpec("P")
# Up to 128 rows, all sequences together, a product costs little more than reading its weights; from there on its time
# grows with the rows, in steps. Between 208 and 512 sizes are left out that save nothing against a larger one at the
# shapes of LLaDA-8B and Dream-7B on an H200: 224 and 240 rows take as long as 256 (benchmarks/README.md).
GPU_BUCKETS = (
    *range(16, 224, 16),
    *(256, 272, 304, 320, 384, 432, 448, 512),
    *range(576, 1024, 64),
    *range(1024, 4096, 128),
    *range(4096, 65537, 1024),
)


class Executor(Protocol):
    """Runs the device work of a pass, which touches static buffers only."""

    def ready(self, key: Hashable) -> bool:
        """Whether there is a recording of this key, or none is needed."""

    def record(self, key: Hashable, work: Callable[[], None]) -> None:
        """Make one, without running the work."""

    def __call__(self, key: Hashable, work: Callable[[], None]) -> None:
        """Run the work, or the recording."""

    def forget(self, key: Hashable = None) -> None:
        """Drop the recording of this key, or all: the buffers they were made on are gone."""


class Eager:
    """Runs the work as it stands."""

    def ready(self, key: Hashable) -> bool:
        """Always."""
        return True

    def record(self, key: Hashable, work: Callable[[], None]) -> None:
        """There is nothing to record."""

    def __call__(self, key: Hashable, work: Callable[[], None]) -> None:
        """Run it."""
        work()

    def forget(self, key: Hashable = None) -> None:
        """There is nothing to forget."""


@dataclass
class Prepared:
    """The buffers of one kind of pass and shape.

    Attributes:
        inputs: what the pass reads.
        current: their device side, as layers see it.
        shown: keys that the plan shows by a mask on the device, of all sequences, (batch, 1, slots) or (layers, batch,
            1 or kv_heads, slots) bool; None where it has no such mask.
        outputs: what the pass found; None before its first run.
    """

    inputs: Packet
    current: Pass
    shown: Tensor | None = None
    outputs: Packet | None = None


def within_memory(method: Callable[Concatenate[Engine, P], T]) -> Callable[Concatenate[Engine, P], T]:
    """Say what the batch needs in place of torch's error, raised where no traceback holds the tensors of the pass."""

    @wraps(method)
    def checked(engine: Engine, /, *given: P.args, **more: P.kwargs) -> T:
        try:
            return method(engine, *given, **more)
        except torch.OutOfMemoryError:
            pass
        raise MemoryLimitError(does_not_fit(engine.sizes, engine.model.device, room_on(engine.model)))

    return checked


def _with_heads(visible: Tensor) -> Tensor:
    """A mask of visible keys with its axis of heads: (batch, 1, slots) of (batch, slots), else as it is."""
    return visible[:, None] if visible.dim() == 2 else visible


class Engine:
    """A model, a policy and an unmasker, ready to run steps.

    Args:
        model: the transformer.
        policy: which rows are computed.
        unmasker: which positions are committed.
        buckets: sizes to which row lists are padded, and with them the number of lanes; () takes exact sizes, the
            default on a CPU.
        graphs: whether passes are recorded as CUDA graphs; None: on a CUDA device.
        executor: how a pass is run, of this engine's own; None: by graphs, or as it stands.
        maps: keep a recompute map (layers, batch, slots) of every step.
        debug: fill stores with NaN first, so that reading what nobody wrote shows.

    Attributes:
        recording: seconds spent so far on recording graphs, which is no part of any step.
        sizes: of the latest batch, from which its memory follows.
    """

    def __init__(
        self,
        model: Transformer,
        policy: CachePolicy,
        unmasker: Unmasker,
        *,
        buckets: Sequence[int] | None = None,
        graphs: bool | None = None,
        executor: Executor | None = None,
        maps: bool = False,
        debug: bool = False,
    ):
        self.model, self.policy, self.unmasker = model, policy, unmasker
        on_gpu = model.device.type == "cuda"
        if graphs and not on_gpu:
            raise UsageError(f"CUDA graphs need a CUDA device, and the model is on {model.device}; leave graphs out")
        self.buckets = (GPU_BUCKETS if on_gpu else ()) if buckets is None else tuple(buckets)
        graphs = on_gpu if graphs is None else graphs
        self.executor: Executor = executor or (Graphs(model.device) if graphs else Eager())
        self.maps, self.debug, self.recording = maps, debug, 0.0
        self.beside = Aside(model.device)
        self._late: list[tuple[Callable[[], Any], Callable[[Any], object] | None]] = []
        self._shape: tuple[int, int, int | None, bool] | None = None
        self._inspect = False
        with torch.inference_mode():
            policy.prepare(Weights(model))

    @property
    def label(self) -> str:
        """The policy as errors name it."""
        return self.policy.label or repr(type(self.policy).__name__)

    @property
    def store_bytes(self) -> dict[str, int]:
        """Bytes held for the policy: its stores, K and V among them, and its buffers, by name."""
        return self.stores.n_bytes | {f"buffer {name}": x.nbytes for name, x in self.buffers.items()}

    @property
    def graphs(self) -> bool:
        """Whether passes are recorded as CUDA graphs."""
        return isinstance(self.executor, Graphs)

    @property
    def captured(self) -> int:
        """Graphs recorded so far."""
        return self.executor.captured if isinstance(self.executor, Graphs) else 0

    @property
    def count(self) -> Count:
        """What the passes of the latest step computed; complete once `catch_up` has run."""
        return self.accounts.count

    def later(self, make: Callable[[], T], use: Callable[[T], object] | None = None) -> None:
        """Put off `make`, or ``use(make())``, which no plan depends on, until the device is busy with the next pass."""
        self._late.append((make, use))

    def catch_up(self) -> None:
        """Do now what was put off."""
        late, self._late = self._late, []
        for make, use in late:
            made = make()
            if use is not None:
                use(made)

    @within_memory
    @torch.inference_mode()
    def begin(self, state: State) -> None:
        """Make room for a batch and forget the last one; buffers are kept while batch, slots and capacity stay."""
        self.state = state
        self.beside.join()  # a pass that failed may have left work there, and the memory that it holds
        self._late.clear()  # and accounts of its batch
        extra, capacity = self._extra_stores(state.spec), self._capacity(state)
        self.sizes = Batch.of(state, self.model, extra, capacity, self.graphs)
        shape = (state.batch, state.slots, capacity, bool(state.embedded.any()))
        if self._shape != shape:
            self._allocate(shape, extra)
        else:
            self.stores.clear(self.debug)
        self._place_embeddings(state)
        self.accounts = Accounts(state, self.maps)
        self.boards.regions.copy_(torch.from_numpy(self.accounts.regions))
        if state.guided != (self.unmasker.sampling.guidance > 0):
            raise UsageError(
                f"the unmasker's guidance is {self.unmasker.sampling.guidance}, but the canvas was made with "
                f"guided={state.guided}; both say whether each text has a second sequence whose prompt is masked"
            )
        self._valid = torch.from_numpy(state.valid).to(self.model.device)[:, None]
        self.checks = Checks(self.label, state, frozenset(extra), self.model.device, compact=capacity is not None)
        self.inputs = Inputs(state, self.buckets)
        self.results = Results(state)
        self.network.on_preload(self.checks.preloaded)
        self.network.on_alone(self.accounts.ahead)
        self.network.asked()
        self.policy.begin(self.network, state)
        self.buffers = self.network.asked()
        self.unmasker.begin(self.network, state)
        if self.network.replaced():  # recordings know the old tensors, and what a plugin derived from their shapes
            self.executor.forget()
            self._prepared.clear()

    def _extra_stores(self, spec: ModelSpec) -> dict[str, int]:
        """The stores that the policy asks for, checked."""
        extra = self.policy.stores(spec)
        for name, width in extra.items():
            expected = {"H": spec.d_model, "Q": spec.q_width}.get(name, width)
            if name in ("K", "V") or not isinstance(width, int) or width < 1 or width != expected:
                raise PolicyError(
                    f'policy {self.label}: stores() asks for {name!r} of width {width!r}; "H" has the width of the '
                    f'layer input, {spec.d_model}, "Q" that of all query heads, {spec.q_width}, others any from 1 on; '
                    "K and V are always there"
                )
        return extra

    def _capacity(self, state: State) -> int | None:
        """Keys held per sequence and layer, as the policy says, aligned on a GPU; None if that is all of them."""
        capacity = self.policy.capacity(state)
        if capacity is None:
            return None
        if not isinstance(capacity, int) or capacity < 1:
            raise PolicyError(
                f"policy {self.label}: capacity() is {capacity!r}, expected at least 1 key, or None for all"
            )
        if self.model.device.type != "cpu":
            capacity = -(-capacity // ALIGN_SLOTS) * ALIGN_SLOTS
        return capacity if capacity < state.slots else None

    def _place_embeddings(self, state: State) -> None:
        """Put what prompts start from, where that is no token, into its place."""
        if self.embeddings is None:
            return
        self.embeddings.zero_()
        self.embedded.copy_(torch.from_numpy(wider(state.embedded)))
        for b, given in enumerate(state.embeddings):
            if given is not None:
                self.embeddings[b, torch.from_numpy(given.positions)] = given.values.to(self.embeddings)

    def _allocate(self, shape: tuple[int, int, int | None, bool], extra: dict[str, int]) -> None:
        model, device = self.model, self.model.device
        batch, slots, capacity, embedded = shape
        self._shape = None
        self.executor.forget()  # whatever it holds was recorded on the buffers that are replaced here
        for name in ("stores", "boards", "layers", "network", "top", "have", "embeddings", "embedded", "_prepared"):
            vars(self).pop(name, None)  # what is replaced need not fit beside what replaces it
        self.stores = Stores(model, batch, slots, extra, self.debug, capacity)
        self.boards = Boards(model.spec.n_layers, batch, slots, device, self.maps)
        blocks = enumerate(model.blocks())
        self.layers = [Layer(model, block, i, self.stores, self.boards, self.beside) for i, block in blocks]
        self.network = Network(model, self.layers, batch, slots)
        self.top = torch.zeros(batch, slots + 1, model.spec.d_model, device=device, dtype=model.dtype)
        self.have = torch.zeros(batch, slots + 1, device=device, dtype=torch.bool)
        self.embeddings = torch.zeros_like(self.top) if embedded else None
        self.embedded = torch.zeros_like(self.have)
        self._prepared: dict[Hashable, Prepared] = {}
        self._shape = shape

    # -- one step -------------------------------------------------------------------------------------------------

    @within_memory
    def run(self, plan: Plan, ask: Ask) -> Seen:
        """The pass of a step; one sync."""
        return self._run(plan, ask, None)

    @within_memory
    def rerun(self, plan: Plan, ask: Ask, seen: Seen) -> Seen:
        """The second pass of a reviewed step: what the first found for other rows and layers stays."""
        return self._run(plan, ask, seen)

    def _run(self, plan: Plan, ask: Ask, before: Seen | None) -> Seen:
        """One pass; `before` is what the first pass of a reviewed step saw."""
        if not torch.is_inference_mode_enabled():  # entering it takes time, so a loop over passes does it once
            with torch.inference_mode():
                return self._run(plan, ask, before)
        second = before is not None
        arrays, key, prepared = self._arranged(plan, ask, second)
        first = prepared is None or prepared.outputs is None
        if first:  # later ones of its key are safe to run, and are checked while the device is busy
            self.checks.plan(plan, second)
        if prepared is None:
            prepared = self._make_room(key, plan, arrays)
        for name, value in arrays.items():
            prepared.inputs.host[name][...] = value
        if isinstance(plan.visible, Tensor):  # it is on the device already
            assert prepared.shown is not None
            prepared.shown.copy_(_with_heads(plan.visible) & self._valid)
        if prepared.outputs is None:
            prepared.outputs = self._first_pass(prepared, second)
        else:
            if not self.executor.ready(key):
                began = perf_counter()
                self.executor.record(key, lambda: self._pass(prepared, second))
                self.recording += perf_counter() - began
            self.executor(key, lambda: self._pass(prepared, second))
        try:
            landing = self.results.landing(arrays, before)  # while it runs
            if not first:
                self.checks.plan(plan, second)
            self._while_it_runs(plan, ask, second)
        finally:
            prepared.outputs.wait()  # after a failed check too: the memory that the pass writes to may be let go next
        return self._seen(prepared, landing)

    def _arranged(self, plan: Plan, ask: Ask, second: bool) -> tuple[dict[str, np.ndarray], Hashable, Prepared | None]:
        """What a pass reads, its key, and its buffers if it has any; of a plan that makes no arrays, why."""
        try:
            arrays = self.inputs.arrays(plan, ask)
            key = (*self.inputs.key(plan, arrays), second)
            return arrays, key, self._prepared.get(key)
        except Exception:
            self.checks.plan(plan, second)
            raise

    def _make_room(self, key: Hashable, plan: Plan, arrays: dict[str, np.ndarray]) -> Prepared:
        """Buffers for passes of a new key, in the place of the oldest if there are many."""
        while len(self._prepared) >= MOST_GRAPHS:
            oldest = next(iter(self._prepared))
            del self._prepared[oldest]
            self.executor.forget(oldest)
        self._prepared[key] = prepared = self._prepare(plan, arrays)
        return prepared

    def _first_pass(self, prepared: Prepared, second: bool) -> Packet:
        """The first of its key runs as it stands, and shows what comes out of it."""
        self._inspect = self.debug  # values may be read in this eager run, never in a recorded one
        prepared.inputs.upload()
        try:
            results = self._forward(prepared, second)
        finally:
            self._inspect = False
        outputs = Packet(fields_of(results), self.model.device)
        self._deliver(outputs, results)
        return outputs

    def _pass(self, prepared: Prepared, second: bool) -> None:
        """All the device work of a pass whose buffers are there, from the inputs on the host to the results there."""
        assert prepared.outputs is not None
        prepared.inputs.upload()
        self._deliver(prepared.outputs, self._forward(prepared, second))

    def _while_it_runs(self, plan: Plan, ask: Ask, second: bool) -> None:
        """Checks whose failure stops the run before anybody reads a result, and what earlier steps put off."""
        self.catch_up()
        if not second:
            self.accounts.next_step()
            self.checks.window(ask)
            self.checks.progress(ask)
        self.checks.keys(plan, ask)

    def _prepare(self, plan: Plan, arrays: dict[str, np.ndarray]) -> Prepared:
        n_lanes, by_slot = len(arrays["lanes"]), self.inputs.flags_by_slot(arrays)
        widths = {name: (n_lanes, self.state.slots + 1) for name in by_slot}
        packet = Packet([(name, widths.get(name, x.shape), x.dtype) for name, x in arrays.items()], self.model.device)
        for name in by_slot:  # written but for the column of the dump slot, which stays 0
            packet.host[name] = packet.host[name][:, :-1]
        side = packet.device
        current = Pass(
            kind=plan.kind,
            marks=dict(plan.marks),
            lanes=side["lanes"],
            whole=n_lanes == self.state.batch,
            rows=side["rows"],
            live=side["live"],
            all_live=bool(arrays["live"].all()) and plan.start is None,
            start=side.get("start"),
            first=self.inputs.first_layer(plan),
            sets={name: side[f"set {name}"] for name in plan.sets},
            flags={name: side[f"flag {name}"] for name in plan.flags},
            visible=side.get("visible"),
            books=Books({}),
        )
        shown = None
        if isinstance(plan.visible, Tensor):
            shown = torch.empty(_with_heads(plan.visible).shape, dtype=torch.bool, device=self.model.device)
        return Prepared(packet, current, shown)

    # -- the pass: device work on static buffers ------------------------------------------------------------------

    def _forward(self, prepared: Prepared, second: bool) -> dict[str, Tensor]:
        """Embed, layers, head, pick. No host decision depends on a tensor here."""
        current, side = prepared.current, prepared.inputs.device
        current.books.planned = {name: [0] * len(self.layers) for name in ("rows", "kv_rows")}
        current.books.on_device, current.books.reports = False, []
        if (shown := prepared.shown) is not None:
            current.visible = shown if current.whole else shown.index_select(shown.dim() - 3, current.lanes)
        current.keys = None if current.visible is None else visible_keys(current.visible)
        if not second:
            self.have.zero_()
        self.boards.clear(second)
        rows, h = current.rows, self._inputs(current, side["tokens"])
        for layer in self.layers[current.first :]:
            if current.start is None:
                layer.enter(current, current.rows, current.live)
            else:
                rows, h = self._enter(current, layer, h)
            layer.unpack()
            stream = self._layer(layer, rows, h)
            layer.leave(rows, h)
            layer.pack()
            rows, h = self.checks.stream(layer.index, stream, h, current.start is not None, self._inspect)
        put(self.top, rows, h, current.lanes)
        here = torch.ones_like(rows, dtype=torch.bool)  # a Python True would be copied from the host
        self.have.index_put_((current.lanes[:, None], rows), here)
        return self._read(prepared)

    def _inputs(self, current: Pass, tokens: Tensor) -> Tensor:
        """What the rows of a pass start from: their tokens' embeddings, or those that their prompts gave."""
        h = self.model.embed(tokens)
        if self.embeddings is None:
            return h
        lanes = None if current.whole else current.lanes
        own = self.embedded[current.lanes[:, None], current.rows]
        return torch.where(own[..., None], take(self.embeddings, current.rows, lanes), h)

    def _layer(self, layer: Layer, rows: Tensor, h: Tensor) -> object:
        """The policy's layer; what it raises by mistake is reported as the policy's."""
        try:
            return self.policy.layer(layer, rows, h)
        except torch.OutOfMemoryError:
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            self.checks.fail(f"layer {layer.index} raised {type(error).__name__}: {error}", error)

    def _enter(self, current: Pass, layer: Layer, h: Tensor) -> tuple[Tensor, Tensor]:
        """A pass with `start`: sequences that have not begun point at the dump slot, those that begin read "H"."""
        assert current.start is not None
        live = current.live & (current.start <= layer.index)
        rows = torch.where(live[:, None], current.rows, layer.dump)
        layer.enter(current, rows, live)
        if layer.index > 0:
            begins = (current.start == layer.index)[:, None, None]
            h = torch.where(begins, layer.stored("H", rows), h)
        return rows, h

    def _read(self, prepared: Prepared) -> dict[str, Tensor]:
        current, side, slots, spec = prepared.current, prepared.inputs.device, self.network.slots, self.model.spec
        where, lanes = side["where"], current.lanes
        real = where < slots
        row = torch.where(real, (where - spec.shift).clamp_min(0), slots)
        predicted = self.have[lanes[:, None], row] & real
        logits = self.model.logits(take(self.top, row, lanes))
        finite = all_finite(logits)
        shadow = side.get("shadow")
        shadow_logits = None if shadow is None else self._shadow_logits(current, shadow)
        if self.state.guided:
            logits, predicted = self._guide(logits), predicted & predicted.roll(len(lanes) // 2, 0)
            shadow_logits = None if shadow_logits is None else self._guide(shadow_logits)
        asked = Asked(
            where=where,
            predicted=predicted,
            eligible=predicted & side["window"] if "window" in side else predicted,
            sequence=side["sequence"],
            step=side["step"],
            mask_id=spec.mask_id,
            eos_id=spec.eos_id,
            end_ids=spec.end_ids,
            lanes=lanes,
            flags={name.removeprefix("ask "): x for name, x in side.items() if name.startswith("ask ")},
            shadow=shadow,
            shadow_logits=shadow_logits,
            forbidden=spec.forbidden,
        )
        picks = self.unmasker.pick(logits, asked)
        self.beside.join()  # reports are read from here on
        results = {
            "tokens": torch.where(predicted, picks.tokens, -1),
            "confidence": picks.confidence.to(torch.float32).masked_fill(~predicted, float("-inf")),
            "commit": picks.commit,
            "bad": (~finite & predicted).any(-1),
        }
        if picks.remask is not None:
            results["remask"] = picks.remask & real
        return results | self._accounts(current)

    def _accounts(self, current: Pass) -> dict[str, Tensor]:
        """What the layers of a pass reported and counted, by lane."""
        books, n = current.books, len(current.lanes)
        results = {}
        for name in books.reports:
            board = self.boards.reports[name]
            per_layer = books.per_layer[name]
            results[f"report {name}"] = board if current.whole else board.index_select(int(per_layer), current.lanes)
        if books.on_device:
            results["counted"] = self.boards.counted[:, :, :n]
        return results | {f"map {name}": x[:, :n] for name, x in self.boards.maps.items()}

    def _guide(self, logits: Tensor) -> Tensor:
        """Classifier-free guidance: c with the prompt, u with a masked prompt, ``u + (1 + guidance) (c - u)``."""
        c, u = logits.chunk(2)
        guided = u + (1 + self.unmasker.sampling.guidance) * (c - u)
        return torch.cat([guided, guided])

    def _shadow_logits(self, current: Pass, shadow: Tensor) -> Tensor:
        """Logits of masks at the shadow positions, over the keys that the pass has left: (batch, k, vocab)."""
        h = self.model.embed(torch.full_like(shadow, self.model.spec.mask_id))
        rows = torch.where(shadow < self.network.slots, shadow, self.network.slots)
        for layer in self.layers:
            layer.enter(current, current.rows, current.live)
            h = layer.shadow(rows, h)
        return self.model.logits(h)

    @staticmethod
    def _deliver(outputs: Packet, results: dict[str, Tensor]) -> None:
        """Put the results into their block, and bring it to the host."""
        for name, x in results.items():
            outputs.device[name].copy_(x)
        outputs.download()

    # -- device to host -------------------------------------------------------------------------------------------

    def _seen(self, prepared: Prepared, landing: Landing) -> Seen:
        assert prepared.outputs is not None
        out, arrays = prepared.outputs.host, landing.arrays
        if np.count_nonzero(out["bad"]):
            self._blame(prepared, landing.before is not None, int(out["bad"].argmax()), arrays["lanes"])
        books = prepared.current.books
        # the results of the next pass may come down before this is read
        found = {name: out[name].copy() for name in books.counted(self.maps)}
        self.later(partial(self._account, self.count, books, found, arrays))
        return self.results.seen(landing, out, books)

    def _account(self, count: Count, books: Books, found: dict[str, np.ndarray], arrays: dict[str, np.ndarray]) -> None:
        """Add what a pass computed to the accounts of its step, and note the keys that it wrote."""
        written = wider(self.checks.written)
        written[arrays["lanes"][:, None], arrays["rows"]] = True
        self.checks.written = written[:, :-1]
        self.accounts.add(count, books.planned, found, arrays)

    def _blame(self, prepared: Prepared, second: bool, lane: int, lanes: Ints) -> None:
        """Run the pass once more, layer by layer, to name the first layer whose output is not finite."""
        culprit = "the head"
        inner, own = self.policy.layer, vars(self.policy)
        instead = own.get("layer")  # of the instance, before the method of its class
        found: list[int] = []

        def watched(at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            rows, h = inner(at, rows, h)
            real = (rows < at.dump)[lane]
            if not found and not bool(h[lane][real].isfinite().all()):
                found.append(at.index)
            return rows, h

        own["layer"] = watched
        try:
            self._forward(prepared, second)
        finally:
            del own["layer"]
            if instead is not None:
                own["layer"] = instead
        if found:
            culprit = f"layer {found[0]}"
        sequence = int(lanes[lane])
        raise NumericsError(
            f"policy {self.label}, step {int(self.state.step[sequence])}, sequence {sequence}: the logits are not "
            f"finite, first in {culprit}; check the weights and dtype, or the policy's stores"
        )
