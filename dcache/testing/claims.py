"""The claims of the conformance kit: what holds for every cache policy, each under a name that can be false.

A claim is a function of a subject and a canvas that raises AssertionError where it does not hold; the message names
step, sequence and position, what was found and what was expected. `dcache.testing.search` looks for the smallest canvas
on which it fails. More than a claim about a policy, most are about the engine too.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dcache.errors import UsageError
from dcache.policy import Filter, Plan
from dcache.state import State
from dcache.testing.golden.base import Watched
from dcache.testing.inner import Inner
from dcache.testing.recorder import Recorder
from dcache.testing.runs import (
    Canvas,
    Maker,
    Refused,
    Run,
    changed,
    commits,
    policy_of,
    refusal,
    same_decisions,
    starts,
    where,
)
from dcache.testing.subject import Exact, Subject, maker_text
from dcache.testing.watch import watched
from dcache.trace import Trace

Holds: TypeAlias = Callable[[Subject, Canvas], None]

LOGITS = 2e-3  # absolute; logits of the random models reach about 20
SAME = 1e-4  # of logits of two passes of one shape
PADDED = (8, 64)  # row lists are padded to these sizes


@dataclass(frozen=True)
class Claim:
    """A property of every policy.

    Attributes:
        name: as an identifier; the test is called ``test_`` and this.
        text: the same as a sentence.
        holds: raises AssertionError where it does not.
        on: fields of the canvas that are fixed.
        share: examples, as a share of those of other claims; 0 is a single one.
        needs: why a subject has nothing to check; None if it has.
    """

    name: str
    text: str
    holds: Holds
    on: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0
    needs: Callable[[Subject], str | None] = lambda subject: None


CLAIMS: dict[str, Claim] = {}
FIRST = "decodes_every_canvas_to_the_end"  # where it fails, no other claim can be judged


def claim(
    share: float = 1.0, needs: Callable[[Subject], str | None] | None = None, **on: Any
) -> Callable[[Holds], Holds]:
    """Enter a function in the list of claims, under its own name."""

    def enter(holds: Holds) -> Holds:
        name = holds.__name__
        CLAIMS[name] = Claim(name, name.replace("_", " "), holds, on, share, needs or (lambda subject: None))
        return holds

    return enter


@lru_cache(maxsize=128)
def plain(maker: Maker, canvas: Canvas, buckets: tuple[int, ...] = ()) -> Run:
    """A run without further ado, and in `Run.due` what its unmasker asked for; several claims read it."""
    run = Run(maker, canvas, buckets=buckets)
    ask = run.unmasker.ask

    def asking(state: State) -> Any:
        run.due.append((asked := ask(state)).due)
        return asked

    vars(run.unmasker)["ask"] = asking
    return run.go()


def each(run: Run) -> Iterable[int]:
    """The sequences of a run."""
    return range(run.state.batch)


# -- what is decoded --------------------------------------------------------------------------------------------------


@claim()
def decodes_every_canvas_to_the_end(subject: Subject, canvas: Canvas) -> None:
    """No error, no NaN from a key that nobody wrote, no step without a commit when one is due, nothing left masked."""
    run = plain(subject.policy, canvas)
    for n, step in enumerate(run.trace):
        for b in np.flatnonzero(step.active & run.due[n] & ~step.commit.any(1)):
            lost = np.flatnonzero(step.tokens[b] < 0)
            raise AssertionError(
                f"step {step.step[b]}, sequence {b}: nothing was committed although a commit was due; of the canvas, "
                f"positions {lost.tolist()} were not predicted: compute State.needed"
            )
    assert not run.state.masked.any(), f"positions {where(run.state.masked[0])} of sequence 0 are still masked"


@claim(needs=lambda s: None if s.exacts else "no configuration is declared equal to no cache: set `exact`")
def the_exact_configuration_commits_what_no_cache_commits(subject: Subject, canvas: Canvas) -> None:
    """The same tokens in the same order, with the same confidences."""
    for exact in subject.exacts:
        here = changed(canvas, exact.on)
        if refusal(policy_of(exact.policy), here) is not None:
            continue
        run, reference = plain(exact.policy, here), plain("none", here)
        for b in each(run):
            same_decisions(run, b, reference, b, f"{exact} must equal none")


@claim(needs=lambda s: None if s.exacts else "no configuration is declared equal to no cache: set `exact`", share=0.5)
def the_exact_configuration_computes_what_the_plain_forward_computes(subject: Subject, canvas: Canvas) -> None:
    """Logits of every pass against those of the whole model without an engine."""
    for exact in subject.exacts:
        here = changed(canvas, exact.on)
        if refusal(policy_of(exact.policy), here) is None:
            _against_the_plain_forward(exact, here)


def _against_the_plain_forward(exact: Exact, canvas: Canvas) -> None:
    run = Run(exact.policy, canvas)
    listener = run.engine.unmasker = run.unmasker = Watched(run.unmasker)
    expected: list[Tensor] = []
    plan = run.policy.plan

    def planning(state: State) -> Plan:
        h, valid = starts(canvas.model, state), torch.from_numpy(state.valid)
        expected.append(canvas.model(embeddings=h, valid=valid))
        return plan(state)

    vars(run.policy)["plan"] = planning
    run.go()
    for n, (found, want) in enumerate(zip(listener.logits, expected, strict=True)):
        for b, rows in found.items():
            for p, logits in rows.items():
                off = float((logits - want[b, max(p - canvas.shift, 0)]).abs().max())
                assert off <= LOGITS, f"step {n}, sequence {b}, position {p}: logits are off by {off:.3g} ({exact})"


@claim(needs=lambda s: None if s.equals else "no other policy is named that it must equal: set `equals`")
def equal_configurations_commit_the_same(subject: Subject, canvas: Canvas) -> None:
    """Each pair of `Subject.equals`."""
    for one, other in subject.equals:
        if any(refusal(policy_of(maker), canvas) is not None for maker in (one, other)):
            continue
        run, reference = plain(one, canvas), plain(other, canvas)
        for b in each(run):
            same_decisions(run, b, reference, b, f"{maker_text(one)} must equal {maker_text(other)}")


@claim()
def a_batch_decodes_each_sequence_as_if_it_were_alone(subject: Subject, canvas: Canvas) -> None:
    """Commits, rows and accounts of a ragged batch equal those of single runs."""
    together = plain(subject.policy, canvas)
    for b in each(together) if together.state.batch > 1 else ():
        as_alone(together, b, Run(subject.policy, canvas, only=b).go())


def as_alone(together: Run, b: int, alone: Run) -> None:
    """Assert that sequence `b` of a batch did what it does in a batch of its own."""
    same_decisions(together, b, alone, 0, "the same sequence alone")
    for n, (rows, want) in enumerate(zip(together.rows(b), alone.rows(0), strict=False)):
        assert rows == want, f"step {n}, sequence {b}: computes rows {rows}, expected {want} (the sequence alone)"
    mine, own = (Trace(r.trace, i, 0, 0) for r, i in ((together, b), (alone, 0)))
    found, expected = ((t.row_layers, t.kv_row_layers, t.nfe, t.regions) for t in (mine, own))
    told = "(row-layers, K/V row-layers, forward calls, and these by region)"
    assert found == expected, f"sequence {b}: {told} are {found}, expected {expected} (the sequence alone)"


def in_a_batch_as_alone(subject: Subject, canvas: Canvas) -> None:
    """The claim above; the run alone for a subject that does not make it."""
    together = a_batch_decodes_each_sequence_as_if_it_were_alone
    if subject.reason_not(together.__name__) is None:
        together(subject, canvas)
    else:
        plain(subject.policy, canvas)


@claim()
def a_committed_row_never_changes(subject: Subject, canvas: Canvas) -> None:
    """Unless the unmasker puts it back: then it is masked until it is committed again."""
    run = plain(subject.policy, canvas)
    committed = np.zeros_like(run.state.valid)
    tokens = canvas.state().tokens
    for n, step in enumerate(run.trace):
        for b, p in np.argwhere(step.commit & committed)[:1]:
            raise AssertionError(f"step {n}, sequence {b}: position {p} is committed a second time")
        committed = (committed | step.commit) & ~step.remask
        tokens = np.where(step.commit, step.tokens, tokens)
        tokens = np.where(step.remask, run.state.spec.mask_id, tokens)
    for b, p in np.argwhere(tokens != run.state.tokens)[:1]:
        found = run.state.tokens[b, p]
        raise AssertionError(f"sequence {b}, position {p}: ends with token {found}, but {tokens[b, p]} was committed")


@claim(unmask="remasking")
def remasked_rows_are_decoded_again(subject: Subject, canvas: Canvas) -> None:
    """With an unmasker that takes commits back a run neither stalls nor depends on the batch."""
    run = plain(subject.policy, canvas)
    assert not run.state.masked.any(), f"positions {where(np.asarray(run.state.masked.any(0)))} are still masked"
    a_committed_row_never_changes(subject, canvas)
    in_a_batch_as_alone(subject, canvas)


# -- prompts with embeddings ------------------------------------------------------------------------------------------


@claim()
def every_row_starts_from_its_token_or_its_embedding(subject: Subject, canvas: Canvas) -> None:
    """What enters layer 0: that of the token, and where the prompt of the sequence has one, its embedding."""
    no_faults(watched(subject, canvas).faults["starts"])


@claim(share=0.3)
def embeddings_of_tokens_decode_as_the_tokens(subject: Subject, canvas: Canvas) -> None:
    """The ids that stand in for rows with embeddings decide nothing."""
    has_embeddings(canvas)
    run = Run(subject.policy, canvas)
    run.state = canvas.spelled()
    same_runs(run.go(), plain(subject.policy, changed(canvas, {"spans": ()})), "the same prompts as tokens")


@claim(share=0.15, needs=lambda s: s.reason_not(a_batch_decodes_each_sequence_as_if_it_were_alone.__name__))
def embeddings_that_come_again_decode_in_a_batch_as_alone(subject: Subject, canvas: Canvas) -> None:
    """What a policy keeps of them from another request is what a request of that sequence alone leaves."""
    has_embeddings(canvas)
    canvas, n = apart(canvas), len(canvas.lengths)

    def second(first: int | None, only: int | None) -> Run:
        policy = policy_of(subject.policy)
        Run(lambda: policy, canvas, only=first).again(draw=1, known=True)
        return Run(lambda: policy, canvas, only=only).go()

    together, fresh = second(None, None), plain(subject.policy, canvas)
    if all(np.array_equal(a.confidence, b.confidence) for a, b in zip(together.trace, fresh.trace, strict=False)):
        return  # nothing was kept: the claims above say the rest
    for b in each(together):
        as_alone(together, b, second((b - 1) % n, b))  # in the first request the sequence before it has its embeddings


def apart(canvas: Canvas) -> Canvas:
    """The canvas, no two sequences of which share embeddings."""
    n = len(canvas.lengths)
    spans = [tuple((start, stop, number * n + b) for start, stop, number in own) for b, own in enumerate(canvas.spans)]
    return changed(canvas, {"spans": tuple(spans)})


def has_embeddings(canvas: Canvas) -> None:
    """Raise `Refused` for a canvas of tokens alone."""
    if not canvas.state().embedded.any():
        raise Refused("no prompt has embeddings")


# -- what is stored ---------------------------------------------------------------------------------------------------


@claim()
def a_committed_row_is_computed_again_with_its_token(subject: Subject, canvas: Canvas) -> None:
    """In layer 0, within `Subject.patience` steps: until then its K and V are those of the mask."""
    watch = watched(subject, canvas)
    run = watch.run
    for b in each(run):
        waiting: dict[int, int] = {}  # position to the step of its commit
        for n, step in enumerate(run.steps(b)):
            computed = watch.embedded[n][b]  # a sequence takes part in every step up to its last
            waiting = {p: since for p, since in waiting.items() if not computed[p] and not step.remask[b, p]}
            for p, since in waiting.items():
                assert n - since < subject.patience, (
                    f"step {n}, sequence {b}, position {p}: committed in step {since} and not computed since; its key "
                    "and value are those of the mask"
                )
            waiting |= {p: n for p in commits(step, b)}


@claim()
def written_keys_and_values_are_fresh_projections(subject: Subject, canvas: Canvas) -> None:
    """K and V of written rows equal a projection of the layer's input; all else in the store keeps its bits."""
    no_faults(watched(subject, canvas).faults["fresh"])


