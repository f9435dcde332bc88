"""What a comparison writes down: its conditions, then one line per decoded text, as soon as it exists.

``results.jsonl`` holds JSON objects, one per line: a `Conditions`, then a `Result` per (repeat, problem, policy). A
resumed comparison adds its own conditions line, with its own start, before what it adds.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import IO, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from dcache.errors import UsageError
from dcache.regions import Region

log = logging.getLogger(__name__)

FILE = "results.jsonl"
SYNC_EVERY_S = 5.0  # a sync may take longer than a short text; a process that is killed loses nothing in any case
CURES = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room within the quota",
    errno.EFBIG: "raise the limit on the size of files",
    errno.EACCES: "make the folder writable",
    errno.EPERM: "make the folder writable",
    errno.EROFS: "make the folder writable",
}
MAY_GROW = frozenset({"started", "limit", "n_problems", "repeats", "workers"})
"""Conditions in which a resumed comparison may differ: they change no result, only how many there are."""


class Entrant(BaseModel):
    """A policy of a comparison.

    Attributes:
        policy: as the table calls it: its name and the knobs that differ from the defaults.
        name: as registered.
        source: the distribution that it comes from.
        knobs: all of them, defaults included.
        unmask: the unmasker that it ran with, as written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: str
    name: str
    source: str
    knobs: dict[str, Any]
    unmask: str


class Conditions(BaseModel):
    """Everything that the results of a comparison depend on.

    Attributes:
        dcache, python, torch, triton: versions; triton is None where it is not installed.
        device: "cpu" or "cuda".
        device_name: of the GPU, or of the CPU.
        threads: of torch, on a CPU; None on a GPU.
        dtype: "float32".
        model: what it was loaded as.
        n_parameters: number of weights.
        weights: fingerprint of the weights, from a sample of every tensor.
        task, split, limit, seed: which problems; the seed is also that of the noise.
        n_problems: how many that are.
        repeats: times that each is decoded by each policy.
        settings: of decoding: gen_length, block_length, batch_size, ...; ``unmask`` is what was asked for.
        policies: in the order of the table, the reference first.
        started: UTC, ISO 8601.
        workers: processes that decode side by side, each on a GPU or with threads of its own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["conditions"] = "conditions"
    dcache: str
    python: str
    torch: str
    triton: str | None
    device: str
    device_name: str
    threads: int | None
    dtype: str
    model: str
    n_parameters: int
    weights: str
    task: str
    split: str | None
    limit: int | None
    n_problems: int
    seed: int
    repeats: int
    settings: dict[str, Any]
    policies: list[Entrant]
    started: str
    workers: int = 1

    @property
    def reference(self) -> str:
        """The policy that the others are compared with."""
        return self.policies[0].policy

    def difference(self, other: Conditions) -> tuple[str, object, object] | None:
        """First field in which results of `other` could differ from ours: its name, our value, the other's."""
        for name, mine, theirs in _pairs(self._facts(), other._facts()):
            if mine != theirs:
                return name, mine, theirs
        return None

    def _facts(self) -> dict[str, Any]:
        facts = self.model_dump(mode="json", exclude=set(MAY_GROW))
        settings, policies = facts.pop("settings"), facts.pop("policies")
        facts |= {name: value for name, value in settings.items()}
        facts["policies"] = ", ".join(p["policy"] for p in policies)
        facts |= {f"{field} of {p['policy']}": p[field] for p in policies for field in ("source", "knobs", "unmask")}
        return facts


