from threading import Thread

import pytest
import torch

from dcache.reuse import ReuseCache, content_key


def cache(budget: int, *names: str) -> ReuseCache[str]:
    """A cache with values of 10 bytes each."""
    made = ReuseCache[str](budget)
    for name in names:
        made.put(name, name.upper(), 10)
    return made


def test_what_was_put_is_found_and_counted():
    held = cache(100, "a")
    assert (held.get("a"), held.get("b")) == ("A", None)
    assert held.statistics == {"hits": 1, "misses": 1, "evictions": 0, "entries": 1, "bytes": 10}


def test_the_value_that_was_not_used_for_longest_goes_first():
    held = cache(20, "a", "b")
    held.get("a")
    held.put("c", "C", 10)
    assert [held.get(name) for name in "abc"] == ["A", None, "C"]
    assert held.statistics["evictions"] == 1
    assert held.statistics["bytes"] == 20


def test_the_first_value_of_a_key_stays():
    held = cache(100, "a")
    held.put("a", "other", 10)
    assert held.get("a") == "A"
    assert held.statistics["bytes"] == 10


def test_a_value_above_the_budget_is_not_kept_and_evicts_nothing():
    held = cache(20, "a")
    held.put("b", "B", 21)
    assert (held.get("a"), held.get("b")) == ("A", None)


def test_clearing_gives_the_bytes_back():
    held = cache(20, "a", "b")
    held.clear()
    assert held.get("a") is None
    assert held.statistics["bytes"] == 0


def test_threads_leave_the_bytes_right():
    held = ReuseCache[int](50)

    def work(offset: int) -> None:
        for i in range(300):
            held.put((i + offset) % 11, i, 10)
            held.get(i % 11)

    threads = [Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = held.statistics
    assert (found["entries"], found["bytes"]) == (5, 50)
    assert found["hits"] + found["misses"] == 1200


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_key_tells_values_shapes_and_types_apart(dtype):
    x = torch.arange(6, dtype=dtype)
    others = [x + 1, x.reshape(2, 3), x.to(torch.float16), x[:5], "x"]
    assert content_key(x, 1) == content_key(x.clone(), 1)
    assert len({content_key(x, 1), content_key(x), *map(content_key, others)}) == 7