@claim()
def reused_rows_keep_their_bits(subject: Subject, canvas: Canvas) -> None:
    """A pass changes nothing in the rows that its plan does not compute."""
    no_faults(watched(subject, canvas).faults["kept"])


@claim(share=0.2, lengths=((7, 8), (1, 4), (12, 12)))
def every_byte_is_reported_and_returned(subject: Subject, canvas: Canvas) -> None:
    """Reported stores and buffers exist; a second batch takes no more; nothing is left when the engine goes."""
    model = canvas.model
    gc.freeze()  # what is there already is of no interest, and looking through it takes a second
    try:
        run = Run(subject.policy, canvas).go()
        held = {name: sum(x.nbytes for x in layers) for name, layers in run.engine.stores.all.items()}
        held |= {f"buffer {name}": x.nbytes for name, x in run.engine.buffers.items()}
        assert run.engine.store_bytes == held, f"reports {run.engine.store_bytes} bytes, but the stores hold {held}"
        asked = {"K", "V", *run.policy.stores(model.spec), *(f"buffer {name}" for name in run.engine.buffers)}
        asked |= {"positions"} if run.engine.stores.capacity is not None else set()
        assert set(held) == asked, f"the stores are {sorted(held)}, asked for were {sorted(asked)}"
        if run.state.embedded.any():
            run.again(
                known=True
            )  # what a policy keeps of them may save rows, and passes over fewer have their own buffers
        once = sum(x.nbytes for x in tensors())
        run.again(known=True)
        twice = sum(x.nbytes for x in tensors())
        assert twice <= once, f"after the same batch once more {twice} bytes are held, {once} after the first time"
        del run
        shapes = sorted({tuple(x.shape) for x in tensors()})
        assert not shapes, f"tensors of shape {shapes[:4]} outlive the engine and the policy"
    finally:
        gc.unfreeze()


