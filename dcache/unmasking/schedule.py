"""How many rows a step commits, decided on the host.

=========  ========================================================================================================
``even``   LLaDA's ``get_num_transfer_tokens``: n masked rows over s steps, ``n // s`` each, the remainder to the
           first ones
``linear`` Dream's ``diffusion_generate``: with ``t`` falling evenly from 1 to eps over the steps, step i commits
           ``floor(masked * (1 - t[i + 1] / t[i]))`` of the rows masked now, in float32; the last step all
=========  ========================================================================================================
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from dcache.arrays import Bools, Floats, Ints, leftmost
from dcache.errors import UsageError
from dcache.state import State
from dcache.unmasking.base import MOST, Ask, UnmaskerConfig, ask_for


class Opening(UnmaskerConfig):
    """What the first step of a block commits."""

    first: Literal["free", "alone"] = Field(
        "free",
        description="what the first step of a block commits: what the rule says, or its first row alone whatever its "
        "score (Fast-dLLM and Sparse-dLLM on Dream)",
    )

    @property
    def first_alone(self) -> bool:
        """The knob, as policies ask for it."""
        return self.first == "alone"


class Schedule(Opening):
    """How many rows a step commits."""

    steps: int | None = Field(
        None, ge=1, le=MOST, description="denoising steps of the whole generation, the same number for each block"
    )
    tokens_per_step: int | None = Field(None, ge=1, le=MOST, description="rows per step; 1 unless steps is given")
    schedule: Literal["even", "linear"] = Field(
        "even", description="how rows are spread over the steps: evenly (LLaDA), or by Dream's noise schedule"
    )
    eps: float = Field(0.001, gt=0, lt=1, description="where the linear schedule's t ends")
    idle_steps: bool = Field(
        False,
        description="make the forward calls in which the linear schedule commits nothing, as released; false: such a "
        "step commits one row",
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> Schedule:
        if self.steps is not None and self.tokens_per_step is not None:
            raise ValueError("give steps or tokens_per_step, not both")
        if self.schedule == "linear" and self.tokens_per_step is not None:
            raise ValueError("the linear schedule counts in steps; give steps instead of tokens_per_step")
        return self


class Span:
    """What a schedule is spread over: the blocks of a generation, or all of it where a window slides.

    Args:
        state: the batch.
        window: the sliding window, if any; it knows no blocks.

    Attributes:
        size: (batch,) int64 rows of a block, known ones included.
        blocks: (batch,) int64 number of blocks.
        step: (batch,) int64 steps done in the current one.
        masked: (batch, slots) bool, its masked rows.
    """

    def __init__(self, state: State, window: int | None):
        whole = window is not None or state.block_length is None
        self.size: Ints = state.gen_length if whole else np.full_like(state.gen_length, state.block_length)
        self.blocks: Ints = state.gen_length // self.size
        self.step: Ints = state.step if whole else state.block_step
        self.masked: Bools = state.masked if whole else state.masked & state.block

    def share(self, steps: int | None) -> Ints:
        """(batch,) int64: steps per block out of `steps` for the generation; as many as rows if None."""
        if steps is None:
            return self.size
        if (steps % self.blocks).any():
            raise UsageError(
                f"steps {steps} is not divisible by the {int(self.blocks.max())} blocks of the generation; "
                "every block takes the same number of steps"
            )
        return steps // self.blocks


@lru_cache(maxsize=64)
def progress(steps: int, eps: float) -> Floats:
    """(steps,) float32: share of the masked rows that each step of the linear schedule commits, the last one all."""
    t = torch.linspace(1, eps, steps + 1)
    share: Floats = (1 - t[1:] / t[:-1]).numpy().copy()  # kept, so without the tensor behind it
    share[-1] = 1.0
    return share


def linear_share(step: Ints, steps: Ints, eps: float) -> Floats:
    """(batch,) float32: share of the masked rows due in `step` (batch,) out of `steps` (batch,); 1 from the last on."""
    tables = [progress(int(n), eps) for n in steps]
    return np.array([table[min(i, len(table) - 1)] for i, table in zip(step, tables, strict=True)], dtype=np.float32)


class Quota:
    """Rows to commit per step.

    The even split is fixed when a block begins. With more steps than rows the last steps would commit nothing; the
    released loop makes those forward calls all the same, this one does not. Rows that are left when the schedule is
    through (a window narrower than the quota, a row that was put back or not predicted) follow at the same pace, at
    least one per step; under the linear schedule all at once.
    """

    def __init__(self, config: Schedule):
        self.config = config
        self.size = self._same = np.zeros(0, dtype=np.int64)

    def of(self, state: State) -> Ints:
        """(batch,) int64: rows to commit in this step."""
        config = self.config
        if config.steps is None and config.schedule == "even":
            if len(self._same) != state.batch:
                self._same = np.full(state.batch, config.tokens_per_step or 1, dtype=np.int64)
                self._same.setflags(write=False)  # of all steps
            quota = self._same
        else:
            span = Span(state, config.window)
            quota = self._linear(span) if config.schedule == "linear" else self._even(span)
        return np.where(opens(state, config), 1, quota) if config.first == "alone" else quota

    def _even(self, span: Span) -> Ints:
        if self.size.shape != span.step.shape:
            self.size = np.zeros_like(span.step)
        self.size = np.where(span.step == 0, span.masked.sum(1), self.size)
        share, rest = np.divmod(self.size, span.share(self.config.steps))
        quota: Ints = np.maximum(share + (span.step < rest), 1)
        return quota

    def _linear(self, span: Span) -> Ints:
        masked = span.masked.sum(1)
        due = linear_share(span.step, span.share(self.config.steps), self.config.eps)
        quota: Ints = np.floor(masked.astype(np.float32) * due).astype(np.int64)
        return quota if self.config.idle_steps else np.maximum(quota, 1)


def opens(state: State, config: Opening) -> Bools:
    """(batch,) bool: sequences whose block begins in this step and opens with its first row alone."""
    begins: Bools = (state.step if config.window is not None else state.block_step) == 0
    return begins & (config.first == "alone")


def ask_opening(state: State, config: Opening, **flags: np.ndarray) -> Ask:
    """Ask for the masked rows of the block or window; for the first of them where a block opens with it alone."""
    ask = ask_for(state, config.window, **flags)
    if config.first == "free":
        return ask
    return replace(ask, window=np.where(opens(state, config)[:, None], leftmost(ask.window, 1), ask.window))
