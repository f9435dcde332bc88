"""What a batch needs is counted exactly where it can be, and an error says what would fit."""

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dcache
from dcache import CachePolicy, MemoryLimitError, Plan, State
from dcache.decode import decode
from dcache.engine import Engine
from dcache.engine.layer import Layer
from dcache.engine.memory import Batch, Room, does_not_fit, memory_needs, room_on
from dcache.models.transformer import ModelSpec
from dcache.plugins import make_policy, make_unmasker
from dcache.testing.models import random_model

GIB = 2**30
MODEL = random_model(1)
CPU = torch.device("cpu")
LLADA = dcache.load_model("llada-8b:random", device="meta").spec


def engine_of(policy: CachePolicy, guided: bool = False, **more: object) -> tuple[Engine, State]:
    engine = Engine(MODEL, policy, make_unmasker("low-confidence", dcache.Sampling(guidance=float(guided))), **more)  # type: ignore[arg-type]
    return engine, State(MODEL.spec, [[1, 2, 3], [4, 5]], [9, 4], guided=guided)


class Greedy(CachePolicy):
    """A layer finds no memory, while `hungry`."""

    hungry = True
    held: "weakref.ref[Tensor] | None" = None

    def plan(self, state: State) -> Plan:
        return Plan.all(state)

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        if self.hungry and at.index == 1:
            self.held = weakref.ref(h)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return at.compute(rows, h)


@pytest.mark.parametrize(
    "policy",
    ["none", "elastic", "d2", "dllm-cache", "es-dllm", "spa(rank=4)", "sparse-dllm(keep=0.3,compact=true)"],
)
@pytest.mark.parametrize("guided", [False, True])
def test_needs_of_stores_are_what_an_engine_holds(policy: str, guided: bool) -> None:
    engine, state = engine_of(make_policy(policy), guided)
    engine.begin(state)
    assert engine.sizes.needs.stores == engine.stores.n_bytes
    assert engine.sizes.needs.stores.items() <= engine.store_bytes.items()


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(1, 3000), st.none() | st.integers(1, 400), st.booleans())
def test_a_batch_needs_its_number_of_sequences_times_what_one_needs(
    batch: int, slots: int, capacity: int | None, on_gpu: bool
) -> None:
    def of(n: int) -> int:
        return memory_needs(LLADA, 2, n, slots, {"H": 4096}, capacity, read=64, on_gpu=on_gpu).total

    assert of(batch) == batch * of(1)


def test_padded_stores_of_an_8b_model_have_their_known_size() -> None:
    needs = memory_needs(LLADA, 2, 8, 1280, {}, None)
    assert needs.stores == {name: 8 * 32 * 32 * 1344 * 128 * 2 for name in "KV"}


def batch_of(texts: int, slots: int = 1280, spec: ModelSpec = LLADA, **more: object) -> Batch:
    sizes = {"extra": {}, "capacity": None, "per_text": 1, "graphs": True, "on_gpu": True, "dtype_bytes": 2} | more
    return Batch(spec=spec, slots=slots, texts=texts, prompt=slots - 256, read=256, **sizes)  # type: ignore[arg-type]


def test_the_largest_batch_that_fits_is_named() -> None:
    batch = batch_of(512)
    room = Room(140 * GIB, GIB, 15 * GIB, 100 * GIB)
    text = does_not_fit(batch, torch.device("cuda", 0), room)
    assert text.startswith("out of memory on cuda:0 (140.0 GiB, 1.0 GiB free, weights 15.0 GiB): batch_size 512 ")
    (most,) = (
        n
        for n in range(1, 512)
        if replace(batch, texts=n).needs.total <= room.batch < replace(batch, texts=n + 1).needs.total
    )
    assert text.endswith(f"; a batch_size of {most} would fit")