def tensors() -> list[Tensor]:
    """Every tensor that Python has made since the last freeze and still holds."""
    gc.collect()
    return [x for x in gc.get_objects() if type(x) is Tensor]


@claim()
def every_visible_key_has_been_written(subject: Subject, canvas: Canvas) -> None:
    """By this pass or an earlier one, in the layer that attends to it; what a policy decides on the device included."""
    no_faults(watched(subject, canvas).faults["visible"])


# -- what is computed -------------------------------------------------------------------------------------------------


@claim()
def accounting_equals_a_counting_hook(subject: Subject, canvas: Canvas) -> None:
    """Rows that attended and rows that were projected, per step, layer and sequence."""
    no_faults(watched(subject, canvas).faults["books"])


@claim()
def a_finished_sequence_costs_nothing(subject: Subject, canvas: Canvas) -> None:
    """None of its rows is computed or written."""
    no_faults(watched(subject, canvas).faults["finished"])


@claim()
def a_pass_syncs_once_and_plans_read_nothing_from_the_device(subject: Subject, canvas: Canvas) -> None:
    """`plan` and `review` read numpy; what the device knows comes with the picks."""
    no_faults(watched(subject, canvas).faults["syncs"])


def no_faults(faults: list[str]) -> None:
    """Raise the first of them."""
    if faults:
        raise AssertionError(faults[0])


