"""Canvases, runs on them, and the comparison of two runs: what the kit's claims are made of.

Everything is float32 on small random models whose decisions spread, with every store filled with NaN first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dcache.arrays import Bools, Ints
from dcache.calls import parse_call
from dcache.decode import decode
from dcache.engine import Engine
from dcache.errors import UsageError
from dcache.models.transformer import Transformer
from dcache.plugins import make_policy, make_unmasker, plugins
from dcache.policy import CachePolicy
from dcache.state import Embeddings, Span, State
from dcache.testing.models import random_model
from dcache.testing.unmaskers import Pausing, Remasking
from dcache.trace import Step
from dcache.unmasking.base import Sampling, Unmasker

Maker: TypeAlias = str | Callable[[], CachePolicy]  # how a policy is written, or what makes a fresh one

OWN: Mapping[str, type[Unmasker]] = {"pausing": Pausing, "remasking": Remasking}
SETTINGS = ("low-confidence(tokens_per_step=2)", "threshold(threshold=0.3)", "threshold(threshold=0.5,window=5)")
CLOSE = 1e-4  # of confidences of two runs that compute the same in batches, or row lists, of other shapes
TIED = 1e-5  # confidences closer than this may be ordered either way


class Refused(Exception):
    """Policy or unmasker said before the first pass that they do not run on a canvas, or a claim needs another one."""


def unmaskers() -> tuple[str, ...]:
    """What the kit decodes with: every installed unmasker, some settings of the built-in ones, and two of its own."""
    return (*sorted(plugins().unmaskers.entries), *SETTINGS, *OWN)


@lru_cache(maxsize=32)
def model_of(seed: int, n_layers: int, shift: int) -> Transformer:
    """The random model of a canvas."""
    return random_model(seed, n_layers=n_layers, shift=shift)


@dataclass(frozen=True)
class Canvas:
    """What a policy is tried on: a random model, prompts, and how they are decoded.

    Attributes:
        seed: of the weights, the prompts and the noise.
        shift: positions are predicted by the row this far to the left (1 in Dream).
        n_layers: of the model.
        lengths: prompt tokens and masked rows of each sequence.
        spans: of each sequence, prompt rows that start from embeddings: start, stop, and a number that says which
            embeddings, the same for the same. Ascending; cut where the prompt ends. () for prompts of tokens alone.
        block_length: rows of a semi-autoregressive block; None makes the generation one block.
        unmask: which rows are committed: an installed unmasker, or ``pausing`` or ``remasking``.
        after_end: what happens behind an end of the text, see `Sampling`.
        temperature: of the sampling.
    """

    seed: int = 0
    shift: int = 0
    n_layers: int = 3
    lengths: tuple[tuple[int, int], ...] = ((5, 8),)
    block_length: int | None = None
    unmask: str = "low-confidence"
    after_end: str = "decode"
    temperature: float = 0.0
    spans: tuple[tuple[tuple[int, int, int], ...], ...] = ()

    def __str__(self) -> str:
        """In plain words."""
        layers = f"{self.n_layers} layer{'s' * (self.n_layers != 1)}"
        sizes = ", ".join(f"{prompt} + {rows}" for prompt, rows in self.lengths)
        n = len(self.lengths)
        told = f"random model {self.seed} with {layers} and a logit shift of {self.shift}; "
        told += f"{n} sequence{'s' * (n != 1)} of {sizes} (prompt + masked) rows; "
        told += "one block" if self.block_length is None else f"blocks of {self.block_length}"
        told += "".join(f"; {rows} start from embeddings" for rows in self._told_spans())
        told += f"; unmasker {self.unmask}"
        told += f"; temperature {self.temperature:g}" if self.temperature else ""
        return told + (f"; rows behind an end of the text: {self.after_end}" if self.after_end != "decode" else "")

    def __repr__(self) -> str:
        """As it is written, without what is the default."""
        told = [f for f in fields(self) if getattr(self, f.name) != f.default]
        return f"Canvas({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in told)})"

    @property
    def model(self) -> Transformer:
        """The random model."""
        return model_of(self.seed, self.n_layers, self.shift)

    def state(self, only: int | None = None, draw: int = 0, request: int = 0) -> State:
        """The canvas before the first step.

        Args:
            only: one sequence, as a batch of its own.
            draw: number of other prompts of its shape; each sequence then has the embeddings of the one `draw` further
                on, and other tokens around them.
            request: embeddings are known again within a request, and not by another one.
        """
        which = range(len(self.lengths)) if only is None else [only]
        prompts, given = self._prompts(draw), [self._embeddings(b, draw, request) for b in which]
        return self._state(which, [prompts[b] for b in which], given)

    def spelled(self) -> State:
        """The canvas whose `spans` have the embeddings of its own tokens, and in their places ids that no prompt has.

        Without `spans` the same canvas has these tokens themselves.
        """
        spec, prompts = self.model.spec, self._prompts(0)
        given: list[Embeddings | None] = []
        for b, prompt in enumerate(prompts):
            spans = [Span(start, stop, f"tokens of {b} from {start}") for start, stop, _ in self._placed(b)]
            where = _rows(spans)
            given.append(Embeddings(where, self.model.embed(torch.tensor(prompt)[where]), tuple(spans)))
            for p in where.tolist():
                prompt[p] = (spec.eos_id, spec.mask_id)[p % 2]
        return self._state(range(len(prompts)), prompts, given)

    def _state(self, which: Sequence[int], prompts: list[list[int]], given: list[Embeddings | None]) -> State:
        rows = [self.lengths[b][1] for b in which]
        return State(self.model.spec, prompts, rows, self.block_length, ids=list(which), embeddings=given)

    def _prompts(self, draw: int) -> list[list[int]]:
        random = np.random.default_rng([self.seed, draw])
        return [random.integers(0, self.model.spec.vocab_size - 2, size=n).tolist() for n, _ in self.lengths]

    def _placed(self, b: int, draw: int = 0) -> list[tuple[int, int, int]]:
        """The spans of a sequence, as far as its prompt has room for them."""
        end, of = self.lengths[b][0], (b + draw) % len(self.lengths)
        spans = self.spans[of] if of < len(self.spans) else ()
        return [(start, min(stop, end), number) for start, stop, number in spans if start < end]

    def _embeddings(self, b: int, draw: int, request: int) -> Embeddings | None:
        """Random ones, about as large as those of tokens; what is cut to another length has another key."""
        if not (placed := self._placed(b, draw)):
            return None
        shapes = [(number, stop - start) for start, stop, number in placed]
        values = [np.random.default_rng(shape).standard_normal((shape[1], self.model.spec.d_model)) for shape in shapes]
        keys = [f"{number} of {n} rows, request {request}" for number, n in shapes]
        spans = tuple(Span(start, stop, key) for (start, stop, _), key in zip(placed, keys, strict=True))
        return Embeddings(_rows(spans), torch.from_numpy(np.concatenate(values)).to(torch.float32), spans)

    def _told_spans(self) -> Iterator[str]:
        for b in range(len(self.lengths)):
            if placed := self._placed(b):
                rows = ", ".join(f"{start}-{stop - 1} (number {number})" for start, stop, number in placed)
                yield f"rows {rows} of sequence {b}"

    def unmasker(self) -> Unmasker:
        """A fresh unmasker."""
        return unmasker_of(self.unmask, Sampling.model_validate(
            {"seed": self.seed, "after_end": self.after_end, "temperature": self.temperature}
        ))  # fmt: skip


def _rows(spans: Iterable[Span]) -> Ints:
    """Positions of spans, in their order."""
    return np.array([p for span in spans for p in range(span.start, span.stop)], dtype=np.int64)


def starts(model: Transformer, state: State) -> Tensor:
    """What every row starts from, (batch, slots, d_model): the embedding of its token, or that of its prompt."""
    h = model.embed(torch.from_numpy(state.tokens))
    for b, given in enumerate(state.embeddings):
        if given is not None:
            h[b, given.positions] = given.values
    return h


def unmasker_of(text: str, sampling: Sampling | None = None) -> Unmasker:
    """An installed unmasker or one of the kit's own."""
    own = OWN.get(parse_call(text).name)
    return make_unmasker(text, sampling) if own is None else own(sampling=sampling)


