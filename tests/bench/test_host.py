"""The host beside a measurement: how fast it is, and on which CPU."""

import os
from time import perf_counter

import pytest
import torch

from dcache.bench import host

GPU = torch.device("cuda")
chooses = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no choice of CPUs")


def test_the_probe_is_a_time_in_microseconds():
    began = perf_counter()
    found = host.probe(3)
    assert 1 < found < (perf_counter() - began) * 1e6


@pytest.fixture
def system(monkeypatch):
    """A machine with CPUs 2, 3 and 5, of which 3 is the quickest; where the thread may run, in the order of changes."""
    now = [{2, 3, 5}]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: now[-1], raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: now.append(set(cpus)), raising=False)
    monkeypatch.setattr(host, "probe", lambda repeats: {2: 110.0, 3: 50.0, 5: 60.0}[min(now[-1])])
    return now


def test_the_quickest_cpu_is_taken_and_left_again(system):
    with host.on_quickest_cpu(GPU):
        assert system[1:] == [{2}, {3}, {5}, {3}]
    assert system[-1] == {2, 3, 5}


def test_a_failure_leaves_the_cpu_too(system):
    with pytest.raises(RuntimeError), host.on_quickest_cpu(GPU):
        raise RuntimeError
    assert system[-1] == {2, 3, 5}


def test_a_model_on_the_cpu_keeps_all_of_them(system):
    with host.on_quickest_cpu(torch.device("cpu")):
        assert system == [{2, 3, 5}]


def test_without_a_choice_nothing_is_chosen(monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    with host.on_quickest_cpu(GPU):
        pass


def test_a_container_that_forbids_the_choice_costs_no_measurement(monkeypatch):
    def forbidden(pid, cpus):
        raise PermissionError

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", forbidden, raising=False)
    done = False
    with host.on_quickest_cpu(GPU):
        done = True
    assert done
    with pytest.raises(OSError, match="full"), host.on_quickest_cpu(GPU):  # of what runs inside
        raise OSError("the disk is full")


@chooses
def test_on_this_machine_the_thread_has_one_cpu_inside_and_the_same_as_before_behind():
    before = os.sched_getaffinity(0)
    with host.on_quickest_cpu(GPU):
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before