@claim(unmask="pausing", share=0.5)
def an_idle_step_changes_no_logits(subject: Subject, canvas: Canvas) -> None:
    """If no token changed and only rows are computed that were computed just before, logits stay as they were."""
    run = Run(subject.policy, canvas, maps=True)
    listener = run.engine.unmasker = run.unmasker = Watched(run.unmasker)
    hidden: list[Any] = []
    plan = run.policy.plan

    def planning(state: State) -> Plan:
        made = plan(state)
        shown = made.visible.numpy() if isinstance(made.visible, Tensor) else made.visible
        hidden.append(None if shown is None else shown.copy())  # a tensor may be written again in the pass
        return made

    vars(run.policy)["plan"] = planning
    run.go()
    for n, (last, step) in enumerate(zip(run.trace, run.trace[1:], strict=False), 1):
        for b in where(last.active & step.active & ~last.commit.any(1) & ~last.remask.any(1)):
            within = all((step.maps[name][:, b] <= last.maps[name][:, b]).all() for name in step.maps)
            if not within or last.drop[b].any() or not same_visible(hidden[n - 1], hidden[n], b):
                continue
            for p in listener.logits[n][b].keys() & listener.logits[n - 1][b].keys():
                off = float((listener.logits[n][b][p] - listener.logits[n - 1][b][p]).abs().max())
                assert off <= SAME, (
                    f"step {n}, sequence {b}, position {p}: no token changed, yet its logits moved by {off:.3g}"
                )