def test_a_canvas_that_fits_is_named_where_not_even_one_text_does() -> None:
    batch = batch_of(2, 16_384)
    for n_bytes, ending in (
        (replace(batch, texts=1, slots=16_256).needs.total, "prompt of 16128 tokens a gen_length of 128 would"),
        (
            replace(batch, texts=1, slots=1024).needs.total,
            "longer than the 1024 positions that would: choose shorter ones",
        ),
        (0, "longer than the 0 positions that would: choose shorter ones"),
    ):
        text = does_not_fit(batch, torch.device("cuda", 0), Room(140 * GIB, 0, 15 * GIB, n_bytes))
        assert "; not even one fits" in text
        assert text.endswith(ending)


@pytest.mark.parametrize(
    ("texts", "ending"), [(3, "choose a batch_size below 3"), (1, "a shorter prompt or gen_length")]
)
def test_an_error_that_the_numbers_do_not_explain_says_so(texts: int, ending: str) -> None:
    text = does_not_fit(batch_of(texts), torch.device("cuda", 0), Room(140 * GIB, 90 * GIB, 15 * GIB, 100 * GIB))
    assert "by these numbers it would fit" in text
    assert text.endswith(ending)


def test_room_for_a_batch_is_all_that_is_free_or_taken_by_anything_but_the_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    weights = [torch.zeros(10), torch.zeros(5)]
    model: Any = SimpleNamespace(device=torch.device("cuda"), parameters=lambda: weights, buffers=lambda: weights[:1])
    assert room_on(model) == Room(total=1000, free=20, weights=100, batch=220)
    assert room_on(MODEL) is None


def test_a_layer_without_memory_stops_the_run_with_what_would_fit() -> None:
    engine, state = engine_of(Greedy())
    with pytest.raises(MemoryLimitError) as caught:
        decode(engine, state)
    assert str(caught.value) == does_not_fit(engine.sizes, CPU, None)
    assert str(caught.value).startswith("out of memory on cpu: batch_size 2 with 12 slots needs 0.0 MiB of stores (K ")
    assert str(caught.value).endswith("choose a batch_size below 2")


def test_the_error_holds_no_tensor_of_the_pass() -> None:
    policy = Greedy()
    engine, state = engine_of(policy)
    with pytest.raises(MemoryLimitError) as caught:
        decode(engine, state)
    assert caught.value.__context__ is None
    assert policy.held is not None
    assert policy.held() is None


def test_an_engine_decodes_after_it_ran_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Greedy()
    engine, state = engine_of(policy)
    expected = decode(*engine_of(make_policy("none")))
    for where in ("dcache.engine.engine.Boards", "dcache.engine.engine.Stores"):
        with monkeypatch.context() as patch:
            patch.setattr(where, full)
            with pytest.raises(MemoryLimitError):
                engine.begin(State(MODEL.spec, [[1]], 30))
    policy.hungry = False
    trace = decode(engine, state)
    assert [s.tokens.tolist() for s in trace] == [s.tokens.tolist() for s in expected]


def full(*given: object) -> None:
    raise torch.OutOfMemoryError


def test_stores_are_freed_before_those_of_another_shape_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, state = engine_of(make_policy("none"))
    engine.begin(state)
    old = weakref.ref(engine.stores)
    monkeypatch.setattr("dcache.engine.engine.Stores", full)
    with pytest.raises(MemoryLimitError):
        engine.begin(State(MODEL.spec, [[1]], 30))
    assert old() is None


@pytest.mark.parametrize(
    "policy", ["none", "elastic", "d2", "spa", "dllm-cache", "vlcache", "sparse-dllm(compact=true)"]
)
def test_an_engine_goes_with_its_last_reference(policy: str) -> None:
    """Its stores would otherwise stay on the device until garbage is collected."""
    gc.collect()
    gc.disable()
    try:
        engine = Engine(random_model(1), make_policy(policy), make_unmasker("low-confidence"))
        decode(engine, State(engine.model.spec, [[3, 1, 4]], 8, 4))
        gone = [weakref.ref(thing) for thing in (engine, engine.stores, engine.network)]
        del engine
        assert [ref() for ref in gone] == [None] * 3
    finally:
        gc.enable()
