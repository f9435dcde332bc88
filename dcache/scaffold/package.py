"""The package that ``dcache new-policy`` writes: which name it may have, what is in it, and how it gets to the disk."""

from __future__ import annotations

import builtins
import keyword
import re
import shutil
import tempfile
from pathlib import Path

import dcache
from dcache.calls import NAME
from dcache.errors import UsageError
from dcache.plugins import plugins
from dcache.text import printable

FILES = {  # path in the package: its template
    "pyproject.toml": "pyproject.toml.jinja",
    "README.md": "README.md.jinja",
    ".gitignore": "gitignore.jinja",
    "src/{module}/__init__.py": "init.py.jinja",
    "src/{module}/policy.py": "policy.py.jinja",
    "tests/test_conformance.py": "test_conformance.py.jinja",
}


def new_policy(name: str, folder: Path = Path()) -> Path:
    """Write a package that adds a policy, complete or not at all.

    Args:
        name: of the policy, as users will write it.
        folder: where the package's own folder, ``dcache-NAME``, is made; it must exist.

    Returns:
        The package's folder.

    Raises:
        UsageError: the name cannot be used or is taken, the package's folder exists, or it cannot be written.
    """
    check_name(name)
    target = folder / distribution(name)
    if target.is_symlink() or target.exists():
        raise UsageError(
            f"{str(target)!r} exists already, and nothing was written; "
            "choose another name, or another folder with --dir"
        )
    if not folder.is_dir():
        raise UsageError(f"there is no folder {str(folder)!r}; make it first, or leave --dir out")
    try:
        _write(files(name), target)
    except OSError as error:
        raise UsageError(
            f"{str(target)!r} cannot be written: {error.strerror or error}; nothing was left there"
        ) from None
    return target


def check_name(name: str) -> None:
    """Refuse a name that cannot be registered, or is."""
    if not NAME.fullmatch(name):
        near = re.sub(r"[^a-z0-9]+", "-", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()).strip("-")
        hint = f"; {near!r} would do" if NAME.fullmatch(near) else ""
        raise UsageError(f"policy name {printable(name)!r} is not lower-case words joined by hyphens{hint}")
    taken = plugins().policies.entries
    if name in taken:
        raise UsageError(f"there is a policy {name!r} already, from {taken[name].source}; choose another name")


def distribution(name: str) -> str:
    """What the package is installed as."""
    return f"dcache-{name}"


def class_name(name: str) -> str:
    """The policy's class: the name in capitals, unless that means something else in Python or in the module."""
    camel = "".join(word.capitalize() for word in name.split("-"))
    taken = {*dir(builtins), *keyword.kwlist, *dcache.__all__, "Config", "Field"}
    return f"{camel}Policy" if camel in taken else camel


def files(name: str) -> dict[str, str]:
    """Path in the package and text of every file of the package of a policy."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = Environment(
        loader=PackageLoader(__package__, "templates"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # Python and TOML, of a checked name
    )
    facts = {
        "name": name,
        "distribution": distribution(name),
        "module": distribution(name).replace("-", "_"),
        "class_name": class_name(name),
        "version": dcache.__version__,
    }
    return {path.format(**facts): templates.get_template(file).render(facts) for path, file in FILES.items()}


def _write(contents: dict[str, str], target: Path) -> None:
    """Write the files beside their place and move them there together, so that nothing half-written stands there."""
    aside = Path(tempfile.mkdtemp(prefix=".new-policy-", dir=target.parent))
    try:
        for path, text in contents.items():
            file = aside / target.name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8", newline="\n")
        (aside / target.name).rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
