"""gsm-mini: arithmetic word problems of two to five calculations, generated from a seed.

In the manner of GSM8K each problem has a written-out solution, one calculation per sentence, and ends in
``#### answer``; later calculations use the results of earlier ones, so tokens that are committed too early are wrong.
Numbers are small non-negative integers and every division is exact.

A problem belongs to the test split if and only if the hash of its prompt is a multiple of 16. No prompt can therefore
be in both splits, whatever the seeds.
"""

from collections.abc import Callable
from random import Random
from typing import ClassVar

from dcache.tasks.base import Problem, Task
from dcache.tasks.generated import check_request, in_test, says_number

SHE = ("Ann", "Eva", "Mia", "Lena", "Rosa", "Nora", "Iris", "Jade")
HE = ("Ben", "Tom", "Max", "Leo", "Sam", "Omar", "Hugo", "Finn")
ITEMS = ("apples", "pears", "plums", "eggs", "coins", "cards", "books", "pens", "shells", "stamps", "beads", "nuts")
BOXES = ("boxes", "bags", "packs", "trays")
DAYS = ("Monday", "Tuesday", "Friday", "Sunday")


class _Story:
    """A problem in the making: sentences told to the reader and calculations worked out for them."""

    def __init__(self, rng: Random):
        self.rng = rng
        self.told: list[str] = []
        self.worked: list[str] = []
        self.answer = 0
        self.names = rng.sample(SHE + HE, 3)
        self.items = rng.sample(ITEMS, 2)

    @property
    def she(self) -> str:
        """Pronoun of the first person, at the start of a sentence."""
        return "She" if self.names[0] in SHE else "He"

    def draw(self, low: int, high: int) -> int:
        """A number from low to high, both included."""
        return self.rng.randint(low, high)

    def tell(self, sentence: str) -> None:
        """Add a sentence to the prompt."""
        self.told.append(sentence)

    def work(self, before: str, a: int, sign: str, b: int, after: str) -> int:
        """Add a calculation to the solution; its result becomes the answer unless another follows."""
        self.answer = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
        assert sign != "/" or a % b == 0
        self.worked.append(f"{before} {a} {sign} {b} = {self.answer} {after}.")
        return self.answer


def _divisors(n: int) -> list[int]:
    return [d for d in range(2, 10) if n % d == 0 and n > d]


def _collection(s: _Story) -> None:
    """One person's things grow and shrink; the question may turn them into money or boxes."""
    name, friend, _ = s.names
    item, she = s.items[0], s.she
    n_steps = s.draw(2, 5)
    if s.rng.random() < 0.5:
        a, b, box = s.draw(2, 9), s.draw(3, 15), s.rng.choice(BOXES)
        s.tell(f"{name} buys {a} {box} of {b} {item}.")
        n = s.work(f"{name} buys", a, "*", b, item)
    else:
        a, b, when = s.draw(5, 60), s.draw(5, 60), s.rng.choice(DAYS)
        s.tell(f"{name} finds {a} {item} on {when} and {b} the day after.")
        n = s.work(f"{name} finds", a, "+", b, item)
    end = s.rng.choice(("keep", "sell", "pack")) if n_steps > 2 else "keep"
    n_more = n_steps - 1 - (end != "keep")
    while n_more:
        n, used = _event(s, name, friend, item, she, n, room=n_more)
        n_more -= used
    if end == "pack" and _divisors(n):
        size, box = s.rng.choice(_divisors(n)), s.rng.choice(BOXES)
        s.tell(f"{she} packs them in {box} of {size}. How many {box} does {name} need?")
        s.work(f"{she} needs", n, "/", size, box)
    elif end != "keep":
        price = s.draw(2, 9 if n < 200 else 3)
        s.tell(f"{she} sells all of them for {price} dollars each. How many dollars does {name} get?")
        s.work(f"{she} gets", n, "*", price, "dollars")
    else:
        s.tell(f"How many {item} does {name} have now?")


