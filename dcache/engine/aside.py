"""Device work beside the main line of a pass: statistics that only the host reads.

On a GPU it is put on a second stream, where short kernels run while matrix products wait for memory. The main line
waits for it before it overwrites what may be read there, and at the end of each layer. On a CPU it runs in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Aside:
    """A second stream, and the promise to come back from it.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device):
        on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]  # torch leaves it so
        self._open = False

    @contextmanager
    def run(self) -> Iterator[None]:
        """Run what is inside beside the main line, after all that was launched before."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        self._open = True
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """The main line waits for what runs beside it."""
        if self._open:
            assert self._stream is not None
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            self._open = False
