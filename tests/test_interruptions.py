"""Whatever ends a comparison: what it finished is kept, the message says how to go on, the same again resumes it."""

import errno
import io
import logging
import os
import shutil
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dcache import Comparison, UsageError, compare, load_model
from dcache.cli import main
from dcache.compare import Experiment, Run
from dcache.files import write_whole
from dcache.results import FILE, ResultFile, read_results

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "golden" / "models" / "llada_mha"
SMALL = {"limit": 2, "gen_length": 8, "block_length": 8}
FLAGS = ["--model", str(FOLDER), "--device", "cpu", "--gen-length", "8", "--block-length", "8", "--limit", "2"]
COMPARE = ["compare", *FLAGS, "--policies", "dkv", "--out"]


@pytest.fixture(scope="module")
def model():
    return load_model(FOLDER, device="cpu")


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A comparison that nothing interrupted, and its file."""
    folder = tmp_path_factory.mktemp("whole")
    return compare(model, ["dkv"], out=folder, **SMALL), folder / FILE


def run_of(model, folder):
    return Run(Experiment(["dkv"], **SMALL), model, folder)


def tokens(comparison):
    return {r.key: (r.canvas, r.nfe, r.row_layers) for r in comparison.results}


def resumes(model, folder, whole, kept):
    """It goes on from `kept` results and ends as if nothing had happened."""
    run = run_of(model, folder)
    assert len(run.results) == kept
    list(run)
    assert tokens(run.comparison) == tokens(whole[0])
    assert tokens(Comparison.load(folder)) == tokens(whole[0])


# Killed

KILLS = """
    import os, random, signal, sys, time
    from pathlib import Path
    from dcache import load_model
    from dcache.compare import Experiment, Run
    from dcache.results import FILE, read_results

    folder, moments = Path(sys.argv[2]), random.Random(int(sys.argv[3]))
    model = load_model(sys.argv[1], device="cpu")

    def run(out):  # in a process of its own: this one has a single thread, so that a fork is whole
        for _ in Run(Experiment(["dkv"], limit=6, gen_length=8, block_length=8), model, folder):
            os.write(out, b".")

    kept, middle = [], 0
    for _ in range(6):
        begun, out = os.pipe()
        if not (child := os.fork()):
            try:
                run(out)
            finally:
                os._exit(0)
        os.close(out)
        for _ in range(moments.randint(0, 2)):
            os.read(begun, 1)
        time.sleep(moments.uniform(0, 0.04))  # about as long as a text takes
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(begun)
        results = read_results(folder / FILE)[1] if (folder / FILE).exists() else []
        assert results[: len(kept)] == kept, "a kill lost what an earlier run had finished"
        middle += os.WIFSIGNALED(status) and len(results) < 12
        kept = results
    print(middle)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_comparison_killed_at_random_moments_ends_as_if_it_had_not_been(model, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(KILLS), str(FOLDER), str(tmp_path), "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3  # the first ones, at the least, come before everything is finished
    straight = compare(model, ["dkv"], limit=6, gen_length=8, block_length=8)
    assert tokens(compare(model, ["dkv"], limit=6, gen_length=8, block_length=8, out=tmp_path)) == tokens(straight)
    assert tokens(Comparison.load(tmp_path)) == tokens(straight)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1))
def test_wherever_the_file_ends_its_whole_lines_are_kept_and_continued(whole, tmp_path, share):
    comparison, file = whole
    data = file.read_bytes()
    cut = data[: round(share * len(data))]
    lines = cut.count(b"\n")
    folder = tmp_path / str(lines)
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_bytes(cut)
    left = ResultFile(folder, comparison.conditions)
    left.close()
    assert left.results == comparison.results[: max(lines - 1, 0)]
    again = ResultFile(folder, comparison.conditions)
    again.write(comparison.results[len(left.results) :])
    again.close()
    assert read_results(folder / FILE)[1] == comparison.results


# A full disk


class Full(io.FileIO):
    """A file on a disk with room for some bytes more."""

    room = 10**9

    def write(self, data):
        fits = bytes(data[: self.room])
        if not fits:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(fits)
        return super().write(fits)