def _event(s: _Story, name: str, friend: str, item: str, she: str, n: int, room: int) -> tuple[int, int]:
    """Tell one change of `n` things; return the new number and how many calculations it took (at most `room`)."""
    kinds = ["get"] + ["lose"] * (n > 10) + ["times"] * (n < 100) + ["share"] * bool(_divisors(n))
    kinds += ["bags"] * (room > 1) + ["each"] * (room > 1 and n > 20)
    kind = s.rng.choice(kinds)
    if kind == "get":
        a = s.draw(3, 90)
        s.tell(s.rng.choice((f"{friend} gives {name} {a} more.", f"Then {name} gets {a} more.")))
        return s.work(f"{she} then has", n, "+", a, item), 1
    if kind == "lose":
        a = s.draw(3, n - 4)
        s.tell(s.rng.choice((f"{name} gives {a} to {friend}.", f"Then {name} loses {a} of them.")))
        return s.work(f"{she} then has", n, "-", a, item), 1
    if kind == "times":
        a = s.draw(2, 6)
        s.tell(f"A week later {name} has {a} times as many.")
        return s.work(f"{she} then has", n, "*", a, item), 1
    if kind == "share":
        a = s.rng.choice(_divisors(n))
        s.tell(f"{name} makes {a} equal piles and keeps one of them.")
        return s.work(f"{she} then has", n, "/", a, item), 1
    a, b = s.draw(2, 9), s.draw(2, 9)
    if kind == "bags":
        box = s.rng.choice(BOXES)
        s.tell(f"Then {name} buys {a} {box} of {b} {item}.")
        more = s.work(f"{name} buys", a, "*", b, item)
        return s.work(f"{she} then has", n, "+", more, item), 2
    a = min(a, (n - 2) // b)
    s.tell(f"{name} gives {b} to each of {a} friends.")
    less = s.work(f"{name} gives", a, "*", b, item)
    return s.work(f"{she} then has", n, "-", less, item), 2


def _compare(s: _Story) -> None:
    """Three people, each described by another; asked for one, two or all of them."""
    first, second, third = s.names
    item = s.items[0]
    a = s.draw(5, 60)
    s.tell(f"{first} has {a} {item}.")
    b = _related(s, second, first, a, item)
    c = _related(s, third, second, b, item)
    asked = s.rng.choice(("third", "pair", "all"))
    if asked == "third":
        s.tell(f"How many {item} does {third} have?")
    elif asked == "pair":
        s.tell(f"How many {item} do {second} and {third} have together?")
        s.work(f"{second} and {third} have", b, "+", c, item)
    else:
        s.tell(f"How many {item} do they have together?")
        two = s.work(f"{first} and {second} have", a, "+", b, item)
        s.work("Together they have", two, "+", c, item)


def _related(s: _Story, name: str, other: str, n: int, item: str) -> int:
    """Tell how many `name` has, given that `other` has `n`."""
    kind = s.rng.choice(["more"] + ["fewer"] * (n > 8) + ["times"] * (n < 100))
    if kind == "times":
        a = s.draw(2, 5)
        s.tell(f"{name} has {a} times as many as {other}.")
        return s.work(f"{name} has", n, "*", a, item)
    a = s.draw(2, 50 if kind == "more" else n - 3)
    s.tell(f"{name} has {a} {kind} than {other}.")
    return s.work(f"{name} has", n, "+" if kind == "more" else "-", a, item)


def _wages(s: _Story) -> None:
    """Hours times a wage, then spending or splitting."""
    name, item, she = s.names[0], s.items[0], s.she
    wage, a, b = s.draw(3, 15), s.draw(2, 9), s.draw(2, 9)
    first, second = s.rng.sample(DAYS, 2)
    s.tell(f"{name} earns {wage} dollars an hour and works {a} hours on {first} and {b} hours on {second}.")
    hours = s.work(f"{name} works", a, "+", b, "hours")
    n = s.work(f"{she} earns", hours, "*", wage, "dollars")
    end = s.rng.choice(("spend", "spend", "weeks", "earn"))
    if end == "spend":
        price = s.draw(2, 9)
        count = s.draw(1, min(9, n // price))  # n is at least 12
        s.tell(f"{she} buys {count} {item} for {price} dollars each. How many dollars are left?")
        cost = s.work(f"{she} pays", count, "*", price, "dollars")
        s.work(f"{she} then has", n, "-", cost, "dollars")
    elif end == "weeks":
        weeks = s.draw(2, 4)
        s.tell(f"{she} does so for {weeks} weeks. How many dollars does {name} earn?")
        s.work("In all this is", n, "*", weeks, "dollars")
    else:
        s.tell(f"How many dollars does {name} earn?")


def _shopping(s: _Story) -> None:
    """Two things at two prices, and the change."""
    name, she = s.names[0], s.she
    x, y = s.items
    a, p, b, q = s.draw(2, 9), s.draw(2, 15), s.draw(2, 9), s.draw(2, 9)
    s.tell(f"{name} buys {a} {x} for {p} dollars each and {b} {y} for {q} dollars each.")
    cost_x = s.work(f"The {x} cost", a, "*", p, "dollars")
    cost_y = s.work(f"The {y} cost", b, "*", q, "dollars")
    cost = s.work(f"{name} pays", cost_x, "+", cost_y, "dollars")
    if s.rng.random() < 0.7:
        has = cost + s.draw(2, 60)
        s.tell(f"{she} has {has} dollars. How many dollars are left?")
        s.work(f"{she} then has", has, "-", cost, "dollars")
    else:
        s.tell(f"How many dollars does {name} pay?")


def _trip(s: _Story) -> None:
    """A cost shared equally among friends."""
    name = s.names[0]
    friends = s.draw(2, 7)
    people = friends + 1
    share = s.draw(3, 30)
    nights = s.rng.choice(_divisors(people * share))
    rate = people * share // nights
    s.tell(f"{name} and {friends} friends make a trip of {nights} days. A day costs {rate} dollars.")
    count = s.work("The trip is for", friends, "+", 1, "people")
    cost = s.work("The trip costs", nights, "*", rate, "dollars")
    n = s.work("Each of them pays", cost, "/", count, "dollars")
    if s.rng.random() < 0.5:
        extra = s.draw(2, 40)
        s.tell(f"All pay the same, and {name} also buys food for {extra} dollars.")
        s.work(f"{name} pays", n, "+", extra, "dollars")
        s.tell(f"How many dollars does {name} pay?")
    else:
        s.tell("All pay the same. How many dollars does each of them pay?")


STORIES: tuple[Callable[[_Story], None], ...] = (_collection, _collection, _compare, _wages, _shopping, _trip)


class GsmMini(Task):
    """Generated arithmetic word problems, splits "train" and "test"."""

    name: ClassVar[str] = "gsm-mini"
    gen_length: ClassVar[int] = 96
    n_problems: ClassVar[int] = 500
    """Problems of a split when no limit is given; the generator has no end."""

    def problems(self, split: str, limit: int | None, seed: int) -> list[Problem]:
        """Return problems 0 to `limit` - 1 (default 500) of split "train" or "test"."""
        check_request("gsm-mini", split, limit)
        return [self.problem(split, index, seed) for index in range(self.n_problems if limit is None else limit)]

    def problem(self, split: str, index: int, seed: int) -> Problem:
        """Return one problem, a function of (split, index, seed) alone."""
        rng = Random(f"gsm-mini/{split}/{seed}/{index}")
        while True:
            story = _Story(rng)
            rng.choice(STORIES)(story)
            prompt = " ".join(story.told)
            if in_test(prompt) == (split == "test"):
                solution = " ".join([*story.worked, f"#### {story.answer}"])
                return Problem(f"gsm-mini/{split}/{seed}/{index}", prompt, str(story.answer), solution)

    def score(self, problem: Problem, text: str) -> bool | None:
        """Compare the first ``#### <integer>`` of the text with the reference; thousands commas do not matter."""
        return None if problem.answer is None else says_number(text, int(problem.answer))