def policy_of(maker: Maker) -> CachePolicy:
    """A fresh policy."""
    return make_policy(maker) if isinstance(maker, str) else maker()


def refusal(policy: CachePolicy, canvas: Canvas, unmasker: Unmasker | None = None) -> str | None:
    """Why policy or unmasker refuse a canvas, or each other; None if they do not."""
    unmasker, spec = unmasker or canvas.unmasker(), canvas.model.spec
    return unmasker.refuses(spec) or policy.refuses(spec, unmasker)


class Run:
    """One decoding run on a canvas.

    Args:
        maker: the policy.
        canvas: what is decoded.
        only: one sequence of the canvas, as a batch of its own.
        unmasker: instead of the canvas's.
        engine: further arguments of `Engine`.

    Raises:
        Refused: if policy and unmasker do not go together, or not on this canvas.
    """

    def __init__(
        self,
        maker: Maker,
        canvas: Canvas,
        only: int | None = None,
        unmasker: Unmasker | None = None,
        **engine: Any,
    ):
        self.canvas, self.only = canvas, only
        self.policy, self.unmasker = policy_of(maker), unmasker or canvas.unmasker()
        if (reason := refusal(self.policy, canvas, self.unmasker)) is not None:
            raise Refused(reason)
        options: dict[str, Any] = {"debug": True, "buckets": ()} | engine
        self.engine = Engine(canvas.model, self.policy, self.unmasker, **options)
        self.state = canvas.state(only)
        self.trace: list[Step] = []
        self.due: list[Bools] = []  # of each step, in which sequences a commit was due; for a run that was listened to
        self.request = 0

    def go(self) -> Run:
        """Decode it."""
        try:
            self.trace = decode(self.engine, self.state)
        except UsageError as error:  # e.g. a schedule that does not divide into the blocks of this canvas
            raise Refused(str(error)) from error
        return self

    def again(self, draw: int = 0, known: bool = False) -> Run:
        """Decode once more on the same engine, from the beginning.

        Args:
            draw: with other prompts, if it is not 0.
            known: whether the embeddings of the prompts have the keys of the run before. Otherwise they have new ones,
                so that a policy which keeps something under such keys finds nothing of it.
        """
        self.request += not known
        self.state = self.canvas.state(self.only, draw, self.request)
        return self.go()

    def steps(self, b: int) -> Iterator[Step]:
        """The steps that sequence `b` took part in."""
        return (step for step in self.trace if step.active[b])

    def rows(self, b: int = 0) -> list[list[int]]:
        """Rows that each of these steps computed."""
        return [where(step.rows[b]) for step in self.steps(b)]

    def commits(self, b: int = 0) -> list[dict[int, int]]:
        """Position to token of what each of these steps committed."""
        return [commits(step, b) for step in self.steps(b)]


