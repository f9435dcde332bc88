"""Look for the smallest canvas on which a claim does not hold, with Hypothesis; and say what was found."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from time import monotonic
from typing import Any, Literal, TypeAlias

import torch

from dcache.errors import UsageError
from dcache.testing.claims import CLAIMS, FIRST, Claim
from dcache.testing.runs import Canvas, Refused, changed
from dcache.testing.subject import Subject

try:
    from hypothesis import HealthCheck, Phase, given, reject, seed, settings
    from hypothesis import strategies as st
    from hypothesis.errors import Unsatisfiable
except ImportError as error:
    raise UsageError("the conformance kit draws its examples with hypothesis; pip install 'dcache[test]'") from error

Drawn: TypeAlias = Sequence[tuple[int, int, int]]  # per span: rows between the last one and it, its rows, its number

MOST = 6  # sequences of a canvas
SHRINK_S = 20.0  # seconds after the first failure within which a smaller one is looked for


@dataclass(frozen=True)
class Verdict:
    """How a claim did.

    Attributes:
        claim: its name.
        text: the claim as a sentence.
        status: pass, fail, or n/a: nothing to check, or not claimed.
        detail: the fault with place, found and expected; or why there was nothing to check.
        example: the smallest canvas that fails, in plain words.
        snippet: Python that reproduces it.
        examples: canvases that were tried.
    """

    claim: str
    text: str
    status: Literal["pass", "fail", "n/a"]
    detail: str = ""
    example: str = ""
    snippet: str = ""
    examples: int = 0

    def __str__(self) -> str:
        """One line, or a paragraph for a failure."""
        mark = {"pass": "pass", "fail": "FAIL", "n/a": "  - "}[self.status]
        if self.status != "fail":
            return f"{mark}  {self.text}" + (f"\n      not applicable: {self.detail}" if self.detail else "")
        body = f"{self.detail}\nsmallest failing example: {self.example}\nreproduce it with\n"
        body += textwrap.indent(self.snippet, "    ")
        return f"{mark}  {self.text}\n" + textwrap.indent(body, "      ")

    def as_data(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def canvases(pairs: Sequence[tuple[int, str]]) -> st.SearchStrategy[Canvas]:
    """Canvases of 1 to 6 prompts of 1 to 40 tokens with different numbers of masked rows, many of them with embeddings.

    Args:
        pairs: the logit shifts and unmaskers to choose from.
    """
    lengths = st.lists(st.tuples(st.integers(1, 40), st.sampled_from([4, 8, 12])), min_size=1, max_size=MOST)
    spans = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6), st.integers(0, 2)), max_size=2)

    def canvas(pair: tuple[int, str], lengths: list[tuple[int, int]], spans: Sequence[Drawn], **rest: Any) -> Canvas:
        placed = tuple(place(drawn, n) for drawn, (n, _) in zip(spans, lengths, strict=False))
        spans = placed if any(placed) else ()
        return Canvas(shift=pair[0], unmask=pair[1], lengths=tuple(lengths), spans=spans, **rest)

    return st.builds(
        canvas,
        pair=st.sampled_from(pairs),
        lengths=lengths,
        seed=st.integers(0, 2),
        block_length=st.sampled_from([None, 4]),
        after_end=st.sampled_from(["decode", "drop", "drop-once"]),
        spans=st.just(()) | st.tuples(*[spans] * MOST),
        temperature=st.sampled_from([0.0, 0.7]),
    )


def place(drawn: Drawn, end: int) -> tuple[tuple[int, int, int], ...]:
    """The `Canvas.spans` of a prompt of `end` tokens, cut where it ends."""
    spans, at = [], 0
    for gap, size, number in drawn:
        at += gap
        if at < end:
            spans.append((at, min(at + size, end), number))
        at += size
    return tuple(spans)


class Trial:
    """A claim on one canvas after another. Each is judged once; some time after the first failure new ones pass."""

    def __init__(self, claim: Claim, subject: Subject):
        self.claim, self.subject = claim, subject
        self.judged: dict[Canvas, Exception | None] = {}
        self.refused = ""
        self.failed_at: float | None = None
        self.last: tuple[Canvas, Exception] | None = None

    def __call__(self, canvas: Canvas) -> None:
        """Raise what the claim raises."""
        canvas = changed(canvas, self.claim.on)
        if canvas not in self.judged:
            if self.failed_at is not None and monotonic() - self.failed_at > SHRINK_S:
                return
            self.judged[canvas] = self._judge(canvas)
        if (error := self.judged[canvas]) is not None:
            self.last = canvas, error
            self.failed_at = monotonic() if self.failed_at is None else self.failed_at
            raise error

    def _judge(self, canvas: Canvas) -> Exception | None:
        try:
            self.claim.holds(self.subject, canvas)
        except Refused as error:
            self.refused = str(error)
            reject()
        except Exception as error:
            return Broken(describe(error))
        return None


class Broken(AssertionError):
    """A claim that does not hold; one type, so that Hypothesis shrinks across ways to fail."""


def describe(error: Exception) -> str:
    """What went wrong: an assertion speaks for itself, another error is named."""
    text = " ".join(str(error).split())
    return text if type(error) is AssertionError else f"{type(error).__name__}: {text}"


def judge(claim: Claim, subject: Subject, examples: int, start: int = 0) -> Verdict:
    """Try a claim on `examples` canvases, drawn from a seed, and shrink the first failure."""

    def verdict(status: Literal["pass", "fail", "n/a"], detail: str = "", **more: Any) -> Verdict:
        return Verdict(claim.name, claim.text, status, detail, **more)

    reason = subject.reason_not(claim.name) or claim.needs(subject)
    fixed = [claim.on["unmask"]] if "unmask" in claim.on else None
    pairs = subject.pairs(fixed)
    if reason is None and not pairs:
        reason = f"it takes {'no unmasker' if fixed is None else f'not the unmasker {fixed[0]}'}"
    if reason is not None:
        return verdict("n/a", reason)
    trial = Trial(claim, subject)
    drawn = 1 + round(examples * claim.share)  # the first is the simplest of all

    @seed(start)
    @settings(
        max_examples=drawn,
        database=None,
        deadline=None,
        derandomize=False,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(canvas=canvases(pairs))
    def search(canvas: Canvas) -> None:
        trial(canvas)

    try:
        with one_thread():
            search()
    except Unsatisfiable:
        return verdict("n/a", f"every canvas was refused, the last because {trial.refused}")
    except Exception:
        if trial.last is None:
            raise
        canvas, found = trial.last
        call = f"hold({claim.name!r}, {subject!r}, {canvas!r})"
        snippet = f"from dcache.testing import Canvas, Exact, Subject, hold\n\n{call}"
        return verdict("fail", str(found), example=str(canvas), snippet=snippet, examples=len(trial.judged))
    return verdict("pass", examples=len(trial.judged))


@contextmanager
def one_thread() -> Iterator[None]:
    """The models are tiny: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def judge_all(subject: Subject, examples: int, start: int = 0) -> Iterator[Verdict]:
    """All claims in order. Where the policy does not run at all, the others are not tried."""
    runs = True
    for claim in CLAIMS.values():
        if not runs:
            yield Verdict(claim.name, claim.text, "n/a", "not tried, since the policy does not run")
            continue
        yield (verdict := judge(claim, subject, examples, start))
        runs = verdict.status != "fail" or claim.name != FIRST
