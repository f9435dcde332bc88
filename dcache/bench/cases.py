"""What ``dcache bench kernels`` runs: every op at the sizes of published models, as data.

An op is called by its public name, so that what is timed is what the engine runs. Bytes and operations are counted by
hand: each input read once, each output written once, two operations per multiplication and addition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dcache.kernels.rotary import rotary_table
from dcache.models.transformer import ModelSpec

ALIGN = 64  # as `dcache.engine.network` pads its stores


@dataclass(frozen=True)
class Size:
    """A size and a variant of an op: how many rows, of how many sequences, over how many slots."""

    rows: int
    slots: int = 1280
    batch: int = 1
    variant: str = ""

    def __str__(self) -> str:
        parts = [f"{self.rows} rows"]
        parts += [f"{self.slots} slots"] if self.slots != Size.slots else []
        parts += [f"batch {self.batch}"] if self.batch > 1 else []
        return ", ".join([*parts, self.variant] if self.variant else parts)


@dataclass
class Call:
    """Arguments of an op, the bytes and operations that it needs, and where it writes.

    Attributes:
        args, options: of the call.
        n_bytes, n_flops: counted.
        written: numbers of the arguments that are changed in place.
    """

    args: tuple[Any, ...]
    n_bytes: int
    n_flops: int = 0
    options: dict[str, Any] | None = None
    written: tuple[int, ...] = ()


class Draw:
    """Random arguments at one size of one model.

    Args:
        spec: sizes of the model.
        size: of the case.
        device, dtype: of activations and stores.
        seed: another one gives other numbers.
    """

    def __init__(self, spec: ModelSpec, size: Size, device: torch.device, dtype: torch.dtype, seed: int):
        self.spec, self.size, self.device, self.dtype = spec, size, device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)
        self.batch, self.n, self.slots = size.batch, size.rows, size.slots
        self.item = dtype.itemsize

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers."""
        return torch.randn(*shape, generator=self.generator, device=self.device, dtype=dtype or self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in 0..1, float32."""
        return torch.rand(*shape, generator=self.generator, device=self.device)

    def rows(self, n: int | None = None) -> Tensor:
        """(batch, n) ascending positions, all different."""
        order = self.uniform(self.batch, self.slots).argsort(-1)[:, : self.n if n is None else n]
        return order.sort(-1).values

    def store(self, heads: int) -> Tensor:
        """A store, as wide as the engine's."""
        wide = -(-(self.slots + 1) // ALIGN) * ALIGN
        return self.normal(self.batch, heads, wide, self.spec.head_dim)

    def wide_store(self, width: int) -> Tensor:
        """A store of layer inputs."""
        return self.normal(self.batch, -(-(self.slots + 1) // ALIGN) * ALIGN, width)

    def keys(self) -> Tensor:
        """Keys as a layer sees them: a view without the dump slot."""
        return self.store(self.spec.n_kv_heads)[:, :, : self.slots]

    def queries(self) -> Tensor:
        """(batch, heads, n, head_dim)."""
        return self.normal(self.batch, self.n, self.spec.n_heads, self.spec.head_dim).transpose(1, 2)

    @cached_property
    def visible(self) -> Tensor | None:
        """Half of the keys, in a case that says so."""
        if "half" not in self.size.variant:
            return None
        return self.uniform(self.batch, 1, self.slots) < 0.5

    @property
    def n_seen(self) -> int:
        """Visible keys of a sequence, about."""
        return self.slots // 2 if "half" in self.size.variant else self.slots

    @property
    def key_bytes(self) -> int:
        """Of the visible keys of all sequences, or of their values."""
        return self.batch * self.spec.kv_width * self.n_seen * self.item

    @property
    def query_bytes(self) -> int:
        """Of all queries."""
        return self.batch * self.n * self.spec.q_width * self.item

    @property
    def score_flops(self) -> int:
        """Of the dot products of all queries with all visible keys."""
        return 2 * self.batch * self.n * self.spec.q_width * self.n_seen


def attend(d: Draw) -> Call:
    """Attention; with lists where keys are hidden."""
    visible = d.visible
    options = {} if visible is None else {"visible": visible, "keys": _op("attend", "visible_keys")(visible)}
    n_bytes = 2 * d.query_bytes + 2 * d.key_bytes
    return Call((d.queries(), d.keys(), d.keys()), n_bytes, 2 * d.score_flops, options)


def visible_keys(d: Draw) -> Call:
    """All layers of a batch at once; `rows` layers."""
    mask = d.uniform(d.n, d.batch, 1, d.slots) < 0.5
    return Call((mask,), mask.numel() * 5)


def probs(d: Draw) -> Call:
    """Probabilities themselves."""
    out = d.batch * d.spec.n_heads * d.n * (d.slots + 1) * 4
    return Call((d.queries(), d.keys()), d.query_bytes + d.key_bytes + out, d.score_flops, {"visible": d.visible})


def received(d: Draw) -> Call:
    """Column sums; with `lse` the keys are read once. In the variant "layers" the batch is made of 32."""
    q, k, weight = d.queries(), d.keys(), d.uniform(d.batch, d.n)
    known = d.size.variant != ""
    passes = 1 if known else 2
    options: dict[str, Any] = {"lse": _op("attend", "attend_lse")(q, k, k)[1]} if known else {}
    options |= {"layers": LAYERS} if "layers" in d.size.variant else {}
    n_bytes = d.query_bytes + d.key_bytes + 4 * d.batch * (d.slots + 1)
    return Call((q, k, weight), n_bytes, passes * d.score_flops, options)


def head_mean(d: Draw) -> Call:
    """Rows averaged over heads."""
    n_bytes = d.query_bytes + d.key_bytes + 4 * d.batch * d.n * (d.slots + 1)
    return Call((d.queries(), d.keys()), n_bytes, 2 * d.score_flops)


def products(d: Draw) -> Call:
    """Plain products averaged over heads: those of a group are summed first."""
    n_bytes = d.query_bytes + d.key_bytes + 4 * d.batch * d.n * (d.slots + 1)
    return Call((d.queries(), d.keys()), n_bytes, 2 * d.batch * d.n * d.spec.kv_width * d.slots)


def rollout(d: Draw) -> Call:
    """Attention of some rows to one another in all layers, 32 of them."""
    flow = d.uniform(LAYERS, d.batch, d.n, d.n) / d.n
    real = torch.ones(d.batch, d.n, dtype=torch.bool, device=d.device)
    return Call((flow, real), flow.nbytes + (LAYERS + 1) * 4 * d.batch * d.n, 2 * flow.numel())


def drift(d: Draw) -> Call:
    """Two results of `probs`."""
    shape = (d.batch, d.spec.n_heads, d.n, d.slots + 1)
    past, now = d.uniform(*shape), d.uniform(*shape)
    past[..., -1] = now[..., -1] = 0
    real = torch.ones(d.batch, d.n, dtype=torch.bool, device=d.device)
    return Call((past, now, real, None, d.size.variant), 2 * past.nbytes, 6 * past.numel())


def attention_drift(d: Draw) -> Call:
    """Old and new attention of some rows where 64 keys were written; the batch is made of 32 layers, if it can be."""
    layers = LAYERS if d.batch % LAYERS == 0 else 1
    q, k, past_q = d.queries(), d.keys(), d.queries()
    written = torch.arange(min(64, d.slots), device=d.device).repeat(d.batch // layers, 1)
    kept = d.normal(d.batch, d.spec.n_kv_heads, written.shape[1], d.spec.head_dim)
    before = k.clone()
    before[:, :, : written.shape[1]] = kept
    past = _op("attention_drift", "remember")(past_q, before, written, kept, layers=layers)
    real = torch.ones(d.batch, d.n, dtype=torch.bool, device=d.device)
    options = {"over": d.size.variant, "lse": _op("attend", "attend_lse")(q, k, k)[1], "layers": layers}
    n_bytes = 2 * d.query_bytes + d.key_bytes + kept.nbytes
    return Call((past, q, k, real), n_bytes, 2 * d.score_flops, options)


def cosine(d: Draw) -> Call:
    """New and old values of some rows, all key/value heads together."""
    x, y = (d.normal(d.batch, d.spec.n_kv_heads, d.n, d.spec.head_dim) for _ in range(2))
    return Call((x, y), 2 * x.nbytes + 4 * d.batch * d.n, 6 * x.numel())


def rms_norm(d: Draw) -> Call:
    """One norm."""
    x = d.normal(d.batch, d.n, d.spec.d_model)
    return Call((x, d.normal(d.spec.d_model), d.spec.norm_eps), 2 * x.nbytes, 4 * x.numel())


def rms_norm_keep(d: Draw) -> Call:
    """A norm that keeps its input."""
    x, weight = d.normal(d.batch, d.n, d.spec.d_model), d.normal(d.spec.d_model)
    args = (x, weight, d.spec.norm_eps, d.wide_store(d.spec.d_model), d.rows())
    return Call(args, 3 * x.nbytes, 4 * x.numel(), written=(3,))


def add_rms_norm(d: Draw) -> Call:
    """Residual and norm."""
    x, delta = (d.normal(d.batch, d.n, d.spec.d_model) for _ in range(2))
    return Call((x, delta, d.normal(d.spec.d_model), d.spec.norm_eps), 4 * x.nbytes, 5 * x.numel())


def rotary(d: Draw) -> Call:
    """Queries alone."""
    cos, sin = (each[d.rows()][:, None] for each in table(d))
    return Call(
        (d.queries(), cos, sin, d.spec.rope_full_precision), 2 * d.query_bytes, 3 * d.batch * d.n * d.spec.q_width
    )


def rotary_scatter(d: Draw) -> Call:
    """The whole fused projection of some rows into the stores."""
    width = d.spec.q_width + 2 * d.spec.kv_width
    qkv = d.normal(d.batch, d.n, width)
    bias = d.normal(width) if d.spec.qkv_bias else None
    stores = d.store(d.spec.n_kv_heads), d.store(d.spec.n_kv_heads)
    args = (qkv, bias, d.rows(), *table(d), d.spec.rope_full_precision, *stores)
    return Call(args, 2 * qkv.nbytes + 8 * d.batch * d.n, 3 * qkv.numel(), written=(6, 7))


def table(d: Draw) -> tuple[Tensor, Tensor]:
    """cos and sin of all slots, the dump slot among them."""
    return rotary_table(d.slots + 1, d.spec.head_dim, d.spec.rope_theta, d.device)


def swiglu(d: Draw) -> Call:
    """The gate of the MLP."""
    x = d.normal(d.batch, d.n, 2 * d.spec.mlp_size)
    return Call((x,), x.nbytes * 3 // 2, 5 * x.numel() // 2)


def product(d: Draw) -> Call:
    """The projection to queries, keys and values; of a variant, another matrix of the layer, or the head."""
    spec = d.spec
    sizes = {"out": (spec.d_model, spec.q_width), "head": (spec.vocab_size, spec.d_model)}
    n, k = sizes.get(d.size.variant, (spec.q_width + 2 * spec.kv_width, spec.d_model))
    return of_weights(d, n, k, n)


def gated_product(d: Draw) -> Call:
    """Gate and up, and the gate."""
    return of_weights(d, 2 * d.spec.mlp_size, d.spec.d_model, d.spec.mlp_size)


def add_product(d: Draw) -> Call:
    """Down, and the residual."""
    call = of_weights(d, d.spec.d_model, d.spec.mlp_size, 2 * d.spec.d_model)
    return replace(call, args=(d.normal(d.batch, d.n, d.spec.d_model), *call.args), written=(0,))


def of_weights(d: Draw, n: int, k: int, moved: int) -> Call:
    """A product with a matrix (n, k), and how many elements of a row are moved beside its input."""
    x, weight = d.normal(d.batch, d.n, k), d.normal(n, k) * k**-0.5
    rows = d.batch * d.n
    return Call((x, weight), (weight.numel() + rows * (k + moved)) * d.item, 2 * rows * n * k)


def take(d: Draw) -> Call:
    """Rows of a store of layer inputs, or of queries."""
    heads = d.size.variant == "heads"
    store = d.store(d.spec.n_heads) if heads else d.wide_store(d.spec.d_model)
    width = d.spec.q_width if heads else d.spec.d_model
    return Call((store, d.rows()), 2 * d.batch * d.n * width * d.item)


def put(d: Draw) -> Call:
    """As `take`, the other way."""
    call, heads = take(d), d.size.variant == "heads"
    y = d.queries() if heads else d.normal(d.batch, d.n, d.spec.d_model)
    return Call((*call.args, y), call.n_bytes, written=(0,))


def tally(d: Draw) -> Call:
    """Rows of each lane in each of three regions."""
    counter = torch.zeros(d.batch, 3, dtype=torch.int64, device=d.device)
    classes = (4 * d.uniform(d.batch, d.slots)).to(torch.uint8)
    return Call((counter, d.rows(), classes), 9 * d.batch * d.n, written=(0,))


def logits(d: Draw) -> Tensor:
    """(batch, rows, vocab) of the model."""
    return d.normal(d.batch, d.n, d.spec.vocab_size)


def of_logits(d: Draw) -> Call:
    """An op that needs the logits alone."""
    x = logits(d)
    return Call((x,), x.nbytes, 3 * x.numel())


def confidence_of(d: Draw) -> Call:
    """Probability of given tokens."""
    x = logits(d)
    return Call((x, x.argmax(-1)), x.nbytes, 3 * x.numel())


def lowest(d: Draw) -> Call:
    """The lowest scores of a canvas; `rows` of them."""
    score = d.uniform(d.batch, d.slots)
    return Call((score, d.n, d.n), score.nbytes + 9 * d.batch * d.n)


def ascending(d: Draw) -> Call:
    """A set of rows."""
    rows = d.rows().flip(-1)
    return Call((rows,), 3 * rows.nbytes)


def rank(d: Draw) -> Call:
    """All rows of a window."""
    score = d.uniform(d.batch, d.n)
    return Call((score, score > 0.1), score.nbytes + 17 * d.batch * d.n)


def highest(d: Draw) -> Call:
    """The best row of a window."""
    score = d.uniform(d.batch, d.n)
    return Call((score, score > 0.1, 1), score.nbytes + 2 * d.batch * d.n)


def find(d: Draw) -> Call:
    """Every third row of a list."""
    rows = d.rows()
    wanted = rows[:, ::3].contiguous()
    return Call((rows, wanted), rows.nbytes + 2 * wanted.nbytes)


@dataclass(frozen=True)
class Op:
    """An op, how its arguments are drawn, and the sizes that it is run at.

    Attributes:
        module: of `dcache.kernels`.
        draw: makes arguments.
        sizes: for every model.
        first: sizes for the first model alone, where the second would show nothing new.
        defined: what of a result is defined, as tensors; everything by default.
    """

    module: str
    draw: Callable[[Draw], Call]
    sizes: tuple[Size, ...]
    first: tuple[Size, ...] = ()
    defined: Callable[[Any], Any] = lambda result: result

    def of(self, model: str) -> tuple[Size, ...]:
        """The sizes at which it runs for a model."""
        return self.sizes + (self.first if model == MODELS[0] else ())


def listed(keys: Any) -> tuple[Tensor, Tensor]:
    """What of `visible_keys` is defined: the lists up to their count."""
    place = torch.arange(keys.index.shape[-1], device=keys.index.device)
    return keys.index.masked_fill(place >= keys.count[..., None], 0), keys.count


MODELS = ("llada-8b:random", "dream-7b:random")
LAYERS = 32  # of ops that take all layers at once
FEW, BLOCK, MANY, ALL = Size(16), Size(64), Size(256), Size(1280)
EIGHT = Size(64, batch=8)
LONG, LONGEST = Size(64, slots=4096), Size(64, slots=16384)
HALF = Size(64, variant="half visible")

OPS: dict[str, Op] = {
    "attend": Op("attend", attend, (BLOCK, ALL), (FEW, MANY, LONG, LONGEST, EIGHT, HALF)),
    "attend_lse": Op("attend", attend, (BLOCK,), (ALL,)),
    "visible_keys": Op("attend", visible_keys, (), (Size(1), Size(32)), listed),
    "probs": Op("attention_probs", probs, (FEW,), (Size(16, slots=4096), Size(16, batch=8))),
    "received": Op(
        "attention_probs",
        received,
        (Size(32, variant="lse"),),
        (Size(32), ALL, Size(1280, variant="lse"), *(Size(n, batch=LAYERS, variant="layers") for n in (32, 160))),
    ),
    "head_mean": Op("attention_probs", head_mean, (BLOCK,), (Size(128), EIGHT)),
    "products": Op("attention_probs", products, (Size(32),)),
    "rollout": Op("rollout", rollout, (), (BLOCK, Size(160), MANY)),
    "drift": Op("drift", drift, (Size(16, variant="heads"),), (Size(16, variant="rows"), Size(16, variant="flat"))),
    "attention_drift": Op(
        "attention_drift",
        attention_drift,
        (),
        tuple(Size(32, batch=LAYERS, variant=over) for over in ("heads", "rows", "flat")),
    ),
    "cosine": Op("cosine", cosine, (MANY,)),
    "product": Op("product", product, (FEW, Size(32), Size(32, variant="out"), Size(32, variant="head")), (BLOCK,)),
    "gated_product": Op("product", gated_product, (FEW, Size(32))),
    "add_product": Op("product", add_product, (FEW, Size(32)), (BLOCK,)),
    "rms_norm": Op("rms_norm", rms_norm, (BLOCK, ALL)),
    "rms_norm_keep": Op("rms_norm", rms_norm_keep, (), (BLOCK, ALL)),
    "add_rms_norm": Op("rms_norm", add_rms_norm, (BLOCK, ALL), (Size(1280, batch=8),)),
    "rotary": Op("rotary", rotary, (), (BLOCK,)),
    "rotary_scatter": Op("rotary", rotary_scatter, (BLOCK, ALL), (Size(1280, batch=8),)),
    "swiglu": Op("swiglu", swiglu, (BLOCK, ALL), (Size(1280, batch=8),)),
    "take": Op("rows", take, (), (BLOCK, ALL, Size(64, variant="heads"))),
    "put": Op("rows", put, (), (BLOCK, ALL, Size(64, variant="heads"))),
    "tally": Op("rows", tally, (), (BLOCK,)),
    "summarize": Op("confidence", of_logits, (Size(32),), (Size(1), MANY)),
    "certainty": Op("confidence", of_logits, (), (Size(32),)),
    "confidence_of": Op("confidence", confidence_of, (), (Size(32),)),
    "best_token": Op("confidence", of_logits, (), (Size(32),)),
    "all_finite": Op("confidence", of_logits, (), (Size(32),)),
    "lowest": Op("select", lowest, (), (FEW, MANY)),
    "ascending": Op("select", ascending, (), (MANY,)),
    "rank": Op("select", rank, (), (Size(32),)),
    "highest": Op("select", highest, (), (Size(32),)),
    "find": Op("select", find, (), (BLOCK,)),
}


def _op(module: str, name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(import_module(f"dcache.kernels.{module}"), name)
    return found


def op_of(name: str) -> Callable[..., Any]:
    """The public function of an op."""
    return _op(OPS[name].module, name)
