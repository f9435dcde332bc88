"""Muon for matrices, AdamW for the rest, their schedule, and the bound on attention scores."""

from collections import defaultdict
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from dcache.models.tiny.recipe import Recipe
from dcache.models.transformer import Transformer
from dcache.models.vision import Vision

Parts = tuple[tuple[int, int], ...]  # a fused matrix from top to bottom: so many parts of so many rows


def orthogonalize(x: Tensor) -> Tensor:
    """Push the singular values of x (n, rows, cols) towards 1 by five quintic Newton-Schulz iterations, in bfloat16.

    The coefficients are those of Jordan et al., "Muon" (2024): singular values end between about 0.7 and 1.2.
    """
    x = x.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose direction is orthogonalised; each parameter group holds matrices of one shape.

    A fused matrix is orthogonalised in its `parts` (q, k and v; gate and up): they are different maps. The kernel of a
    convolution is the matrix that a patch is multiplied with.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # a closure is of no use here
        """Update all matrices."""
        for group in self.param_groups:
            grads = torch.stack([p.grad.flatten(1) for p in group["params"]])  # (n, rows, cols)
            state = self.state[group["params"][0]]
            velocity = state.setdefault("velocity", torch.zeros_like(grads))
            velocity.lerp_(grads, 1 - group["momentum"])
            update = self._direction(grads.lerp(velocity, group["momentum"]), group["parts"])
            torch._foreach_mul_(group["params"], 1 - group["lr"] * group["weight_decay"])
            parts = [part.view_as(p) for part, p in zip(update, group["params"], strict=True)]
            torch._foreach_add_(group["params"], parts, alpha=-group["lr"])

    @staticmethod
    def _direction(x: Tensor, parts: Parts) -> Tensor:
        """`x` (n, rows, cols) orthogonalised part by part; a tall part is scaled to the size of a square one's rows."""
        cols, done = x.shape[2], []
        for piece, (count, rows) in zip(torch.split(x, [n * rows for n, rows in parts], dim=1), parts, strict=True):
            direction = orthogonalize(piece.reshape(len(x) * count, rows, cols)).reshape(piece.shape).to(x.dtype)
            done.append(direction * max(1.0, rows / cols) ** 0.5)
        return torch.cat(done, dim=1)


def make_optimizers(model: Transformer, recipe: Recipe, vision: Vision | None = None) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers and of the tower; AdamW for everything that surrounds them.

    The projector is trained slowly and decays: its rows are normalised wherever they are read, so nothing else holds
    their size, and under Muon they became thousands of times as large as those of tokens.
    """
    spec = model.spec
    sizes = {
        "qkv": [spec.q_width, spec.kv_width, spec.kv_width],
        "out": [spec.d_model],
        "gate_up": [spec.mlp_size] * 2,
        "down": [spec.d_model],
    }
    groups: list[dict[str, Any]] = [
        {
            "params": [getattr(block, name) for block in model.blocks()],
            "parts": tuple((len(list(run)), rows) for rows, run in groupby(parts)),
        }
        for name, parts in sizes.items()
    ]
    if vision is not None:
        groups += _vision_groups(vision)
    slow = [] if vision is None else list(vision.projector.parameters())
    taken = {id(p) for p in slow} | {id(p) for group in groups for p in group["params"]}
    rest: list[dict[str, Any]] = [
        {"params": [p for part in (model, vision) if part for p in part.parameters() if id(p) not in taken]}
    ]
    if slow:
        rest.append({"params": slow, "lr": recipe.adam_lr / 3, "weight_decay": 0.1})
    return [
        Muon(groups, recipe.muon_lr, recipe.weight_decay),
        torch.optim.AdamW(rest, recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _vision_groups(vision: Vision) -> list[dict[str, Any]]:
    """The matrices of the tower, by shape."""
    alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for name, parameter in vision.tower.named_parameters():
        if parameter.ndim > 1 and "position" not in name:
            alike[parameter.shape].append(parameter)
    return [{"params": parameters, "parts": ((1, shape[0]),)} for shape, parameters in alike.items()]


def lr_scale(step: int, progress: float, recipe: Recipe) -> float:
    """Warm up linearly, stay, and decay linearly to zero over the last `decay` of the training; progress 0 to 1."""
    return min((step + 1) / recipe.warmup_steps, 1.0, max(0.0, 1 - progress) / recipe.decay)


@torch.no_grad()
def clip_scores(model: Transformer, bounds: Tensor, cap: float) -> None:
    """Scale keys, and the queries that read them, so that no bound (layers, kv_heads) would have exceeded `cap`."""
    heads_per_kv = model.spec.n_heads // model.spec.n_kv_heads
    for block, scale in zip(model.blocks(), (cap / bounds).clamp(max=1).sqrt(), strict=True):
        for name, n in (("q", heads_per_kv), ("k", 1)):
            rows, factor = block.slices(name), scale.repeat_interleave(n * model.spec.head_dim)
            block.qkv[rows] *= factor[:, None]
            if block.qkv_bias is not None:
                block.qkv_bias[rows] *= factor


def score_cap(progress: float, recipe: Recipe) -> float:
    """From `score_cap_start` down to `score_cap`, geometrically, over the first half of the training."""
    return float(recipe.score_cap * (recipe.score_cap_start / recipe.score_cap) ** max(0.0, 1 - 2 * progress))
