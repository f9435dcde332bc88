"""The contract of an unmasker, and what unmaskers share.

An unmasker answers four questions per step: which positions may be committed (`Unmasker.ask`), which token and which
score each of them has, which are committed (`Unmasker.pick`, on the device), and what that does to the canvas
(`Unmasker.settle`). Rules and sources: LLaDA (arXiv 2502.09992) and its released ``generate.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from dcache.arrays import Bools, Ints, first, leftmost
from dcache.kernels.confidence import best_token, confidence_of
from dcache.kernels.noise import uniform
from dcache.models.transformer import ModelSpec
from dcache.state import Seen, State

if TYPE_CHECKING:
    from dcache.engine.network import Network


MOST = 2**31 - 1  # of any count: far beyond use, and within every integer type


class UnmaskerConfig(BaseModel):
    """Knobs that every unmasker has."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    window: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="sliding window: only the leftmost masked rows of the generation, this many, may be committed, and "
        "blocks do not apply; none: the masked rows of the current block",
    )


class Sampling(BaseModel):
    """How a candidate token is drawn and what happens around the end of the text; one setting for a whole run."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    temperature: float = Field(0.0, ge=0, description="temperature of LLaDA's Gumbel rule; 0 takes the best token")
    seed: int = Field(
        0, ge=0, le=2**63 - 1, description="seed of all noise; the same seed gives the same tokens in any batch"
    )
    forbid_eos: bool = Field(False, description="never predict end-of-text (LLaDA's logits_eos_inf)")
    eos_last: Literal["off", "on", "published"] = Field(
        "off",
        description="commit end-of-text and end-of-turn last (LLaDA's confidence_eos_eot_inf); 'published' keeps the "
        "released code's slip, which at temperature > 0 holds back end-of-turn alone",
    )
    confidence: Literal["plain", "filtered"] = Field(
        "plain",
        description="probability of the candidate under the plain softmax (LLaDA), or after temperature, top_p and "
        "top_k (Dream)",
    )
    top_p: float | None = Field(
        None, gt=0, le=1, description="draw from the likeliest tokens that together hold this probability; none: all"
    )
    top_k: int | None = Field(None, ge=1, le=MOST, description="draw from this many likeliest tokens; none: all")
    guidance: float = Field(
        0.0,
        ge=0,
        description="classifier-free guidance (LLaDA's cfg_scale): u + (1 + guidance) * (c - u), u from a second "
        "sequence whose prompt is masked; twice the rows. 0 is off",
    )
    after_end: Literal["decode", "drop", "drop-once"] = Field(
        "drop",
        description="masked rows behind a committed end of the text, where the output is cut: drop them, decode them "
        "all the same (LLaDA's released loop), or drop them at the first end of the text only (Elastic-Cache)",
    )


@dataclass(frozen=True)
class Ask:
    """What an unmasker wants of a step. Masks are numpy arrays (batch, slots).

    Attributes:
        window: positions that may be committed; all masked.
        block: the current block if the unmasker keeps its own; None takes the state's fixed blocks.
        read: positions whose logits it wants; None reads the window. Re-maskers add committed ones.
        flags: (batch,) or (batch, slots) arrays that arrive as ``at.flags[name]`` in `pick`, the latter by read
            position: (batch, w).
        commits: (batch,) bool: at least one commit is due; None where the window holds something. A schedule may
            ask for none in a step.
        order: (batch, slots) int64: place of each window position in the order of commits, where that is settled
            beforehand (see `Unmasker.announces`); None is left to right.
        shadow: positions whose token should also be predicted as if it were masked: each gets a row that holds the
            mask, sees every visible key but that of its own position, and is seen by shadow rows alone (WINO, arXiv
            2507.18578). They read the keys that the pass leaves in the store, whatever the policy.
    """

    window: Bools
    block: Bools | None = None
    read: Bools | None = None
    flags: Mapping[str, np.ndarray] = field(default_factory=dict)
    commits: Bools | None = None
    order: Ints | None = None
    shadow: Bools | None = None

    @property
    def due(self) -> Bools:
        """(batch,) bool: sequences that must commit something if anything is predicted."""
        due: Bools = np.asarray(self.window.any(1))
        return due if self.commits is None else due & self.commits


@dataclass(frozen=True)
class Asked:
    """What `Unmasker.pick` sees of the step, on the device.

    Attributes:
        where: (batch, w) int64 read positions, ascending, padded with the dump slot.
        predicted: (batch, w) bool: the row that predicts it was computed in this step.
        eligible: (batch, w) bool: predicted, and in the window.
        sequence: (batch, 1) int64 number of the sequence in the run, for noise.
        step: (batch, 1) int64 step of the sequence, for noise.
        mask_id: the mask token, never a candidate.
        eos_id: end-of-text.
        end_ids: all ids that end a text.
        lanes: (batch,) int64 number of each sequence in the batch that `Unmasker.begin` saw. A pass runs the sequences
            that take part in it, so its batch may be smaller; index device tensors of your own by
            ``x[at.lanes[:, None], at.where]``.
        shadow: (batch, k) int64 shadow positions, padded with the dump slot; None if none were asked for.
        shadow_logits: (batch, k, vocab) their logits.
        flags: those of `Ask`.
    """

    where: Tensor
    predicted: Tensor
    eligible: Tensor
    sequence: Tensor
    step: Tensor
    mask_id: int
    eos_id: int
    end_ids: tuple[int, ...]
    lanes: Tensor
    flags: Mapping[str, Tensor]
    shadow: Tensor | None = None
    shadow_logits: Tensor | None = None


@dataclass(frozen=True)
class Picks:
    """Result of `Unmasker.pick`, by read position: all (batch, w).

    Attributes:
        tokens: int64 candidates.
        confidence: float32, before priors.
        commit: bool.
        remask: bool, or None.
    """

    tokens: Tensor
    confidence: Tensor
    commit: Tensor
    remask: Tensor | None = None


@dataclass(frozen=True)
class Update:
    """What a step does to the canvas, all (batch, slots); `drop` takes masked rows off the list undecoded."""

    tokens: Ints
    commit: Bools
    drop: Bools
    remask: Bools


class Noise:
    """Where random numbers come from: a hash of seed, sequence, step and position, never a generator's state.

    `pick` runs twice in a reviewed step and in batches of any make-up; both must draw the same numbers.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def _keys(self, at: Asked) -> tuple[Tensor, ...]:
        return torch.full_like(at.where, self.seed), at.sequence, at.step, at.where

    def positions(self, at: Asked) -> Tensor:
        """(batch, w) float64, uniform in (0, 1)."""
        return uniform(*self._keys(at))

    def tokens(self, at: Asked, vocab: int) -> Tensor:
        """(batch, w, vocab) float64, uniform in (0, 1)."""
        draws = torch.arange(1, vocab + 1, device=at.where.device)
        return uniform(*(key[..., None] for key in self._keys(at)), draws)


