"""Device work beside the main line of a pass: statistics that only the host reads.

On a GPU it is put on a second stream, where short kernels run while matrix products wait for memory. The main line
waits for it before it overwrites a store that is read there, and at the end of the pass. On a CPU it runs in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch


@lru_cache
def stream_of(device: torch.device, purpose: str) -> torch.cuda.Stream:
    """One stream per device and purpose, for all engines: the libraries behind products keep 32 MiB for each."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it so


class Aside:
    """A second stream, and the promise to come back from it.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device):
        self._stream = stream_of(device, "aside") if device.type == "cuda" else None
        self._inside = self._open = False
        self._read: set[tuple[int, str]] = set()  # layer and store
        self._held: list[object] = []

    @contextmanager
    def run(self) -> Iterator[None]:
        """Run what is inside beside the main line, after all that was launched before."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        self._inside = self._open = True
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            self._inside = False

    def reads(self, layer: int, *names: str) -> None:
        """Stores of a layer are read; noted if that happens beside the main line."""
        if self._inside:
            self._read.update((layer, name) for name in names)

    def writes(self, layer: int, *names: str) -> None:
        """Stores of a layer are about to be written: the main line waits if they may still be read."""
        if self._open and not self._inside and any((layer, name) in self._read for name in names):
            self.join()

    def hold(self, *tensors: object) -> None:
        """Keep the memory of tensors that may be read beside, until the main line has waited."""
        if self._open:
            self._held += tensors

    def join(self) -> None:
        """The main line waits for what runs beside it."""
        if self._open:
            assert self._stream is not None
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            self._open = False
            self._read.clear()
            self._held.clear()
