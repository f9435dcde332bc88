"""``dcache new-policy``: what it writes, under which names, and that it writes all of it or nothing."""

import ast
import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import dcache
from dcache import UsageError
from dcache.cli import main
from dcache.plugins import Plugins, plugins
from dcache.scaffold.package import check_name, class_name, files, new_policy
from dcache.testing.models import random_model

ROOT = Path(__file__).resolve().parents[1]
HOME = Path(dcache.__file__).parents[1]


def contents(folder: Path) -> dict[str, str]:
    """Path and text of every file."""
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in folder.rglob("*")
        if path.is_file() and not {"__pycache__", ".hypothesis"} & {*path.parts} and ".egg-info" not in str(path)
    }


def test_the_example_is_what_it_writes(tmp_path):
    """After a change of the templates, write the example anew: `dcache new-policy periodic`."""
    assert contents(new_policy("periodic", tmp_path)) == contents(ROOT / "examples" / "periodic")


def test_it_says_what_it_wrote_and_what_to_do_next(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["new-policy", "my-cache"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for path in contents(tmp_path / "dcache-my-cache"):
        assert f"  {path}\n" in out
    assert out.endswith("  cd dcache-my-cache\n  pip install -e .\n  pytest\n  dcache verify my-cache\n")


@pytest.mark.parametrize(
    "name", ["lru", "my-cache", "d2-again", "plan", "cache-policy", "field", "true", "class", "exit"]
)
def test_every_name_gives_a_package_that_decodes(name, tmp_path, monkeypatch):
    folder = new_policy(name, tmp_path)
    for path, text in contents(folder).items():
        if path.endswith(".py"):
            ast.parse(text)
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    ((registered, module),) = project["entry-points"]["dcache"].items()
    assert (registered, project["name"]) == (name, f"dcache-{name}")
    monkeypatch.syspath_prepend(folder / "src")
    found = Plugins(extra=[importlib.import_module(module)], entry_points=False).policies.get(name).thing
    transformer = random_model(0)
    model = dcache.Model("random", transformer.spec, transformer)
    settings = {"gen_length": 8, "block_length": 4}
    exact, none = (dcache.generate(model, [[3, 1, 4]], policy=p, **settings) for p in (found(period=1), "none"))
    assert exact[0].trace.commits == none[0].trace.commits
    assert dcache.generate(model, [[3, 1, 4]], policy=found(period=4), **settings)[0].trace.row_share < 1


def test_a_class_is_called_after_its_policy_unless_that_means_something_else():
    assert class_name("my-cache") == "MyCache"
    assert class_name("d2-again") == "D2Again"
    assert class_name("plan") == "PlanPolicy"
    assert class_name("true") == "TruePolicy"
    assert class_name("exception-group") == "ExceptionGroupPolicy"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("My Cache", "'My Cache' is not lower-case words joined by hyphens; 'my-cache' would do"),
        ("MyCache", "'my-cache' would do"),
        ("my_cache", "'my-cache' would do"),
        ("../evil", "'evil' would do"),
        ("3d", "'3d' is not lower-case words joined by hyphens"),
        ("", "'' is not lower-case words"),
        ("a\nb", r"'a\nb' is not lower-case words"),
        ("elastic", "there is a policy 'elastic' already, from dcache; choose another name"),
        ("none", "there is a policy 'none' already"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused_and_nothing_is_written(name, said, tmp_path):
    with pytest.raises(UsageError) as caught:
        new_policy(name, tmp_path)
    assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_a_plugin_has_is_refused_naming_it(monkeypatch):
    mine = plugins().policies.entries["none"].__class__("mine", object, "my-package 0.1")
    monkeypatch.setitem(plugins().policies.entries, "mine", mine)
    with pytest.raises(UsageError, match=r"'mine' already, from my-package 0\.1"):
        check_name("mine")


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_what_exists_is_left_alone(kind, tmp_path):
    target = tmp_path / "dcache-lru"
    {"folder": target.mkdir, "file": target.touch, "dangling link": lambda: target.symlink_to("nowhere")}[kind]()
    with pytest.raises(UsageError, match="exists already, and nothing was written"):
        new_policy("lru", tmp_path)
    assert list(tmp_path.iterdir()) == [target]
    assert not target.is_dir() or list(target.iterdir()) == []


def test_a_folder_that_is_not_there_is_not_made(tmp_path, capsys):
    assert main(["new-policy", "lru", "--dir", str(tmp_path / "no")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    n_files, write = len(files("lru")), Path.write_text
    written = []

    def full(path, *args, **more):
        written.append(path)
        if len(written) == n_files:
            raise OSError(28, "No space left on device")
        return write(path, *args, **more)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UsageError, match="cannot be written: No space left on device; nothing was left there"):
        new_policy("lru", tmp_path)
    assert len(written) == n_files
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_as_readable_as_any(tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    assert new_policy("lru", tmp_path).stat().st_mode == plain.stat().st_mode


def test_a_second_package_with_a_policy_of_that_name_is_refused(tmp_path):
    """As two installers leave them."""
    for n, module in enumerate(("dcache_lru", "other")):
        place = tmp_path / module
        for path, text in files("lru").items():
            if path.startswith("src/"):
                file = place / module / Path(path).name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
        info = place / f"package_{n}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: package-{n}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[dcache]\n{module} = {module}\n")
    path = os.pathsep.join([str(tmp_path / "dcache_lru"), str(tmp_path / "other"), str(HOME)])
    command = [sys.executable, "-P", "-m", "dcache", "policies"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "'lru' is registered by package-" in done.stderr