def candidates(logits: Tensor, at: Asked, sampling: Sampling, noise: Noise) -> tuple[Tensor, Tensor]:
    """LLaDA's candidate token and its confidence for every read position.

    The candidate is ``argmax(logits + t * Gumbel)``, a sample of ``softmax(logits / t)``; its confidence is its
    probability under the plain softmax, without noise or temperature. The mask token is never a candidate.

    Args:
        logits: (batch, w, vocab).
        at: the step.
        sampling: temperature and end-of-text options.
        noise: source of the Gumbel noise.

    Returns:
        tokens (batch, w) int64 and confidence (batch, w) float32.
    """
    if sampling.forbid_eos:
        logits = logits.index_fill(-1, torch.full((1,), at.eos_id, device=logits.device), float("-inf"))
    chosen = logits
    if sampling.temperature > 0:
        gumbel = -(-noise.tokens(at, logits.shape[-1]).log()).log()
        chosen = logits.to(torch.float64) + sampling.temperature * gumbel
    tokens = best_token(chosen, (at.mask_id,))
    if sampling.eos_last != "off":
        last = at.end_ids if sampling.eos_last == "on" or sampling.temperature == 0 else at.end_ids[1:]
        for token in last:
            logits = logits.index_fill(-1, torch.full((1,), token, device=logits.device), float("-inf"))
    return tokens, confidence_of(logits, tokens)


