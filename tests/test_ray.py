"""Comparisons on a local Ray cluster: the tokens of one process, with workers that die and policies that fail."""

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import dcache
from dcache import Comparison, PolicyError, UsageError, WorkerError, compare
from dcache.policies.vlcache import VLCache
from dcache.results import FILE

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
FOLDER = Path(__file__).resolve().parent / "golden" / "models" / "llada_mha"
SETTINGS = {"task": "gsm-mini", "limit": 3, "gen_length": 16, "block_length": 8}
MARK = "DCACHE_TEST_OF_RAY"

MODULE = '''
    import os
    import signal
    from pathlib import Path

    import numpy as np
    from dcache import CachePolicy, Plan, PolicyConfig


    class Deadly(CachePolicy):
        """Kills its process in the middle of a text, as often as there are files in a folder; removes one each time."""

        class Config(PolicyConfig):
            folder: str

        def plan(self, state):
            lives = sorted(Path(self.config.folder).iterdir())
            if lives and state.step[0] == 5 and state.gen_length[0] == 16:  # not in the warm-up, which is shorter
                lives[0].unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            return Plan.all(state)


    class Misshapen(CachePolicy):
        def plan(self, state):
            return Plan(np.ones(3, dtype=bool))
'''


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A cluster on this machine whose workers have as many threads as the tests, and can import a user's module."""
    from dcache.ray_launcher import Cluster

    folder = tmp_path_factory.mktemp("modules")
    (folder / "policies_of_a_user.py").write_text(textwrap.dedent(MODULE))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr("dcache.ray_launcher.PATIENCE_S", 600.0)  # a busy machine is no news
        patch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
        patch.setenv("RAY_worker_niceness", "0")  # Ray's 15 starves them beside the other tests
        cluster = Cluster(None)
        yield cluster
        cluster.close()


@pytest.fixture(scope="module")
def model():
    return dcache.load_model(FOLDER, device="cpu")


def content(comparison):
    """All of the results but times, in an order that does not depend on which worker was first."""
    timed = {"seconds", "step_ms"}
    return sorted((r.model_dump(exclude=timed) for r in comparison.results), key=lambda r: (r["problem"], r["policy"]))


def deadly(folder, lives):
    from policies_of_a_user import Deadly

    folder.mkdir()
    for n in range(lives):
        (folder / str(n)).touch()
    return Deadly(folder=str(folder))


def test_two_workers_give_the_results_and_conditions_of_this_process(cluster, model, tmp_path):
    expected = compare(model, ["elastic", "dkv"], **SETTINGS)
    found = compare(model, ["elastic", "dkv"], launcher="ray", workers=2, out=tmp_path, **SETTINGS)
    assert content(found) == content(expected)
    assert found.conditions.difference(expected.conditions) is None
    assert (found.conditions.workers, expected.conditions.workers) == (2, 1)
    assert Comparison.load(tmp_path).results == found.results
    assert compare(model, ["elastic", "dkv"], out=tmp_path, **SETTINGS).results == found.results  # nothing runs again


def test_a_killed_worker_loses_nothing_and_what_was_there_is_kept(cluster, model, tmp_path):
    policy = deadly(tmp_path / "lives", lives=0)
    expected = compare(model, [policy], out=tmp_path / "run", **SETTINGS)
    lines = (tmp_path / "run" / FILE).read_bytes().splitlines(keepends=True)
    (tmp_path / "run" / FILE).write_bytes(b"".join(lines[:2]))
    (tmp_path / "lives" / "0").touch()
    with pytest.warns(RuntimeWarning, match=r"worker \d .* was lost while decoding batch \d under 'Deadly.*again"):
        found = compare(FOLDER, [policy], out=tmp_path / "run", launcher="ray", workers=2, **SETTINGS)
    assert not list((tmp_path / "lives").iterdir())
    assert content(found) == content(expected)
    assert found.results[0] == expected.results[0]
    assert Comparison.load(tmp_path / "run").results == found.results


def test_a_batch_that_kills_every_worker_ends_the_comparison(cluster, monkeypatch, tmp_path):
    monkeypatch.setattr("dcache.ray_launcher.MOST_LOSSES", 2)
    policy = deadly(tmp_path / "lives", lives=9)
    said = r"2 workers were lost while decoding batch 0 under 'Deadly.*its worker process has died"
    with pytest.warns(RuntimeWarning, match="was lost"), pytest.raises(WorkerError, match=said):
        compare(FOLDER, [policy], launcher="ray", workers=1, out=tmp_path / "run", **SETTINGS | {"limit": 1})
    assert [r.policy for r in Comparison.load(tmp_path / "run").results] == ["none"]


def test_a_policy_that_breaks_the_contract_fails_as_in_this_process(cluster, model):
    from policies_of_a_user import Misshapen

    with pytest.raises(PolicyError) as here:
        compare(model, [Misshapen()], **SETTINGS)
    with pytest.raises(PolicyError) as there:
        compare(model, [Misshapen()], launcher="ray", workers=1, **SETTINGS)
    assert str(there.value) == str(here.value)
    assert type(there.value) is PolicyError


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"policies": [VLCache("dkv")]}, "cannot be sent to a worker: .*pickle"),
        ({"workers": 999}, r"workers=999 on cpu: each needs one of its own, and the cluster has \d+ GPUs and \d+ CPUs"),
        ({"ray_address": "auto"}, "connected to Ray already"),
    ],
)
def test_what_the_cluster_cannot_do_is_refused(cluster, model, arguments, said):
    with pytest.raises(UsageError, match=said):
        compare(model, **{"policies": [], "launcher": "ray"} | arguments, **SETTINGS)


def alive(mark):
    """Processes that have the mark in their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or is not ours
            found += [int(entry.parent.name)] * (f"{MARK}={mark}".encode() in entry.read_bytes().split(b"\0"))
    return found


def until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_ctrl_c_ends_the_workers_and_another_launcher_continues(cluster, model, tmp_path):
    address, file = cluster.ray.get_runtime_context().gcs_address, tmp_path / FILE
    command = f"{sys.executable} -m dcache compare --model {FOLDER} --device cpu --policies dkv --limit 2 --repeats 99"
    command += f" --gen-length 16 --block-length 8 --out {tmp_path} --launcher ray --ray-address {address} --workers 1"
    environment = os.environ | {"PYTHONPATH": str(Path(dcache.__file__).parents[1]), MARK: str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # what a shell starts in the background ignores the signal, and its children do: this test must not, run there
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command.split(), env=environment, cwd=tmp_path, preexec_fn=heeds, **pipes) as process:
        try:
            until(lambda: process.poll() is not None or (file.exists() and file.read_bytes().count(b"\n") > 4), 120)
            working = alive(tmp_path)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, err
    assert len(working) > 1, "a worker has the variables of dcache"
    assert until(lambda: not alive(tmp_path), 30)
    assert re.search(r"^dkv .*%", out, re.MULTILINE)
    assert f"interrupted. To continue, repeat the command with --out {tmp_path}\n" in err
    left = {r.key: r for r in Comparison.load(tmp_path).results}
    found = compare(model, ["dkv"], out=tmp_path, **SETTINGS | {"limit": 2})
    assert len(left) >= 4
    assert [r for r in found.results if r.key in left] == [left[r.key] for r in found.results if r.key in left]
    assert content(found) == content(compare(model, ["dkv"], **SETTINGS | {"limit": 2}))
