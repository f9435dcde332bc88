"""What all tests of the benchmarks share."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def nothing_old_is_garbage() -> Iterator[None]:
    """Each line of a benchmark collects garbage before it; looking through what was there before takes a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
