"""How a candidate token is drawn for every read position, and the distribution that its scores are taken from.

Two rules, chosen by `Sampling.confidence`:

=============  ====================================================================================================
``plain``      LLaDA's ``generate.py``: the candidate is ``argmax(logits + t * Gumbel)``, a sample of
               ``softmax(logits / t)``; scores come from ``softmax(logits)``, without noise or temperature
``filtered``   Dream's ``sample_tokens``: divide by the temperature, keep the likeliest tokens (top-p, then top-k),
               softmax; the candidate is a sample of that, and scores come from the same distribution
=============  ====================================================================================================

At temperature 0 the candidate is the best token either way. Under ``plain`` the filters, if any are set, narrow what a
sample is drawn from and leave the scores alone. The mask token is never a candidate: it keeps its share of
the distribution, as in the released code, but is passed over when the token is chosen. Tokens that the published
decoding of a model family never predicts (`ModelSpec.forbidden`) have no share: their logits are -inf from the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from dcache.kernels.confidence import Summary, best_token, confidence_of, summarize
from dcache.kernels.noise import uniform

if TYPE_CHECKING:
    from dcache.unmasking.base import Asked

MOST = 2**31 - 1  # of any count: far beyond use, and within every integer type
NEVER = float("-inf")


class Sampling(BaseModel):
    """How a candidate token is drawn and what happens around the end of the text; one setting for a whole run."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    temperature: float = Field(
        0.0, ge=0, description="temperature of the sample, by Gumbel noise; 0 takes the best token"
    )
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
        None,
        gt=0,
        le=1,
        description="draw from the likeliest tokens, those that together hold this probability; none: all",
    )
    top_k: int | None = Field(None, ge=1, le=MOST, description="draw from this many likeliest tokens; none: all")
    guidance: float = Field(
        0.0,
        ge=0,
        description="classifier-free guidance (LLaDA's cfg_scale): from the logits of a second sequence, whose prompt "
        "is masked, to those with the prompt and on by this share of the way; twice the rows. 0 is off",
    )
    after_end: Literal["decode", "drop", "drop-once", "fill"] = Field(
        "drop",
        description="masked rows behind a committed end of the text, where the output is cut: drop them, decode them "
        "all the same (LLaDA's released loop), drop them at the first end of the text only (Elastic-Cache), or "
        "overwrite them and those decoded there with end-of-text, every fill_every steps (SPA-Cache's early stop)",
    )
    fill_every: int = Field(
        1,
        ge=1,
        le=MOST,
        description="after_end=fill: denoising steps from one overwriting to the next (SPA-Cache's early_stop_steps)",
    )

    @model_validator(mode="after")
    def _fills(self) -> Sampling:
        if self.fill_every != 1 and self.after_end != "fill":
            raise ValueError(f"fill_every={self.fill_every} belongs to after_end=fill; give both, or neither")
        return self


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

    def order(self, sequence: Tensor, start: Tensor, slots: int) -> Tensor:
        """A draw per position that is made once for a whole block, by its first position.

        Args:
            sequence: (batch, 1) int64 number of each sequence in the run.
            start: (batch, 1) int64 first position of its block.
            slots: width of the canvas.

        Returns:
            (batch, slots) float64, uniform in (0, 1).
        """
        seed = torch.full_like(sequence, self.seed)
        return uniform(seed, sequence, start, torch.arange(slots)[None], torch.zeros_like(start))


def gumbel(uniforms: Tensor) -> Tensor:
    """Standard Gumbel numbers from uniform ones: adding them to log-probabilities and taking the maximum samples."""
    return -(-uniforms.log()).log()


@dataclass(frozen=True)
class Drawn:
    """Candidates of the read positions.

    Attributes:
        tokens: (batch, w) int64.
        logits: (batch, w, vocab) whose softmax is the distribution that scores are taken from; -inf where a token was
            filtered out or is held back.
        confidence: (batch, w) float32, probability of the candidate there.
        held: (batch, w) bool: the candidate is an end of the text that is to be committed last; None if none is.
        summary: of the logits, where one pass over them gave tokens and confidence; None otherwise.
    """

    tokens: Tensor
    logits: Tensor
    confidence: Tensor
    held: Tensor | None = None
    summary: Summary | None = None


