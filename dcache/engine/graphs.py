"""CUDA graphs: the device work of a pass recorded once per key, then replayed with one launch.

A pass of an 8B model is some 400 kernels. Launched one by one they take the host longer than the GPU needs to run
them; a graph launches in a few tens of microseconds, whatever it holds. It freezes everything but the contents of
tensors, which is why a pass touches static buffers only (``docs/explanation/engine.md``).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from dcache.engine.aside import stream_of

MOST_GRAPHS = 512  # keys that an engine keeps buffers and a recording for; of more than that it forgets the oldest


class Graphs:
    """Records and replays; the executor of engines on a GPU.

    All graphs share one memory pool. That is safe because they run one after the other on one stream, and nothing that
    a pass leaves behind lies in the pool.

    Args:
        device: a CUDA device.

    Attributes:
        captured: graphs recorded so far, forgotten ones included.
        replayed: passes that were a replay.
        keys: how often each key was recorded, since all were forgotten.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.captured = self.replayed = 0
        self.keys: dict[Hashable, int] = {}
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None
        self._stream = stream_of(device, "graphs")

    def ready(self, key: Hashable) -> bool:
        """Whether there is a recording of this key."""
        return key in self._graphs

    def record(self, key: Hashable, work: Callable[[], None]) -> None:
        """Record `work` without running it; every kernel of it has run before, so nothing is compiled in here."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self._stream), _no_collection():
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with suppress(RuntimeError):  # the capture is lost; what lost it is the error to show
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        self._graphs[key] = graph
        self.keys[key] = self.keys.get(key, 0) + 1
        self.captured += 1

    def __call__(self, key: Hashable, work: Callable[[], None]) -> None:
        """Replay what was recorded."""
        self._graphs[key].replay()
        self.replayed += 1

    def forget(self, key: Hashable = None) -> None:
        """Drop the recording of this key, or all of them, and their memory with them."""
        if key is not None:
            self._graphs.pop(key, None)
            return
        self._graphs.clear()
        self.keys.clear()
        self._pool = None


@contextmanager
def _no_collection() -> Iterator[None]:
    """Freeing graphs or pinned buffers of another engine during a capture would invalidate it."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
