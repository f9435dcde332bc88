"""What mkdocs does not do by itself; named under `hooks` in mkdocs.yml, and as an extension of griffe.

Pages are written for a checkout: they link to files beside docs/, and mkdocs knows nothing outside it. Whatever they
link to there becomes a part of the site: Markdown a page, anything else a file to look at. And the package is laid out
as an install would, since its folders lie beside each other in a checkout (see tools/types.sh).
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs"
LINK = re.compile(r"(?<=\]\()(?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?(?=\))")  # of this repository: no scheme
INTERNAL = "Engine only"  # how the docstring of a method begins that no policy calls

_installed = TemporaryDirectory(prefix="dcache-docs-")


@event_priority(100)  # before mkdocstrings looks
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Let mkdocstrings read a `dcache` with all of its subpackages."""
    package = Path(_installed.name) / "dcache"
    if not package.exists():
        package.mkdir()
        for path in (ROOT / "dcache").iterdir():
            (package / path.name).symlink_to(path)
        for name in ("policies", "models", "kernels"):
            (package / name).symlink_to(ROOT / name)
    config.plugins["mkdocstrings"].config["handlers"]["python"]["paths"] = [_installed.name]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to outside docs/, and what is linked to from there."""
    pages = [Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path]
    while pages:
        page = pages.pop()
        for path in _linked(page):
            if files.get_file_from_path(_place(path)) is None and path.is_file():
                files.append(File(_place(path), str(ROOT), config.site_dir, config.use_directory_urls))
                pages += [path] * (path.suffix == ".md")
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turn links between docs/ and the rest of the repository into links within the site."""
    source, here = Path(str(page.file.abs_src_path)), posixpath.dirname(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        path = _target(source, link["path"])
        if _inside(source) and _inside(path):
            return link[0]
        return posixpath.relpath(_place(path), here or ".") + (link["anchor"] or "")

    return LINK.sub(moved, markdown)


class Authors(griffe.Extension):
    """The reference is for authors: it leaves out what the engine alone calls."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Hide it from the filter `public`, and what Python alone calls."""
        told = "" if func.docstring is None else func.docstring.value
        if told.startswith(INTERNAL) or func.name == "__init_subclass__":
            func.public = False


def _target(page: Path, link: str) -> Path:
    return Path(os.path.normpath(page.parent / link))


def _linked(page: Path) -> set[Path]:
    """Files of the repository that a page outside docs/, or a link out of it, leads to."""
    found = {_target(page, link["path"]) for link in LINK.finditer(page.read_text(encoding="utf-8"))}
    return {path for path in found if not _inside(path) and path.is_relative_to(ROOT)}


def _inside(path: Path) -> bool:
    return path.is_relative_to(ROOT / DOCS)


def _place(path: Path) -> str:
    """Where a file of the repository stands in the site: docs/ is its root, the rest lies beside."""
    return path.relative_to(ROOT / DOCS if _inside(path) else ROOT).as_posix()
