"""What decides the weights of a tiny checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, besides library versions and the number of data workers."""

    family: str = "llada"
    seed: int = 0
    n_layers: int = 8
    d_model: int = 256
    mlp_size: int = 512
    vocab_size: int = 512
    head_dim: int = 32
    heads_per_kv: int = 1
    batch: int = 1024
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    weight_decay: float = 0.01
    warmup_steps: int = 200
    decay: float = 0.6
    block_share: float = 0.5
    score_cap: float = 20.0
    score_cap_start: float = 20.0

    @property
    def n_heads(self) -> int:
        """Query heads."""
        return self.d_model // self.head_dim

    @property
    def n_kv_heads(self) -> int:
        """Key/value heads."""
        return self.n_heads // self.heads_per_kv


RECIPES: Mapping[str, Recipe] = {
    "llada": Recipe(),
    # Fewer KV weights and a wider MLP: as many weights as tiny-llada. One run, so the caps and the decay begin at once.
    "dream": Recipe("dream", mlp_size=640, heads_per_kv=4, decay=0.8, score_cap_start=100.0),
}
"""Defaults by family."""
