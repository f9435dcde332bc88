"""Commit rows whose token says something: confidence weighed against how common the token is (PC-Sampler).

``score = min(-c * log(f[token] + 1e-10), clip_alpha)``, with ``c`` the confidence and ``f`` the frequency of the token
in a corpus (arXiv 2508.13021, as in d2Cache's released code). A frequent token needs more confidence than a rare one,
so that punctuation and end-of-text are not committed first. The positional weight of the paper is not part of the
released code, nor of this.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dcache.arrays import Floats
from dcache.errors import UsageError
from dcache.models.files import one_line
from dcache.models.transformer import ModelSpec
from dcache.state import State
from dcache.unmasking.base import Asked, Noise, Sampling
from dcache.unmasking.rules import Judged, Judging, reaches
from dcache.unmasking.sampling import Drawn

if TYPE_CHECKING:
    from dcache.engine.network import Network

TINY = 1e-10  # as released; keeps the logarithm finite
LARGEST = 1 << 28  # bytes of a file of frequencies; 150,000 numbers of full precision take 4 MB
EXPECTED = "a JSON object of counts by token id, or a list with a frequency for every id"


class PCSampler(Judged):
    """The rows of the highest confidence times surprise; or all rows whose product reaches a threshold.

    Args:
        config: the knobs.
        sampling: of the run.
        noise: source of random numbers.
        table: (vocab,) frequency of every token, instead of the file that the knob `frequencies` names.
        knobs: the knobs by name.
    """

    class Config(Judging):
        """Knobs of `PCSampler`."""

        frequencies: str | None = Field(
            None,
            description="JSON file of token frequencies: an object of counts by token id, or a list with a frequency "
            "for every id; none: the class must be given an array",
        )
        clip_alpha: float = Field(10.0, gt=0, description="upper bound of the score")
        threshold: float | None = Field(
            None, description="commit rows whose score is at least this; none: at_least rows"
        )

    paper = "PC-Sampler, arXiv 2508.13021"
    config: Config

    def __init__(
        self,
        config: Config | None = None,
        sampling: Sampling | None = None,
        noise: Noise | None = None,
        table: np.ndarray | None = None,
        **knobs: object,
    ):
        super().__init__(config, sampling, noise, **knobs)
        self.table = table

    def refuses(self, spec: ModelSpec) -> str | None:
        """Without frequencies there is nothing to weigh."""
        if self.table is None and self.config.frequencies is None:
            return (
                "pc weighs confidence by token frequencies and has none: name a JSON file of counts with the knob "
                "frequencies, or give the class an array"
            )
        if self.config.score in ("margin", "entropy"):
            return (
                f"pc weighs the confidence, which score={self.config.score} takes the place of in the released code; "
                f"use the unmasker {self.config.score}"
            )
        return None

    def begin(self, net: Network, state: State) -> None:
        """Put ``-log f`` on the device."""
        super().begin(net, state)
        size = net.spec.vocab_size
        if self.table is None:
            self.table = read_frequencies(Path(self.config.frequencies or ""), size)
        if self.table.shape != (size,):
            raise UsageError(f"token frequencies have shape {self.table.shape}, the vocabulary has {size} ids")
        surprise = -np.log(self.table.astype(np.float64) + TINY)
        self.surprise = net.buffer("pc.surprise", (size,), torch.float32)
        self.surprise.copy_(torch.from_numpy(surprise))

    def judged(self, drawn: Drawn, at: Asked) -> Tensor:
        """Confidence times surprise, clipped; times the density if it counts."""
        if self.config.score == "random":
            return super().judged(drawn, at)
        score = (drawn.confidence * self.surprise[drawn.tokens]).clamp_max(self.config.clip_alpha)
        return score if self.config.sigma is None else score * at.flags["density"]

    def choose(self, score: Tensor, drawn: Drawn, at: Asked) -> Tensor:
        """What reaches the threshold."""
        return reaches(score, self.config.threshold)


def read_frequencies(path: Path, size: int) -> Floats:
    """Frequencies (size,) float32 from a JSON file of counts by id, or of a list of frequencies.

    An id without a count gets that of a token seen once, ``1 / total``, as released.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has {path.stat().st_size} bytes, more than any table of {size} numbers needs")
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"token frequencies cannot be read from {path}: {one_line(error)}; give {EXPECTED}") from None
    try:
        table = _from_counts(data, size) if isinstance(data, dict) else _from_list(data, size)
    except ValueError as error:
        raise UsageError(f"token frequencies in {path}: {error}; give {EXPECTED}") from None
    return table.astype(np.float32)


def _from_counts(counts: dict[str, Any], size: int) -> np.ndarray:
    for token, count in counts.items():
        if not (token.isdecimal() and token.isascii() and len(token) < 10 and int(token) < size):
            raise ValueError(f"{token[:40]!r} is no token id, which run from 0 to {size - 1}")
        if not _is_number(count):
            raise ValueError(f"the count of {token} is {count!r:.40}, expected a number from 0 on")
    if counts and not sum(counts.values()):
        raise ValueError("all counts are 0")
    total = float(sum(counts.values())) or 1.0
    table = np.full(size, 1 / total)
    for token, count in counts.items():
        table[int(token)] = count / total
    return table


def _from_list(values: Any, size: int) -> np.ndarray:
    if not isinstance(values, list):
        raise ValueError(f"found {values!r:.40}")
    if len(values) != size:
        raise ValueError(f"found a list of {len(values)}, the vocabulary has {size} ids")
    for token, value in enumerate(values):
        if not _is_number(value):
            raise ValueError(f"the frequency of {token} is {value!r:.40}, expected a number from 0 on")
    return np.array(values, dtype=np.float64)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value <= 1e18  # false for NaN as well
