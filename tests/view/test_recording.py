"""What is recorded of a comparison, and how it is kept."""

import numpy as np
import pytest

from dcache import UsageError
from dcache.generate import Runner
from dcache.results import FILE as RESULTS
from dcache.view.recording import FILE, Recorder, read_recordings


@pytest.fixture(scope="module")
def recorded(compared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run = compared(folder)
    recorder = Recorder(run, folder, texts=2)
    assert list(recorder) == ["none", "elastic", "dkv"]
    return run, folder, recorder.file.found


def test_a_recording_agrees_with_its_measured_text(recorded):
    run, _, found = recorded
    assert len(found) == 2 * 3
    for (problem, policy), recording in found.items():
        result = run.results[0, problem, policy]
        assert recording.same
        assert (recording.canvas, recording.text, recording.prompt) == (result.canvas, result.text, result.prompt)
        assert sum(recording.row_layers) == result.row_layers
        assert sum(recording.refresh) == result.refreshes
        assert recording.n_steps == len(result.step_ms) == len(recording.step_ms)


def test_maps_commits_and_confidences_are_those_of_a_trace(recorded, model):
    run, _, found = recorded
    for name, policy in run.experiment.policies.items():
        trace = Runner(model, policy, run.experiment.settings, maps=True).run(run.here().prompts[:1], ids=[0])[0].trace
        recording = found[run.experiment.problems[0].id, name]
        n = trace.length
        rows = recording.rows.mask()
        kv_rows = rows if recording.kv_rows is None else recording.kv_rows.mask()
        for s, step in enumerate(trace.mine):
            assert np.array_equal(rows[s], step.maps["rows"][:, 0, :n])
            assert np.array_equal(kv_rows[s], step.maps["kv_rows"][:, 0, :n])
            assert recording.commits[s] == np.flatnonzero(step.commit[0]).tolist()
            seen = recording.candidates[s]
            assert seen.tokens == step.tokens[0, seen.at].tolist()
            assert np.allclose(seen.confidence, step.confidence[0, seen.at], atol=1e-4)
            assert set(recording.commits[s]) <= set(seen.at)


def test_the_parts_of_a_step_add_up_to_it(recorded):
    for recording in recorded[2].values():
        total = np.sum(list(recording.split_ms.values()), axis=0)
        assert np.allclose(total, recording.step_ms, atol=0.05)
        assert min(recording.split_ms["pass"]) > 0


def test_token_ends_cut_the_text_into_its_tokens(recorded, model):
    for recording in recorded[2].values():
        tokens = recording.canvas[: len(recording.ends)]
        begins = [0, *recording.ends[:-1]]
        cut = [recording.text[a:b] for a, b in zip(begins, recording.ends, strict=True)]
        assert "".join(cut) == recording.text
        plain = [
            (text, recording.piece(i))
            for text, i in zip(cut, tokens, strict=True)
            if "\ufffd" not in recording.piece(i)
        ]
        assert all(text.strip() == piece.strip() or text == "" for text, piece in plain)


def test_a_batch_is_recorded_as_it_was_measured(compared, tmp_path):
    run = compared(tmp_path, "dkv", batch_size=2)
    recorder = Recorder(run, tmp_path, texts=1)
    list(recorder)
    assert {problem for problem, _ in recorder.file.found} == {run.experiment.problems[0].id}
    assert all(recording.same for recording in recorder.file.found.values())


def test_what_is_there_is_kept_and_what_is_missing_added(compared, tmp_path):
    run = compared(tmp_path, "dkv")
    results = (tmp_path / RESULTS).read_bytes()
    list(Recorder(run, tmp_path, texts=1))
    before = (tmp_path / FILE).read_bytes()
    assert list(Recorder(run, tmp_path, texts=1)) == []
    assert (tmp_path / FILE).read_bytes() == before
    with (tmp_path / FILE).open("ab") as stream:
        stream.write(b'{"kind":"recording","vers')  # killed while it was written
    again = Recorder(run, tmp_path, texts=1, drift=True)
    assert list(again) == ["none", "dkv"]
    assert (tmp_path / FILE).read_bytes().startswith(before)
    assert all(recording.drift is not None for recording in read_recordings(tmp_path / FILE)[1].values())
    assert len(list(Recorder(run, tmp_path, texts=2))) == 2
    assert (tmp_path / RESULTS).read_bytes() == results


def test_recordings_of_other_conditions_are_refused(compared, tmp_path):
    list(Recorder(compared(tmp_path, "dkv"), tmp_path, texts=1))
    (tmp_path / RESULTS).unlink()
    other = compared(tmp_path, "dkv", seed=1)
    with pytest.raises(UsageError, match=r"recordings of other conditions: seed was 0 and is 1 now; delete the file"):
        Recorder(other, tmp_path, texts=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version"),
        ({"length": 7}, "maps of shape"),
        ({"commits": [[2]]}, "lists that do not have the 2 steps"),
        ({"commits": [[0], []]}, "a position outside the generated rows"),
        ({"canvas": [1, 2, 3]}, "2 prompt and 3 generated tokens for 6 rows"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_line_that_is_no_recording_is_refused_by_number(made, tmp_path, change, message):
    import json

    given = made.conditions(made.entrant("none"))
    made.save(tmp_path, given, [made.result("none")], [made.recording("none")])
    head, line = (tmp_path / FILE).read_text().splitlines()
    (tmp_path / FILE).write_text(f"{head}\n{json.dumps(json.loads(line) | change)}\n")
    with pytest.raises(UsageError, match=f"line 2: not a recording of this version .*{message}"):
        read_recordings(tmp_path / FILE)


def test_a_folder_that_cannot_be_written_is_said(compared, tmp_path):
    run = compared(tmp_path / "a", "none", limit=1)
    (tmp_path / "a" / FILE).mkdir()
    with pytest.raises(UsageError, match=r"recordings\.jsonl.*(cannot be|directory)"):
        Recorder(run, tmp_path / "a", texts=1)
