"""Planted faults: policies and parts of the engine that are wrong in one way each, and the claim that finds it.

What the faults are planted in, `Periodic`, is right: it passes every claim as `examples/periodic`.
"""

import re
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from pydantic import Field
from torch import Tensor

from dcache import CachePolicy, Filter, Plan, PolicyConfig, Seen, State
from dcache.engine import Engine
from dcache.engine import layer as engine_layer
from dcache.engine.inputs import Inputs
from dcache.engine.layer import Layer
from dcache.kernels.attend import attend
from dcache.kernels.rows import take
from dcache.kernels.select import lowest
from dcache.plugins import make_policy
from dcache.policies.vlcache import VLCache
from dcache.testing import Canvas, Exact, Subject, hold, search
from dcache.testing.claims import CLAIMS, plain
from dcache.testing.watch import watched

UNMASK = ("low-confidence", "threshold(threshold=0.3)", "pausing", "remasking")


class Periodic(CachePolicy):
    class Config(PolicyConfig):
        period: int = Field(100, ge=1)

    exact = "period=1"
    config: Config

    def full(self, state: State) -> np.ndarray:
        return (state.step % self.config.period == 0)[:, None] & state.valid

    def plan(self, state: State) -> Plan:
        full = self.full(state)
        rows = state.masked | state.changed | state.needed | full
        return Plan(rows, "full" if (rows >= state.valid).all() else "reuse")


@dataclass(frozen=True)
class Fault:
    """A wrong policy, and the claim that must find it."""

    policy: Any
    claim: str
    says: str = ""
    equals: Any = None


FAULTS: list[Fault] = []


def found_by(claim: str, says: str = "", equals: Any = None) -> Callable[[Any], Any]:
    """Enter a policy in the list of faults; `says` is a pattern in the verdict, `equals` what it should decode like."""
    assert claim in CLAIMS

    def enter(policy: Any) -> Any:
        FAULTS.append(Fault(policy, claim, says, equals))
        return policy

    return enter


EXACT = "the_exact_configuration_commits_what_no_cache_commits"
FRESH = "written_keys_and_values_are_fresh_projections"
RUNS = "decodes_every_canvas_to_the_end"
BATCH = "a_batch_decodes_each_sequence_as_if_it_were_alone"
REPLAY = "a_recorded_pass_replays_to_the_same_run"
SEED = "the_same_seed_gives_the_same_run"
PLAIN = "the_exact_configuration_computes_what_the_plain_forward_computes"
BOOKS = "accounting_equals_a_counting_hook"
VISIBLE = "every_visible_key_has_been_written"
SECOND = "a_second_run_on_the_same_engine_is_the_first_again"
STARTS = "every_row_starts_from_its_token_or_its_embedding"
TOKENS = "embeddings_of_tokens_decode_as_the_tokens"
AGAIN = "embeddings_that_come_again_decode_in_a_batch_as_alone"


# -- rows -------------------------------------------------------------------------------------------------------------


@found_by("a_committed_row_is_computed_again_with_its_token", r"committed in step \d+ and not computed since")
class KeepsTheKeyOfTheMask(Periodic):
    def plan(self, state: State) -> Plan:
        return Plan(state.masked | state.needed | self.full(state))


@found_by(EXACT, "must equal none")
class DelayOfZero(Periodic):
    """Delayed caching without the delay; what is claimed of one layer shows it."""

    exact = None

    def plan(self, state: State) -> Plan:
        return Plan(state.masked | state.needed | self.full(state))


@found_by(EXACT, r"expected token|expected no commit|found confidence")
class ForgetsTheRefresh(Periodic):
    def full(self, state: State) -> np.ndarray:
        return (state.step == 0)[:, None] & state.valid


@found_by(RUNS, r"has committed nothing for 8 steps; of its window, positions \[\d+\] were not predicted")
class WindowOneShort(Periodic):
    def plan(self, state: State) -> Plan:
        needed = state.needed
        last = needed.shape[1] - 1 - needed[:, ::-1].argmax(1)
        short = needed & (np.arange(state.slots) != last[:, None])
        return Plan(short | state.changed | self.full(state))


@found_by(RUNS, "logit shift of 1")
class RowsOfTheWindowItself(Periodic):
    """Right without a logit shift."""

    def plan(self, state: State) -> Plan:
        return Plan(state.masked | state.changed | self.full(state))