def same_visible(one: np.ndarray | None, other: np.ndarray | None, b: int) -> bool:
    """Whether a sequence sees the same keys in two passes; the arrays are those of `Plan.visible`."""
    if one is None or other is None or one.ndim != other.ndim:
        return one is other
    axis = 0 if one.ndim == 2 else 1
    return np.array_equal(one.take(b, axis), other.take(b, axis))


@claim()
def padding_of_row_lists_changes_nothing(subject: Subject, canvas: Canvas) -> None:
    """Row lists are padded to a few sizes on a GPU."""
    exact, padded = plain(subject.policy, canvas), plain(subject.policy, canvas, PADDED)
    for b in each(exact):
        same_decisions(padded, b, exact, b, "without padding")
        for n, (found, expected) in enumerate(zip(padded.rows(b), exact.rows(b), strict=False)):
            assert found == expected, f"step {n}, sequence {b}: computes rows {found}, expected {expected} (unpadded)"


# -- again and again --------------------------------------------------------------------------------------------------


@claim(share=0.25)
def a_recorded_pass_replays_to_the_same_run(subject: Subject, canvas: Canvas) -> None:
    """As a CUDA graph does: syncs are refused, and what is read from Python stays that of the recording."""
    eager = plain(subject.policy, canvas, PADDED)
    recorder = Recorder()
    run = Run(subject.policy, canvas, buckets=PADDED, executor=recorder)
    for told in ("run before the recording", "while recording", "replayed"):
        run.again()
        for b in each(run):
            same_decisions(run, b, eager, b, f"the eager run; this one {told}")
        for n, (found, expected) in enumerate(zip(run.trace, eager.trace, strict=True)):
            same_bits(found.confidence, expected.confidence, f"step {n}", f"eager run; this one {told}")
    assert recorder.replayed > 0, "no pass was replayed: `Plan.kind` differs in every step"


@claim(share=0.5)
def the_same_seed_gives_the_same_run(subject: Subject, canvas: Canvas) -> None:
    """Bit for bit, whatever the state of global generators."""
    first = plain(subject.policy, canvas)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(canvas.seed + 1)
        second = Run(subject.policy, canvas).go()
    same_runs(second, first, "the same run on another engine")


@claim(share=0.5)
def a_second_run_on_the_same_engine_is_the_first_again(subject: Subject, canvas: Canvas) -> None:
    """With another batch of the same shape between them: nothing survives but what is known again by its embeddings."""
    run = Run(subject.policy, canvas).go().again(draw=1).again()
    same_runs(run, plain(subject.policy, canvas), "the first run on a fresh engine")


