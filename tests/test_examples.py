"""A package of its own adds a policy: built, installed and used as a third party would, without touching dcache."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dcache

ROOT = Path(__file__).resolve().parents[1]
HOME = Path(dcache.__file__).parents[1]  # site-packages, or the checkout where dcache is not installed


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, installed into a folder without network; built from a copy, since a build leaves files behind."""
    place = tmp_path_factory.mktemp("periodic")
    shutil.copytree(
        ROOT / "examples" / "periodic", place / "source", ignore=shutil.ignore_patterns("*.egg-info", "build")
    )
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--no-index"]
    run([*pip, "--no-build-isolation", "--target", str(place / "installed"), str(place / "source")], {}, place)
    return place


def run(command: list[str], env: dict[str, str], cwd: Path, code: int = 0) -> str:
    done = subprocess.run(command, env=os.environ | env, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def said(target: Path, *arguments: str, code: int = 0) -> str:
    path = os.pathsep.join([str(target / "installed"), str(HOME)])
    return run(
        [sys.executable, "-P", *arguments], {"PYTHONPATH": path, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}, target, code
    )


def test_it_is_listed_with_its_distribution(target: Path) -> None:
    listing = said(target, "-m", "dcache", "policies")
    assert "periodic (dcache-periodic 0.1): Delayed caching of decoded rows" in listing
    assert "equals no cache with: period=1" in listing


def test_it_is_compared(target: Path) -> None:
    small = ["--limit", "1", "--gen-length", "16", "--device", "cpu", "--format", "json"]
    data = said(target, "-m", "dcache", "compare", "--policies", "periodic(period=4)", *small)
    assert "periodic(period=4)" in data


def test_it_is_verified(target: Path) -> None:
    options = ["--examples", "1", "--model", "tiny-llada", "--format", "json"]
    data = json.loads(said(target, "-m", "dcache", "verify", "periodic(period=4)", *options))
    assert (data["policy"], data["source"], data["holds"]) == ("periodic(period=4)", "dcache-periodic 0.1", True)
    status = {verdict["claim"]: verdict["status"] for verdict in data["verdicts"]}
    assert status["the_exact_configuration_commits_what_no_cache_commits"] == "pass"
    assert status["every_unmasker_works_or_is_refused_with_a_reason"] == "pass"
    assert status["model:exact"] == status["model:agreement"] == "pass"


def test_its_own_tests_pass(target: Path) -> None:
    out = said(target, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(target / "source"))
    assert " passed, 2 skipped" in out


def test_a_second_policy_of_its_name_is_refused(target: Path) -> None:
    shadow = target / "other"
    shutil.copytree(target / "installed", shadow, ignore=shutil.ignore_patterns("*.dist-info"))
    info = shadow / "other-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[dcache]\nother = other_module\n")
    (shadow / "other_module.py").write_text((shadow / "dcache_periodic.py").read_text())
    path = os.pathsep.join([str(target / "installed"), str(shadow), str(HOME)])
    command = [sys.executable, "-P", "-m", "dcache", "policies"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, cwd=target, capture_output=True, text=True)
    assert done.returncode == 1
    assert "'periodic' is registered by" in done.stderr
