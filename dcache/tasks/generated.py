"""What tasks that are generated from a seed share: their two splits, and the verdict on a number."""

import re
from hashlib import blake2b

from dcache.errors import UsageError

ANSWER = re.compile(r"####\s*(-?(?:\d{1,3}(?:,\d{3})+|\d+))(?!\d|[.,]\d)")


def in_test(text: str) -> bool:
    """Whether what `text` spells out belongs to the test split: a property of the text alone, one in sixteen."""
    return blake2b(text.encode(), digest_size=4).digest()[-1] % 16 == 0


def check_request(task: str, split: str, limit: int | None) -> None:
    """Refuse a split that a generated task does not have, and a limit below one problem."""
    if split not in ("train", "test"):
        raise UsageError(f"task {task!r} has no split {split!r}; its splits are 'train' and 'test'")
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}; ask for at least 1 problem")


def says_number(text: str, answer: int) -> bool:
    """Whether the first ``#### <integer>`` of the text is `answer`; thousands commas do not matter."""
    found = ANSWER.search(text)
    return found is not None and int(found[1].replace(",", "")) == answer