@found_by(RUNS, r"State\.needed\) did not reach the last layer|compute State\.needed")
class DropsTheWindow(Periodic):
    def plan(self, state: State) -> Plan:
        return Plan(state.changed | state.prompt | self.full(state))


@found_by(BATCH, "the sequence alone|the same sequence alone")
class MixesTheBatchOnTheHost(Periodic):
    def plan(self, state: State) -> Plan:
        return Plan(state.masked | state.changed.any(0) & state.valid | state.needed | self.full(state))


@found_by(BATCH)
class DependsOnTheWidthOfTheCanvas(Periodic):
    def full(self, state: State) -> np.ndarray:
        return (state.step % (1 + state.slots % 7) == 0)[:, None] & state.valid


@found_by("remasked_rows_are_decoded_again", "unmasker remasking")
class ForgetsThatRowsAreMaskedAgain(Periodic):
    def begin(self, net: Any, state: State) -> None:
        self.done = state.prompt.copy()

    def plan(self, state: State) -> Plan:
        self.done |= state.known
        return Plan(state.rows_for(state.masked & ~self.done) | state.changed | self.full(state))


DRIFTS = "elastic(gamma=0.97,track_num=2)"  # refreshes often on the random models


class ShowsAll(Filter):
    """A filter that restricts nothing, so that it is its inner policy."""

    def __init__(self) -> None:
        super().__init__(make_policy(DRIFTS))

    def restrict(self, state: State, plan: Plan) -> Plan:
        return plan


@found_by("equal_configurations_commit_the_same", "must equal elastic", equals=DRIFTS)
class ForgetsTheReview(ShowsAll):
    """It switches the refreshes of its inner policy off."""

    def review(self, state: State, plan: Plan, seen: Seen) -> Plan | None:
        return None


# -- what a layer writes ----------------------------------------------------------------------------------------------


class Writes(Periodic):
    """A layer taken apart."""

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = at.project(rows, h)
        self.write(at, rows, k, v)
        return rows, at.finish(h, at.attend(rows, q))


@found_by(FRESH, r"position \d+: K of layer \d+ is \[.*a fresh projection of the layer's input is \[")
class RotatesTwice(Writes):
    def write(self, at: Layer, rows: Tensor, k: Tensor, v: Tensor) -> None:
        at.write(rows, at.rope(k, rows), v)


@found_by(FRESH, "K of layer 0")
class WritesOneToTheLeft(Writes):
    def write(self, at: Layer, rows: Tensor, k: Tensor, v: Tensor) -> None:
        at.write(rows, k, v)
        at.write((rows - 1).clamp_min(0), k, v)


@found_by(FRESH, "V of layer 0")
class WritesNoValue(Writes):
    def write(self, at: Layer, rows: Tensor, k: Tensor, v: Tensor) -> None:
        at.write(rows, k, v if at.kind == "full" else at.stored("V", rows))


@found_by(FRESH, "2 sequences|3 sequences|sequences of")
class WritesTheKeysOfAnotherSequence(Writes):
    def write(self, at: Layer, rows: Tensor, k: Tensor, v: Tensor) -> None:
        at.write(rows, k.roll(1, 0), v)


@found_by(FRESH, "did not write [KV] of the row with at.write")
class WritesPastTheBooks(Writes):
    def write(self, at: Layer, rows: Tensor, k: Tensor, v: Tensor) -> None:
        at.store("K", rows, k)
        at.store("V", rows, v)


@found_by("reused_rows_keep_their_bits", "although the plan does not compute the row")
class WritesPaddingAsRows(Writes):
    def write(self, at: Layer, rows: Tensor, k: Tensor, v: Tensor) -> None:
        at.write(rows.clamp_max(at.dump - 1), k, v)
        at.write(rows, k, v)


# -- what a layer reads -----------------------------------------------------------------------------------------------


@found_by("an_idle_step_changes_no_logits", "no token changed, yet its logits moved")
class ReusesTheOutputOfAnotherLayer(Periodic):
    def stores(self, spec: Any) -> dict[str, int]:
        return {"C": spec.d_model}

    def begin(self, net: Any, state: State) -> None:
        self.layers = net.layers

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        if at.kind == "full":
            at.store("C", rows, at.output(at.attend(rows, at.refresh(rows, h))))
            mixed = at.stored("C", rows)
        else:
            mixed = self.layers[0].stored("C", rows)
        return rows, h + mixed + at.ffn(h + mixed)


