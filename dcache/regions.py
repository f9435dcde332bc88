"""The three parts of a canvas that accounts are kept for: rows of images, other rows of the prompt, generated rows."""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict

from dcache.arrays import Bools, Bytes

REGIONS = ("image", "text", "generated")
NOWHERE = len(REGIONS)  # in place of the number of a region: a slot that does not exist


def region_of(valid: Bools, prompt: Bools, image: Bools) -> Bytes:
    """Number of the region that each slot lies in.

    Args:
        valid: (batch, slots) bool: the slot exists.
        prompt: (batch, slots) bool: it is prompt.
        image: (batch, slots) bool: it is prompt, and stands for a part of an image.

    Returns:
        (batch, slots) uint8: index into `REGIONS`, or `NOWHERE`.
    """
    image_, text, generated = range(NOWHERE)
    codes = np.select([image, prompt, valid], [image_, text, generated], NOWHERE)
    return codes.astype(np.uint8)


class Region(BaseModel):
    """What one text cost in one region.

    Attributes:
        rows: of the canvas; 0 if the text has no such rows.
        row_layers: row-layers that ran a query.
        kv_row_layers: row-layers whose value was projected.
        full_row_layers: row-layers of as many steps without a cache.
        refreshed_row_layers: row-layers in layers that refreshed the region: in one pass they computed every row of it.
            A step counts once for each layer.
        refreshes: steps whose last layer refreshed the region.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: int
    row_layers: int
    kv_row_layers: int
    full_row_layers: int
    refreshed_row_layers: int
    refreshes: int

    @property
    def row_share(self) -> float:
        """``row_layers / full_row_layers``: 0 to 1, or above; 0 for a region without rows."""
        return self.row_layers / self.full_row_layers if self.full_row_layers else 0.0

    @property
    def refreshed_share(self) -> float:
        """``refreshed_row_layers / full_row_layers``: 0 to 1; 0 for a region without rows."""
        return self.refreshed_row_layers / self.full_row_layers if self.full_row_layers else 0.0
