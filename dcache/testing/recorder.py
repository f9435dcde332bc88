"""Capture on a CPU: record the operations of a pass once, refuse every sync, and replay them on the same tensors.

A CUDA graph freezes everything but the contents of tensors. This executor does the same, so that code which would
break under capture breaks in a test without a GPU: a value read from Python is the one of the recording, and an
operation that needs the host (``item``, ``nonzero``, indexing by a boolean mask, random generators) is refused by name.

Two things differ. A CUDA graph is recorded without running it; this runs the work while it records. And there is one
stream: what `Layer.aside` puts beside the main line runs in its place, so a race between the two does not show here.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST_OPS = (
    "_local_scalar_dense", "nonzero", "nonzero_numpy", "is_nonzero", "equal", "masked_select", "_unique", "_unique2",
    "unique_dim", "unique_consecutive", "bincount", "repeat_interleave",
)  # fmt: skip
HOST_CALLS = {
    Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.item, Tensor.__bool__, Tensor.__array__,
    torch.tensor, torch.as_tensor, torch.from_numpy,
}  # fmt: skip


class SyncError(AssertionError):
    """A captured method used an operation that needs the host, or whose shape depends on values."""


class _Calls(TorchFunctionMode):
    """Refuses what never reaches the dispatcher: on a CPU these are free, on a GPU each of them is a copy or a sync."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in HOST_CALLS:
            raise SyncError(f"{func.__name__} moves values between host and device; it cannot be captured")
        return func(*args, **(kwargs or {}))


class _Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves these two untyped
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:  # an operation made of others is recorded, and searched for syncs, as what it is made of
            parts = func.decompose(*args, **(kwargs or {}))
        if parts is not NotImplemented:
            return parts
        name = func._schema.name.split("::")[-1]
        if torch.Tag.nondeterministic_seeded in func.tags and "scaled_dot_product" not in name:  # draws for dropout
            raise SyncError(f"{func} draws from a generator, which a replay would repeat; use dcache.kernels.noise")
        if name in HOST_OPS:
            raise SyncError(f"{func} needs the host, or gives a shape that depends on values; it cannot be captured")
        if name in ("index", "index_put", "index_put_") and any(
            isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1])
        ):
            raise SyncError(f"{func} with a boolean mask gives a shape that depends on values; use torch.where")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class Recorder:
    """An executor for `dcache.engine.Engine`.

    Attributes:
        recorded: number of passes that were recorded.
        replayed: number of passes that were replayed.
    """

    def __init__(self) -> None:
        self._tapes: dict[Hashable, list[tuple[Any, Any, Any, Any]]] = {}
        self.recorded = self.replayed = 0

    def ready(self, key: Hashable) -> bool:
        """It records when it first runs a key."""
        return True

    def record(self, key: Hashable, work: Callable[[], None]) -> None:
        """Nothing to do beforehand."""

    def __call__(self, key: Hashable, work: Callable[[], None]) -> None:
        """Record `work` the first time, replay it from then on."""
        if key not in self._tapes:
            with _Calls(), _Tape() as tape:
                work()
            self._tapes[key] = tape.calls
            self.recorded += 1
            return
        self.replayed += 1
        for func, args, kwargs, out in self._tapes[key]:
            self._replay(func, args, kwargs, out)

    def forget(self, key: Hashable = None) -> None:
        """Drop the tape of this key, or all."""
        if key is None:
            self._tapes.clear()
        else:
            self._tapes.pop(key, None)

    @staticmethod
    def _replay(func: Any, args: Any, kwargs: Any, out: Any) -> None:
        held = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if not func._schema.is_mutable and all(x.untyped_storage().data_ptr() in held for x in results):
            return  # a view: the recorded one still shows the right memory
        fresh = func(*args, **kwargs)
        if func._schema.is_mutable:
            return  # wrote into a recorded tensor already
        for new, old in zip((x for x in tree_leaves(fresh) if isinstance(x, Tensor)), results, strict=True):
            old.copy_(new)