@found_by(RUNS, "NumericsError: .*not finite")
class ReadsKeysThatNobodyWrote(Periodic):
    def plan(self, state: State) -> Plan:
        seen = state.prompt | state.needed | state.known
        return Plan(seen, visible=seen)

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        every = torch.arange(at.dump).expand(rows.shape[0], -1)
        mean = at.stored("K", every).mean((1, 2, 3))[:, None, None]
        return at.compute(rows, h + 0 * mean)


@found_by(BOOKS, "attention past at.attend")
class CountsNoRows(Periodic):
    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        q = at.refresh(rows, h)
        o = attend(q, *at._keys(), at.visible).transpose(1, 2).flatten(2)
        return rows, at.finish(h, o)


@found_by("padding_of_row_lists_changes_nothing", "without padding")
class DependsOnThePaddingOfRows(Periodic):
    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return at.compute(rows, h * (1 + 0.05 * rows.shape[1]))


# -- capture, seeds, memory -------------------------------------------------------------------------------------------


@found_by(REPLAY, "the eager run; this one replayed|eager run")
class BranchesOnItsStep(Periodic):
    """`Plan.kind` does not name what `layer` branches on."""

    def plan(self, state: State) -> Plan:
        self.odd = bool(state.step.max() % 2)
        return replace(super().plan(state), kind="")

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        rows, h = at.compute(rows, h)
        return rows, h * 0.5 if self.odd else h


@found_by(REPLAY, "SyncError: .*cannot be captured")
class AsksTheDeviceInALayer(Periodic):
    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        scale = 1.0 if h.abs().max().item() < 1e6 else 0.5
        return at.compute(rows, h * scale)


@found_by("a_pass_syncs_once_and_plans_read_nothing_from_the_device", "plan asks for item .* waits for the device")
class AsksTheDeviceInAPlan(Periodic):
    def begin(self, net: Any, state: State) -> None:
        self.seen = net.buffer("seen", (state.batch,), torch.int64)

    def plan(self, state: State) -> Plan:
        return super().plan(state) if self.seen.sum().item() < 1 else Plan.all(state)


@found_by(SECOND, "the first run on a fresh engine")
class SurvivesABatch(Periodic):
    steps = 0

    def full(self, state: State) -> np.ndarray:
        self.steps += 1
        due = (self.steps % 3 == 0) | (state.step == 0)
        return due[:, None] & state.valid


@found_by(SEED)
class DrawsFromAGenerator(Periodic):
    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return at.compute(rows, h + 0.01 * torch.randn(h.shape))


@found_by(SEED, "the row is")
class DrawsRowsFromAGenerator(Periodic):
    def plan(self, state: State) -> Plan:
        chance = np.random.random(state.valid.shape) < 0.3
        return Plan(super().plan(state).row_mask | chance & state.valid)


@found_by("every_byte_is_reported_and_returned", "outlive the engine and the policy|bytes are held")
class KeepsEverything(Periodic):
    kept: ClassVar[list[Tensor]] = []

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        self.kept.append(h)
        return at.compute(rows, h)


@found_by("every_unmasker_works_or_is_refused_with_a_reason", "no sentence")
class RefusesWithoutAReason(Periodic):
    def refuses(self, spec: Any, unmasker: Any) -> str | None:
        return "no" if unmasker.name == "low-confidence" else None


@found_by("every_unmasker_works_or_is_refused_with_a_reason", r"unmasker remasking, logit shift 0: IndexError")
class CrashesWithAnUnmasker(Periodic):
    def plan(self, state: State) -> Plan:
        if state.seen is not None and (state.seen.taken.sum(1) > 1).any():
            _ = state.valid[:, state.slots]
        return super().plan(state)


# -- prompts with embeddings ------------------------------------------------------------------------------------------


@found_by(TOKENS, r"same prompts as tokens.*rows \d+-\d+ \(number \d\) of sequence \d start from embeddings")
class EmbedsTheIdsOfARefresh(Periodic):
    """Right for prompts of tokens."""

    def begin(self, net: Any, state: State) -> None:
        self.table = net._model.embedding

    def plan(self, state: State) -> Plan:
        return replace(super().plan(state), flags={"tokens": state.tokens})

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        if at.index == 0 and at.kind == "full":
            h = self.table[at.flags["tokens"].gather(1, rows)]
        return at.compute(rows, h)


