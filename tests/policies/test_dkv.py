import numpy as np
import pytest

from dcache import Sampling, State
from dcache.decode import decode
from dcache.engine import Engine
from dcache.policies.dkv import DKVCache
from dcache.testing.models import random_model
from dcache.trace import Step
from dcache.unmasking.confidence import LowConfidence, Threshold

MODEL = random_model(3)


def go(interval: int, block: int | None = None, gen: int = 16) -> list[Step]:
    state = State(MODEL.spec, [[3, 1, 4, 1, 5]], gen, block)
    return decode(Engine(MODEL, DKVCache(interval=interval), LowConfidence(), debug=True), state)


@pytest.mark.parametrize("interval", [2, 3, 5, 100])
def test_a_cached_step_computes_what_was_not_known_two_commits_ago(interval: int) -> None:
    known = [set(range(5))]  # before step 0
    for i, step in enumerate(go(interval)):
        rows = set(np.flatnonzero(step.rows[0]).tolist())
        everything = set(range(21))
        cached = i >= 2 and i % interval != 0
        assert rows == (everything - known[i - 1] if cached else everything)
        known.append(known[-1] | set(np.flatnonzero(step.commit[0]).tolist()))


def test_the_first_two_steps_of_every_block_are_full() -> None:
    full = [bool(step.rows.all()) for step in go(100, block=4)]
    assert full == [True, True, False, False] * 4


def test_a_row_dropped_undecoded_is_computed_like_any_mask() -> None:
    for seed in range(8):
        model = random_model(seed, vocab_size=6)
        unmasker = Threshold(sampling=Sampling(after_end="drop"), threshold=0.9)
        state = State(model.spec, [[1, 2, 3]], 24)
        dropped = np.zeros_like(state.valid)
        for step in decode(Engine(model, DKVCache(interval=100), unmasker), state):
            assert step.rows[dropped & step.active[:, None]].all()
            dropped |= step.drop
