"""scenes: questions on pictures of coloured shapes and digits, generated from a seed.

A scene is a grid of three by three cells; each cell is empty or holds one thing: a circle, a square, a triangle or a
digit, in one of four colours. A problem asks for a count, for the sum of some digits, or for what is next to a thing.
Its solution names what has to be looked up first, then calculates, and ends in ``#### answer``.

Scenes are made around an answer that was drawn first, so no answer is frequent enough to be guessed without the image.
A scene belongs to the test split if and only if the hash of what its cells hold is a multiple of 16. No scene can
therefore be in both splits, whatever the seeds, the question, and the size and place of each thing within its cell.

Pixels are computed with integers, without Pillow's drawing: every version of Pillow gets the same image.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from dcache.images import PLACEHOLDER, pillow
from dcache.tasks.base import Problem, Task
from dcache.tasks.generated import check_request, in_test, says_number

SIDE = 3
CELL = 32
"""Pixels from one grid line to the next; an image has SIDE * CELL of them each way."""
WHITE, GREY = 255, 200
COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220), "yellow": (235, 190, 20)}
KINDS = ("circle", "square", "triangle", "digit")
STEPS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
"""Rows and columns from a thing to its neighbour."""
GLYPHS = {
    1: "..#.. .##.. ..#.. ..#.. ..#.. ..#.. .###.",
    2: ".###. #...# ....# ...#. ..#.. .#... #####",
    3: ".###. #...# ....# ..##. ....# #...# .###.",
    4: "...#. ..##. .#.#. #..#. ##### ...#. ...#.",
    5: "##### #.... ####. ....# ....# #...# .###.",
    6: "..##. .#... #.... ####. #...# #...# .###.",
    7: "##### ....# ...#. ..#.. .#... .#... .#...",
    8: ".###. #...# #...# .###. #...# #...# .###.",
    9: ".###. #...# #...# .#### ....# ...#. .##..",
}
"""Rows of each digit, five pixels wide. There is no 0: it adds nothing, and it looks like a circle."""
WORDS = re.compile(r"####\s*([^\n]*)")


@dataclass(frozen=True)
class Thing:
    """What a cell holds; `digit` is 1 to 9 if and only if the kind is "digit"."""

    colour: str
    kind: str
    digit: int | None = None

    def __str__(self) -> str:
        return f"{self.colour} {self.digit or self.kind}"


Cells = tuple[Thing | None, ...]
"""The nine cells in reading order; None is an empty one."""
Choice = Callable[[Thing], bool]


@dataclass(frozen=True)
class Asked:
    """A scene, a question on it, and the way to the answer."""

    cells: Cells
    question: str
    worked: str
    answer: str


def _thing(rng: Random, choice: Choice) -> Thing:
    """A random thing among those of a choice."""
    while True:
        kind = rng.choice(KINDS)
        thing = Thing(rng.choice([*COLOURS]), kind, rng.randint(1, 9) if kind == "digit" else None)
        if choice(thing):
            return thing


def _cells(rng: Random, fixed: dict[int, Thing | None], choice: Choice) -> Cells:
    """A scene with the given cells; of the others four in five hold a thing of the choice."""

    def other() -> Thing | None:
        return _thing(rng, choice) if rng.random() < 0.8 else None

    return tuple(fixed[cell] if cell in fixed else other() for cell in range(SIDE * SIDE))


def _count(rng: Random) -> Asked:
    """How many things of a colour, of a kind, or of both: 0 to 4, each as often."""
    colour, kind = rng.choice([*COLOURS]), rng.choice(KINDS)
    colour, kind = rng.choice(((colour, kind), (colour, ""), ("", kind)))

    def counts(thing: Thing) -> bool:
        return colour in ("", thing.colour) and kind in ("", thing.kind)

    n = rng.randint(0, 4)
    fixed: dict[int, Thing | None] = {cell: _thing(rng, counts) for cell in rng.sample(range(SIDE * SIDE), n)}
    cells = _cells(rng, fixed, lambda thing: not counts(thing))
    rows = [sum(cell // SIDE == row for cell in fixed) for row in range(SIDE)]
    told = ", ".join(f"row {row} has {count}" for row, count in enumerate(rows, start=1))
    question = f"How many {colour} {kind or 'thing'}s are there?".replace("  ", " ")
    return Asked(cells, question, f"{told.capitalize()}. {' + '.join(map(str, rows))} = {n}.", str(n))


def _sum(rng: Random) -> Asked:
    """The sum of two to four digits: those of a colour, or all."""
    colour = rng.choice([*COLOURS, ""])

    def adds(thing: Thing) -> bool:
        return thing.kind == "digit" and colour in ("", thing.colour)

    places = rng.sample(range(SIDE * SIDE), rng.randint(2, 4))
    cells = _cells(rng, {cell: _thing(rng, adds) for cell in places}, lambda thing: not adds(thing))
    digits = [thing.digit for thing in cells if thing and thing.digit and adds(thing)]
    worked = [f"The {colour} digits".replace("  ", " ") + f" are {', '.join(map(str, digits[:-1]))} and {digits[-1]}."]
    total = digits[0]
    for digit in digits[1:]:
        worked.append(f"{total} + {digit} = {total + digit}.")
        total += digit
    question = f"What is the sum of {'the ' + colour if colour else 'all'} digits?"
    return Asked(cells, question, " ".join(worked), str(total))


def _position(rng: Random) -> Asked:
    """What is in the cell next to a thing that the scene holds once; nothing, one time in eight."""
    direction = rng.choice([*STEPS])
    down, right = STEPS[direction]
    row = rng.randrange(max(0, -down), SIDE - max(0, down))
    column = rng.randrange(max(0, -right), SIDE - max(0, right))
    known = _thing(rng, lambda thing: True)

    def differs(thing: Thing) -> bool:
        return thing != known

    found = _thing(rng, differs) if rng.random() < 7 / 8 else None
    there = row + down, column + right
    cells = _cells(rng, {row * SIDE + column: known, there[0] * SIDE + there[1]: found}, differs)
    worked = (
        f"The {known} is in row {row + 1}, column {column + 1}. {direction.capitalize()} it, in row {there[0] + 1}, "
        f"column {there[1] + 1}, is {f'a {found}' if found else 'nothing'}."
    )
    return Asked(cells, f"What is directly {direction} the {known}?", worked, str(found) if found else "nothing")


QUESTIONS: tuple[Callable[[Random], Asked], ...] = (_count, _sum, _position)


class Placed(NamedTuple):
    """A thing in the picture: its `size`, and the top left corner of its mask within its cell, in pixels."""

    thing: Thing
    size: int
    top: int
    left: int


def sizes(thing: Thing) -> tuple[int, int]:
    """The smallest and the largest size: the side of a shape in pixels, or pixels per dot of a digit."""
    return (2, 3) if thing.digit else (16, 26)


@cache
def mask(kind: str, digit: int | None, size: int) -> npt.NDArray[np.bool_]:
    """The pixels of a thing: a shape of `size` by `size`, a digit of five by seven dots."""
    if digit is not None:
        glyph = np.array([[pixel == "#" for pixel in row] for row in GLYPHS[digit].split()])
        return glyph.repeat(size, axis=0).repeat(size, axis=1)
    across = 2 * np.arange(size) - size + 1  # twice the distance from the middle
    if kind == "circle":
        return across[:, None] ** 2 + across**2 <= size**2
    if kind == "triangle":
        return abs(across) <= np.arange(size)[:, None] + 1  # tip up, as wide as high at the foot
    return np.ones((size, size), bool)


def place(cells: Cells, rng: Random) -> tuple[Placed | None, ...]:
    """Draw the size of each thing, and its place near the middle of its cell."""

    def placed(thing: Thing) -> Placed:
        size = rng.randint(*sizes(thing))
        corner = []
        for side in mask(thing.kind, thing.digit, size).shape:
            margin = (CELL - side) // 2  # at least 3: things touch no grid line
            corner.append(margin + rng.randint(-min(3, margin - 2), min(3, margin - 2)))
        return Placed(thing, size, *corner)

    return tuple(placed(thing) if thing else None for thing in cells)


def paint(placed: tuple[Placed | None, ...]) -> Any:
    """The RGB Pillow image of a scene."""
    pixels = np.full((SIDE * CELL, SIDE * CELL, 3), WHITE, np.uint8)
    pixels[CELL::CELL] = pixels[:, CELL::CELL] = GREY
    for cell, found in enumerate(placed):
        if found is not None:
            shape = mask(found.thing.kind, found.thing.digit, found.size)
            top, left = (line * CELL + at for line, at in zip(divmod(cell, SIDE), found[2:], strict=True))
            pixels[top : top + shape.shape[0], left : left + shape.shape[1]][shape] = COLOURS[found.thing.colour]
    return pillow().frombytes("RGB", (SIDE * CELL, SIDE * CELL), pixels.tobytes())


class Scene(NamedTuple):
    """A problem before its image is painted."""

    name: str
    asked: Asked
    placed: tuple[Placed | None, ...]

    @property
    def prompt(self) -> str:
        """The user turn, a placeholder for the image."""
        return f"{PLACEHOLDER}\n{self.asked.question}"

    @property
    def solution(self) -> str:
        """What a model should write."""
        return f"{self.asked.worked} #### {self.asked.answer}"


class Scenes(Task):
    """Generated pictures with a question each, splits "train" and "test". Needs Pillow."""

    name: ClassVar[str] = "scenes"
    gen_length: ClassVar[int] = 64
    n_problems: ClassVar[int] = 500
    """Problems of a split when no limit is given; the generator has no end."""

    def problems(self, split: str, limit: int | None, seed: int) -> list[Problem]:
        """Return problems 0 to `limit` - 1 (default 500) of split "train" or "test"."""
        check_request("scenes", split, limit)
        return [self.problem(split, index, seed) for index in range(self.n_problems if limit is None else limit)]

    def problem(self, split: str, index: int, seed: int) -> Problem:
        """Return one problem, a function of (split, index, seed) alone."""
        scene = self.scene(split, index, seed)
        return Problem(scene.name, scene.prompt, scene.asked.answer, scene.solution, (paint(scene.placed),))

    def scene(self, split: str, index: int, seed: int) -> Scene:
        """What `problem` paints."""
        name = f"scenes/{split}/{seed}/{index}"
        rng = Random(name)
        while True:
            asked = rng.choice(QUESTIONS)(rng)
            if in_test(", ".join(map(str, asked.cells))) == (split == "test"):
                return Scene(name, asked, place(asked.cells, rng))

    def score(self, problem: Problem, text: str) -> bool | None:
        """Compare what follows the first ``####`` of the text with the reference, as a number or as words."""
        if problem.answer is None:
            return None
        if problem.answer.isdecimal():
            return says_number(text, int(problem.answer))
        found = WORDS.search(text)
        return found is not None and found[1].rstrip(" .").lower() == problem.answer