@found_by(TOKENS, "the row is computed, but was not in the same prompts as tokens")
class LooksForMasksByTheirIds(Periodic):
    """An id that stands in for an embedding may be that of the mask."""

    def plan(self, state: State) -> Plan:
        rows = (state.tokens == state.spec.mask_id) | state.changed | state.needed | self.full(state)
        return Plan(rows & state.valid)


@found_by(BATCH, "the sequence alone|the same sequence alone")
class ComputesTheImagesOfEverySequence(Periodic):
    exact = None

    def plan(self, state: State) -> Plan:
        made = super().plan(state)
        return replace(made, row_mask=made.row_mask | state.embedded.any(0) & state.prompt)


@found_by(AGAIN, "the sequence alone|the same sequence alone")
class KeepsTheKeysOfAnotherSequence(VLCache):
    """What comes again finds the keys of what stood there in the first sequence of its batch."""

    class Config(VLCache.Config):
        fill: Literal["alone", "first"] = "first"

    config: Config

    def _keep(self, plan: Plan) -> None:
        self.missed = [(0, span, key) for _, span, key in self.missed]
        super()._keep(plan)


# -- rows chosen in a layer -------------------------------------------------------------------------------------------


class Chosen(CachePolicy):
    """Right: values of the whole stream; the rest where a value moved most. The others replay what they added."""

    class Config(PolicyConfig):
        share: float = Field(0.5, gt=0, le=1)

    exact = "share=1"
    config: Config

    def stores(self, spec: Any) -> dict[str, int]:
        return {"C": spec.d_model, "F": spec.d_model}  # added by attention and by the MLP

    def plan(self, state: State) -> Plan:
        first = state.step == 0
        whole = first if self.config.share < 1 else np.ones_like(first)
        rows = state.valid & (~state.prompt | state.needed | whole[:, None])
        n = rows.sum(1)
        count = np.where(first, n, np.maximum(np.ceil(self.config.share * n), state.changed.sum(1))).astype(np.int64)
        return Plan(rows, kind=int(count.max()), flags={"count": count, "changed": state.changed})

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        (v,) = at.project(rows, h, "v")
        picked, places = self.pick(at, rows, self.moved(at, rows, v))
        here = take(h, places)
        q, k = at.project(picked, here, "qk")
        self.write(at, rows, v, picked, k)
        c = at.output(at.attend(picked, q))
        at.store("C", picked, c)
        at.store("F", picked, at.ffn(here + c))
        return rows, h + at.stored("C", rows) + at.stored("F", rows)

    def moved(self, at: Layer, rows: Tensor, v: Tensor) -> Tensor:
        """Cosine with the value of the last step (batch, n), rounded so that rows of the same value tie."""
        alike = torch.cosine_similarity(v, at.stored("V", rows), dim=-1).mean(1).nan_to_num(-1.0)
        return (alike * 1e3).round().masked_fill(at.flags["changed"].gather(1, rows), -2e3)

    def pick(self, at: Layer, rows: Tensor, alike: Tensor) -> tuple[Tensor, Tensor]:
        """Positions that are computed, ascending and padded, and their places in the stream, both (batch, k)."""
        n = rows.shape[1]
        index, real = lowest(alike.masked_fill(rows == at.dump, 2e3), at.flags["count"], min(at.kind, n))
        places = torch.where(real, index, n - 1).sort(1).values
        picked = torch.where(real, rows.gather(1, index), at.dump).sort(1).values
        return picked, places

    def write(self, at: Layer, rows: Tensor, v: Tensor, picked: Tensor, k: Tensor) -> None:
        at.write(rows, v=v)
        at.write(picked, k=k)


@found_by(FRESH, "K of layer")
class TakesPlacesForPositions(Chosen):
    """The two are the same while the stream has every row."""

    def pick(self, at: Layer, rows: Tensor, alike: Tensor) -> tuple[Tensor, Tensor]:
        _, places = super().pick(at, rows, alike)
        return places, places


@found_by(BOOKS, "its key was written without its value")
class ProjectsValuesOfTheChosenOnly(Chosen):
    def write(self, at: Layer, rows: Tensor, v: Tensor, picked: Tensor, k: Tensor) -> None:
        at.write(rows, *(x for x in at.project(rows, self.h, "k")))
        at.write(picked, v=take(v, self.places))

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        self.h = h
        return super().layer(at, rows, h)

    def pick(self, at: Layer, rows: Tensor, alike: Tensor) -> tuple[Tensor, Tensor]:
        picked, self.places = super().pick(at, rows, alike)
        return picked, self.places


