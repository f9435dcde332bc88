"""Benchmarks of prompts with images, on a small random LLaDA-V and a CPU."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dcache
from dcache.bench import clock, images
from dcache.bench.e2e import floor_of, shown, tasks
from dcache.bench.images import First, Server, latency, requests
from dcache.bench.prompts import BEFORE, pictures, places, random_prompts, with_images
from dcache.bench.reports import STAGES, EndToEndSettings, ImageReport, ImageSettings, StageResult, read
from dcache.cli import main
from dcache.models.vision import IMAGE, Tiles, best_canvas

pytest.importorskip("PIL.Image")
MODELS = Path(__file__).resolve().parents[1] / "golden" / "models"
TEXT_ONLY, SEEING = str(MODELS / "llada_mha"), str(MODELS / "llada_v")
SMALL = ["--prompt", "6", "--gen", "4", "--block", "4", "--repeats", "1", "--device", "cpu"]
SETTINGS = ImageSettings(sizes=(18,), prompt=6, gen=4, block=4, repeats=2)


@pytest.fixture(scope="module")
def model() -> dcache.Model:
    return dcache.load_model(SEEING, device="cpu", dtype="float32")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(clock, "LEAST", 1)
    monkeypatch.setattr(clock, "MOST", 1)


@pytest.mark.parametrize(
    ("size", "tiles", "rows"),
    [
        (64, 2, 1485),
        (384, 2, 1485),
        (385, 5, 3699),
        (768, 5, 3699),
        (769, 10, 3699),
        (1152, 10, 3699),
        (2304, 37, 3699),
    ],
)
def test_the_documented_sizes_give_the_documented_rows(size, tiles, rows):
    vision = dcache.load_model("llada-v-8b:random", device="meta").vision
    edge, side = vision.spec.image_size, vision.spec.side
    across, down = (x // edge for x in best_canvas((size, size), vision.spec.canvases))
    assert across * down + 1 == tiles
    cut = Tiles(torch.empty(tiles, 3, edge, edge, device="meta"), (size, size), (across, down))
    assert len(vision.merge(torch.empty(tiles, side**2, 4096, device="meta"), cut)) == rows
    alone = Tiles(torch.empty(1, 3, edge, edge, device="meta"), (size, size), None)
    assert len(vision.merge(torch.empty(1, side**2, 4096, device="meta"), alone)) == 730  # beside another image
    table = (MODELS.parents[2] / "docs" / "reference" / "cli.md").read_text()
    assert f"{rows:,} | {tiles} |" in table
    assert "| 730 | 1 |" in table


def test_pictures_differ_from_each_other_and_come_again_with_their_seed():
    drawn = [np.asarray(image) for seed in (1, 1, 2) for image in pictures(20, 2, seed)]
    assert all(image.shape == (20, 20, 3) for image in drawn)
    assert [image.tobytes() for image in drawn[:2]] == [image.tobytes() for image in drawn[2:4]]
    assert len({image.tobytes() for image in drawn}) == 4


def test_images_stand_behind_the_first_tokens():
    assert places([1, 2, 3], 2) == [1, IMAGE, IMAGE, 2, 3]
    assert places(range(100), 1).index(IMAGE) == BEFORE
    assert places([1], 1) == [IMAGE, 1]


def test_a_prompt_has_its_text_and_what_generate_makes_of_its_images(model):
    (image,), (ids,) = pictures(30, 1, 0), random_prompts(model.spec, 6, 1, 0)
    prompt = with_images(model, ids, [image])
    spliced = model.image_prompt("what", [image])
    (span,) = prompt.embeddings.spans
    assert [*prompt.ids[: span.start], *prompt.ids[span.stop :]] == ids
    assert torch.equal(prompt.embeddings.values, spliced.embeddings)
    assert span.key == spliced.keys[0]
    assert prompt.embeddings.positions.tolist() == list(range(span.start, span.stop))


def test_every_line_of_e2e_has_the_images_of_its_sequences_encoded_once(model, monkeypatch):
    encoded, encode = [], type(model.vision).encode
    monkeypatch.setattr(type(model.vision), "encode", lambda v, tiles: encoded.append(tiles) or encode(v, tiles))
    settings = EndToEndSettings(prompt=6, gen=4, block=4, batch=(1, 2), images=2, image_size=18)
    lines = shown(model, tasks(["none", "dkv"], settings))
    states = [line.state(model.spec) for line in lines]
    assert len(encoded) == 2 * 2
    assert {len(tiles.raw) for tiles in encoded} == {1}
    rows = 2 * (model.vision.spec.side**2 + 1)
    assert [line.image_rows for line in lines] == [rows] * 4
    assert [line.canvas for line in lines] == [6 + rows + 4] * 4
    assert [state.lengths.tolist() for state in states] == [[10 + rows], [10 + rows], [10 + rows] * 2, [10 + rows] * 2]
    assert all((state.embedded.sum(1) == rows).all() for state in states)
    keys = [span.key for given in states[2].embeddings for span in given.spans]
    assert len(set(keys)) == 4
    assert floor_of(model, settings, rows).exact == {10 + rows, 2 * (10 + rows)}


def test_lines_without_images_stay_as_they_are(model):
    lines = tasks(["none"], EndToEndSettings(prompt=6, gen=4, block=4))
    assert shown(model, lines) == lines
    assert (lines[0].image_rows, lines[0].canvas) == (0, 10)


def test_e2e_counts_image_rows_as_rows_of_the_canvas(capsys, tmp_path):
    flags = ["--images", "1", "--image-size", "30", "--batch", "1,2", "--policies", "none", "--out", str(tmp_path)]
    assert main(["bench", "e2e", SEEING, *SMALL, *flags]) == 0
    assert "prompt 6, 1 x 30 pixels (88 rows), gen 4" in capsys.readouterr().out
    report = read(tmp_path / "e2e-llada_v.json")
    assert (report.settings.images, report.settings.image_size, report.image_rows) == (1, 30, 88)
    assert [(r.rows, r.row_share) for r in report.results] == [(98, 1), (196, 1)]
    assert {98, 196} <= {point.rows for point in report.floor}


def test_images_writes_stages_and_requests(capsys, tmp_path):
    flags = ["--sizes", "18,30", "--policies", "none,vlcache(ratio=0)", "--out", str(tmp_path)]
    assert main(["bench", "images", SEEING, *SMALL, *flags]) == 0
    out, err = capsys.readouterr()
    names = [f"{name}, {n} x {n}: done" for name in ("none", "vlcache(ratio=0.0)") for n in (18, 30)]
    assert sorted(err.splitlines()) == sorted([*names, "stages, 18 x 18: done", "stages, 30 x 30: done"])
    assert "Time to first commit; prompt 6, gen 4, block 4, 1 of each" in out
    report = read(tmp_path / "images-llada_v.json")
    assert isinstance(report, ImageReport)
    first, second, *asked = report.results
    assert [(r.size, r.tiles, r.rows) for r in (first, second)] == [(18, 2, 36), (30, 5, 88)]
    assert all(ms > 0 for r in (first, second) for ms in r.times)
    assert first.sum_ms == pytest.approx(sum(first.times))
    assert [(r.policy, r.image_rows, r.canvas) for r in asked[:2]] == [("none", 36, 46), ("vlcache(ratio=0.0)", 36, 46)]
    assert all(r.new.n == r.again.n == 1 and r.new.p50 > 0 for r in asked)
    assert (asked[0].new.rows, asked[0].again.rows, asked[1].again.rows) == (46, 46, 10)
    assert "| 18 x 18 | 2 | 36 |" in (tmp_path / "images-llada_v.md").read_text()
    assert main(["bench", "plot", str(tmp_path / "images-llada_v.json")]) == 2
    assert "`bench images` has no steps to draw" in capsys.readouterr().err


def test_new_images_are_encoded_and_known_ones_are_not_with_another_text_each_time(model, monkeypatch):
    texts, asked = [], Server.first_commit

    def noting(server, ids, image):
        before = server.features.statistics["hits"]
        found = asked(server, ids, image)
        texts.append((tuple(ids), image.tobytes(), server.features.statistics["hits"] - before))
        return found

    monkeypatch.setattr(Server, "first_commit", noting)
    found = requests(model, SETTINGS, "vlcache(ratio=0)", 18)
    assert len(texts) == 2 * (2 + SETTINGS.repeats)  # without graphs two pairs are all the warming up
    assert len({ids for ids, _, _ in texts}) == len(texts)
    assert len({image for _, image, _ in texts}) == len(texts) // 2
    assert [hit for _, _, hit in texts] == [0, 1] * (len(texts) // 2)
    assert (found.image_rows, found.canvas, found.recorded) == (36, 46, 0)
    assert found.again.rows < found.new.rows


def test_pairs_go_on_outside_the_clock_until_one_records_nothing(monkeypatch):
    captures = iter([0, 0, 2, 2, 2, 2, 2, 2, 2, 2])  # two requests a pair: eager, recorded, replayed, and measured

    class Fake:
        image_rows, canvas = 36, 46

        def __init__(self, *given):
            self.engine = SimpleNamespace(captured=0, graphs=True)
            self.asked = []

        def first_commit(self, ids, image):
            self.engine.captured = next(captures)
            self.asked.append(image)
            made.append(self)
            return First(float(len(self.asked)), 1, 46.0)

    made = []
    monkeypatch.setattr(images, "Server", Fake)
    spec = SimpleNamespace(vocab_size=50, mask_id=1, eos_id=2, end_ids=())
    found = requests(SimpleNamespace(spec=spec), SETTINGS, "none", 18)
    assert len(made[-1].asked) == 2 * (3 + SETTINGS.repeats)
    assert (found.new.n, found.new.least, found.new.most, found.again.most, found.recorded) == (2, 7, 9, 10, 0)


def test_a_latency_is_the_median_between_the_extremes():
    found = latency([First(4.0, 1, 10.0), First(1.0, 2, 20.0), First(2.0, 1, 12.0)])
    assert (found.n, found.p50, found.least, found.most) == (3, 2.0, 1.0, 4.0)
    assert (found.passes, found.rows) == (pytest.approx(1.333), 14.0)


def test_a_line_that_fails_says_why_and_the_next_one_runs(capsys, tmp_path):
    flags = ["--sizes", "18", "--policies", "vlcache(inner=dllm-cache),none", "--out", str(tmp_path)]
    assert main(["bench", "images", SEEING, *SMALL, *flags]) == 0
    assert "vlcache(inner=dllm-cache), 18 x 18: " in capsys.readouterr().out
    stages, failed, none = read(tmp_path / "images-llada_v.json").results
    assert "cannot run like this" in failed.failure
    assert stages.failure is none.failure is None
    blank = StageResult(size=18, failure="out of memory")
    assert (blank.times, blank.sum_ms) == ([None] * len(STAGES), None)


def refused(capsys, *arguments):
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_what_cannot_be_is_refused(capsys, monkeypatch):
    assert "takes no images: it has no vision part" in refused(capsys, "images", TEXT_ONLY, *SMALL)
    assert "takes no images" in refused(capsys, "e2e", TEXT_ONLY, *SMALL, "--policies", "none", "--images", "1")
    many = ("--policies", "none", "--images", "200", "--image-size", "18")
    assert "prompt 0 has 3406 tokens" in refused(capsys, "e2e", SEEING, *SMALL, *many)
    monkeypatch.setattr("dcache.bench.commands.load_model", None)
    assert "unknown policy 'nome'" in refused(capsys, "images", SEEING, "--policies", "nome")
    assert "--sizes is '18;30'" in refused(capsys, "images", SEEING, "--sizes", "18;30")
    assert "sizes" in refused(capsys, "images", SEEING, "--sizes", "9000")
