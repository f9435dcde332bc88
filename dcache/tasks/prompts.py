"""Your own prompts: JSON lines such as ``{"prompt": "2 + 3 = ?", "answer": "5", "id": "a"}``, the last two optional.

A prompt may show images: ``{"prompt": "<image>\\nWhat is this?", "images": ["a.png"]}`` has one ``<image>`` for each
path, and a path is relative to the file.
"""

import json
from pathlib import Path
from typing import ClassVar

from dcache.errors import UsageError
from dcache.images import PLACEHOLDER
from dcache.tasks.base import Problem, Task
from dcache.tasks.images import ImageFiles

KEYS = ("prompt", "answer", "id", "images")


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
            problem = _parse(line, f"{path}, line {number}", f"line-{number}", path.parent)
            if problem.id in problems:
                raise UsageError(
                    f"{path}, line {number}: id {problem.id!r} is taken by an earlier line; ids are unique"
                )
            problems[problem.id] = problem
    if not problems:
        raise UsageError(f'{path}: no prompts; write one JSON object per line, such as {{"prompt": "2 + 3 = ?"}}')
    return list(problems.values())


def _parse(line: str, where: str, default_id: str, folder: Path) -> Problem:
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
        raise UsageError(f"{where}: unknown key {unknown[0]!r}; the keys are prompt, answer, id and images")
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
    files = record.get("images")
    images = () if files is None else _images(files, prompt, where, folder)
    return Problem(name, prompt, None if answer is None else str(answer), images=images)


def _images(files: object, prompt: str, where: str, folder: Path) -> ImageFiles:
    """The images of a line; their files are looked at now and decoded when the images are used."""
    if not isinstance(files, list):
        raise UsageError(f"{where}: 'images' must be a list of paths, found {_kind(files)}")
    for file in files:
        if not isinstance(file, str):
            raise UsageError(f"{where}: 'images' must be a list of paths, found {_kind(file)} in it")
        _check_unicode(file, f"{where}: 'images'")
    if prompt.count(PLACEHOLDER) != len(files):
        raise UsageError(
            f"{where}: 'prompt' has {prompt.count(PLACEHOLDER)} {PLACEHOLDER}, and 'images' has {len(files)} paths; "
            f"write one {PLACEHOLDER} where each image belongs"
        )
    return ImageFiles(tuple(folder / file for file in files), where)


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