def where(mask: Bools) -> list[int]:
    """Positions of a mask."""
    return np.flatnonzero(mask).tolist()


def commits(step: Step, b: int) -> dict[int, int]:
    """Position to token of what a step commits."""
    return {p: int(step.tokens[b, p]) for p in where(step.commit[b])}


def same_decisions(found: Run, b: int, expected: Run, c: int, told: str) -> None:
    """Assert that sequence `b` of one run was decoded like sequence `c` of another.

    Commits, re-masked rows and the number of steps must be equal, and confidences close where both runs predict. Where
    a pick between equals fell the other way, as many rows and of the same confidence, the comparison ends: both runs
    are right.

    Args:
        found: the run in question.
        b: its sequence.
        expected: the run that it must equal.
        c: its sequence.
        told: what `expected` is, for the message.
    """
    mine, theirs = list(found.steps(b)), list(expected.steps(c))
    for n, (step, other) in enumerate(zip(mine, theirs, strict=False)):
        place = f"step {n}, sequence {b}"
        close_confidences(step.confidence[b], other.confidence[c], place, told)
        if (got := commits(step, b)) != (want := commits(other, c)):
            if _tied(got, want, step.confidence[b], other.confidence[c]):
                return
            p = min(p for p in got.keys() | want.keys() if got.get(p) != want.get(p))
            raise AssertionError(
                f"{place}, position {p}: found {_token(got, p)}, expected {_token(want, p)} ({told}); "
                f"the step commits {got}, expected {want}"
            )
        lost, put = where(step.remask[b]), where(other.remask[c])
        assert lost == put, f"{place}: re-masks {lost}, expected {put} ({told})"
    assert len(mine) == len(theirs), f"sequence {b} took {len(mine)} steps, expected {len(theirs)} ({told})"


def close_confidences(found: np.ndarray, expected: np.ndarray, place: str, told: str) -> None:
    """Assert that the confidences (slots,) of a step agree; -inf stands where nothing was predicted."""
    width = min(len(found), len(expected))  # a sequence alone has a narrower canvas
    off = ~np.isclose(found[:width], expected[:width], rtol=CLOSE, atol=CLOSE)
    off &= np.isfinite(found[:width]) & np.isfinite(expected[:width])  # what else is predicted is the policy's choice
    p = int(off.argmax())
    assert not off[p], f"{place}, position {p}: found confidence {found[p]:.6f}, expected {expected[p]:.6f} ({told})"


def _token(got: Mapping[int, int], p: int) -> str:
    return f"token {got[p]}" if p in got else "no commit"


def _tied(got: Mapping[int, int], want: Mapping[int, int], mine: np.ndarray, theirs: np.ndarray) -> bool:
    """Both pick as many rows, and those that differ are equally sure in both: other rows, or another token of a row."""
    off = [p for p in got.keys() | want.keys() if got.get(p) != want.get(p)]
    return len(got) == len(want) and float(np.ptp([mine[off], theirs[off]])) <= TIED


def changed(canvas: Canvas, on: Mapping[str, Any]) -> Canvas:
    """A canvas with some fields set."""
    return replace(canvas, **on)
