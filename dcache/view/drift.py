"""How far the keys and values of a cache are from those of a full recompute.

After each step, before its commits are written, the keys and values in the stores are compared with those of a
forward pass of the model over every row of the same canvas, without a cache. For a row of a layer, x is what the store
holds, as one vector over all heads, and y what the full pass computes:

    distance    |x - y| / |y|
    cosine      x . y / (|x| |y|)

Both are means over the rows that the pass could attend to. A policy that computes every row has a distance of 0, up to
rounding. Keys are compared after rotary embedding. Of a policy that frees keys, those that it holds are compared, and
while it holds none there is no mean. This is slow, and the engine has no part in the full pass.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dcache.arrays import Bools
from dcache.engine import Engine
from dcache.policy import Plan
from dcache.regions import REGIONS
from dcache.state import State

WHERE = ("all", *REGIONS)
MEASURES = ("K distance", "V distance", "K cosine", "V cosine")


class DriftMeter:
    """Measures the passes that it is shown; see `Watched`.

    Attributes:
        steps: of each step an array (measures, layers, batch, where) float64, in the order of `MEASURES` and `WHERE`;
            NaN where a sequence has no such row.
    """

    def __init__(self) -> None:
        self.steps: list[np.ndarray] = []

    @torch.inference_mode()
    def __call__(self, engine: Engine, plan: Plan, second: bool) -> None:
        """Measure what a pass left; the second pass of a step replaces the first."""
        if second:
            self.steps.pop()
        state = engine.state
        rows = self._rows(engine, plan)
        full = fresh(engine, state)
        found = np.full((len(MEASURES), len(rows), state.batch, len(WHERE)), np.nan)
        for at, name in enumerate("KV"):
            for layer, stored in enumerate(engine.stores.spread(name)):
                x = stored[:, :, : state.slots].transpose(1, 2).flatten(2).to(torch.float32)
                y = full[f"{name.lower()}.{layer}"].transpose(1, 2).flatten(2).to(torch.float32)
                for kind, value in enumerate((distance(x, y), cosine(x, y))):
                    found[2 * kind + at, layer] = _means(value.cpu().numpy(), rows[layer], state)
        self.steps.append(found)

    def _rows(self, engine: Engine, plan: Plan) -> Bools:
        """(layers, batch, slots) bool: the rows that the pass could attend to, and that are still there."""
        state, n_layers = engine.state, len(engine.layers)
        rows = np.broadcast_to(state.valid, (n_layers, *state.valid.shape)).copy()
        if plan.visible is not None:
            shown = torch.as_tensor(plan.visible).cpu().numpy()
            rows &= shown.any(-2) if shown.ndim == 4 else shown
        if engine.stores.positions is not None:
            held = np.zeros((n_layers, state.batch, state.slots + 1), dtype=bool)
            np.put_along_axis(held, engine.stores.positions.cpu().numpy(), True, axis=-1)
            rows &= held[:, :, :-1]
        return rows


def fresh(engine: Engine, state: State) -> dict[str, Tensor]:
    """Keys and values of all rows of the canvas: "k.0", "v.0", ..., each (batch, kv_heads, slots, head_dim)."""
    model = engine.model
    h = model.embed(torch.from_numpy(state.tokens).to(model.device))
    for b, given in enumerate(state.embeddings):
        if given is not None:
            h[b, torch.from_numpy(given.positions).to(model.device)] = given.values.to(h)
    keep: dict[str, Tensor] = {}
    model(embeddings=h, valid=torch.from_numpy(state.valid).to(model.device), keep=keep)
    return keep


def distance(x: Tensor, y: Tensor) -> Tensor:
    """|x - y| / |y| over the last axis; 0 where both are 0."""
    size = y.norm(dim=-1)
    found: Tensor = (x - y).norm(dim=-1) / size.clamp_min(torch.finfo(y.dtype).tiny)
    return found


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """The cosine of two vectors over the last axis."""
    return torch.nn.functional.cosine_similarity(x, y, dim=-1)


def _means(value: np.ndarray, rows: Bools, state: State) -> np.ndarray:
    """Means of `value` over `rows`, each (batch, slots): (batch, where), NaN where there is no such row."""
    masks = [rows, *(rows & (state.region == number) for number in range(len(REGIONS)))]
    table = np.full((len(rows), len(masks)), np.nan)
    for w, mask in enumerate(masks):
        n = mask.sum(1)
        total = np.where(mask, value, 0).sum(1)
        table[:, w] = np.where(n > 0, total / np.maximum(n, 1), np.nan)
    return table