def draw(logits: Tensor, at: Asked, sampling: Sampling, noise: Noise) -> Drawn:
    """Draw a candidate for every read position.

    Args:
        logits: (batch, w, vocab).
        at: the step.
        sampling: the rule.
        noise: source of the Gumbel noise.
    """
    logits = _allowed(logits, at, sampling)
    judged = _judged(logits, sampling)
    if judged is logits and sampling.temperature == 0 and sampling.eos_last == "off":
        summary = summarize(logits, (at.mask_id,))
        return Drawn(summary.token, logits, summary.confidence, summary=summary)
    tokens = best_token(logits, (at.mask_id,))
    if sampling.temperature > 0:
        tokens = _sample(logits, judged, tokens, at, sampling, noise)
    logits = judged
    if sampling.eos_last == "off":
        return Drawn(tokens, logits, confidence_of(logits, tokens))
    last = at.end_ids if sampling.eos_last == "on" or sampling.temperature == 0 else at.end_ids[1:]
    logits = _without(logits, last)
    held = torch.zeros_like(at.predicted)
    for token in last:
        held = held | (tokens == token)
    return Drawn(tokens, logits, confidence_of(logits, tokens).masked_fill(held, 0.0), held)


def candidates(logits: Tensor, at: Asked, sampling: Sampling, noise: Noise) -> tuple[Tensor, Tensor]:
    """Candidate token and confidence of every read position: tokens (batch, w) int64, confidence (batch, w) float32."""
    drawn = draw(logits, at, sampling, noise)
    return drawn.tokens, drawn.confidence


def probability(logits: Tensor, tokens: Tensor, at: Asked, sampling: Sampling) -> Tensor:
    """Confidence in given tokens, (batch, w) float32, under the rule by which candidates are judged.

    Args:
        logits: (batch, w, vocab).
        tokens: (batch, w) int64.
        at: the step.
        sampling: the rule.
    """
    logits = _allowed(logits, at, sampling)
    return confidence_of(_judged(logits, sampling), tokens)


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Dream's filters: temperature, then top-p, then top-k; -inf at the tokens that are out, float32.

    top-p keeps the token whose probability crosses the bound, top-k all tokens that tie with the k-th.
    """
    logits = logits.to(torch.float32)
    if sampling.temperature > 0:
        logits = logits / sampling.temperature
    k = None if sampling.top_k is None else min(sampling.top_k, logits.shape[-1])
    if sampling.top_p is not None and sampling.top_p < 1:
        ranked, order = logits.sort(dim=-1, descending=True, stable=True)
        before = ranked.softmax(-1).cumsum(-1).roll(1, -1)  # probability of all better tokens
        before[..., 0] = 0.0
        out = before > sampling.top_p
        if k is not None:
            out = out | (ranked < ranked.masked_fill(out, NEVER)[..., k - 1 : k])
        return logits.masked_fill(torch.empty_like(out).scatter_(-1, order, out), NEVER)
    if k is not None:
        logits = logits.masked_fill(logits < logits.topk(k, dim=-1).values[..., -1:], NEVER)
    return logits


def _judged(logits: Tensor, sampling: Sampling) -> Tensor:
    """The logits whose softmax scores are taken from: `logits` themselves where nothing is filtered."""
    narrows = sampling.temperature > 0 or sampling.top_k is not None or (sampling.top_p or 1) < 1
    return filtered(logits, sampling) if sampling.confidence == "filtered" and narrows else logits


def _sample(logits: Tensor, judged: Tensor, best: Tensor, at: Asked, sampling: Sampling, noise: Noise) -> Tensor:
    """``argmax(logits + t * Gumbel)`` over the tokens that pass the filters, (batch, w) int64.

    `best` (batch, w) always passes: where the filters leave the mask token alone, nothing else could be drawn.
    """
    noised = logits.to(torch.float64) + sampling.temperature * gumbel(noise.tokens(at, logits.shape[-1]))
    if sampling.top_p is not None or sampling.top_k is not None:
        kept = judged if sampling.confidence == "filtered" else filtered(logits, sampling)
        noised = noised.masked_fill((kept == NEVER).scatter(-1, best[..., None], False), NEVER)
    return best_token(noised, (at.mask_id,))


def _allowed(logits: Tensor, at: Asked, sampling: Sampling) -> Tensor:
    return _without(logits, at.forbidden + (at.eos_id,) * sampling.forbid_eos)


def _without(logits: Tensor, tokens: tuple[int, ...]) -> Tensor:
    if not tokens:
        return logits
    # not torch.tensor(tokens), which would be copied from the host
    index = torch.cat([torch.full((1,), token, device=logits.device) for token in tokens])
    return logits.index_fill(-1, index, NEVER)
