"""A comparison in several processes at once, one per GPU, on this machine or on many: the launcher ``ray``.

This process hands out units and writes down results; it decodes nothing and needs no GPU. Ray brings arguments and
results over by pickling them between processes of one user; no file is pickled.
"""

from __future__ import annotations

import os
import socket
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import chdir
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from dcache.config import CPUS_PER_WORKER, LaunchSettings
from dcache.errors import DCacheError, UsageError, WorkerError
from dcache.launch import Launcher, Schedule, Unit, refuse_what_cannot_be_spread
from dcache.models.loading import Source
from dcache.results import Result
from dcache.worker import HOME, Found, Worker

if TYPE_CHECKING:
    from dcache.compare import Experiment

MOST_LOSSES = 3
PATIENCE_S = 30.0
CONNECT_S = 5.0
STORE_BYTES = 2**27  # of a cluster of our own: settings and results are small
PASSED_ON = ("DCACHE_", "TRITON_INTERPRET")  # beginnings of environment variables that change how dcache runs


@dataclass
class Hand:
    """This side of a worker.

    Attributes:
        number: from 1; a worker that takes the place of a lost one has a number of its own.
        actor: Ray's handle.
        task: Ray's reference to the outcome of what it is doing; None if it waits.
        unit: what it is decoding; None while it loads or waits.
        found: None until it has loaded.
    """

    number: int
    actor: Any
    task: Any
    unit: Unit | None = None
    found: Found | None = None

    def __str__(self) -> str:
        return f"worker {self.number}" + (f" ({self.found})" if self.found else "")


class Lost(Exception):
    """A worker died, or its machine did."""


