"""How sure a row is: the score by which rows are ranked, from the distribution of its candidates.

==============  =====================================================================================
``confidence``  probability of the candidate
``margin``      probability of the likeliest token less that of the second (Dream's ``topk_margin``)
``entropy``     ``sum p log(p + 1e-10)``: the negative entropy, so that higher is surer (Dream's ``entropy``)
``random``      a uniform draw in every step
==============  =====================================================================================
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dcache.kernels.confidence import Summary, certainty, summarize
from dcache.unmasking.base import Asked
from dcache.unmasking.sampling import Drawn, Noise

Score = Literal["confidence", "margin", "entropy", "random"]
HELD = torch.finfo(torch.float32).min  # score of a row that is to come last


def margin_of(logits: Tensor) -> Tensor:
    """(batch, w) float32: lead of the likeliest of (batch, w, vocab) over the second.

    The maximum is subtracted before anything is rounded: a low temperature makes large logits and leads close to 1.
    """
    return summarize(logits).margin


def certainty_of(logits: Tensor, summary: Summary | None = None) -> Tensor:
    """(batch, w) float32: negative entropy of the softmax of (batch, w, vocab); a `summary` at hand saves a pass."""
    return certainty(logits, summary)


def score_of(kind: Score, drawn: Drawn, at: Asked, noise: Noise) -> Tensor:
    """Score of every read position, (batch, w) float; ends of the text that are held back come last."""
    if kind == "random":
        return noise.positions(at)
    if kind == "confidence":
        return drawn.confidence
    if kind == "entropy":
        score = certainty_of(drawn.logits, drawn.summary)
    else:
        score = margin_of(drawn.logits) if drawn.summary is None else drawn.summary.margin
    return score if drawn.held is None else score.masked_fill(drawn.held, HELD)
