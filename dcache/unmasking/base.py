"""The contract of an unmasker, and what unmaskers share.

An unmasker answers four questions per step: which positions may be committed (`Unmasker.ask`), which token and which
score each of them has, which are committed (`Unmasker.pick`, on the device), and what that does to the canvas
(`Unmasker.settle`). Rules and sources: LLaDA (arXiv 2502.09992) and its released ``generate.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from dcache.arrays import Bools, Ints, first, leftmost, places
from dcache.models.transformer import ModelSpec
from dcache.state import Seen, State
from dcache.unmasking.sampling import MOST, Noise, Sampling, candidates
from dcache.unmasking.selection import best

if TYPE_CHECKING:
    from dcache.engine.network import Network


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

    @property
    def first_alone(self) -> bool:
        """See `Unmasker.first_alone`."""
        return False


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
        forbidden: tokens that have no share of any distribution (`ModelSpec.forbidden`).
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
    forbidden: tuple[int, ...] = ()


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
    """What a step does to the canvas, all (batch, slots).

    Attributes:
        tokens: int64, of the rows that are committed.
        commit: masked rows that become known.
        drop: masked rows that are taken off the list undecoded.
        remask: known rows that become masked.
        fill: generated rows, masked or known, that are overwritten with end-of-text, after all else; None: none are.
    """

    tokens: Ints
    commit: Bools
    drop: Bools
    remask: Bools
    fill: Bools | None = None

    def written(self, eos_id: int) -> tuple[Bools, Ints]:
        """Rows that take a token, committed or overwritten, and the tokens (batch, slots) int64."""
        if self.fill is None:
            return self.commit, self.tokens
        return self.commit | self.fill, np.where(self.fill, eos_id, self.tokens)


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
    shadows: ClassVar[bool] = False
    """`ask` may ask for shadow rows, which read the keys and values of all layers after a pass."""

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

    @property
    def first_alone(self) -> bool:
        """The first pass of a block commits the block's first position and nothing else (Fast-dLLM for Dream)."""
        return self.config.first_alone

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
        update = Update(seen.tokens, seen.taken.copy(), self._drop(state, seen, seen.taken), seen.remask)
        return self._filled(state, update) if self.sampling.after_end == "fill" else update

    def _filled(self, state: State, update: Update) -> Update:
        """All behind the first known end of the text is overwritten, in the steps when that is due."""
        known = (state.known | update.commit) & ~state.prompt & ~update.remask
        tokens = np.where(update.commit, update.tokens, state.tokens)
        end = first(known & np.isin(tokens, state.spec.end_ids), state.slots)
        due = state.active & ((state.step + 1) % self.sampling.fill_every == 0)
        behind = state.valid & (np.arange(state.slots) > end[:, None]) & due[:, None]
        fill = behind & ((tokens != state.spec.eos_id) | ~known)
        return replace(update, fill=fill, remask=update.remask & ~fill)

    def _drop(self, state: State, seen: Seen, commit: Bools) -> Bools:
        """Masked rows behind an end-of-text that this step committed."""
        drop = np.zeros(commit.shape, dtype=bool)
        if self.sampling.after_end in ("decode", "fill"):
            return drop
        if self._ended is None:
            self._ended = np.zeros(state.batch, dtype=bool)
        if set(state.spec.end_ids).isdisjoint(seen.tokens.take(places(commit)).tolist()):  # which is the rule
            return drop
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


__all__ = [
    "MOST",
    "Ask",
    "Asked",
    "Noise",
    "Picks",
    "Sampling",
    "Unmasker",
    "UnmaskerConfig",
    "Update",
    "ask_for",
    "best",
    "candidates",
]
