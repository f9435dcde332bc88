"""The tutorial "A policy in ten minutes", followed to the letter: a package of one's own, made, installed and used.

Its files are written and its commands typed in the order of the page, in an environment of their own without a network.
Only what takes long is shortened, and pip is told to do without an index.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import dcache

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "tutorial" / "write-a-policy.md").read_text(encoding="utf-8")
HOME = Path(dcache.__file__).parents[1]  # site-packages, or the checkout where dcache is not installed

BLOCK = re.compile(
    r"(?:<!-- (?P<note>[^>]*) -->\n)?"
    r'```(?P<language>\w+)(?: title="(?P<file>[^"]+)")?\n(?P<text>.*?)\n```',
    re.DOTALL,
)
OFFLINE = {"pip install": "--no-index --no-deps --no-build-isolation -qq", "python -m build": "--no-isolation"}
SHORTER = {
    "dcache verify": "--examples 1",
    "dcache compare": "--limit 1 --gen-length 16 --device cpu",
    "dcache generate": "--gen-length 32 --device cpu",
    "dcache bench": "--repeats 1",
}

# Runs modules as `python -m` does, each in a process of its own, with torch imported once for all of them: a line of
# JSON asks for one, and its exit code answers.
SHELL = """
import json, os, runpy, site, sys
import dcache.cli

def run(module, arguments, folder, out, packages):
    for fd, path in ((0, os.devnull), (1, out), (2, out)):
        os.dup2(os.open(path, os.O_RDWR | os.O_APPEND), fd)
    os.chdir(folder)
    sys.path[0] = folder
    site.addsitedir(packages)  # what was installed since
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)

for line in sys.stdin:
    if not (child := os.fork()):
        code = 1
        try:
            run(**json.loads(line))
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Block:
    """A block of the page: a file to write, or commands to type with the exit code that the page foretells."""

    note: str
    language: str
    file: str
    text: str

    @property
    def code(self) -> int:
        found = re.fullmatch(r"exit code (\d+)", self.note)
        return int(found[1]) if found else 0


@dataclass(frozen=True)
class Said:
    """A command of the page, and what it printed."""

    command: str
    out: str


def blocks() -> Iterator[Block]:
    """Everything that a reader writes or types; what is marked as not run is left out."""
    for found in BLOCK.finditer(PAGE):
        block = Block(*(found[part] or "" for part in ("note", "language", "file", "text")))
        if not block.note.startswith("no-run") and (block.file or block.language == "console"):
            yield block


class Shell:
    """A fresh environment with dcache, and behind it the packages of the one that runs the tests.

    Args:
        place: folder of the environment; an empty one.
    """

    def __init__(self, place: Path):
        venv.create(place, symlinks=True)
        (self.packages,) = place.glob("lib/python*/site-packages")
        self.out = place / "out"
        alone = place / "alone"  # the checkout has folders beside the package that must not be importable
        alone.mkdir()
        (alone / "dcache").symlink_to(HOME / "dcache")
        ours = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        (self.packages / "dependencies.pth").write_text("\n".join([str(alone), *ours]))
        env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV_", "PYTEST_"))}
        self.process = subprocess.Popen(
            [place / "bin" / "python", "-c", SHELL],
            env=env | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"},
            cwd=place,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, words: list[str], folder: Path) -> tuple[int, str]:
        """Exit code of a command, and what it printed."""
        module, *arguments = words[2:] if words[:2] == ["python", "-m"] else words
        self.out.write_text("")
        order = {"module": module, "arguments": arguments, "folder": str(folder), "out": str(self.out)}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order | {"packages": str(self.packages)}) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline()), self.out.read_text()

    def close(self) -> None:
        self.process.communicate()


def follow(page: Iterator[Block], folder: Path, shell: Shell) -> Iterator[Said]:
    """Write and type, block by block; a command that ends otherwise than foretold stops it."""
    for block in page:
        if block.file:
            (folder / block.file).write_text(block.text + "\n")
            continue
        for line in block.text.splitlines():
            command = line.removeprefix("$ ")
            if command.startswith("cd "):
                folder = folder / command.removeprefix("cd ")
                continue
            words = shlex.split(command)
            for start, options in (OFFLINE | SHORTER).items():
                words += shlex.split(options) * command.startswith(start)
            code, out = shell.run(words, folder)
            assert code == block.code, f"{shlex.join(words)}\n{out}"
            yield Said(command, out)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tutorial")


@pytest.fixture(scope="module")
def followed(place: Path) -> list[Said]:
    shell = Shell(place / "environment")
    try:
        return list(follow(blocks(), place, shell))
    finally:
        shell.close()


def outputs(followed: list[Said], start: str) -> list[str]:
    return [said.out for said in followed if said.command.startswith(start)]


def test_the_page_is_read_whole():
    found = list(blocks())
    assert [block.file for block in found if block.file] == [
        "src/dcache_nearby/policy.py",
        "src/dcache_nearby/policy.py",
        "tests/test_conformance.py",
    ]
    assert [block.text for block in found if block.code] == [
        "$ dcache verify 'nearby(reach=0,period=100)' --patience 1 --examples 5"
    ]


@pytest.mark.slow
def test_the_new_package_passes_its_own_tests_at_once(followed: list[Said]):
    (tests,) = outputs(followed, "pytest")
    assert re.search(r"\d+ passed, 2 skipped", tests)
    made = [said.command for said in followed]
    assert made.index("dcache new-policy nearby") < made.index("pip install -e .") < made.index("pytest")


@pytest.mark.slow
def test_the_policy_is_listed_with_its_distribution(followed: list[Said]):
    before, after = outputs(followed, "dcache policies")
    assert "nearby (dcache-nearby 0.1.0): Recompute every row each `period` steps" in before
    assert "nearby (dcache-nearby 0.1.0): Recompute rows within `reach`" in after
    assert "equals no cache with: period=1" in after


@pytest.mark.slow
def test_verify_finds_the_mistake_and_passes_without_it(followed: list[Said]):
    wrong, right = outputs(followed, "dcache verify")
    assert "FAIL  a committed row is computed again with its token" in wrong
    assert "committed in step" in wrong
    assert "FAIL" not in right
    assert "pass  the exact configuration commits what no cache commits" in right
    assert "(dcache-nearby 0.1.0)" in right


@pytest.mark.slow
def test_it_is_compared_and_swept(followed: list[Said]):
    first, second, sweep = outputs(followed, "dcache compare")
    assert all(re.search(rf"^{re.escape(name)} ", first, re.MULTILINE) for name in ("none", "nearby(reach=0)", "dkv"))
    assert re.search(r"^nearby .*^dkv .*^elastic ", second, re.MULTILINE | re.DOTALL)
    assert all(f"nearby(reach={reach})" in sweep for reach in (0, 16))


@pytest.mark.slow
def test_its_speed_is_measured(followed: list[Said]):
    (table,) = outputs(followed, "dcache bench e2e")
    assert re.search(r"\bnearby\b", table)
    assert "efficiency" in table


@pytest.mark.slow
def test_the_wheel_holds_the_finished_policy(followed: list[Said], place: Path):
    wheel = zipfile.ZipFile(place / "dcache-nearby" / "dist" / "dcache_nearby-0.1.0-py3-none-any.whl")
    finished = [block.text for block in blocks() if block.file.endswith("policy.py")][-1]
    assert wheel.read("dcache_nearby/policy.py").decode() == finished + "\n"
    points = wheel.read("dcache_nearby-0.1.0.dist-info/entry_points.txt").decode()
    assert points.split() == ["[dcache]", "nearby", "=", "dcache_nearby"]
