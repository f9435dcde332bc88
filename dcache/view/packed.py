"""Arrays in JSON: compressed, base64, with their shape; nothing is executed to read one."""

from __future__ import annotations

import base64
import binascii
import math
import zlib
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from dcache.arrays import Bools, Floats

MOST_BYTES = 2**31
Size = Annotated[int, Field(ge=0, le=2**31)]


class Packed(BaseModel):
    """A boolean or float32 array.

    Attributes:
        kind: "bits", eight to a byte, or "f4", little-endian float32.
        shape: of the array.
        data: base64 of the deflated bytes, row by row.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["bits", "f4"]
    shape: list[Size]
    data: str

    @staticmethod
    def bits(mask: np.ndarray) -> Packed:
        """Pack a boolean array."""
        return _packed("bits", mask.shape, np.packbits(mask.astype(bool)).tobytes())

    @staticmethod
    def floats(values: np.ndarray) -> Packed:
        """Pack numbers as float32; NaN stays NaN."""
        return _packed("f4", values.shape, values.astype("<f4").tobytes())

    def mask(self) -> Bools:
        """The boolean array; ValueError if the bytes are not those of one."""
        n = math.prod(self.shape)
        data = np.frombuffer(self._bytes("bits", -(-n // 8)), dtype=np.uint8)
        return np.unpackbits(data, count=n).astype(bool).reshape(self.shape)

    def values(self) -> Floats:
        """The float32 array; ValueError if the bytes are not those of one."""
        data = self._bytes("f4", 4 * math.prod(self.shape))
        return np.frombuffer(data, dtype="<f4").astype(np.float32).reshape(self.shape)

    def _bytes(self, kind: str, n_bytes: int) -> bytes:
        """What was packed. It may be no larger than its shape says, so a small file cannot fill the memory."""
        if self.kind != kind or n_bytes > MOST_BYTES:
            raise ValueError(
                f"an array of {self.kind} and shape {self.shape}, expected {kind}, {MOST_BYTES} bytes at most"
            )
        try:
            unpacking = zlib.decompressobj()
            data = unpacking.decompress(base64.b64decode(self.data, validate=True), n_bytes + 1)
        except (binascii.Error, zlib.error) as error:
            raise ValueError(f"an array of shape {self.shape} that cannot be unpacked: {error}") from None
        if len(data) != n_bytes or not unpacking.eof:
            raise ValueError(f"an array of shape {self.shape} that does not have its {n_bytes} bytes")
        return data


def _packed(kind: Literal["bits", "f4"], shape: tuple[int, ...], data: bytes) -> Packed:
    return Packed(kind=kind, shape=list(shape), data=base64.b64encode(zlib.compress(data, 9)).decode())
