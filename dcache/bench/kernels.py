"""Time of every kernel beside its torch twin and the ceilings of the device. A kernel that is wrong gets no time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcache.bench.cases import MODELS, OPS, Call, Draw, Size, op_of
from dcache.bench.clock import median_ms
from dcache.bench.reports import Ceilings, KernelResult
from dcache.errors import UsageError
from dcache.kernels import backend
from dcache.models.loading import load_model

TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}  # roundings of inputs and results
CALLS = 20  # in a graph, so that its own launch does not count
MOST_SETS = 32
COPIED = 2**31  # bytes
SIDE = 8192


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure what the device can do: neither fits in a cache."""
    source = torch.randn(COPIED // 4, device=device)
    target = torch.empty_like(source)
    # not `copy_`: in a graph that is a memcpy node, 2.8 TB/s on an H200, where kernels of ours moved 4.3
    copy_ms = median_ms(lambda: torch.neg(source, out=target), device)
    a, b = (torch.randn(SIDE, SIDE, device=device, dtype=dtype) for _ in range(2))
    product_ms = median_ms(lambda: a @ b, device)
    return Ceilings(
        copy_tb_s=round(2 * source.nbytes / copy_ms / 1e9, 3), product_tflop_s=round(2 * SIDE**3 / product_ms / 1e9, 1)
    )


def checked(ops: Sequence[str] | None) -> list[str]:
    """The ops to run, all by default."""
    for name in ops or ():
        if name not in OPS:
            raise UsageError(f"unknown op {name!r}; there are {', '.join(OPS)}")
    return [*OPS] if ops is None else [*ops]


def n_cases(ops: Iterable[str]) -> int:
    """How many results there will be."""
    return sum(len(OPS[name].of(model)) for name in ops for model in MODELS)


def results(ops: Iterable[str], device: torch.device, dtype: torch.dtype, limits: Ceilings) -> Iterator[KernelResult]:
    """Run every case of some ops; one that fails says why, and the next one runs."""
    specs = {model: load_model(model, device="meta").spec for model in MODELS}
    for name in ops:
        for model, spec in specs.items():
            for size in OPS[name].of(model):

                def draw(seed: int, size: Size = size, spec: Any = spec) -> Draw:
                    return Draw(spec, size, device, dtype, seed)

                blank = KernelResult(op=name, model=model.partition(":")[0], size=str(size))
                try:
                    yield blank.model_copy(update=measure(name, draw, limits))
                except Exception as error:  # a compiler's, for one; the table must not end here
                    yield blank.model_copy(
                        update={"failure": f"{type(error).__name__}: {' '.join(str(error).split())}"}
                    )
                torch.cuda.empty_cache()


@torch.inference_mode()
def measure(name: str, draw: Callable[[int], Draw], limits: Ceilings) -> dict[str, Any]:
    """Check and time one case: fields of `KernelResult`."""
    op, build = op_of(name), OPS[name].draw
    call, device, dtype = build(draw(0)), draw(0).device, draw(0).dtype
    error = difference(name, call)
    found: dict[str, Any] = {"error": error, "n_bytes": call.n_bytes, "n_flops": call.n_flops}
    if not error <= TOLERANCES[dtype]:  # NaN is no agreement either
        return found | {"failure": f"wrong: the relative error is {error:.3g}, above {TOLERANCES[dtype]:g}"}
    cache = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    n_sets = min(MOST_SETS, -(-cache // call.n_bytes))
    calls = [call, *(build(draw(seed)) for seed in range(1, n_sets))]
    us = _median_us(op, calls, device)
    with twins():
        twin_us = _median_us(op, calls, device)
    floors = {
        "bytes": call.n_bytes / limits.copy_tb_s * 1e-6,
        "flops": call.n_flops / limits.product_tflop_s * 1e-6,
    }
    bound = max(floors, key=lambda kind: floors[kind])
    times = {"us": round(us, 2), "twin_us": round(twin_us, 2), "share": round(floors[bound] / us, 4), "bound": bound}
    return found | times | {"sets": n_sets, "cached": n_sets * call.n_bytes < cache}


def _median_us(op: Callable[..., Any], calls: Sequence[Call], device: torch.device) -> float:
    n = max(CALLS, len(calls))

    def work() -> None:
        for i in range(n):
            call = calls[i % len(calls)]
            op(*call.args, **(call.options or {}))

    return median_ms(work, device) * 1e3 / n


@contextmanager
def twins() -> Iterator[None]:
    """Within it ops run their torch twins, as with ``DCACHE_KERNELS=torch``."""
    before, backend.ENABLED = backend.ENABLED, False
    try:
        yield
    finally:
        backend.ENABLED = before


def difference(name: str, call: Call) -> float:
    """||kernel - twin|| / ||twin||, the largest of all results; infinite where what must be equal is not.

    The twin gets the same inputs in float32. Buffers that are written in place count as results.
    """
    op, defined = op_of(name), OPS[name].defined
    ours = tuple(x.clone() if i in call.written else x for i, x in enumerate(call.args))
    wide = tuple(map(_widened, call.args))
    found = [*_tensors(defined(op(*ours, **(call.options or {})))), *(ours[i] for i in call.written)]
    with twins():
        options = {key: _widened(value) for key, value in (call.options or {}).items()}
        expected = [*_tensors(defined(op(*wide, **options))), *(wide[i] for i in call.written)]
    return float(np.max([_error(a, b) for a, b in zip(found, expected, strict=True)]))  # NaN stays NaN


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(torch.float32, copy=True) if value.is_floating_point() else value.clone()
    return type(value)(*map(_widened, value)) if hasattr(value, "_fields") else value


def _tensors(result: Any) -> list[Tensor]:
    if result is None:
        return []
    return [result] if isinstance(result, Tensor) else [x for x in result if isinstance(x, Tensor)]


def _error(ours: Tensor, twin: Tensor) -> float:
    if ours.shape != twin.shape:
        return float("inf")
    if not ours.is_floating_point():
        return 0.0 if torch.equal(ours, twin) else float("inf")
    ours, twin = ours.double(), twin.double()
    return float((ours - twin).norm() / twin.norm().clamp_min(1e-30))
