"""Where a comparison runs, as far as one process can tell: who decodes what, and what cannot leave the process."""

import importlib.util
import sys
from itertools import chain, product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dcache
from dcache import CachePolicy, Plan, UsageError, compare
from dcache.compare import Experiment, Run, launch_settings
from dcache.launch import Schedule, Unit, refuse_what_cannot_be_spread
from dcache.plugins import load, make_policy
from dcache.policies.vlcache import VLCache
from dcache.ray_launcher import Places
from dcache.tasks.base import Task
from dcache.testing.models import random_model
from dcache.worker import Found

FOLDER = Path(__file__).resolve().parent / "golden" / "models" / "llada_mha"
POLICIES = ("none", "elastic", "dkv")


def units(n_batches, policies=POLICIES):
    return [Unit(0, batch, policy, (batch,)) for batch, policy in product(range(n_batches), policies)]


def by_turns(schedule, workers):
    """What each worker gets when they ask in turn until nothing is left."""
    got = {worker: [] for worker in workers}
    while schedule:
        for worker in workers:
            if (unit := schedule.take(worker)) is not None:
                got[worker].append(unit)
    return got


# Who decodes what


def test_one_worker_decodes_in_the_order_of_this_process():
    assert by_turns(Schedule(units(3)), [7])[7] == units(3)


@pytest.mark.parametrize("n_workers", [1, 2, 3, 5, 20])
def test_every_unit_is_decoded_once_however_many_workers_there_are(n_workers):
    got = by_turns(Schedule(units(4)), range(n_workers))
    assert sorted(chain(*got.values()), key=units(4).index) == units(4)


def test_all_policies_decode_a_batch_on_one_worker_while_there_is_a_batch_for_each():
    got = by_turns(Schedule(units(4)), [1, 2])
    assert got == {1: units(4)[:3] + units(4)[6:9], 2: units(4)[3:6] + units(4)[9:]}


def test_a_worker_without_a_batch_takes_the_last_of_the_longest_queue():
    schedule = Schedule(units(1, ("a", "b", "c", "d")))
    assert [schedule.take(worker).policy for worker in (1, 2, 1, 2)] == ["a", "d", "b", "c"]
    assert schedule.take(1) is None
    assert not schedule


def test_the_batch_of_a_lost_worker_is_the_next_to_be_decoded_from_where_it_was():
    schedule = Schedule(units(3))
    lost = [schedule.take(1), schedule.take(1)][-1]
    schedule.give_back(1, lost)
    assert [schedule.take(2) for _ in range(2)] == units(3)[1:3]
    assert by_turns(schedule, [2])[2] == units(3)[3:]


def test_the_last_unit_of_all_is_not_lost_with_its_worker():
    schedule = Schedule(units(1, ("none",)))
    unit = schedule.take(1)
    assert not schedule
    schedule.give_back(1, unit)
    assert schedule
    assert schedule.take(2) == unit


def test_units_are_looked_up_as_they_are_needed():
    seen = []
    schedule = Schedule(seen.append(unit) or unit for unit in units(1000))
    schedule.take(1)
    assert len(seen) <= 2 * len(POLICIES)


# Settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"launcher": "slurm"}, "launcher='slurm'"),
        ({"launcher": "ray", "workers": 0}, "workers=0: .*greater than or equal to 1"),
        ({"workers": 2}, "workers=2 needs launcher=ray"),
        ({"ray_address": "auto"}, "ray_address='auto' needs launcher=ray"),
    ],
)
def test_a_bad_launch_is_refused_with_the_value(settings, said):
    with pytest.raises(UsageError, match=said):
        launch_settings(**settings)


def test_a_launch_is_checked_by_compare_before_anything_is_loaded():
    with pytest.raises(UsageError, match="needs launcher=ray"):
        compare("no-such-model", workers=2)


def test_ray_is_asked_for_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'dcache\[ray\]'"):
        compare(FOLDER, [], launcher="ray", limit=1)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ray://head:10001", "is neither HOST:PORT of a cluster's head nor auto"),
        ("head", "is neither HOST:PORT"),
        ("127.0.0.1:1", r"no Ray cluster answers at '127.0.0.1:1': .*refused.*`ray status` tells"),
        ("127.0.0.1:99999", "no Ray cluster answers"),
    ],
)
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_an_address_without_a_cluster_is_refused_at_once(address, said):
    with pytest.raises(UsageError, match=said):
        compare(FOLDER, [], launcher="ray", ray_address=address, limit=1)


