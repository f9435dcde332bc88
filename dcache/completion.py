"""What a shell offers after TAB: commands, options, and the names of what is installed, without loading torch.

The first TAB loads everything, as any command does, and keeps the outline of the command line in the user's cache
folder: commands, options, and names. After that `dcache/__init__.py` has a shell answered from there before it imports
anything else, which takes a tenth of the time. An outline counts as long as no file of dcache changed and the same
plugins are installed. Nothing is looked up on a network.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import blake2b
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from dcache.files import cache_folder, write_whole

if TYPE_CHECKING:
    from typer import Typer

ASKED = "_DCACHE_COMPLETE"  # set by the script that `dcache --install-completion` installs
PROGRAM = "dcache"
SUBPACKAGES = ("policies", "models", "kernels")  # in a checkout they lie beside this folder
NAMES = {
    "policies": ("policies", True),  # parameter of a command: what its values are, and whether it takes a list
    "policy": ("policies", False),
    "unmask": ("unmaskers", False),
    "model": ("models", False),
    "task": ("tasks", False),
    "family": ("families", False),
    "device": ("devices", False),
    "dtype": ("dtypes", False),
}

Outline = dict[str, Any]


def answer() -> None:
    """If a shell asks and an outline is kept, answer and exit; else return."""
    if ASKED not in os.environ or Path(sys.argv[0]).stem != PROGRAM:
        return
    outline = None
    with suppress(OSError, ValueError):
        outline = json.loads(_file().read_bytes())
    if isinstance(outline, dict) and outline.get("stamp") == stamp():
        _reply(outline)


def learn(app: Typer) -> None:
    """If a shell asks, keep the outline of a command line, answer and exit; else return."""
    if ASKED not in os.environ:
        return
    outline = outline_of(app) | {"stamp": stamp()}
    with suppress(OSError):  # then the next one takes as long
        write_whole(_file(), json.dumps(outline).encode())
    _reply(outline)


def _reply(outline: Outline) -> None:
    """Answer as typer answers, whatever the shell, on a command line that has the outline and does nothing."""
    outlined(outline)([], PROGRAM, complete_var=ASKED)


def _file() -> Path:
    """Where the outline of this installation is kept."""
    where = blake2b(f"{sys.prefix} {Path(__file__)}".encode(), digest_size=8).hexdigest()
    return cache_folder() / f"completion-{where}.json"


def stamp() -> str:
    """What an outline depends on: the files of dcache, and the plugins."""
    import dcache

    here = [Path(__file__).parent, *(Path(folder) / name for folder in dcache.__path__ for name in SUBPACKAGES)]
    files = sorted({file for folder in here for file in folder.rglob("*.py")})
    seen: list[object] = [(str(file), (at := file.stat()).st_mtime_ns, at.st_size) for file in files]
    for point in metadata.entry_points(group="dcache"):
        seen.append((point.name, point.value, point.dist and (point.dist.name, point.dist.version)))
    return blake2b(repr(seen).encode(), digest_size=16).hexdigest()


# The outline


def outline_of(app: Typer) -> Outline:
    """Commands, options and names, as plain values."""
    import typer

    return {"names": _names(), "root": _command(typer.main.get_command(app))}


def _command(command: Any) -> Outline:
    own = ("help", "install_completion", "show_completion")  # typer adds them to every command line
    return {
        "help": (command.help or "").partition("\n")[0],
        "parameters": [_parameter(p) for p in command.params if p.name not in own],
        "commands": {name: _command(inner) for name, inner in getattr(command, "commands", {}).items()},
    }


def _parameter(parameter: Any) -> Outline:
    kind, many = NAMES.get(parameter.name, (None, False))
    return {
        "name": parameter.name,
        "flags": parameter.opts if parameter.param_type_name == "option" else [],
        "help": parameter.help or "",
        "flag": bool(getattr(parameter, "is_flag", False)),
        "names": kind or parameter.name,
        "list": many,
    }


def _names() -> dict[str, dict[str, str]]:
    """By kind: every name, with a word about it."""
    from dcache import catalog
    from dcache.config import DecodeSettings
    from dcache.generate import PAIRED
    from dcache.models import tiny
    from dcache.models.loading import DTYPES
    from dcache.plugins import plugins

    families = {name: entry.thing() for name, entry in plugins().models.entries.items()}
    shapes = {f"{shape}:random": "random weights of this shape" for f in families.values() for shape in f.shapes}
    choices = {name: get_args(field.annotation) for name, field in DecodeSettings.model_fields.items()}
    words = {name: dict.fromkeys(given, "") for name, given in choices.items() if all(map(_is_text, given))}
    return words | {
        "policies": {listing.name: listing.summary for listing in catalog.policies()},
        "unmaskers": {listing.name: listing.summary for listing in catalog.unmaskers()}
        | {PAIRED: "the unmasker of each policy's own paper"},
        "models": {name: "comes with dcache" for name in tiny.NAMES} | shapes,
        "tasks": {name: "" for name in plugins().tasks.entries},
        "families": {name: "" for name in families},
        "devices": {"cpu": "", "cuda": ""},
        "dtypes": {name: "" for name in DTYPES},
    }


def _is_text(choice: object) -> bool:
    return isinstance(choice, str)


# A command line of the outline


def outlined(outline: Outline) -> Typer:
    """A command line with the commands and options of an outline, which does nothing."""
    return _app(outline["root"], outline["names"], add_completion=True)


def _app(entry: Outline, names: dict[str, dict[str, str]], **options: Any) -> Typer:
    import typer

    app = typer.Typer(help=entry["help"], **options)
    app.callback(invoke_without_command=True)(_nothing(entry, names))
    for name, inner in entry["commands"].items():
        if inner["commands"]:
            app.add_typer(_app(inner, names), name=name)
        else:
            app.command(name, help=inner["help"])(_nothing(inner, names))
    return app


def _nothing(entry: Outline, names: dict[str, dict[str, str]]) -> Callable[..., None]:
    """A function with the parameters of a command."""
    import typer

    def nothing(**given: object) -> None:
        pass

    parameters = []
    for p in entry["parameters"]:
        help_, complete = p["help"], _completer(names.get(p["names"], {}), p["list"])
        if p["flag"]:
            kind: Any = Annotated[bool, typer.Option(*p["flags"], help=help_)]
        elif p["flags"]:
            kind = Annotated[list[str], typer.Option(*p["flags"], help=help_, autocompletion=complete)]
        else:
            kind = Annotated[str, typer.Argument(help=help_, autocompletion=complete)]
        parameters.append(inspect.Parameter(p["name"], inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))
    nothing.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    nothing.__annotations__ = {p.name: p.annotation for p in parameters}
    return nothing


def _completer(names: dict[str, str], many: bool) -> Callable[[str], list[tuple[str, str]]]:
    def complete(incomplete: str) -> list[tuple[str, str]]:
        return list(_completions(names, many, incomplete))

    return complete


def _completions(names: dict[str, str], many: bool, incomplete: str) -> Iterator[tuple[str, str]]:
    """The names that continue a value; those of a list continue its last item."""
    before, _, item = incomplete.rpartition(",") if many else ("", "", incomplete)
    if "(" in item or before.count("(") > before.count(")"):
        return  # within knobs
    for name, about in names.items():
        if name.startswith(item):
            yield (f"{before},{name}" if before else name), about
