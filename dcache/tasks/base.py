"""What a task is: numbered problems, and a verdict on each generated text."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class Problem:
    """One prompt.

    Attributes:
        id: names the problem in tables and saved runs; unique within one list.
        prompt: the user's turn, before the chat template.
        answer: the reference answer, or None if there is none.
        solution: a worked solution that ends in the answer, or None; what a model is trained to write.
        images: Pillow images, one for each ``<image>`` of the prompt and in their order. Those of a file are read each
            time they are taken out.
    """

    id: str
    prompt: str
    answer: str | None = None
    solution: str | None = None
    images: Sequence[Any] = field(default=(), hash=False)  # an image can be compared, not hashed


class Task(ABC):
    """A source of problems that can judge an answer.

    Attributes:
        name: as written on the command line.
        gen_length: rows to generate unless the user says otherwise; every reference solution fits.
    """

    name: ClassVar[str]
    gen_length: ClassVar[int]

    @abstractmethod
    def problems(self, split: str, limit: int | None, seed: int) -> list[Problem]:
        """Return the first `limit` problems of a split, or all of them if None.

        The same (split, seed) gives the same problems in the same order, and a larger `limit` only appends.
        """

    @abstractmethod
    def score(self, problem: Problem, text: str) -> bool | None:
        """Return whether `text` answers the problem, or None if the problem has no reference answer."""
