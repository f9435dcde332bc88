"""The little language of policies and unmaskers: ``elastic``, ``elastic(gamma=0.95,window=32)``.

A name, then optional ``knob=value`` pairs. A value is an integer, a float, ``true``, ``false``, ``none``, a word, a
path, or another call, as in ``suffix(inner=elastic(gamma=0.95))``. The parser says where it stopped; what the values
mean is for the knobs' own class to judge.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from dcache.errors import UsageError

Value: TypeAlias = bool | int | float | str | None

NAME = re.compile(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*")
KNOB = re.compile(r"[a-z_][a-z0-9_]*")
WORD = re.compile(r"[A-Za-z_/][A-Za-z0-9_.:+/-]*|\.{1,2}/[A-Za-z0-9_.:+/-]*")  # a file's path is a word too
DEEPEST = 16
CONSTANTS: dict[str, Value] = {"true": True, "false": False, "none": None}


@dataclass(frozen=True)
class Call:
    """A name with knobs. ``str`` gives the shortest text that parses to an equal call."""

    name: str
    knobs: Mapping[str, Value] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.knobs:
            return self.name
        return f"{self.name}({','.join(f'{k}={write_value(v)}' for k, v in self.knobs.items())})"

    def replace(self, **knobs: Value) -> "Call":
        """The same call with some knobs set."""
        return Call(self.name, {**self.knobs, **knobs})


def write_value(value: Value) -> str:
    """The text of a value."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, int | float) else value


def parse_value(text: str) -> Value:
    """Read a value; raises UsageError on anything else."""
    if text in CONSTANTS:
        return CONSTANTS[text]
    for kind in (int, float):
        try:
            if text.strip() == text and "_" not in text and math.isfinite(value := kind(text)):
                return value
        except (ValueError, OverflowError):
            pass
    if WORD.fullmatch(text) and text.lower() not in ("nan", "inf", "infinity"):
        return text
    if "(" in text:
        return str(parse_call(text))
    raise UsageError(
        f"{text!r} is not a value; write a number, true, false, none, a word, a call, or a path of letters, "
        "digits and characters of ._:+/-"
    )


def split_list(text: str) -> list[str]:
    """Split at the commas outside parentheses: "elastic(gamma=0.9,window=8),dkv" has two items."""
    items, depth, item = [], 0, ""
    for char in text:
        depth += (char == "(") - (char == ")")
        if depth < 0:
            raise UsageError(f"{text!r}: a ')' without '('")
        if char == "," and depth == 0:
            items.append(item)
            item = ""
        else:
            item += char
    if depth:
        raise UsageError(f"{text!r}: a '(' is not closed; write name(knob=value,...)")
    return [item.strip() for item in [*items, item]]


def parse_call(text: str) -> Call:
    """Read one call; raises UsageError saying what is wrong and how to write it."""
    text = text.strip()
    if text.count("(") > DEEPEST:
        raise UsageError(f"{text[:60]!r}...: more than {DEEPEST} calls within each other")
    name, bracket, rest = text.partition("(")
    if ")" in name:
        raise UsageError(f"{text!r}: a ')' without '('")
    if not NAME.fullmatch(name.strip()):
        what = f"{name.strip()!r} is not a name, which is lower-case words joined by hyphens"
        what = what if name.strip() else f"{text!r} does not begin with a name"
        raise UsageError(f"{what}; write name or name(knob=value,...)")
    if not bracket:
        return Call(name.strip())
    if not rest.endswith(")"):
        raise UsageError(f"{text!r}: the '(' is not closed; write name(knob=value,...)")
    knobs: dict[str, Value] = {}
    inside = rest[:-1]
    for pair in split_list(inside) if inside.strip() else []:
        knob, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not KNOB.fullmatch(knob):
            raise UsageError(f"{text!r}: {pair.strip()!r} is not knob=value")
        if knob in knobs:
            raise UsageError(f"{text!r}: {knob} is given twice")
        knobs[knob] = parse_value(value)
    return Call(name.strip(), knobs)


def policy_calls(policies: str | Sequence[Call], sets: Sequence[str] = (), sweeps: Sequence[str] = ()) -> list[Call]:
    """The calls that a list of policies, assignments ``policy.knob=value`` and sweeps ``policy.knob=v1,v2`` ask for.

    An assignment changes every listed policy of its name. A sweep replaces each by one call per value, or adds them if
    none is listed; two sweeps of one policy give all combinations.
    """
    calls = [parse_call(text) for text in split_list(policies)] if isinstance(policies, str) else [*policies]
    for text in sets:
        name, knob, value = _assignment(text, "--set")
        if name not in [call.name for call in calls]:
            listed = ",".join(map(str, calls))
            raise UsageError(f"--set {text}: {name!r} is not one of --policies {listed}; add it there")
        calls = [_with(call, knob, value, f"--set {text}") if call.name == name else call for call in calls]
    for text in sweeps:
        name, knob, listed = _assignment(text, "--sweep")
        try:
            values = split_list(listed)
        except UsageError as error:
            raise UsageError(f"--sweep {text}: {error}") from None
        if name not in [call.name for call in calls]:
            calls.append(Call(name))
        calls = [
            each
            for call in calls
            for each in (
                [_with(call, knob, value, f"--sweep {text}") for value in values] if call.name == name else [call]
            )
        ]
    return calls


def _assignment(text: str, flag: str) -> tuple[str, str, str]:
    """Name, knob and value of ``policy.knob=value``."""
    target, _, value = text.partition("=")
    name, _, knob = (part.strip() for part in target.partition("."))
    if not (NAME.fullmatch(name) and KNOB.fullmatch(knob) and value.strip()):
        values = "value" if flag == "--set" else "v1,v2,..."
        raise UsageError(f"{flag} {text}: write {flag} policy.knob={values}, e.g. {flag} elastic.gamma=0.95")
    return name, knob, value.strip()


def _with(call: Call, knob: str, value: str, where: str) -> Call:
    if knob in call.knobs:
        raise UsageError(f"{where}: {call} has its {knob} already; give it once")
    try:
        return call.replace(**{knob: parse_value(value)})
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
