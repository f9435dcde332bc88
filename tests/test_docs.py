"""The docs are true: their code runs, their commands parse, and the reference has an entry for everything there is."""

import re
import shlex
import sys
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

import dcache
from dcache import hookspecs
from dcache.plugins import BUILT_IN, Registry, plugins

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "docs" / "reference"
POLICIES = ROOT / "docs" / "policies"
HEADINGS = ("Idea", "Knobs", "Departures", "Exact configuration", "Cost", "Pairs with")  # of each policy's page
PAGES = [Path("README.md"), *sorted(path.relative_to(ROOT) for path in (ROOT / "docs").rglob("*.md"))]

FENCE = re.compile(r"^\s*(`{3,}|~{3,})\s*(\w*)")
NO_RUN = re.compile(r"<!--\s*no-run\b:?\s*(.*?)\s*-->")

each_page = pytest.mark.parametrize("page", PAGES, ids=str)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line (from 1) of its first line, and why it is not run, if so."""

    language: str
    text: str
    line: int
    no_run: str | None


def blocks(markdown: str) -> Iterator[Block]:
    """The fenced blocks of a page. ``<!-- no-run: reason -->`` in the line before one keeps it from running."""
    lines = markdown.splitlines()
    at = 0
    while at < len(lines):
        if fence := FENCE.match(lines[at]):
            end = next(n for n in range(at + 1, len(lines)) if lines[n].strip().startswith(fence[1]))
            before = next((line for line in reversed(lines[:at]) if line.strip()), "")
            skipped = NO_RUN.search(before)
            text = textwrap.dedent("\n".join(lines[at + 1 : end]))
            yield Block(fence[2], text, at + 2, skipped[1] if skipped else None)
            at = end
        at += 1


def commands(block: Block) -> Iterator[list[str]]:
    """The arguments of each ``dcache`` command in a block of shell lines, up to a pipe or a redirection."""
    prompt = "$ " if block.language == "console" else ""
    for line in block.text.replace("\\\n", " ").splitlines():
        if line.startswith(prompt):
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and re.match(r"\w+=", words[0]):  # CUDA_VISIBLE_DEVICES=0 dcache ...
                words = words[1:]
            if words and words[0] == "dcache":
                end = next((n for n, word in enumerate(words) if re.match(r"[|;&]|\d?>", word)), len(words))
                yield words[1:end]


def code(markdown: str) -> str:
    """What stands as code in a page: spans and blocks."""
    fenced = [block.text for block in blocks(markdown)]
    return "\n".join(re.findall(r"`([^`\n]+)`", markdown) + fenced)


def says(text: str, word: str) -> bool:
    return re.search(rf"(?<![\w.-]){re.escape(word)}(?![\w-]|\.\d)", text) is not None


def section(markdown: str, word: str) -> str:
    """The text under the first heading that has `word` in it, up to the next one of its level or above."""
    inside = {n for block in blocks(markdown) for n in range(block.line, block.line + block.text.count("\n") + 1)}
    lines = markdown.splitlines()
    headings = [
        (n, len(found[1])) for n, line in enumerate(lines) if n + 1 not in inside and (found := re.match("(#+) ", line))
    ]
    for n, level in headings:
        if says(lines[n].replace("`", " "), word):
            end = next((m for m, other in headings if m > n and other <= level), len(lines))
            return "\n".join(lines[n + 1 : end])
    return ""


def built_in(registry: Registry) -> dict[str, type]:
    return {name: entry.thing for name, entry in registry.entries.items() if entry.source == BUILT_IN}


def command_line():
    from dcache import cli

    return typer.main.get_command(cli.app)


def test_blocks_commands_and_sections_are_found():
    page = textwrap.dedent(
        """\
        # Page
        ## `one` thing
        <!-- no-run: slow -->
        ```python
        # not a heading
        x = 1
        ```
        ### more
        ```console
        $ A=1 dcache compare --policies 'a, b' \\
            --limit 2 | less  # comment
        output
        ```
        ## `two`
        """
    )
    python, console = blocks(page)
    assert (python.language, python.line, python.no_run) == ("python", 5, "slow")
    assert (console.line, console.no_run) == (10, None)
    assert list(commands(console)) == [["compare", "--policies", "a, b", "--limit", "2"]]
    one = section(page, "one")
    assert "x = 1" in one
    assert "less" in one
    assert "two" not in one
    assert section(page, "three") == ""


@each_page
def test_every_python_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = [block for block in blocks((ROOT / page).read_text()) if block.language in ("python", "py", "python3")]
    module = types.ModuleType("docs_page")  # a module, because classes defined in a block look theirs up
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    for block in found:
        if block.no_run is None:
            source = "\n" * (block.line - 1) + block.text  # a traceback shows the line in the page
            exec(compile(source, str(page), "exec"), module.__dict__)


@each_page
def test_at_most_two_blocks_do_not_run_each_for_a_reason(page: Path):
    reasons = NO_RUN.findall((ROOT / page).read_text())
    assert len(reasons) <= 2
    assert all(len(reason.split()) >= 2 for reason in reasons), f"no-run without a reason: {reasons}"


@each_page
def test_every_command_parses(page: Path):
    app = command_line()
    wrong = []
    for block in blocks((ROOT / page).read_text()):
        for words in commands(block) if block.language in ("console", "sh", "bash", "shell") else ():
            name, *rest = [word for word in words if word != "--help"] or [""]
            try:
                if name and not name.startswith("-"):
                    app.commands[name].make_context(name, rest, resilient_parsing="--help" in words)
            except Exception as error:
                wrong.append(f"{page}:{block.line}: dcache {shlex.join(words)}: {error!r}")
    assert wrong == []


def test_every_link_to_a_file_leads_somewhere():
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
            path = target.partition("#")[0]
            if path and "://" not in target and not (ROOT / page).parent.joinpath(path).exists():
                broken.append(f"{page}: {target}")
    assert broken == []


def undocumented_knobs(thing: type, text: str) -> list[str]:
    """Knobs that no line of `text` explains with their default."""
    missing = []
    for knob, field in thing.Config.model_fields.items():
        lines = [line for line in text.splitlines() if says(code(line), knob)]
        default = str(field.default).lower()
        if not lines:
            missing.append(f"knob `{knob}`")
        elif not field.is_required() and not any(says(line.lower(), default) for line in lines):
            missing.append(f"the default of `{knob}`, {default}, in the line that explains it")
    return missing


def test_the_reference_has_a_section_for_each_unmasker_with_every_knob_and_its_default():
    page = (REFERENCE / "unmaskers.md").read_text()
    missing = []
    for name, thing in built_in(plugins().unmaskers).items():
        text = section(page, name)
        wanted = undocumented_knobs(thing, text) if text else [f"a heading with `{name}`, and a section under it"]
        missing += [f"{name}: {what}" for what in wanted]
    assert missing == []


@pytest.mark.parametrize("name", built_in(plugins().policies))
def test_each_policy_has_a_page_with_the_headings_every_knob_and_its_default(name: str):
    path = POLICIES / f"{name}.md"
    assert path.exists(), f"policy {name!r} has no page; write {path.relative_to(ROOT)} after the pattern of dkv.md"
    page = path.read_text()
    assert re.match(rf"# `{name}`: \S", page), f"the page begins with '# `{name}`: the name of the method'"
    assert [heading for heading in HEADINGS if not re.search(rf"^## {heading}$", page, re.MULTILINE)] == []
    assert f"](img/{name}.svg)" in page, f"the page shows its drawing; python tools/draw_rows.py {name} makes it"
    assert undocumented_knobs(built_in(plugins().policies)[name], section(page, "Knobs")) == []
    assert f"](../policies/{name}.md)" in (REFERENCE / "policies.md").read_text(), "the index has a line with its link"


def test_the_reference_names_every_task_and_model_family():
    text = code("\n".join(path.read_text() for path in sorted(REFERENCE.iterdir())))
    assert [name for name in built_in(plugins().tasks) | built_in(plugins().models) if not says(text, name)] == []


def test_the_reference_names_every_public_name():
    text = code("\n".join(path.read_text() for path in sorted(REFERENCE.iterdir())))
    public = [name for name in dcache.__all__ if not name.startswith("__")]
    assert [name for name in public if not says(text.replace("dcache.", ""), name)] == []


def test_the_reference_names_every_hook():
    text = code((REFERENCE / "hooks.md").read_text())
    hooks = [name for name, hook in vars(hookspecs).items() if hasattr(hook, "dcache_spec")]
    assert "register_policies" in hooks
    assert [name for name in hooks if not says(text, name)] == []


def test_the_reference_has_a_section_for_each_command_with_every_option():
    page = (REFERENCE / "cli.md").read_text()
    app = command_line()
    assert "compare" in app.commands
    missing = []
    for name, command in app.commands.items():
        if not section(page, name):
            missing.append(f"a heading with `{name}`, and a section under it")
        options = [flag for parameter in command.params for flag in parameter.opts if flag.startswith("--")]
        missing += [f"{name}: {flag}" for flag in options if not says(code(section(page, name)), flag)]
    assert missing == []
