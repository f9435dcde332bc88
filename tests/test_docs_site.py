"""The documentation as a site: it builds without a warning, loads nothing from elsewhere, and has every entry."""

import importlib
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import dcache

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "docs" / "reference" / "contract-api.md"
ENTRIES = re.findall(r"^::: (\S+)$", REFERENCE.read_text(encoding="utf-8"), re.MULTILINE)
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href", "object": "data"}


def thing(path: str) -> object:
    """What a dotted path names: a module, or something in one."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("path", ENTRIES)
def test_an_entry_of_the_reference_names_something_with_a_docstring(path: str):
    assert thing(path).__doc__


def test_the_reference_has_an_entry_for_every_public_name():
    modules = [thing(path) for path in ENTRIES if isinstance(thing(path), type(dcache))]
    entered = [thing(path) for path in ENTRIES] + [value for module in modules for value in vars(module).values()]
    public = {name: getattr(dcache, name) for name in dcache.__all__ if not name.startswith("__")}
    assert [name for name, value in public.items() if not any(value is other for other in entered)] == []


class Page(HTMLParser):
    """What a page of the site has: anchors, links, and addresses that a browser loads by itself."""

    def __init__(self, path: Path):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors.add(given.get("id", ""))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if LOADS.get(tag) in given:
            self.loaded.append(given[LOADS[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package, reason="mkdocs is not installed; it comes with the extra docs")
    place = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--site-dir",
        str(place),
    ]  # --quiet hides warnings, from --strict too
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return place


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    return {path.relative_to(site).as_posix(): Page(path) for path in site.rglob("*.html")}


@pytest.mark.slow
class TestSite:
    def test_has_a_page_for_each_of_docs(self, pages: dict[str, Page]):
        docs = {path.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for path in ROOT.glob("docs/**/*.md")}
        assert docs - pages.keys() == set()

    def test_loads_nothing_from_elsewhere(self, site: Path, pages: dict[str, Page]):
        elsewhere = re.compile(r"^(?:\w+:)?//")
        assert [(name, url) for name, page in pages.items() for url in page.loaded if elsewhere.match(url)] == []
        styles = "\n".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
        assert re.findall(r"(?:url\(|@import)\s*[\"']?(?:\w+:)?//[^)]*", styles) == []

    def test_every_link_within_it_leads_to_a_page_and_an_anchor(self, site: Path, pages: dict[str, Page]):
        broken = []
        for name, page in pages.items():
            for link in page.links:
                path, _, anchor = link.partition("#")
                if re.match(r"\w+:|/", link) or name == "404.html":
                    continue
                target = Path(os.path.normpath(site / Path(name).parent / path)) if path else site / name
                target = target / "index.html" if target.is_dir() else target
                other = pages.get(target.relative_to(site).as_posix())
                if not target.exists() or (anchor and other is not None and anchor not in other.anchors):
                    broken.append(f"{name}: {link}")
        assert broken == []

    def test_links_out_of_docs_lead_to_what_they_name(self, site: Path, pages: dict[str, Page]):
        (link,) = (link for link in pages["policies/d2.html"].links if "benchmarks" in link and "#" in link)
        assert link == "../benchmarks/index.html#what-policies-lose-over-their-knobs"
        assert "../reference/cli.html#dcache-bench" in pages["benchmarks/index.html"].links
        figure = "results/tiny-dream-four-tokens.svg"
        assert figure in pages["benchmarks/index.html"].loaded
        assert (site / "benchmarks" / figure).read_bytes() == (ROOT / "benchmarks" / figure).read_bytes()

    def test_the_reference_is_made_of_the_docstrings(self, pages: dict[str, Page]):
        reference = pages["reference/contract-api.html"]
        assert [path for path in ENTRIES if path not in reference.anchors] == []
        assert {"dcache.policy.CachePolicy.plan", "dcache.engine.layer.Layer.refresh"} <= reference.anchors
        assert "Rows that do not exist and finished sequences are taken out for you." in reference.text

    def test_the_reference_leaves_out_what_only_the_engine_calls(self, pages: dict[str, Page]):
        from dcache.engine.layer import Layer

        reference = pages["reference/contract-api.html"]
        assert (Layer.enter.__doc__ or "").startswith("Engine only")
        assert "dcache.engine.layer.Layer.enter" not in reference.anchors
        assert "Engine only" not in reference.text
