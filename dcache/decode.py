"""The decoding loop: the whole of masked-diffusion decoding, with every choice behind a call."""

from functools import partial
from time import perf_counter

import torch

from dcache.engine import Engine
from dcache.state import State
from dcache.trace import Step


@torch.inference_mode()
def decode(engine: Engine, state: State, limit: int | None = None) -> list[Step]:
    """Denoise ``state.tokens`` (batch, slots) until no row is masked; return one record per step.

    A sequence without masked rows is finished: none of its rows is computed again and its store is not touched.
    After `limit` steps the loop stops, for measurements that need no more.
    """
    policy, unmasker = engine.policy, engine.unmasker
    engine.begin(state)
    trace: list[Step] = []
    while not state.finished and (limit is None or state.step.max() < limit):
        began, recorded = perf_counter(), engine.recording
        ask = state.expect(unmasker.ask(state))  # what may be committed, and how many
        plan = policy.plan(state)  # which rows are computed
        seen = engine.run(plan, ask)  # one pass, one sync
        again = policy.review(state, plan, seen)
        if again is not None:  # a drift test that fired: the same step once more, from some layer on
            seen = engine.rerun(again, ask, seen)
        update = unmasker.settle(state, seen)
        moment, count = state.moment, engine.count
        state.apply(update, seen)
        recording = engine.recording - recorded
        seconds = perf_counter() - began - recording
        record = partial(Step.of, moment, plan, again, seen, update, count, seconds, recording)
        engine.later(record, trace.append)  # while the device runs the next pass
    engine.catch_up()
    return trace