@pytest.mark.parametrize(
    ("gpus", "cpus", "asked", "device", "expected"),
    [
        (4, 64, None, None, Places("cuda", 4, gpus=1, cpus=1, threads=16)),
        (4, 64, 3, "cuda", Places("cuda", 3, gpus=1, cpus=1, threads=21)),
        (4, 64, None, "cpu", Places("cpu", 16, gpus=0, cpus=4, threads=4)),
        (0, 16, None, None, Places("cpu", 4, gpus=0, cpus=4, threads=4)),
        (0, 2, None, None, Places("cpu", 1, gpus=0, cpus=2, threads=2)),
        (0, 8, 3, "cpu", Places("cpu", 3, gpus=0, cpus=2, threads=2)),
        (64, 64, None, None, Places("cuda", 20, gpus=1, cpus=1, threads=3)),
    ],
)
def test_there_is_a_worker_for_each_gpu_or_for_a_few_cpus(monkeypatch, gpus, cpus, asked, device, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert Places.of(device, asked, 20, SimpleNamespace(gpus=gpus, cpus=cpus)) == expected


def test_workers_have_as_many_threads_as_the_environment_says(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert Places.of("cpu", 2, 20, SimpleNamespace(gpus=0, cpus=8)).threads == torch.get_num_threads()


@pytest.mark.parametrize(
    ("device", "asked", "said"),
    [
        ("cuda", 3, "workers=3 on cuda: .* has 2 GPUs and 8 CPUs"),
        ("cpu", 9, "workers=9 on cpu"),
        ("cuda:1", None, "device 'cuda:1' names one GPU"),
    ],
)
def test_workers_that_find_no_room_are_refused(device, asked, said):
    with pytest.raises(UsageError, match=said):
        Places.of(device, asked, 20, SimpleNamespace(gpus=2, cpus=8))


# What cannot leave the process


class Elsewhere(Task):
    name, gen_length = "elsewhere", 8

    def problems(self, split, limit, seed):
        return []

    def score(self, problem, text):
        return None


def test_what_is_given_as_text_can_be_spread_and_so_can_an_instance_of_a_module():
    refuse_what_cannot_be_spread(Experiment(["elastic(gamma=0.5)", make_policy("dkv"), VLCache("dkv")]))


def test_an_instance_of_a_class_that_no_module_has_is_refused():
    class Mine(CachePolicy):
        def plan(self, state):
            return Plan.all(state)

    for policy in (Mine(), VLCache(Mine())):
        with pytest.raises(UsageError, match=r"workers cannot import .*Mine from .*; define the class in a module"):
            refuse_what_cannot_be_spread(Experiment([policy]))


def test_a_task_of_a_script_is_refused(monkeypatch):
    monkeypatch.setattr(Elsewhere, "__module__", "__main__")
    with pytest.raises(UsageError, match="workers cannot import Elsewhere from '__main__'"):
        refuse_what_cannot_be_spread(Experiment([], Elsewhere()))


def test_a_policy_that_remembers_earlier_requests_is_refused_wherever_it_is_wrapped():
    for text in ("vlcache(fill=first)", "suffix(inner=vlcache(fill=first))"):
        with pytest.raises(UsageError, match=r"remembers earlier requests.*use the launcher local"):
            refuse_what_cannot_be_spread(Experiment([text]))
    refuse_what_cannot_be_spread(Experiment(["vlcache"]))


def test_a_model_that_was_made_by_hand_is_refused():
    transformer = random_model(0)
    model = dcache.Model("random", transformer.spec, transformer)
    with pytest.raises(UsageError, match="model 'random' was not loaded by load_model"):
        Run(Experiment([]), model, launch=launch_settings(launcher="ray"))


def test_a_loaded_model_says_how_to_load_it_again(tmp_path, monkeypatch):
    monkeypatch.chdir(FOLDER.parent)
    source = dcache.load_model(FOLDER.name, device="cpu", dtype="bf16").source
    assert (source.name, source.device, source.dtype) == (str(FOLDER), "cpu", "bfloat16")
    monkeypatch.chdir(tmp_path)
    again = load(source)
    assert (again.name, again.dtype, again.source) == (FOLDER.name, torch.bfloat16, source)


# What workers must have in common


@pytest.fixture(scope="module")
def found():
    run = Run(Experiment(["dkv"], limit=2, gen_length=8), FOLDER)
    return Found(run.conditions, run.launcher.marks, False, "a", 1)


def with_(found, host="b", marks=None, **conditions):
    return Found(found.conditions.model_copy(update=conditions), marks or found.marks, False, host, 2)


def test_workers_on_equal_machines_agree(found):
    found.check(with_(found, started="later", workers=7))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"device_name": "NVIDIA L4"}, "device_name is '.*' on a, process 1 and 'NVIDIA L4' on b, process 2"),
        ({"torch": "2.12.0"}, "torch is"),
        ({"weights": "0" * 16}, "weights is"),
        ({"marks": ["x", "y"]}, "prompt 1 is"),
    ],
)
def test_workers_that_differ_are_refused_naming_what_and_where(found, change, said):
    with pytest.raises(UsageError, match=said):
        found.check(with_(found, **change))


def test_a_table_of_several_workers_says_so(found):
    run = Run(Experiment([], limit=1, gen_length=8), FOLDER)
    assert "workers" not in run.comparison.table()
    conditions = run.conditions.model_copy(update={"workers": 4})
    assert "4 workers, torch" in dcache.Comparison(conditions, []).table()
