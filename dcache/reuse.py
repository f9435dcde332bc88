"""What outlives a request: values under keys of content, within a budget of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from hashlib import sha256
from threading import Lock
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class ReuseCache(Generic[T]):
    """Keeps values until their bytes exceed a budget; then those go that were not used for longest.

    Several threads may use one. What `get` returned stays valid after it was evicted.

    Args:
        budget_bytes: the most that is held; a value larger than that is not kept.

    Attributes:
        hits: how often `get` found something.
        misses: how often it did not.
        evictions: values that went to make room.
    """

    def __init__(self, budget_bytes: int):
        self.budget_bytes = budget_bytes
        self.hits = self.misses = self.evictions = self._bytes = 0
        self._held: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable) -> T | None:
        """The value of a key, now the most recently used; None, and a miss, if it is not held."""
        with self._lock:
            found = self._held.get(key)
            if found is None:
                self.misses += 1
                return None
            self.hits += 1
            self._held.move_to_end(key)
            return found[0]

    def put(self, key: Hashable, value: T, n_bytes: int) -> None:
        """Keep a value of `n_bytes`, unless its key is held already: the first one stays."""
        with self._lock:
            if key in self._held or n_bytes > self.budget_bytes:
                return
            self._held[key] = value, n_bytes
            self._bytes += n_bytes
            while self._bytes > self.budget_bytes:
                _, (_, freed) = self._held.popitem(last=False)
                self._bytes -= freed
                self.evictions += 1

    def clear(self) -> None:
        """Hold nothing; the statistics go on."""
        with self._lock:
            self._held.clear()
            self._bytes = 0

    @property
    def statistics(self) -> dict[str, int]:
        """hits, misses, evictions, entries and bytes held."""
        with self._lock:
            return {
                "hits": self.hits,
                "misses": self.misses,
                "evictions": self.evictions,
                "entries": len(self._held),
                "bytes": self._bytes,
            }


def content_key(*parts: object) -> str:
    """A hash of tensors by dtype, shape and bytes, and of other things by how they are written."""
    found = sha256()
    for part in parts:
        if isinstance(part, Tensor):
            found.update(f"{part.dtype} {tuple(part.shape)}".encode())
            found.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            found.update(repr(part).encode())
    return found.hexdigest()