@found_by(BOOKS, "has the row twice in one call")
class PicksARowTwice(Chosen):
    def pick(self, at: Layer, rows: Tensor, alike: Tensor) -> tuple[Tensor, Tensor]:
        picked, places = super().pick(at, rows, alike)
        return torch.cat([picked[:, :1], picked], 1), torch.cat([places[:, :1], places], 1)


@found_by(EXACT, "must equal none")
class ReplaysTheAttentionOnly(Chosen):
    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        super().layer(at, rows, h)
        return rows, h + at.stored("C", rows)


@found_by("padding_of_row_lists_changes_nothing", "without padding")
class StoresPaddingInTheLastSlot(Chosen):
    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        out = super().layer(at, rows, h)
        at.store("C", rows.clamp_max(at.dump - 1), out[1] - h - at.stored("F", rows))
        return rows, h + at.stored("C", rows) + at.stored("F", rows)


@found_by(VISIBLE, r"position \d+: layer \d+ attends to it, but nobody has written its K there")
class ForgetsTheFirstPass(Chosen):
    """Every value is there, so nothing but the keys shows it."""

    def plan(self, state: State) -> Plan:
        made = super().plan(state)
        count = np.minimum(made.flags["count"], 3)
        return replace(made, kind=3, flags={**made.flags, "count": count})


@found_by(REPLAY, "eager run|NumericsError")
class FreezesItsBudget(Chosen):
    """It is in no kind and no flag."""

    def plan(self, state: State) -> Plan:
        made = super().plan(state)
        self.most = 1 + int(state.step.max()) % 5 if state.step.max() else state.slots
        return replace(made, kind=state.slots)

    def pick(self, at: Layer, rows: Tensor, alike: Tensor) -> tuple[Tensor, Tensor]:
        picked, places = super().pick(at, rows, alike)
        order = torch.arange(picked.shape[1])
        return torch.where(order < self.most, picked, at.dump), places


@found_by(BATCH, "the sequence alone|the same sequence alone")
class TakesLanesForSequences(Chosen):
    """Right until the first sequence is finished, and its lane is that of another."""

    def begin(self, net: Any, state: State) -> None:
        self.past = net.buffer("past", (net.spec.n_layers, net.batch, net.slots + 1), torch.float32)

    def moved(self, at: Layer, rows: Tensor, v: Tensor) -> Tensor:
        mine = self.past[at.index, : len(rows)]
        now = v.norm(dim=-1).sum(1)
        alike = -(now - mine.gather(1, rows)).abs().mul(100).round()
        mine.scatter_(1, rows, now)
        return alike.masked_fill(at.flags["changed"].gather(1, rows), -2e4)


