"""What can be written after ``--policies`` and ``--unmask``: names, papers and knobs, read from the classes."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import BaseModel

from dcache.calls import write_value
from dcache.plugins import BUILT_IN, Registry, plugins
from dcache.policy import CachePolicy
from dcache.text import printable
from dcache.unmasking.base import MOST, Unmasker

BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


@dataclass(frozen=True)
class Knob:
    """A knob: its name, its type with bounds as text, its default as text, and what it does."""

    name: str
    type: str
    default: str
    description: str


@dataclass(frozen=True)
class Listing:
    """A policy or an unmasker.

    Attributes:
        name: as written.
        source: the distribution it comes from.
        summary: first line of its documentation.
        paper: where it comes from.
        pairs_with: unmasker of the paper; None for an unmasker, and where there is none.
        exact: knobs that make a policy equal to no cache; None where none are declared.
        knobs: in the order of the class.
    """

    name: str
    source: str
    summary: str
    paper: str
    pairs_with: str | None
    exact: str | None
    knobs: list[Knob]


def knobs_of(config: type[BaseModel]) -> list[Knob]:
    """The knobs of a `Config` class."""
    schema = config.model_json_schema()
    found = []
    for name, field in schema.get("properties", {}).items():
        kinds = [_type(option, schema) for option in field.get("anyOf", [field])]
        default = _text(field["default"]) if "default" in field else "required"
        found.append(Knob(name, " or ".join(kinds), default, field.get("description", "")))
    return found


def _type(field: dict[str, Any], schema: dict[str, Any]) -> str:
    if "$ref" in field:
        field = schema["$defs"][field["$ref"].rpartition("/")[2]]
    if "enum" in field:
        return ", ".join(_text(value) for value in field["enum"])
    if "const" in field:
        return _text(field["const"])
    told = {key: sign for key, sign in BOUNDS.items() if key in field and field[key] < MOST}  # MOST is no limit in use
    bounds = [f"{sign} {field[key]:g}" for key, sign in told.items()]
    kind = {"null": "none", "boolean": "true or false", "string": "word"}.get(field.get("type", ""), field.get("type"))
    return " ".join([str(kind), ", ".join(bounds)]).strip()


def _text(value: object) -> str:
    return write_value(value) if isinstance(value, bool | int | float | str | None) else str(value)


def _listings(registry: Registry[Any]) -> Iterator[Listing]:
    for name, entry in sorted(registry.entries.items()):
        thing: type[CachePolicy] | type[Unmasker] = entry.thing
        summary = (thing.__doc__ or "").strip().partition("\n")[0]
        pairs = getattr(thing, "pairs_with", None)
        exact = getattr(thing, "exact", None)
        yield Listing(name, entry.source, summary, thing.paper, pairs, exact, knobs_of(thing.Config))


def policies() -> list[Listing]:
    """Installed policies by name."""
    return list(_listings(plugins().policies))


def unmaskers() -> list[Listing]:
    """Installed unmaskers by name."""
    return list(_listings(plugins().unmaskers))


def as_data(listings: list[Listing]) -> list[dict[str, Any]]:
    """Listings as plain lists and dictionaries."""
    return [asdict(listing) for listing in listings]


def as_text(listings: list[Listing]) -> str:
    """Listings for reading, wrapped to 100 columns."""
    return printable("\n".join(line for listing in listings for line in _lines(listing)))


def _lines(listing: Listing) -> Iterator[str]:
    source = "" if listing.source == BUILT_IN else f" ({listing.source})"
    yield f"{listing.name}{source}: {listing.summary}"
    if listing.paper:
        yield from textwrap.wrap(f"paper: {listing.paper}", 100, initial_indent=" " * 4, subsequent_indent=" " * 8)
    if listing.pairs_with:
        yield f"    pairs with: {listing.pairs_with}"
    if listing.exact:
        yield f"    equals no cache with: {listing.exact}"
    if not listing.knobs:
        yield "    no knobs"
    for knob in listing.knobs:
        yield f"    {knob.name} = {knob.default}  ({knob.type})"
        yield from textwrap.wrap(knob.description, 100, initial_indent=" " * 8, subsequent_indent=" " * 8)
    yield ""