@pytest.mark.parametrize("room", [0, 1, 700])
def test_a_full_disk_keeps_whole_lines_and_says_how_to_go_on(model, whole, tmp_path, room):
    run = run_of(model, tmp_path)
    batches = iter(run)
    next(batches)
    before = (tmp_path / FILE).read_bytes()
    disk = run.file.stream
    run.file.stream = Full(disk.fileno(), "a+b", closefd=False)
    run.file.stream.room = room
    with pytest.raises(UsageError) as caught:
        next(batches)
    assert str(caught.value) == (
        f"results cannot be written to {tmp_path / FILE}: No space left on device. The 1 result in it is kept: make "
        "room on the disk, then do the same again, and it continues from there"
    )
    assert (tmp_path / FILE).read_bytes() == before
    disk.close()
    resumes(model, tmp_path, whole, kept=1)


@contextmanager
def files_of_at_most(n_bytes):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_command_line_prints_the_table_so_far_before_it_says_that_the_disk_is_full(model, whole, capsys, tmp_path):
    size = len(b"".join(whole[1].read_bytes().splitlines(keepends=True)[:4]))  # the conditions and three texts
    with files_of_at_most(size + 200):
        assert main([*COMPARE, str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()[4:6]] == ["none", "dkv"]
    assert "warning: only 1 of 2 texts per policy are finished" in err
    assert "File too large. The 3 results in it are kept: raise the limit on the size of files" in err.splitlines()[-1]
    assert main([*COMPARE, str(tmp_path)]) == 0
    assert "3 of 4 texts are there already" in capsys.readouterr().err
    assert tokens(Comparison.load(tmp_path)) == tokens(whole[0])


TMPFS = """
    import os, sys
    from dcache.cli import main

    *arguments, disk = sys.argv[1:]
    first = main([*arguments, disk + "/results"])
    os.remove(disk + "/ballast")
    print(first, main([*arguments, disk + "/results"]))
"""


def test_a_disk_that_is_really_full_is_resumed_once_there_is_room(tmp_path):
    unshare = shutil.which("unshare")
    mount = f"mount -t tmpfs -o size=20k none {tmp_path} && head -c 12288 /dev/zero > {tmp_path}/ballast"
    inside = [unshare or "", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if unshare is None or subprocess.run([*inside, mount], capture_output=True).returncode != 0:
        pytest.skip("no file system can be mounted here")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    arguments = ["-c", textwrap.dedent(TMPFS), *COMPARE, str(tmp_path)]
    command = [*inside, f'{mount} && exec "$@"', "sh", sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["2 0"], done.stderr
    assert "No space left on device. The 3 results in it are kept: make room on the disk" in done.stderr


def test_a_full_disk_under_the_table_is_one_line_and_loses_no_result(whole, tmp_path, capsys, monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", full)
        assert main([*COMPARE, str(tmp_path)]) == 2
        assert (
            capsys.readouterr().err.splitlines()[-1] == "error: the output cannot be written: No space left on device"
        )
    assert tokens(Comparison.load(tmp_path)) == tokens(whole[0])


# A folder that cannot be written, or that somebody else is at


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model may take minutes: what is wrong with a folder is told before."""
    monkeypatch.setattr("dcache.models.loading.load_model", None)


def refused(capsys, folder):
    assert main([*COMPARE, str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


@pytest.mark.parametrize("below", ["", "a", "a/b"])
def test_a_path_through_a_file_is_told_before_a_model_is_loaded(capsys, tmp_path, no_model, below):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / below
    expected = f"error: results cannot be written to {folder / FILE}: Not a directory; choose another directory\n"
    assert refused(capsys, folder) == expected


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_may_not_be_written_is_told_before_a_model_is_loaded(capsys, tmp_path, no_model, monkeypatch, what):
    file = tmp_path / "made" / FILE
    file.parent.mkdir()
    file.touch()
    asked = file if what == "file" else tmp_path  # as root, which may write everything, chmod would show nothing
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != asked or not mode & os.W_OK)
    folder = file.parent if what == "file" else tmp_path / "new" / "folder"
    assert "Permission denied; make the folder writable, or choose another directory" in refused(capsys, folder)
    assert not (tmp_path / "new").exists()


def test_a_folder_in_use_is_told_before_a_model_is_loaded(model, capsys, tmp_path, no_model):
    pytest.importorskip("fcntl")
    run = run_of(model, tmp_path)
    assert "is being written by another comparison; choose another directory" in refused(capsys, tmp_path)
    run.file.close()


def test_a_read_only_disk_that_only_the_write_finds_is_told_the_same_way(model, tmp_path, monkeypatch):
    def refuses(self, *arguments, **options):
        if self.name == FILE:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(self, *arguments, **options)

    opened = Path.open
    monkeypatch.setattr(Path, "open", refuses)
    with pytest.raises(UsageError, match="Read-only file system; make the folder writable, or choose another"):
        compare(model, ["dkv"], out=tmp_path, **SMALL)


# A folder that changes meanwhile


def test_a_folder_that_is_deleted_meanwhile_is_made_again_with_everything(model, whole, tmp_path, caplog):
    run = run_of(model, tmp_path / "out")
    for n, _ in enumerate(run):
        if n == 1:
            shutil.rmtree(tmp_path / "out")
    assert tokens(Comparison.load(tmp_path / "out")) == tokens(whole[0])
    (record,) = caplog.records
    assert (record.levelno, "was deleted or moved while it was in use" in record.getMessage()) == (
        logging.WARNING,
        True,
    )


def test_a_folder_that_is_moved_meanwhile_keeps_what_it_had_and_everything_goes_on_in_its_place(model, whole, tmp_path):
    run = run_of(model, tmp_path / "out")
    for n, _ in enumerate(run):
        if n == 1:
            (tmp_path / "out").rename(tmp_path / "moved")
    assert len(Comparison.load(tmp_path / "moved").results) == 2
    assert tokens(Comparison.load(tmp_path / "out")) == tokens(whole[0])


def test_the_file_that_is_made_again_is_locked_too(model, tmp_path):
    pytest.importorskip("fcntl")
    run = run_of(model, tmp_path / "out")
    batches = iter(run)
    next(batches)
    shutil.rmtree(tmp_path / "out")
    next(batches)
    with pytest.raises(UsageError, match="is being written by another comparison"):
        run_of(model, tmp_path / "out")


def test_another_file_in_its_place_stops_the_comparison_and_is_left_alone(model, tmp_path):
    run = run_of(model, tmp_path)
    batches = iter(run)
    next(batches)
    (tmp_path / FILE).unlink()
    (tmp_path / FILE).write_text("mine\n")
    with pytest.raises(UsageError, match=r"was replaced by another program while this comparison ran"):
        next(batches)
    assert (tmp_path / FILE).read_text() == "mine\n"


def test_a_second_writer_is_noticed_where_the_file_system_has_no_locks(model, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def unsupported(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    first = iter(run_of(model, tmp_path))
    next(first)
    second = iter(run_of(model, tmp_path))
    with pytest.raises(UsageError, match=r"was changed by another program while this comparison ran"):
        next(first)
    assert [len(batch) for batch in second] == [1, 1, 1]
    assert len(Comparison.load(tmp_path).results) == 4


# Files that are written as a whole


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_file_that_cannot_be_written_as_a_whole_stays_as_it_was(tmp_path, monkeypatch, failing):
    def fails(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_whole(tmp_path / "a" / "file", b"before")
    monkeypatch.setattr(os, failing, fails)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "a" / "file", b"after")
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "a").iterdir()] == [("file", b"before")]


def test_a_link_to_a_file_stays_one(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_whole(tmp_path / "link", b"data")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"data"


def test_results_that_cannot_be_saved_leave_no_half_of_them(whole, tmp_path, monkeypatch):
    def fails(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fails)
        with pytest.raises(UsageError, match="results cannot be written"):
            whole[0].save(tmp_path)
    whole[0].save(tmp_path)
    assert Comparison.load(tmp_path) == whole[0]
