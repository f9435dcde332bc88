"""Images of a prompt, from a file or a task to the tokens of every policy; on a random model."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import dcache
from dcache import Problem, ReuseCache, Task, UsageError, compare, generate, load_model
from dcache.calls import split_list
from dcache.cli import main
from dcache.compare import Experiment, Run
from dcache.generate import image_prompt
from dcache.plugins import make_policy
from dcache.regions import REGIONS
from dcache.tasks.scenes import Scenes

Image = pytest.importorskip("PIL.Image")
FOLDER = Path(__file__).parent / "golden" / "models" / "llada_v"
POLICIES = (
    "elastic(gamma=0.9),dkv(interval=3),d2(current_k=3),fast-dllm,sparse-dllm,spa(rank=4),dllm-cache,es-dllm,suffix"
)
SMALL = {"gen_length": 8, "block_length": 4, "after_end": "decode"}


@pytest.fixture(scope="module")
def model() -> dcache.Model:
    return dcache.load_model(FOLDER, device="cpu", dtype="float32")


def picture(seed: int, size: tuple[int, int] = (20, 14)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


class Pictures(Task):
    """Prompts with two images, one, and none."""

    name, gen_length = "pictures", 8

    def problems(self, split, limit, seed):
        two = Problem("two", "<image><image> are these alike", images=(picture(1), picture(2)))
        return [two, Problem("one", "<image> what", images=(picture(3, (30, 10)),)), Problem("none", "what")]

    def score(self, problem, text):
        return None


def test_every_policy_decodes_prompts_with_images_and_a_batch_is_as_good_as_single_runs(model):
    single, batch = (compare(model, POLICIES, Pictures(), batch_size=n, **SMALL).results for n in (1, 3))
    tokens = [{(r.problem, r.policy): r.canvas for r in found} for found in (single, batch)]
    assert len(tokens[0]) == 3 * (1 + len(split_list(POLICIES)))
    assert tokens[0] == tokens[1]


def test_an_image_decides_what_is_decoded_and_the_same_image_the_same(model):
    def canvas(images):
        return dcache.generate(model, "what is this", "elastic", images=images, **SMALL).canvas

    assert canvas([picture(1)]) == canvas([picture(1)])
    prompts = [image_prompt(model, "what is this", [picture(seed)]) for seed in (1, 2)]
    assert prompts[0].ids == prompts[1].ids
    assert (prompts[0].embeddings.values != prompts[1].embeddings.values).any()


def test_an_exact_configuration_commits_what_no_cache_does(model):
    def canvas(policy):
        return dcache.generate(model, "what", policy, images=[picture(4)], **SMALL).canvas

    assert canvas("elastic(refresh=always)") == canvas("dkv(interval=1)") == canvas("none")


def test_several_prompts_have_a_list_of_images_each(model):
    texts, images = ["what", "which", "how"], [[picture(1)], [], [picture(2), picture(3)]]
    together = dcache.generate(model, texts, "dkv", images=images, batch_size=3, **SMALL)
    alone = [dcache.generate(model, [t], "dkv", images=[i], **SMALL)[0] for t, i in zip(texts, images, strict=True)]
    assert [x.canvas for x in together] == [x.canvas for x in alone]


@pytest.mark.parametrize(
    ("prompts", "images", "message"),
    [
        ("what", ["missing.png"], "does not exist"),
        ("<image> and <image>", [picture(1)], "2"),
        (["a", "b"], [[picture(1)]], "1 lists for 2 prompts"),
        ([[1, 2, 3]], [[picture(1)]], "images go with a text"),
    ],
)
def test_images_that_cannot_be_are_refused(model, prompts, images, message):
    with pytest.raises(UsageError, match=message):
        dcache.generate(model, prompts, images=images, **SMALL)


def test_the_command_line_takes_images_and_files_that_name_them(capsys, tmp_path):
    picture(5).save(tmp_path / "a.png")
    lines = [{"prompt": "<image> what", "images": ["a.png"]}, {"prompt": "what"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = ["--model", str(FOLDER), "--device", "cpu", "--gen-length", "8", "--block-length", "4"]
    assert main(["generate", "what", "--image", str(tmp_path / "a.png"), *flags]) == 0
    one, told = capsys.readouterr()
    assert re.search(r"% of the rows \(image \d+ %, text \d+ %, generated \d+ %\), ", told)
    assert main(["generate", "--prompts", str(tmp_path / "p.jsonl"), *flags]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["compare", "--policies", "dkv", "--prompts", str(tmp_path / "p.jsonl"), *flags]) == 0
    assert "of all" in capsys.readouterr().out
    assert main(["generate", "--prompts", str(tmp_path / "p.jsonl"), "--image", "a.png", *flags]) == 2
    assert "--image goes with one prompt" in capsys.readouterr().err
    assert main(["generate", "what", "--image", str(tmp_path / "a.png"), "--gen-length", "8"]) == 2
    assert "takes no images" in capsys.readouterr().err
    assert isinstance(one, str)


def test_results_of_another_image_are_not_taken_over(model, tmp_path):
    class Changed(Pictures):
        def problems(self, split, limit, seed):
            return [Problem("one", "<image> what", images=(picture(9, (30, 10)),))]

    class First(Pictures):
        def problems(self, split, limit, seed):
            return [Problem("one", "<image> what", images=(picture(3, (30, 10)),))]

    dcache.compare(model, ["dkv"], First(), out=tmp_path, **SMALL)
    with pytest.raises(UsageError, match="another prompt or answer of problem 'one'"):
        dcache.compare(model, ["dkv"], Changed(), out=tmp_path, **SMALL)


def test_an_image_in_the_feature_cache_is_not_encoded_again_and_the_tokens_stay(model, monkeypatch):
    features, encoded, encode = ReuseCache(2**20), [], type(model.vision).encode

    def counting(vision, tiles):
        encoded.append(tiles)
        return encode(vision, tiles)

    monkeypatch.setattr(type(model.vision), "encode", counting)
    for images in ([picture(1)], [picture(1)], [picture(2), picture(1)], [picture(1), picture(2)]):
        canvas = [dcache.generate(model, "what", images=images, features=f, **SMALL).canvas for f in (features, None)]
        assert canvas[0] == canvas[1]
    assert len(encoded) == 6 + 3  # picture 1 alone is cut into tiles, beside another one squared
    assert (features.statistics["hits"], features.statistics["misses"]) == (3, 3)


def test_rows_from_the_feature_cache_have_the_same_bits(model):
    features = ReuseCache(2**20)
    values = [image_prompt(model, "what", [picture(1)], f).embeddings.values for f in (features, features, None)]
    assert features.statistics["hits"] == 1
    assert (values[1] == values[2]).all()


def test_each_image_of_a_prompt_is_a_span_of_its_own(model):
    prompt = image_prompt(model, "<image><image> and <image>", [picture(1), picture(2), picture(1)])
    first, second, third = prompt.embeddings.spans
    assert first.stop == second.start < second.stop < third.start
    assert first.key == third.key != second.key
    assert [p for span in prompt.embeddings.spans for p in range(*span[:2])] == prompt.embeddings.positions.tolist()


def test_regions_are_the_images_the_rest_of_the_prompt_and_the_generation(model):
    prompt = image_prompt(model, "<image><image> are these alike", [picture(1), picture(2)])
    trace = dcache.generate(
        model, "<image><image> are these alike", "fast-dllm", images=[picture(1), picture(2)], **SMALL
    ).trace
    image, text, generated = (trace.regions[name] for name in REGIONS)
    n = len(prompt.embeddings.positions)
    assert (image.rows, text.rows, generated.rows) == (n, len(prompt) - n, 8)
    assert image.refreshes == text.refreshes == 2  # each block begins with a pass of all rows
    assert image.row_share == text.row_share == 2 / trace.nfe < generated.row_share
    assert dcache.generate(model, "are these alike", "fast-dllm", **SMALL).trace.regions["image"].rows == 0


def test_an_image_that_comes_again_costs_fewer_image_rows_alone(model):
    policy = make_policy("vlcache(inner=fast-dllm,fill=first,ratio=0.1)")
    runs = [dcache.generate(model, "what is this", policy, images=[picture(1)], **SMALL).trace for _ in range(2)]
    first, again = (trace.regions for trace in runs)
    assert again["image"].row_layers < first["image"].row_layers
    assert again["image"].refreshes < first["image"].refreshes
    assert again["text"].refreshes == first["text"].refreshes


def test_the_table_tells_regions_apart_where_a_prompt_has_an_image(model):
    comparison = dcache.compare(model, ["fast-dllm"], Pictures(), **SMALL)
    table, told = comparison.table(), comparison.by_region()
    assert told in table
    titles, units, none, cached = told.splitlines()
    assert titles.split() == ["policy", *(name for name in REGIONS for _ in range(3))]
    assert units.split() == ["rows", "of", "all", "refreshes"] * 3
    assert none.split().count("100") == 3
    standing = comparison.standings[1].regions
    assert standing["image"].refreshes == 2  # mean over the two problems with images
    assert 0 < standing["image"].row_share == standing["image"].refreshed_share < 1
    assert sum(part.of_rows for part in standing.values()) == pytest.approx(1)
    assert sum(part.of_refreshed for part in standing.values()) == pytest.approx(1)
    assert cached.split()[1] == f"{100 * standing['image'].row_share:.0f}"


def test_the_table_of_texts_alone_has_no_regions_and_python_has_two(model):
    class Texts(Pictures):
        def problems(self, split, limit, seed):
            return [Problem("none", "what")]

    comparison = dcache.compare(model, ["dkv"], Texts(), **SMALL)
    assert "image" not in comparison.table()
    assert comparison.by_region().splitlines()[0].split() == ["policy", *["text"] * 3, *["generated"] * 3]
    image = comparison.standings[0].regions["image"]
    assert (image.row_share, image.of_rows, image.refreshes) == (None, 0, None)


def test_without_a_task_a_model_that_reads_images_is_compared_on_scenes() -> None:
    model, blind = (load_model(name, device="cpu") for name in ("tiny-llada-v", "tiny-llada"))
    experiment = Experiment([], limit=2)
    assert (experiment.task.name, experiment.settings.gen_length) == ("gsm-mini", 96)
    chosen = Run(experiment, model).experiment
    assert (chosen.task.name, chosen.settings.gen_length) == ("scenes", 64)
    assert [len(problem.images) for problem in chosen.problems] == [1, 1]
    assert Run(Experiment([], "gsm-mini", limit=2), model).experiment.task.name == "gsm-mini"
    assert Run(experiment, blind).experiment is experiment


def test_the_shipped_model_answers_with_the_image_and_not_without() -> None:
    model, problems = load_model("tiny-llada-v", device="cpu"), Scenes().problems("test", 4, 0)
    compared = compare(model, "elastic", limit=4, batch_size=4)
    assert [row.accuracy for row in compared.standings] == [1.0, 1.0]
    grey = Image.new("RGB", (96, 96), (128, 128, 128))
    outputs = generate(model, [p.prompt for p in problems], images=[[grey]] * 4, gen_length=64, policy="none")
    assert sum(bool(Scenes().score(p, out.text)) for p, out in zip(problems, outputs, strict=True)) <= 1


def test_the_size_of_a_model_counts_its_vision_part() -> None:
    seeing, blind = (load_model(name, device="cpu") for name in ("tiny-llada-v", "tiny-llada"))
    assert seeing.n_parameters == 6_071_808
    assert blind.n_parameters == blind.spec.n_parameters
