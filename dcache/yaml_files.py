"""YAML in which a value is what it looks like: the core schema of version 1.2, read without running anything.

Version 1.1, which PyYAML takes by default, reads ``on`` and ``no`` as true and false, 010 as 8, and 1e-3 as text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dcache.errors import UsageError

Place = tuple[str | int, ...]  # keys and indices from the top
LONGEST = 10**6  # bytes; a file that is written by hand has a few hundred
DEEPEST = 16
_NUMBERS = "-+.0123456789"
_RULES = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list(_NUMBERS)),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list(_NUMBERS)),
)


def _with_rules(kind: Any, **options: Any) -> Any:
    """A loader or dumper of PyYAML that knows the rules of the core schema."""
    made: Any = type(kind.__name__, (kind,), options)
    for name, pattern, first in _RULES:
        made.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(rf"(?:{pattern})\Z"), first)
    return made


def read(path: Path) -> tuple[Any, dict[Place, int]]:
    """Read a file.

    Returns:
        its value, of plain types, and the line of each part of it, from 1.

    Raises:
        UsageError: naming the file, and the line where there is one.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        data = path.read_bytes()
        if len(data) > LONGEST:
            raise UsageError(f"{path} has {len(data)} bytes; give a file of at most {LONGEST}")
        loader = _with_rules(yaml.SafeLoader, yaml_implicit_resolvers={})(data.decode("utf-8-sig"))
        node = loader.get_single_node()
        lines: dict[Place, int] = {}
        _walk(node, (), lines, set(), path)
        return (None if node is None else loader.construct_document(node)), lines
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except ValueError as error:  # Python reads no integer beyond a few thousand digits
        raise UsageError(f"{path}: {error}") from None
    except RecursionError:
        raise UsageError(f"{path} is nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = str(path) if mark is None else f"{path}, line {mark.line + 1}, column {mark.column + 1}"
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise UsageError(f"{where}: not valid YAML: {what}") from None


def _walk(node: Any, place: Place, lines: dict[Place, int], seen: set[int], path: Path) -> None:
    """Note where each part begins. Refuses keys that are given twice, of which PyYAML takes the last, and aliases,
    by which a short file can hold more than a machine.
    """
    if node is None:
        return
    line = lines.setdefault(place, node.start_mark.line + 1)
    if id(node) in seen:
        raise UsageError(f"{path}, line {lines[place]}: anchors and aliases are not read; write it out")
    seen.add(id(node))
    if len(place) > DEEPEST:
        raise UsageError(f"{path}, line {line} is nested too deeply")
    if node.id == "sequence":
        for i, item in enumerate(node.value):
            _walk(item, (*place, i), lines, seen, path)
    elif node.id == "mapping":
        for key, value in node.value:
            inner = (*place, str(key.value))
            if inner in lines:
                here, first = key.start_mark.line + 1, lines[inner]
                raise UsageError(f"{path}, line {here}: {key.value!r} is given twice, first in line {first}")
            lines[inner] = key.start_mark.line + 1
            _walk(value, inner, lines, seen, path)


def write(value: Any) -> str:
    """The text of a value of plain types, which `read` reads as the same value, and so do readers of version 1.1."""
    import yaml

    dumper = _with_rules(yaml.SafeDumper)  # beside its own rules: what is a word by one of them only is quoted
    text: str = yaml.dump(value, Dumper=dumper, sort_keys=False, default_flow_style=False)
    return text