class Cluster:
    """The Ray cluster: the one that this process is connected to already, a running one, or one of its own.

    Args:
        address: of a running one; None starts one that ends with this comparison.

    Attributes:
        gpus, cpus: of all machines.
    """

    def __init__(self, address: str | None):
        self.ray = _ray()
        self.own, self.joined = False, False
        if self.ray.is_initialized():
            if address is not None:
                raise UsageError(f"this process is connected to Ray already; leave ray_address {address!r} out")
        else:
            self._connect(address)
        total = self.ray.cluster_resources()
        self.gpus, self.cpus = int(total.get("GPU", 0)), int(total.get("CPU", 0))

    def _connect(self, address: str | None) -> None:
        if address is not None and address != "auto":
            _refuse_what_does_not_answer(address)
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if address is None:
            options |= {"include_dashboard": False, "object_store_memory": STORE_BYTES}
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            with chdir(HOME):  # Ray puts the working directory first on the workers' paths, where it would hide modules
                self.ray.init(address or "local", **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            what = "a Ray cluster cannot be started here" if address is None else f"Ray cannot join {address!r}"
            raise UsageError(f"{what}: {_one_line(error)}") from error
        self.own, self.joined = address is None, True

    def close(self) -> None:
        """Leave it; it ends if it was started here."""
        if self.joined:
            self.ray.shutdown()
            self.joined = False


def _ray() -> Any:
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")  # Ray writes of lost workers to stdout, where our table is
    try:
        import ray
    except ImportError as error:
        raise UsageError(f"the launcher ray needs Ray; pip install 'dcache[ray]' ({error})") from None
    return ray


def _refuse_what_does_not_answer(address: str) -> None:
    """Ray itself would try for many minutes."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise UsageError(
            f"ray_address {address!r} is neither HOST:PORT of a cluster's head nor auto; give one of them, on a "
            "machine of the cluster"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"no Ray cluster answers at {address!r}: {error}; `ray status` tells the address of a running one, and "
            "without any dcache starts its own"
        ) from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


@dataclass(frozen=True)
class Places:
    """How many workers there are, and what each is given.

    Attributes:
        device: "cpu" or "cuda".
        n_workers: on the whole cluster.
        gpus, cpus: that Ray sets aside for a worker.
        threads: of torch.
    """

    device: str
    n_workers: int
    gpus: int
    cpus: int
    threads: int

    @staticmethod
    def of(device: str | None, asked: int | None, n_units: int, cluster: Cluster) -> Places:
        """For `asked` workers, or as many as are usual; no more than there are units.

        Raises:
            UsageError: for a device that names one GPU, and for more workers than the cluster has room for.
        """
        device = device or ("cuda" if cluster.gpus else "cpu")
        if ":" in device:
            raise UsageError(
                f"device {device!r} names one GPU, and Ray gives each worker another; write cuda, and choose among the "
                "GPUs of a machine by CUDA_VISIBLE_DEVICES"
            )
        on_gpu = device == "cuda"
        if (asked or 1) > (cluster.gpus if on_gpu else cluster.cpus):
            raise UsageError(
                f"workers={asked or 1} on {device}: each needs one of its own, and the cluster has {cluster.gpus} GPUs "
                f"and {cluster.cpus} CPUs; ask for fewer, or for another device"
            )
        usual = cluster.gpus if on_gpu else max(1, cluster.cpus // CPUS_PER_WORKER)
        n_workers = min(asked or usual, n_units)
        share = max(1, cluster.cpus // n_workers)
        threads = torch.get_num_threads() if os.environ.get("OMP_NUM_THREADS") else share
        return Places(device, n_workers, gpus=int(on_gpu), cpus=1 if on_gpu else share, threads=threads)


class RayLauncher(Launcher):
    """Workers on a Ray cluster: one for each GPU, or where there is none for a few CPUs.

    The first worker that is ready settles the conditions; one that finds others ends the comparison. A worker that is
    lost is replaced, and what it was decoding is decoded again.

    Args:
        experiment: what to compare.
        source: of the model.
        settings: how many workers, and where.
        note: is told in a sentence when a worker is lost, or is long in coming; None warns.

    Raises:
        UsageError: if Ray or the cluster is missing or too small, if something cannot be sent to a worker, and for all
            that `Decoder` raises.
        WorkerError: if no worker gets ready.
    """

    def __init__(
        self,
        experiment: Experiment,
        source: Source,
        settings: LaunchSettings,
        note: Callable[[str], None] | None = None,
    ):
        refuse_what_cannot_be_spread(experiment)
        self.note, self.source = note or _warn, source
        self.hands: list[Hand] = []
        self._losses: Counter[Unit | None] = Counter()
        self._started = 0
        self.cluster = Cluster(settings.ray_address)
        self.ray = self.cluster.ray
        try:
            self.places = Places.of(source.device, settings.workers, experiment.n_units, self.cluster)
            self.recipe = self._put(experiment)
            for _ in range(self.places.n_workers):
                self._start()
            found = self._first()
        except BaseException:
            self.close()
            raise
        self.experiment, self.marks = experiment.on(found.reads_images), found.marks
        self.conditions = found.conditions.model_copy(update={"workers": self.places.n_workers})

    # Workers

    def _put(self, experiment: Experiment) -> Any:
        """The recipe of the experiment, where every worker finds it."""
        try:
            return self.ray.put(experiment.recipe)
        except Exception as error:  # whatever objects raise that cannot be pickled
            raise UsageError(
                f"a policy or the task was given as an instance that cannot be sent to a worker: {_one_line(error)}; "
                "give it as text, or without what cannot be pickled"
            ) from error

    def _start(self) -> None:
        """One more worker, which begins to load."""
        self._started += 1
        places = self.places
        options: dict[str, Any] = {"num_gpus": places.gpus, "num_cpus": places.cpus, "max_restarts": 0}
        passed = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
        if passed and not self.cluster.own:  # the processes of a cluster of our own have the environment of this one
            options["runtime_env"] = {"env_vars": passed}
        actor = self.ray.remote(Worker).options(**options).remote(sys.path, os.getcwd(), places.threads)
        source = replace(self.source, device=places.device)
        self.hands.append(Hand(self._started, actor, actor.load.remote(self.recipe, source)))

    def _first(self) -> Found:
        """Wait for a worker that has loaded."""
        while True:
            hand = self._wait()
            try:
                return self._loaded(hand)
            except Lost as loss:
                self._replace(hand, loss)

    def _loaded(self, hand: Hand) -> Found:
        """Take what a worker found, which must be what the others did."""
        found: Found = self._outcome(hand)
        expected = self.source.weights
        if expected is not None and found.conditions.weights != expected:
            raise UsageError(
                f"{hand} loaded weights {found.conditions.weights} from {self.source.name!r}, and the model given has "
                f"{expected}; it was changed after it was loaded: save it, and give the folder"
            )
        for other in self.hands:
            if other.found is not None:
                other.found.check(found)
        hand.found = found
        self._losses[None] = 0
        return found

    def _outcome(self, hand: Hand) -> Any:
        """Of what a worker was doing, which is over; raises what it raised, or `Lost`."""
        task, hand.task = hand.task, None
        try:
            return self.ray.get(task)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, DCacheError):
                raise error.cause from None
            if isinstance(error.cause, self.ray.exceptions.RaySystemError):  # arguments that it cannot unpickle
                what = str(error.cause).partition("\n")[0]
                raise UsageError(
                    f"{hand} cannot read the policies or the task ({what}); install their modules where workers run"
                ) from error
            raise
        except self.ray.exceptions.RayError as error:
            raise Lost(_reason(error)) from error

    def _wait(self) -> Hand:
        """A worker whose task is over."""
        busy = {hand.task: hand for hand in self.hands if hand.task is not None}
        while True:
            over, _ = self.ray.wait(list(busy), num_returns=1, timeout=PATIENCE_S)
            if over:
                return busy[over[0]]
            if not any(hand.found for hand in self.hands):
                self._explain_the_wait()

    def _explain_the_wait(self) -> None:
        """No worker is there yet: the cluster is busy, or the model large."""
        total, free = self.ray.cluster_resources(), self.ray.available_resources()
        kind, needed = ("GPU", self.places.gpus) if self.places.gpus else ("CPU", self.places.cpus)
        if total.get(kind, 0) < needed:
            raise WorkerError(f"no worker is left, and the cluster has {total.get(kind, 0):g} {kind}s for another")
        self.note(f"no worker is ready yet: loading, or waiting for a place ({free.get(kind, 0):g} {kind}s are free)")

    def _replace(self, hand: Hand, loss: Lost) -> None:
        """Start another worker for one that is lost, unless the same was lost too often."""
        self.hands.remove(hand)
        self._losses[hand.unit] += 1
        doing = "loading" if hand.unit is None else f"decoding batch {hand.unit.batch} under {hand.unit.policy!r}"
        if self._losses[hand.unit] >= MOST_LOSSES:
            raise WorkerError(f"{MOST_LOSSES} workers were lost while {doing}; the last one, {hand}: {loss}")
        again = "" if hand.unit is None else "; the batch is decoded again"
        self.note(f"{hand} was lost while {doing}{again}. Ray says: {loss}")
        self._start()

    # Units

    def run(self, policies: Iterable[str], units: Iterable[Unit]) -> Iterator[list[Result]]:
        """As they arrive; a worker warms each policy up before its first unit of it."""
        schedule = Schedule(units)
        while self._hand_out(schedule):
            hand = self._wait()
            try:
                if hand.found is None:
                    self._loaded(hand)
                    continue
                results: list[Result] = self._outcome(hand)
            except Lost as loss:
                schedule.give_back(hand.number, hand.unit)
                self._replace(hand, loss)
                continue
            hand.unit = None
            yield results

    def _hand_out(self, schedule: Schedule) -> bool:
        """Give every idle worker a unit; whether anything is left to wait for."""
        for hand in self.hands:
            if hand.task is None and (unit := schedule.take(hand.number)) is not None:
                hand.unit, hand.task = unit, hand.actor.decode.remote(unit)
        return bool(schedule) or any(hand.unit for hand in self.hands)

    def close(self) -> None:
        """End the workers, whatever they are doing, and the cluster if it is ours."""
        for hand in self.hands:
            self.ray.kill(hand.actor)
        self.hands = []
        self.cluster.close()


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def _reason(error: BaseException) -> str:
    """What Ray says of a loss, without the fields that it indents."""
    lines = [line for line in str(error).splitlines() if not line.startswith("\t")]
    return textwrap.shorten(" ".join(lines[1:] or lines), 240, placeholder=" ...")
