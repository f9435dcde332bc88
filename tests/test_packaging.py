"""What is built and installed: one package `dcache`, complete, whichever way it is built.

The tests are functions, because classes would be spread over the workers of a run, and each worker would build again.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = SETTINGS["tool"]["setuptools"]["package-dir"]  # package to folder: "dcache.policies" to "policies"
NOT_SOURCE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "site", "types")


def run(*command: str | Path, cwd: Path) -> str:
    """Run outside the checkout's reach; a failure shows what the command printed."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV_"))}
    done = subprocess.run(command, cwd=cwd, env=env | {"COLUMNS": "200"}, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Built:
    """Distributions, and the copy of the checkout they were built from."""

    source: Path
    sdist: Path
    wheel: Path
    wheel_of_sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Built from a copy, since a build leaves folders behind that the next build would pick up."""
    place = tmp_path_factory.mktemp("build")
    shutil.copytree(ROOT, place / "source", ignore=NOT_SOURCE)
    build = [sys.executable, "-m", "build", "--no-isolation"]
    run(*build, "--outdir", "by-way-of-sdist", "source", cwd=place)  # the sdist, and from it a wheel
    run(*build, "--wheel", "--outdir", "direct", "source", cwd=place)
    (sdist,) = (place / "by-way-of-sdist").glob("*.tar.gz")
    (wheel_of_sdist,) = (place / "by-way-of-sdist").glob("*.whl")
    (wheel,) = (place / "direct").glob("*.whl")
    return Built(place / "source", sdist, wheel, wheel_of_sdist)


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel in it, and behind it the dependencies of the one that runs the tests."""
    home = tmp_path_factory.mktemp("installed")
    venv.create(home, symlinks=os.name != "nt")
    python = home / "bin" / "python"
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "-qq", "--no-deps", "--no-index", built.wheel),
        cwd=home,
    )
    (site_packages,) = home.glob("lib/python*/site-packages")
    ours = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site_packages / "dependencies.pth").write_text("\n".join(ours))  # adds the folders; their .pth files are not read
    return home


def files_in(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}


def files_of(root: Path) -> set[str]:
    """Every file of the four folders of a checkout, under the name it is installed as."""
    return {
        f"{package.replace('.', '/')}/{path.relative_to(root / folder).as_posix()}"
        for package, folder in FOLDERS.items()
        for path in (root / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }


def test_the_package_list_names_every_folder_that_is_a_package():
    folders = {file.rpartition("/")[0].replace("/", ".") for file in files_of(ROOT) if "__init__.py" in file}
    listed = SETTINGS["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(folders)


def test_the_version_is_the_same_in_the_settings_and_in_the_package():
    import dcache

    assert dcache.__version__ == SETTINGS["project"]["version"]


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_checkout_and_none_besides(built: Built):
    package = {name for name in files_in(built.wheel) if ".dist-info/" not in name}
    assert package == files_of(built.source)
    assert "dcache/py.typed" in package


@pytest.mark.slow
def test_the_wheel_has_nothing_beside_the_package_at_top_level(built: Built):
    top = {name.split("/")[0] for name in files_in(built.wheel)}
    assert top == {"dcache", f"dcache-{SETTINGS['project']['version']}.dist-info"}


@pytest.mark.slow
def test_the_wheel_has_the_tiny_checkpoints(built: Built):
    from dcache.models.tiny import NAMES

    names = files_in(built.wheel)
    for checkpoint in NAMES:
        files = {name.rpartition("/")[2] for name in names if name.startswith(f"dcache/models/tiny/{checkpoint}/")}
        assert {"config.json", "model.safetensors"} <= files
        assert "tokenizer.json" in files or {"vocab.json", "merges.txt"} <= files


@pytest.mark.slow
def test_the_wheel_has_the_licence(built: Built):
    (licence,) = (name for name in files_in(built.wheel) if name.endswith("/licenses/LICENSE"))
    assert zipfile.ZipFile(built.wheel).read(licence) == (ROOT / "LICENSE").read_bytes()


@pytest.mark.slow
def test_the_wheel_is_the_same_by_way_of_the_sdist(built: Built):
    assert files_in(built.wheel_of_sdist) == files_in(built.wheel)


@pytest.mark.slow
def test_the_sdist_has_the_tests_and_their_recorded_runs(built: Built):
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tests = (path for path in (built.source / "tests").rglob("*") if path.is_file())
    assert {path.relative_to(built.source).as_posix() for path in tests} - names == set()
    assert {"Makefile", "CHANGELOG.md", "LICENSE", "tools/types.sh"} <= names


@pytest.mark.slow
def test_the_installed_package_imports_from_the_environment_and_not_from_the_checkout(installed: Path, tmp_path: Path):
    names = "dcache, dcache.policies, dcache.models, dcache.kernels"
    code = f"import {names}; print(*(module.__file__ for module in ({names})), sep='\\n')"
    files = run(installed / "bin" / "python", "-c", code, cwd=tmp_path).split()
    assert len(files) == 4
    assert all(Path(file).resolve().is_relative_to(installed.resolve()) for file in files), files


@pytest.mark.slow
def test_the_installed_command_lists_the_policies(installed: Path, tmp_path: Path):
    shown = run(installed / "bin" / "dcache", "policies", cwd=tmp_path)
    assert {"none", "elastic", "dkv"} <= set(re.findall(r"[\w-]+", shown))


@pytest.mark.slow
def test_the_installed_command_writes_a_package_from_its_templates(installed: Path, tmp_path: Path):
    run(installed / "bin" / "dcache", "new-policy", "lru", cwd=tmp_path)
    assert 'lru = "dcache_lru"' in (tmp_path / "dcache-lru" / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_installed_package_works_where_a_checkout_shadows_it(installed: Path):
    run(installed / "bin" / "python", "-c", "import dcache.policies, dcache.models, dcache.kernels", cwd=ROOT)