@found_by("a_committed_row_is_computed_again_with_its_token", r"committed in step \d+ and not computed since")
class NeverChoosesWhatChanged(Chosen):
    """Its plans have every row, its layers leave out those that were committed."""

    def moved(self, at: Layer, rows: Tensor, v: Tensor) -> Tensor:
        known = ~at.flags["masked"].gather(1, rows) & (at.flags["step"] > 0)[:, None]
        return super().moved(at, rows, v).masked_fill(known, 1.5e3)

    def plan(self, state: State) -> Plan:
        made = super().plan(state)
        count = np.where(state.step == 0, made.flags["count"], np.maximum(1, state.masked.sum(1) // 2))
        flags = {**made.flags, "count": count, "masked": state.masked, "step": state.step}
        return replace(made, kind=int(count.max()), flags=flags)


@found_by("another_model_prepares_the_policy_again", "a fresh policy")
class PreparesOnce(Periodic):
    scale: Tensor | None = None

    def prepare(self, weights: Any) -> None:
        if self.scale is None:
            self.scale = weights.weight(0, "v").abs().mean()

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return at.compute(rows, h * (1 + self.scale))


# -- keys that are hidden ---------------------------------------------------------------------------------------------


class Hides(Filter):
    """Right: the second step of a block hides the keys that its rows attend to least, until the block ends."""

    def __init__(self, inner: Any = Periodic) -> None:
        super().__init__(inner())

    def begin(self, net: Any, state: State) -> None:
        super().begin(net, state)
        self.shown = net.buffer("shown", (net.spec.n_layers, net.batch, 1, net.slots), torch.bool)

    def restrict(self, state: State, plan: Plan) -> Plan:
        opens = state.block_step == 0
        flags = {**plan.flags, "opens": opens, "scoring": state.block_step == 1, "there": state.valid.sum(1)}
        return replace(plan, visible=self.shown | torch.from_numpy(opens)[:, None, None], flags=flags)

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        out = self.inner.layer(at, rows, h)
        kept = self.kept(at, at.received(at.q, (rows < at.dump).float())[:, :-1])
        shown = self.shown[at.index]
        now = torch.where(at.flags["scoring"][:, None, None], kept[:, None], shown[at.lanes])
        shown.index_copy_(0, at.lanes, now | at.flags["opens"][:, None, None])
        return out

    def kept(self, at: Layer, score: Tensor) -> Tensor:
        """The better half of the keys: (batch, slots) bool."""
        n = score.shape[1]
        index, real = lowest(-score, (at.flags["there"] + 1) // 2, n)
        return torch.zeros_like(score, dtype=torch.bool).scatter_(1, index, real)


@found_by(BATCH, "the sequence alone|the same sequence alone")
class HidesByTheScoresOfTheFirst(Hides):
    def kept(self, at: Layer, score: Tensor) -> Tensor:
        return super().kept(at, score[:1].expand_as(score))


@found_by(VISIBLE, "the layer changed at.visible")
class HidesInTheScoringPass(Hides):
    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        out = super().layer(at, rows, h)
        at.visible[:] &= self.shown[at.index][at.lanes]
        return out


@found_by(VISIBLE, r"position \d+: layer 0 attends to it, but nobody has written its K there")
class ShowsWhatNobodyComputed(Filter):
    """A window over the canvas that slides, without the rows that come into it."""

    def __init__(self) -> None:
        super().__init__(Periodic())

    def restrict(self, state: State, plan: Plan) -> Plan:
        ahead = (state.masked & ~state.needed).cumsum(1)
        rows = plan.row_mask & ((ahead <= 1) | state.needed)
        return replace(plan, row_mask=rows, visible=torch.from_numpy(state.valid & (ahead <= 1 + state.step[:, None])))


@found_by(SECOND, "the first run on a fresh engine")
class NeverShowsAgain(Hides):
    def begin(self, net: Any, state: State) -> None:
        self.inner.begin(net, state)
        if not hasattr(self, "shown"):
            self.shown = torch.ones(net.spec.n_layers, net.batch, 1, net.slots, dtype=torch.bool)

    def restrict(self, state: State, plan: Plan) -> Plan:
        return replace(super().restrict(state, plan), visible=self.shown)


# -- around another policy --------------------------------------------------------------------------------------------

KEEPS = "a_filter_keeps_what_its_inner_policy_says"


@found_by(KEEPS, "review of the filter was called .* times, and that of its inner policy 0 times")
class DropsTheReview(ForgetsTheReview):
    pass


@found_by(KEEPS, "prepare of the filter was called 1 times, and that of its inner policy 0 times")
class ForgetsToPrepare(ShowsAll):
    def prepare(self, weights: Any) -> None:
        pass


@found_by(KEEPS, r"stores of the inner policy asked for \{\"X\": 3\}")
class ForgetsTheStores(ShowsAll):
    def stores(self, spec: Any) -> dict[str, int]:
        return {"Q": spec.q_width}


@found_by(KEEPS, "refuses of the inner policy returned a reason, and that of the filter None")
class TakesWhatItsInnerRefuses(ShowsAll):
    def refuses(self, spec: Any, unmasker: Any) -> str | None:
        return None


@found_by(KEEPS, "exempt of the inner policy named a claim")
class ClaimsWhatItsInnerDoesNot(ShowsAll):
    def exempt(self) -> dict[str, str]:
        return {}


@found_by(KEEPS, "plan of the inner policy returned kind '.*', which the filter does not hand on")
class OverwritesTheKind(ShowsAll):
    def restrict(self, state: State, plan: Plan) -> Plan:
        return replace(plan, kind="mine")


@found_by(KEEPS, r"step \d+: plan of the inner policy hides position \d+ of sequence \d+, and the filter shows it")
class ShowsWhatItsInnerHides(Hides):
    def __init__(self) -> None:
        super().__init__(Hides)

    def restrict(self, state: State, plan: Plan) -> Plan:
        return replace(super().restrict(state, plan), visible=state.valid)

    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner.layer(at, rows, h)


# -- what the engine refuses ------------------------------------------------------------------------------------------


@found_by(RUNS, r"PolicyError: policy 'FlatMask', step 0: row_mask has shape \(\d+,\), expected .*add a batch axis")
class FlatMask(Periodic):
    def plan(self, state: State) -> Plan:
        return Plan(state.valid[0])


@found_by(RUNS, r"PolicyError: .*layer 0 returned rows .*expected ascending positions in 0\.\.\d+")
class RepeatsARow(Periodic):
    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        rows, h = at.compute(rows, h)
        return torch.cat([rows[:, :1], rows], 1), torch.cat([h[:, :1], h], 1)


@found_by(RUNS, r"PolicyError: .*layer 0 returned rows|IndexError|index .* out of bounds")
class RowsOutOfRange(Periodic):
    def layer(self, at: Layer, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        rows, h = at.compute(rows, h)
        return rows + at.dump, h


def subject_of(policy: Any, equals: Any = None) -> Subject:
    exact = [Exact(policy, n_layers=1)] if policy is DelayOfZero else None
    return Subject(policy, exact, () if equals is None else [(policy, equals)], unmask=UNMASK)


def verdict_on(claim: str, subject: Subject) -> search.Verdict:
    return search.judge(CLAIMS[claim], subject, examples=10)


def readable(verdict: search.Verdict) -> bool:
    """It names the claim, the place, what is wrong, and the smallest example with the code that reproduces it."""
    text = str(verdict)
    parts = [
        verdict.text,
        "smallest failing example: random model",
        "(prompt + masked) rows",
        f"hold({verdict.claim!r}",
    ]
    return (
        all(part in text for part in parts)
        and re.search(r"step \d|layer \d|tensors? of shape|unmasker", text) is not None
    )


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a fault was found once, no test but that of the smallest example asks for less."""
    monkeypatch.setattr(search, "SHRINK_S", 0.0)


def forget_runs() -> None:
    for kept in (plain, watched):
        kept.cache_clear()


@pytest.fixture
def _own_runs() -> Iterator[None]:
    """No run of a right engine is taken for one of a broken one, nor the other way round."""
    forget_runs()
    yield
    forget_runs()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.policy.__name__)
def test_a_planted_fault_is_found_by_the_claim_that_it_breaks(fault: Fault) -> None:
    verdict = verdict_on(fault.claim, subject_of(fault.policy, fault.equals))
    assert verdict.status == "fail", f"{fault.policy.__name__} passes {fault.claim}"
    assert re.search(fault.says, str(verdict), re.S), str(verdict)
    assert readable(verdict), str(verdict)


@dataclass(frozen=True)
class Broken:
    """A part of the engine that is wrong, and the claim that must find it."""

    name: str
    claim: str
    owner: Any
    attribute: str
    wrong: Callable[[Any], Any]


def twice_rotated(rotary_scatter: Any) -> Any:
    return lambda *given: rotary_scatter(*given[:-1], 2 * given[-1])


def of_another_sequence(rotary_scatter: Any) -> Any:
    return lambda qkv, *given: rotary_scatter(qkv.roll(1, 0), *given)


def for_everyone(arrays: Any) -> Any:
    """The inputs of a pass, made as if no sequence were finished."""

    class Everyone(State):
        @property
        def active(self) -> np.ndarray:
            return np.ones(self.batch, dtype=bool)

    def wrong(inputs: Inputs, plan: Plan, ask: Any) -> Any:
        inputs = copy(inputs)
        inputs.state = copy(inputs.state)
        inputs.state.__class__ = Everyone
        return arrays(inputs, plan, ask)

    return wrong


def rewriting(apply: Any) -> Any:
    """The canvas, whose first committed token becomes another one step later."""

    def wrong(state: State, update: Any, seen: Any) -> None:
        early = state.known & ~state.prompt
        apply(state, update, seen)
        state.tokens = np.where(early & (early.cumsum(1) == 1), 1 - state.tokens.clip(0, 1), state.tokens)

    return wrong


def of_ids(inputs: Any) -> Any:
    """What rows start from, in a pass over all of them without a look at the embeddings of prompts."""

    def wrong(engine: Engine, current: Any, tokens: Tensor) -> Tensor:
        whole = current.rows.shape[1] >= engine.network.slots
        return engine.model.embed(tokens.gather(1, current.rows)) if whole else inputs(engine, current, tokens)

    return wrong


def of_the_sequence_before(inputs: Any) -> Any:
    """What rows start from, with the embeddings of another prompt."""

    def wrong(engine: Engine, current: Any, tokens: Tensor) -> Tensor:
        return inputs(engine, replace(current, lanes=current.lanes.roll(1), whole=False), tokens)

    return wrong


def beside_those_before(place: Any) -> Any:
    """The embeddings of a batch, put beside those of the batch before."""

    def wrong(engine: Engine, state: State) -> None:
        before = None if engine.embeddings is None else (engine.embeddings.clone(), engine.embedded.clone())
        place(engine, state)
        if before is not None:
            stale = before[1] & ~engine.embedded
            engine.embeddings.copy_(torch.where(stale[..., None], before[0], engine.embeddings))
            engine.embedded.logical_or_(stale)

    return wrong


def of_the_next(visible: Any) -> Any:
    def wrong(at: Layer) -> Tensor | None:
        shown = visible.fget(at)
        return None if shown is None else shown.roll(1, 0)

    return property(wrong)


BROKEN = [
    Broken("finished sequences run on", "a_finished_sequence_costs_nothing", Inputs, "arrays", for_everyone),
    Broken("a token is rewritten", "a_committed_row_never_changes", State, "apply", rewriting),
    Broken("keys rotated twice", PLAIN, engine_layer, "rotary_scatter", twice_rotated),
    Broken("rows counted twice", BOOKS, Layer, "_count", lambda count: lambda at, *a: (count(at, *a), count(at, *a))),
    Broken("rows of another sequence", FRESH, engine_layer, "rotary_scatter", of_another_sequence),
    Broken("a logit shift forgotten", RUNS, State, "rows_for", lambda rows_for: lambda state, rows: rows & state.valid),
    Broken("a refresh that embeds ids", STARTS, Engine, "_inputs", of_ids),
    Broken("embeddings of another sequence", STARTS, Engine, "_inputs", of_the_sequence_before),
    Broken("embeddings of the batch before", SECOND, Engine, "_place_embeddings", beside_those_before),
    Broken("keys that another sequence sees", VISIBLE, Layer, "visible", of_the_next),
    Broken("attention to slots that do not exist", BATCH, Layer, "visible", lambda visible: None),
]


@pytest.mark.usefixtures("_own_runs")
@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_a_fault_of_the_engine_is_found(broken: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broken.owner, broken.attribute, broken.wrong(getattr(broken.owner, broken.attribute)))
    verdict = verdict_on(broken.claim, subject_of(Periodic))
    assert verdict.status == "fail", f"{broken.name} passes {broken.claim}"
    assert readable(verdict), str(verdict)


ALIKE = {Periodic: Periodic, Chosen: Chosen, Hides: Hides, ShowsAll: DRIFTS}  # what is right, and what decodes alike
RIGHT = {policy: subject_of(policy, equals) for policy, equals in ALIKE.items()}  # one each: its claims share runs


@pytest.mark.parametrize("name", CLAIMS)
@pytest.mark.parametrize("policy", RIGHT)
def test_what_the_faults_are_planted_in_has_none(policy: Any, name: str) -> None:
    subject = RIGHT[policy]
    verdict = search.judge(CLAIMS[name], subject, examples=3)
    assert verdict.status == "pass" or CLAIMS[name].needs(subject) is not None, str(verdict)


def test_the_snippet_of_a_verdict_reproduces_it() -> None:
    verdict = verdict_on(FRESH, subject_of(RotatesTwice))
    names = {"RotatesTwice": RotatesTwice, "Canvas": Canvas, "Exact": Exact, "Subject": Subject, "hold": hold}
    with pytest.raises(AssertionError, match=re.escape(verdict.detail)):
        exec(verdict.snippet, names)


def test_the_smallest_example_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "SHRINK_S", 20.0)
    verdict = verdict_on(FRESH, subject_of(RotatesTwice))
    assert "1 sequence of 1 + 4 (prompt + masked) rows" in verdict.example


def test_a_filter_that_restricts_nothing_is_its_inner_policy() -> None:
    verdict = verdict_on("equal_configurations_commit_the_same", subject_of(ShowsAll, DRIFTS))
    assert verdict.status == "pass", str(verdict)


def test_every_claim_has_a_fault_that_it_finds() -> None:
    assert {entry.claim for entry in (*FAULTS, *BROKEN)} == CLAIMS.keys()
