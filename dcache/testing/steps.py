"""Steps made by hand, and runs without a cache: what a test of an unmasker needs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dcache.decode import decode
from dcache.engine import Engine
from dcache.models.transformer import ModelSpec, Transformer
from dcache.policies.none import NoCache
from dcache.state import State
from dcache.trace import Step
from dcache.unmasking.base import Asked, Unmasker


def asked(
    spec: ModelSpec, batch: int = 1, w: int = 6, *, eligible: Tensor | None = None, step: int = 0, **flags: Tensor
) -> Asked:
    """What `Unmasker.pick` sees of a step that reads positions 0..w-1 of each sequence.

    Args:
        spec: sizes and ids of the model.
        batch: number of sequences.
        w: read positions of each.
        eligible: (batch, w) bool; all by default.
        step: number of the step, for noise.
        flags: those of `Ask`, as tensors.
    """
    lanes = torch.arange(batch)
    every = torch.ones(batch, w, dtype=torch.bool)
    return Asked(
        where=torch.arange(w).expand(batch, w).contiguous(),
        predicted=every,
        eligible=every if eligible is None else eligible,
        sequence=lanes[:, None],
        step=torch.full((batch, 1), step),
        mask_id=spec.mask_id,
        eos_id=spec.eos_id,
        end_ids=spec.end_ids,
        lanes=lanes,
        flags=flags,
        forbidden=spec.forbidden,
    )


def logits_of(confidence: Sequence[Sequence[float]], vocab: int, token: int = 1) -> Tensor:
    """(batch, w, vocab) float32 logits that give `token` these probabilities and share the rest among the others."""
    p = torch.tensor(confidence, dtype=torch.float64)[..., None]
    logits = ((1 - p) / (vocab - 1)).log().repeat(1, 1, vocab)
    logits[..., token : token + 1] = p.log()
    return logits.to(torch.float32)


def uncached(
    model: Transformer,
    unmasker: Unmasker,
    prompts: Sequence[Sequence[int]],
    gen_length: int | Sequence[int],
    block_length: int | None = None,
    ids: Sequence[int] | None = None,
) -> tuple[list[Step], State]:
    """Decode with every row recomputed in every step; returns the steps and the finished canvas."""
    state = State(model.spec, prompts, gen_length, block_length, ids=ids, guided=unmasker.sampling.guidance > 0)
    return decode(Engine(model, NoCache(), unmasker, debug=True), state), state


def counts(trace: Sequence[Step], b: int = 0) -> list[int]:
    """How many rows each step commits in a sequence."""
    return [int(step.commit[b].sum()) for step in trace]


def commits(trace: Sequence[Step], b: int = 0) -> list[dict[int, int]]:
    """Position to token of what each step commits in a sequence."""
    return [{int(p): int(step.tokens[b, p]) for p in np.flatnonzero(step.commit[b])} for step in trace]
