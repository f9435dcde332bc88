"""Best token and its probability.

``token[i] = argmax_v logits[i, v]`` over the ids that are allowed, lowest id first on a tie, and
``confidence[i] = exp(logits[i, token[i]] - m) / sum_v exp(logits[i, v] - m)`` with ``m = max_v logits[i, v]``: the
softmax over the whole vocabulary, allowed or not, in float32.

Published samplers take a float64 softmax of every row. Subtracting the maximum before anything is rounded keeps float32
within a few units of its last place of that (``tests/kernels/test_confidence.py`` bounds it by 1e-6 at 126,464 ids),
and needs one pass over the row.
"""

from torch import Tensor, float32


def confidence_of_ref(logits: Tensor, token: Tensor) -> Tensor:
    """The torch twin of `confidence_of`."""
    wide = logits.to(float32)
    weight = (wide - wide.amax(-1, keepdim=True)).exp()
    return weight.gather(-1, token[..., None])[..., 0] / weight.sum(-1)


def confidence_of(logits: Tensor, token: Tensor) -> Tensor:
    """Probability of given tokens.

    Args:
        logits: (batch, rows, vocab).
        token: (batch, rows) int64.

    Returns:
        (batch, rows) float32.
    """
    return confidence_of_ref(logits, token)


def best_token_ref(logits: Tensor, forbidden: tuple[int, ...]) -> Tensor:
    """The torch twin of `best_token`."""
    allowed = logits.clone()
    for token in forbidden:  # a few ids, known on the host
        allowed[..., token] = float("-inf")
    return allowed.argmax(-1)


def best_token(logits: Tensor, forbidden: tuple[int, ...] = ()) -> Tensor:
    """Most likely allowed token, lowest id first on a tie.

    Args:
        logits: (batch, rows, vocab).
        forbidden: ids that are never chosen.

    Returns:
        (batch, rows) int64.
    """
    return best_token_ref(logits, forbidden)