def best(score: Tensor, eligible: Tensor, count: Tensor) -> Tensor:
    """Mark the `count` (batch,) highest scores among `eligible` (batch, w); ties go to the leftmost."""
    order = score.masked_fill(~eligible, float("-inf")).sort(dim=-1, descending=True, stable=True).indices
    place = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return eligible & (place < count[:, None])


class Unmasker(ABC):
    """Chooses which masked rows are committed.

    Args:
        config: the knobs; or give them by name.
        sampling: temperature, seed and end-of-text handling of the run.
        noise: source of random numbers; a test may replay recorded ones.
    """

    class Config(UnmaskerConfig):
        """No knobs beyond the window."""

    name: ClassVar[str] = ""
    """What users write; set when the unmasker is registered."""
    label: ClassVar[str] = ""
    """Name and distribution, for errors; set when the unmasker is registered."""
    paper: ClassVar[str] = ""
    """Where the rule comes from."""
    announces: ClassVar[bool] = False
    """The window of `ask` is exactly what the step commits, so a policy knows the picks before the pass."""

    config: UnmaskerConfig

    def __init_subclass__(cls, **more: Any) -> None:
        """A subclass is not what its parent is registered as."""
        super().__init_subclass__(**more)
        for attribute in ("name", "label"):
            if attribute not in cls.__dict__:
                setattr(cls, attribute, "")

    def __init__(
        self,
        config: UnmaskerConfig | None = None,
        sampling: Sampling | None = None,
        noise: Noise | None = None,
        **knobs: object,
    ):
        self.config = self.Config.model_validate(knobs) if config is None else config
        self.sampling = Sampling() if sampling is None else sampling
        self.noise = Noise(self.sampling.seed) if noise is None else noise
        self._ended: Bools | None = None

    def refuses(self, spec: ModelSpec) -> str | None:
        """Why this unmasker makes no sense on a model, as a sentence; None if it does."""
        return None

    def begin(self, net: Network, state: State) -> None:
        """Host, once per batch: forget the past; allocate device tensors with `net.buffer`."""
        self._ended = None

    @abstractmethod
    def ask(self, state: State) -> Ask:
        """Host, before `plan`: what may be committed."""

    @abstractmethod
    def pick(self, logits: Tensor, at: Asked) -> Picks:
        """Device, captured and pure: it runs twice in a reviewed step. Own state changes in `settle`.

        Args:
            logits: (batch, w, vocab) at the read positions.
            at: what else is known of the step.
        """

    def settle(self, state: State, seen: Seen) -> Update:
        """Host, after the pass: commit what was taken, then handle the end of the text."""
        commit = seen.taken & state.active[:, None]
        return Update(seen.tokens, commit, self._drop(state, seen, commit), seen.remask)

    def _drop(self, state: State, seen: Seen, commit: Bools) -> Bools:
        """Masked rows behind an end-of-text that this step committed."""
        drop = np.zeros_like(commit)
        if self.sampling.after_end == "decode":
            return drop
        if self._ended is None:
            self._ended = np.zeros(state.batch, dtype=bool)
        end = first(commit & np.isin(seen.tokens, state.spec.end_ids), -1)
        behind = (np.arange(state.slots) > end[:, None]) & (end >= 0)[:, None]
        if self.sampling.after_end == "drop-once":
            behind &= ~self._ended[:, None]
        self._ended = self._ended | (end >= 0)
        return behind & state.masked & ~commit


def ask_for(state: State, window: int | None, **flags: np.ndarray) -> Ask:
    """Ask for the masked rows of the current block, or of a window that slides over the whole generation."""
    if window is None:
        return Ask(state.masked & state.block, flags=flags)
    generation = state.valid & ~state.prompt & state.active[:, None]
    return Ask(leftmost(state.masked, window), block=generation, flags=flags)
