"""Many small arrays in one transfer.

A packet is a block of bytes that exists on the host and on the device, with the same named views on both sides.
Inputs go up in one copy, the first work of a pass on the device; results come down in one, the last; then the host
waits, once. In a recording both copies are part of it, and take no call of their own. On the CPU both sides are the
same memory and nothing moves.
"""

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

Field: TypeAlias = tuple[str, tuple[int, ...], np.dtype]  # name, shape, dtype

ALIGN = 16  # bytes; keeps every view of the block aligned for its dtype
TORCH = {
    np.dtype(np.bool_): torch.bool,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}
NUMPY = {kind: name for name, kind in TORCH.items()}


class Packet:
    """Named arrays of fixed shape on host and device.

    Args:
        fields: name, shape and dtype of each array.
        device: where the other side lives.

    Attributes:
        host: name to numpy view.
        device: name to torch view.
    """

    def __init__(self, fields: Iterable[Field], device: torch.device):
        places: list[tuple[str, tuple[int, ...], np.dtype, int]] = []
        end = 0
        for name, shape, kind in fields:
            places.append((name, shape, kind, end))
            size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
            end += -(-size // ALIGN) * ALIGN
        self.on_device = device.type != "cpu"
        self._near = torch.zeros(max(end, ALIGN), dtype=torch.uint8, pin_memory=self.on_device)
        self._far = torch.zeros_like(self._near, device=device) if self.on_device else self._near
        self.host: dict[str, np.ndarray] = {}
        self.device: dict[str, Tensor] = {}
        block = self._near.numpy()
        for name, shape, kind, begin in places:
            size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
            self.host[name] = block[begin : begin + size].view(kind).reshape(shape)
            self.device[name] = self._far[begin : begin + size].view(TORCH[kind]).reshape(shape)

    def upload(self) -> None:
        """Send the host side; asynchronous, so it must not change before `wait`."""
        if self.on_device:
            self._far.copy_(self._near, non_blocking=True)

    def download(self) -> None:
        """Bring the device side; asynchronous, so it is there after `wait`."""
        if self.on_device:
            self._near.copy_(self._far, non_blocking=True)

    def wait(self) -> None:
        """Wait for all that was launched: the single sync of a pass."""
        if self.on_device:
            torch.cuda.current_stream(self._far.device).synchronize()


def fields_of(tensors: Mapping[str, Tensor]) -> list[Field]:
    """The packet fields that hold `tensors`."""
    return [(name, tuple(x.shape), NUMPY[x.dtype]) for name, x in tensors.items()]