def _pairs(mine: dict[str, Any], theirs: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in dict.fromkeys([*mine, *theirs]):
        yield name, mine.get(name), theirs.get(name)


class Result(BaseModel):
    """One text, decoded by one policy.

    Attributes:
        repeat: from 0.
        problem: its id.
        prompt: fingerprint of the prompt's token ids and of the reference answer.
        policy: `Entrant.policy`.
        text: up to the first end-of-text.
        tokens: generated ids up to the first end-of-text.
        canvas: all generated ids.
        correct: None if the problem has no answer.
        n_tokens: length of `tokens`.
        nfe: forward calls.
        seconds: wall time from an empty canvas to the text; that of a batch is divided evenly among its sequences.
        batch: sequences decoded together.
        row_layers: row-layers that ran a query.
        kv_row_layers: row-layers whose value was projected.
        full_row_layers: row-layers of as many steps without a cache.
        row_share: ``row_layers / full_row_layers``.
        refreshes: steps that computed every row in the last layer.
        regions: the same of image rows, of the rest of the prompt and of generated rows, by name; None in results of an
            earlier version.
        step_ms: wall time of each step; the sequences of a batch share their steps.
        peak_bytes: most GPU memory in use, without the stores of the other policies; None on a CPU.
        cache_bytes: of all stores of the batch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["result"] = "result"
    repeat: int
    problem: str
    prompt: str
    policy: str
    text: str | None
    tokens: list[int]
    canvas: list[int]
    correct: bool | None
    n_tokens: int
    nfe: int
    seconds: float
    batch: int
    row_layers: int
    kv_row_layers: int
    full_row_layers: int
    row_share: float
    refreshes: int
    step_ms: list[float]
    peak_bytes: int | None
    cache_bytes: int
    regions: dict[str, Region] | None = None

    @property
    def flat(self) -> dict[str, Any]:
        """The fields without `kind`; those of a region as ``image_row_layers``, ``text_row_layers``, ..."""
        whole = self.model_dump(exclude={"kind", "regions"})
        parts = (self.regions or {}).items()
        return whole | {f"{name}_{field}": x for name, part in parts for field, x in part.model_dump().items()}

    @property
    def key(self) -> tuple[int, str, str]:
        """What identifies it within a comparison."""
        return self.repeat, self.problem, self.policy


def line_of(entry: Conditions | Result) -> bytes:
    """An entry as a line of the file."""
    return (json.dumps(entry.model_dump(mode="json"), separators=(",", ":")) + "\n").encode()


def read_results(path: Path) -> tuple[list[Conditions], list[Result], int]:
    """Read a results file.

    A last line without its end was being written when the comparison was killed, and is not read.

    Returns:
        conditions and results in the order of the file, and the number of bytes that hold whole lines.

    Raises:
        UsageError: naming the file and the line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    whole = data[: data.rfind(b"\n") + 1]
    conditions: list[Conditions] = []
    results: dict[tuple[int, str, str], Result] = {}
    for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
        entry = _parse(line, f"{path}, line {number}")
        if isinstance(entry, Conditions):
            conditions.append(entry)
        elif not conditions:
            raise UsageError(f"{path}, line {number}: a result before any conditions; choose another directory")
        else:
            results.setdefault(entry.key, entry)
    return conditions, list(results.values()), len(whole)


def _parse(line: bytes, where: str) -> Conditions | Result:
    try:
        value = json.loads(line)
        kind = value.get("kind") if isinstance(value, dict) else None
        entry: type[Conditions] | type[Result] = Conditions if kind == "conditions" else Result
        return entry.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg'].lower()}"
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        what = str(error)
    raise UsageError(f"{where}: not a line of a comparison ({what}); choose another directory")


class ResultFile:
    """The results of one comparison on disk: what is there already, and room for more.

    What `write` returned from is in the file whatever becomes of the process; a power cut may cost the last
    `SYNC_EVERY_S` seconds. A write that fails leaves the file as it was before. If the folder is deleted or moved while
    the comparison goes on, the next write puts the whole file back.

    Args:
        folder: made if it does not exist; a comparison of the same conditions in it is continued.
        conditions: of the comparison that goes on now.

    Attributes:
        results: what an earlier run left.

    Raises:
        UsageError: if the folder cannot be written, is in use, or holds results of other conditions.
    """

    def __init__(self, folder: str | os.PathLike[str], conditions: Conditions):
        self.path = Path(folder) / FILE
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.stream = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise _unwritable(self.path, error, 0) from error
        self.n_results = 0
        try:
            lock(self.stream, self.path)
            earlier, self.results, n_bytes = read_results(self.path)
            for entry in earlier if self.results else ():
                self._same(entry, conditions)
            self.n_bytes = n_bytes if self.results else 0  # what failed before its first result binds nobody
            self.n_results = len(self.results)
            self.stream.truncate(self.n_bytes)
            self._append(line_of(conditions))
            self._sync()
            _sync_folder(self.path.parent)
        except OSError as error:
            self.stream.close()
            raise _unwritable(self.path, error, self.n_results) from error
        except BaseException:
            self.stream.close()
            raise

    def _same(self, earlier: Conditions, now: Conditions) -> None:
        found = earlier.difference(now)
        if found is not None:
            name, before, value = found
            raise UsageError(
                f"{self.path} holds results of other conditions: {name} was {before!r} and is {value!r} now; "
                "choose another directory, or the same conditions to continue it"
            )

    def write(self, results: Iterable[Result]) -> None:
        """Append results: all of them, or none if that fails."""
        results = list(results)
        try:
            self._check_place()
            self._append(b"".join(line_of(result) for result in results))
            self.n_results += len(results)
            if monotonic() - self.synced > SYNC_EVERY_S:
                self._sync()
        except OSError as error:
            raise _unwritable(self.path, error, self.n_results) from error

    def _append(self, data: bytes) -> None:
        _write_all(self.stream, data, self.n_bytes)
        self.n_bytes += len(data)

    def _check_place(self) -> None:
        """See that the path still leads to our file, and that nobody else wrote into it."""
        mine = os.fstat(self.stream.fileno())
        try:
            there = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            self._put_back()
            return
        if not os.path.samestat(mine, there) or mine.st_size != self.n_bytes:
            what = "changed" if os.path.samestat(mine, there) else "replaced"
            raise UsageError(
                f"{self.path} was {what} by another program while this comparison ran. It stops here, so that two are "
                "not mixed; choose another directory"
            )

    def _put_back(self) -> None:
        """Write the file anew from what is still open, although its path is gone."""
        self.stream.seek(0)
        data = self.stream.read(self.n_bytes)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        again = self.path.open("x+b", buffering=0)
        try:
            lock(again, self.path)
            _write_all(again, data, 0)
        except BaseException:
            again.close()
            raise
        self.stream.close()
        self.stream = again
        self._sync()
        log.warning("%s was deleted or moved while it was in use; it is written again, with all results", self.path)

    def _sync(self) -> None:
        """Have the system write to the disk what it holds back; a file that cannot be synced is none on a disk."""
        self.synced = monotonic()
        try:
            os.fsync(self.stream.fileno())
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
                raise

    def close(self) -> None:
        """Let go of the file."""
        if self.stream.closed:
            return
        try:
            self._sync()
        except OSError as error:
            raise _unwritable(self.path, error, self.n_results) from error
        finally:
            self.stream.close()


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Raise UsageError if results cannot be written to a folder, as far as that shows without touching anything.

    `ResultFile` finds out in any case; this is for a moment at which less time is lost.
    """
    file = Path(folder) / FILE
    place = next((p for p in file.absolute().parents if os.path.exists(p)), Path.cwd())
    wanted = file if os.path.exists(file) else place
    try:
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(wanted, os.R_OK | os.W_OK | (os.X_OK if wanted is place else 0)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if wanted is file:
            with file.open("r+b") as stream:
                lock(stream, file)
    except OSError as error:
        raise _unwritable(file, error, 0) from error


def lock(stream: IO[bytes], path: Path) -> None:
    """Keep a second process out of a file; the lock goes with the stream. Raises UsageError if there is one already."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):  # others say that this file system has no locks
            raise UsageError(f"{path} is being written by another comparison; choose another directory") from error


def _write_all(stream: IO[bytes], data: bytes, end: int) -> None:
    """Write to the end of a file of `end` bytes, and leave it at that if not all of `data` fits."""
    try:
        while data:
            data = data[stream.write(data) :]
    except OSError:
        stream.truncate(end)  # what fitted is no whole line, and the next one must not join it
        stream.seek(end)
        raise


def _unwritable(path: Path, error: OSError, n_results: int) -> UsageError:
    """What happened, what is kept, and how to go on."""
    found = f"results cannot be written to {path}: {error.strerror}"
    if n_results == 0:
        cure = CURES.get(error.errno or 0)
        return UsageError(f"{found}; {'' if cure is None else f'{cure}, or '}choose another directory")
    kept = "The 1 result in it is" if n_results == 1 else f"The {n_results} results in it are"
    cure = CURES.get(error.errno or 0, "see to it")
    return UsageError(f"{found}. {kept} kept: {cure}, then do the same again, and it continues from there")


def _sync_folder(folder: Path) -> None:
    """Have the name of a new file written to the disk, where the system can."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