@claim(share=0.25)
def another_model_prepares_the_policy_again(subject: Subject, canvas: Canvas) -> None:
    """A policy object that has served one model decodes with the next, of other weights and depth, as a fresh one."""
    policy = policy_of(subject.policy)
    Run(lambda: policy, changed(canvas, {"seed": canvas.seed + 1, "n_layers": canvas.n_layers + 1})).go()
    same_runs(Run(lambda: policy, canvas).go(), plain(subject.policy, canvas), "a fresh policy")


def same_runs(found: Run, expected: Run, told: str) -> None:
    """Assert equality of every step, bit for bit."""
    assert len(found.trace) == len(expected.trace), f"took {len(found.trace)} steps, {len(expected.trace)} in {told}"
    for n, (step, other) in enumerate(zip(found.trace, expected.trace, strict=True)):
        for b, p in np.argwhere(step.rows != other.rows)[:1]:
            verb, was = ("computed", "not") if step.rows[b, p] else ("not computed", "so")
            raise AssertionError(f"step {n}, sequence {b}, position {p}: the row is {verb}, but was {was} in {told}")
        same_bits(step.confidence, other.confidence, f"step {n}", told)
        for b, p in np.argwhere(step.commit != other.commit)[:1]:
            raise AssertionError(f"step {n}, sequence {b}, position {p}: not committed alike ({told})")


def same_bits(found: np.ndarray, expected: np.ndarray, place: str, told: str) -> None:
    """Assert equal confidences (batch, slots)."""
    for b, p in np.argwhere(found != expected)[:1]:
        raise AssertionError(
            f"{place}, sequence {b}, position {p}: found confidence {found[b, p]:.9f}, expected {expected[b, p]:.9f} "
            f"({told})"
        )


# -- around whom ------------------------------------------------------------------------------------------------------


@claim(share=0.5, needs=lambda s: None if isinstance(policy_of(s.policy), Filter) else "it wraps no other policy")
def a_filter_keeps_what_its_inner_policy_says(subject: Subject, canvas: Canvas) -> None:
    """The inner policy is prepared, begun, asked, run and reviewed as if alone; what it hides stays hidden."""
    for check in (Inner.ask, Inner.decode):
        policy = policy_of(subject.policy)
        assert isinstance(policy, Filter)
        check(heard := Inner(policy), canvas)
        no_faults(heard.faults)


# -- with whom --------------------------------------------------------------------------------------------------------


@claim(share=0.3)
def every_unmasker_works_or_is_refused_with_a_reason(subject: Subject, canvas: Canvas) -> None:
    """On models with and without a logit shift; what works gives the same in a batch as alone."""
    for shift in (0, 1):
        for text in subject.unmask:
            here = changed(canvas, {"shift": shift, "unmask": text})
            reason = refusal(policy_of(subject.policy), here)
            told = f"unmasker {text}, logit shift {shift}"
            if reason is None:
                reason = _runs_or_says_why(subject, here, told)
            if reason is not None and not (isinstance(reason, str) and len(reason.split()) > 3):
                raise AssertionError(f"{told}: refused with {reason!r}, which is no sentence that says why")


def _runs_or_says_why(subject: Subject, canvas: Canvas, told: str) -> str | None:
    """None if it runs, or the reason that came before the first pass; anything else is a crash."""
    try:
        in_a_batch_as_alone(subject, canvas)
    except Refused as error:
        return str(error)
    except AssertionError as error:
        raise AssertionError(f"{told}: {error}") from error
    except Exception as error:
        raise AssertionError(f"{told}: {type(error).__name__}: {error}") from error
    return None


def find(name: str) -> Claim:
    """The claim of a name; raises UsageError with those there are."""
    if name not in CLAIMS:
        raise UsageError(f"there is no claim {name!r}; claims: {', '.join(CLAIMS)}")
    return CLAIMS[name]
