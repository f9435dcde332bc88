"""``dcache new-policy`` on the command line: parse, call, print."""

from pathlib import Path
from typing import Annotated

import typer

from dcache.scaffold.package import new_policy as write
from dcache.text import printable


def new_policy(
    name: Annotated[str, typer.Argument(help="what users will write: lower-case words joined by hyphens")],
    dir_: Annotated[
        Path, typer.Option("--dir", help="folder in which the package's own folder, dcache-NAME, is made")
    ] = Path(),
) -> None:
    """Write a package with a policy that works, its tests and its entry point; change it from there."""
    folder = write(name, dir_)
    print(f"wrote {printable(str(folder))}")
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"  {path.relative_to(folder).as_posix()}")
    print(f"\nnow\n  cd {printable(str(folder))}\n  pip install -e .\n  pytest\n  dcache verify {name}")
