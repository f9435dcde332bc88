"""Your own prompts: JSON lines such as ``{"prompt": "2 + 3 = ?", "answer": "5", "id": "a"}``, the last two optional."""

import json
from pathlib import Path
from typing import ClassVar

from dcache.errors import UsageError
from dcache.tasks.base import Problem, Task

KEYS = ("prompt", "answer", "id")


class Prompts(Task):
    """Prompts of a file, in its order. A prompt without an answer is decoded but not scored.

    Args:
        path: one JSON object per line; blank lines are skipped.
    """

    name: ClassVar[str] = "prompts"
    gen_length: ClassVar[int] = 128

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._problems = _read(self.path)

    def problems(self, split: str, limit: int | None, seed: int) -> list[Problem]:
        """Return the first `limit` prompts of the file; a file has one split and no seed, so both are ignored."""
        if limit is not None and limit < 1:
            raise UsageError(f"limit is {limit}; ask for at least 1 problem")
        return self._problems[:limit]

    def score(self, problem: Problem, text: str) -> bool | None:
        """Compare the answer with what follows ``####`` on its line if the text has one, else with the whole text."""
        if problem.answer is None:
            return None
        _, mark, rest = text.partition("####")
        given = rest.strip().partition("\n")[0] if mark else text
        return given.strip() == problem.answer.strip()


def _read(path: Path) -> list[Problem]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut at U+2028 within a string
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; give a file with one JSON object per line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    problems: dict[str, Problem] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            problem = _parse(line, f"{path}, line {number}", default_id=f"line-{number}")
            if problem.id in problems:
                raise UsageError(
                    f"{path}, line {number}: id {problem.id!r} is taken by an earlier line; ids are unique"
                )
            problems[problem.id] = problem
    if not problems:
        raise UsageError(f'{path}: no prompts; write one JSON object per line, such as {{"prompt": "2 + 3 = ?"}}')
    return list(problems.values())


def _parse(line: str, where: str, default_id: str) -> Problem:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}, column {error.colno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise UsageError(f"{where}: not valid JSON: it is nested too deeply") from None
    except ValueError:  # Python reads no integer beyond a few thousand digits
        raise UsageError(f"{where}: not valid JSON: a number has too many digits; write it as a string") from None
    if not isinstance(record, dict):
        raise UsageError(f'{where}: expected an object such as {{"prompt": "..."}}, found {_kind(record)}')
    if unknown := sorted(set(record) - set(KEYS)):
        raise UsageError(f"{where}: unknown key {unknown[0]!r}; the keys are prompt, answer and id")
    if "prompt" not in record:
        raise UsageError(f"{where}: the key 'prompt' is missing")
    prompt, answer, name = record["prompt"], record.get("answer"), record.get("id", default_id)
    if not isinstance(prompt, str):
        raise UsageError(f"{where}: 'prompt' must be a string, found {_kind(prompt)}")
    if not prompt.strip():
        raise UsageError(f"{where}: 'prompt' is empty")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float | None):
        raise UsageError(f"{where}: 'answer' must be a string or a number, found {_kind(answer)}")
    if not isinstance(name, str):
        raise UsageError(f"{where}: 'id' must be a string, found {_kind(name)}")
    for key, value in (("prompt", prompt), ("answer", str(answer)), ("id", name)):
        _check_unicode(value, f"{where}: {key!r}")
    return Problem(name, prompt, None if answer is None else str(answer))


def _check_unicode(text: str, where: str) -> None:
    """JSON can spell half of a surrogate pair, which is no character and cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{where} holds a lone surrogate, {text[error.start]!a}, at character {error.start + 1}; remove it"
        ) from None


def _kind(value: object) -> str:
    """The JSON name of a value's type."""
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "null")
