import json
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer

from dcache import compare, generate
from dcache.models.loading import load_model
from dcache.models.tiny.data import choose_masks
from dcache.models.tiny.data_v import SPRITES, THINGS, Painter, SceneCanvases, scene_canvas, sprite
from dcache.models.tiny.llada_v import LLaDAVFormat, Tower
from dcache.models.tiny.measure_v import accuracy, answers
from dcache.models.tiny.optimizers import make_optimizers
from dcache.models.tiny.tokenizer import special_id
from dcache.models.tiny.train import Images, Objective
from dcache.models.tiny.train_v import RECIPE, Training, cell_rows, image_rows, main, parse, patch_rows
from dcache.models.transformer import Transformer
from dcache.models.vision import IMAGE, Vision, open_image
from dcache.tasks.scenes import Scenes, paint, place

SMALL = replace(RECIPE, n_layers=2, d_model=64, mlp_size=96, batch=8, warmup_steps=4)
TOWER = Tower(patch_size=16, tower_width=32, tower_layers=2, tower_heads=2, tower_mlp_size=48)
OPTIONS = [
    *("--workers", "0", "--device", "cpu", "--n-layers", "2", "--d-model", "64", "--mlp-size", "96", "--batch", "8"),
    *("--warmup-steps", "4", "--tower-width", "32", "--tower-layers", "2", "--tower-heads", "2"),
    *("--tower-mlp-size", "48", "--look", "1", "--problems", "1"),
]


@pytest.fixture(scope="module")
def layout() -> LLaDAVFormat:
    return LLaDAVFormat(TOWER)


@pytest.fixture(scope="module")
def tokenizer(layout: LLaDAVFormat) -> Tokenizer:
    return layout.train_tokenizer(0, RECIPE.vocab_size, n_problems=300)


@pytest.fixture
def training(layout: LLaDAVFormat, tokenizer: Tokenizer) -> Training:
    model = Transformer(layout.spec(SMALL, tokenizer)).init_random(0)
    vision = Vision(layout.vision_spec(SMALL, tokenizer)).init_random(0)
    at = layout.prompt(layout.reader(tokenizer), "<image>").index(IMAGE)
    return Training(model, vision, SMALL, at, Objective(0.5, torch.Generator().manual_seed(0)))


def batches(layout: LLaDAVFormat, tokenizer: Tokenizer, n: int, start: int = 0) -> list:
    return list(islice(SceneCanvases(layout, tokenizer, SMALL.batch, 0, start), n))


def save(training: Training, layout: LLaDAVFormat, tokenizer: Tokenizer, folder: Path) -> None:
    layout.save(training.model, tokenizer, SMALL, {}, folder, training.vision)


# Data


def test_a_batch_is_painted_as_the_tower_is_given_each_image(training, layout, tokenizer) -> None:
    numbers = torch.from_numpy(batches(layout, tokenizer, 1)[0][2]).long()
    pixels = Painter("cpu")(numbers)
    for i in range(len(numbers)):
        image = open_image(Scenes().problem("train", i, 0).images[0])
        (tiles,) = training.vision.tiles([image])
        assert tiles.grid == (1, 1)
        assert torch.equal(tiles.pixels(), pixels[[i, i]])


def test_every_thing_of_every_size_and_place_is_painted_as_in_the_task() -> None:
    rng, painter = Random(0), Painter("cpu")
    left = set(SPRITES)
    while left:
        placed = place(tuple(rng.choice([*THINGS, None]) for _ in range(9)), rng)
        left -= {(found.thing, found.size) for found in placed if found}
        numbers = torch.tensor([[sprite(found) for found in placed]])
        painted = ((painter(numbers)[0].permute(1, 2, 0) * 0.5 + 0.5) * 255).round().byte()
        assert np.array_equal(painted.numpy(), np.asarray(paint(placed)))
        assert [THINGS[i - 1] if i else None for i in painter.things(numbers)[0]] == [f and f.thing for f in placed]


def test_a_canvas_is_the_prompt_of_the_checkpoint_then_the_solution_and_padding(
    training, layout, tokenizer, tmp_path
) -> None:
    save(training, layout, tokenizer, tmp_path)
    model = load_model(tmp_path, device="cpu")
    for i, problem in enumerate(Scenes().problems("train", 12, seed=3)):
        prompt = layout.prompt(layout.reader(tokenizer), problem.prompt)
        tokens, n_prompt, at = scene_canvas(layout, tokenizer, Scenes().scene("train", i, 3), prompt)
        spliced = model.image_prompt(problem.prompt, problem.images)
        assert at == training.at == int(spliced.is_image.int().argmax())
        assert tokens[:n_prompt] == [t for t, seen in zip(spliced.tokens, spliced.is_image, strict=True) if not seen]
        end = tokens.index(special_id(tokenizer, layout.turn_end), n_prompt)
        assert tokenizer.decode(tokens[n_prompt:end]) == problem.solution
        assert set(tokens[end:]) == {special_id(tokenizer, layout.turn_end)}
        assert len(tokens) >= n_prompt + Scenes.gen_length


def test_the_template_is_rendered_as_the_checkpoint_says(layout, tokenizer, tmp_path) -> None:
    layout.save_tokenizer(tokenizer, tmp_path)
    messages = [{"role": "user", "content": "Hi there"}]
    rendered = layout.family.tokenizer(tmp_path).render(messages)
    assert layout.render("Hi there").endswith(rendered.removeprefix("<|startoftext|>"))


def test_a_later_start_continues_the_same_stream_of_scenes(layout, tokenizer) -> None:
    first, second = batches(layout, tokenizer, 2)
    assert not np.array_equal(first[2], second[2])
    (again,) = batches(layout, tokenizer, 1, start=SMALL.batch)
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(again, second, strict=True))


def test_the_words_of_the_task_fill_the_vocabulary_and_the_special_tokens_end_it(layout, tokenizer) -> None:
    assert tokenizer.get_vocab_size() == RECIPE.vocab_size
    n = len(layout.specials)
    ids = [special_id(tokenizer, token) for token in layout.specials]
    assert ids == list(range(RECIPE.vocab_size - n, RECIPE.vocab_size))
    longest = max(len(tokenizer.encode(p.solution).ids) for p in Scenes().problems("test", 100, seed=0))
    assert longest < Scenes.gen_length - 16


# The objective


@pytest.mark.parametrize("patch", [16, 12])
def test_the_rows_of_a_batch_of_images_are_those_of_each_alone(layout, tokenizer, patch: int) -> None:
    sizes = LLaDAVFormat(replace(TOWER, patch_size=patch))
    vision = Vision(sizes.vision_spec(SMALL, tokenizer)).init_random(1, std=0.2)
    images = [open_image(Scenes().problem("test", i, 0).images[0]) for i in range(3)]
    pixels = torch.cat([vision.tiles([image])[0].pixels()[:1] for image in images])
    side = 96 // patch
    together = image_rows(vision, patch_rows(vision, pixels))
    assert together.shape == (3, side * side + side * (side + 1), SMALL.d_model)
    torch.testing.assert_close(together, torch.stack([vision.features([image])[0] for image in images]))


def test_the_loss_of_a_scene_is_that_of_the_checkpoint_on_the_spliced_prompt(
    training, layout, tokenizer, tmp_path
) -> None:
    """By hand: the cross entropy of every counted token under the row that the decoder reads."""
    save(training, layout, tokenizer, tmp_path)
    layout.restore(training.model, tmp_path, training.vision)  # rounded
    loaded = load_model(tmp_path, device="cpu")
    tokens, n_prompt, sprites = (torch.from_numpy(part).long() for part in batches(layout, tokenizer, 1)[0])
    images = Images(image_rows(training.vision, patch_rows(training.vision, Painter("cpu")(sprites))), training.at)
    found, _ = Objective(0.5, torch.Generator().manual_seed(7))(training.model, tokens, n_prompt, images)

    masked, counted = choose_masks(n_prompt, tokens.shape[1], 0.5, torch.Generator().manual_seed(7))
    expected = []
    for b in range(len(tokens)):
        problem = Scenes().problem("train", b, 0)
        spliced = loaded.image_prompt(problem.prompt, problem.images)
        response = tokens[b, n_prompt[b] :].masked_fill(masked[b, n_prompt[b] :], loaded.spec.mask_id)
        rows = torch.cat([spliced.embed(loaded.transformer.embedding), loaded.transformer.embed(response)])
        with torch.no_grad():
            logits = loaded.transformer(embeddings=rows[None])[0, len(spliced.tokens) :]
        here = counted[b, n_prompt[b] :]
        expected.append(-logits.log_softmax(-1)[here, tokens[b, n_prompt[b] :][here]].mean())
    torch.testing.assert_close(found.detach(), torch.stack(expected).mean())


def test_every_weight_is_trained_by_one_optimizer_and_gets_a_gradient(training, layout, tokenizer) -> None:
    named = [*training.model.named_parameters(), *training.vision.named_parameters()]
    optimizers = make_optimizers(training.model, SMALL, training.vision)
    held = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(id(p) for _, p in named)
    before = {name: p.detach().clone() for name, p in named}
    for batch in batches(layout, tokenizer, 2):
        training.update(batch, 0.0)
    assert [name for name, p in named if torch.equal(p, before[name])] == []


def test_a_few_training_steps_lower_the_loss(training, layout, tokenizer) -> None:
    losses = [float(training.update(batch, 0.0)[0]) for batch in batches(layout, tokenizer, 20)]
    assert sum(losses[-4:]) / 4 < losses[0] - 2


def test_the_rows_of_a_cell_are_those_of_its_patches() -> None:
    vision_rows = torch.randn(2, 36, 5)
    normed = torch.nn.functional.rms_norm(vision_rows, (5,))
    found = cell_rows(vision_rows)
    for cell in range(9):
        top, left = 2 * (cell // 3), 2 * (cell % 3)
        mine = [6 * (top + y) + left + x for y in range(2) for x in range(2)]
        torch.testing.assert_close(found[:, cell], normed[:, mine].mean(1))


def test_the_classifier_learns_to_name_what_cells_hold(training, layout, tokenizer) -> None:
    named = [float(training.update(batch, 0.0)[1]) for batch in batches(layout, tokenizer, 25)]
    assert named[0] == pytest.approx(np.log(len(THINGS) + 1), abs=1e-3)
    assert sum(named[-5:]) / 5 < named[0] - 0.5


# The checkpoint


def test_it_is_saved_with_the_published_names_and_loads_as_any_other(training, layout, tokenizer, tmp_path) -> None:
    save(training, layout, tokenizer, tmp_path)
    loaded = load_model(tmp_path, device="cpu")
    assert (loaded.spec, loaded.vision.spec) == (training.model.spec, training.vision.spec)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    tower = "model.vision_tower.vision_tower.vision_model"
    assert tuple(tensors[f"{tower}.embeddings.patch_embedding.weight"].shape) == (32, 3, 16, 16)
    assert tuple(tensors["model.layers.1.self_attn.k_proj.weight"].shape) == (64, 64)
    assert {"model.image_newline", "model.mm_projector.2.bias", "lm_head.weight"} < set(tensors)
    for mine, theirs in ((training.model, loaded.transformer), (training.vision, loaded.vision)):
        for (name, p), q in zip(mine.named_parameters(), theirs.parameters(), strict=True):
            assert torch.equal(p.detach().bfloat16().float(), q), name


def test_what_it_generates_depends_on_the_image(training, layout, tokenizer, tmp_path) -> None:
    training.vision.init_random(0, std=0.3)
    training.model.init_random(0, std=0.3)
    save(training, layout, tokenizer, tmp_path)
    model = load_model(tmp_path, device="cpu")
    problems = Scenes().problems("test", 2, seed=0)
    texts = [generate(model, problems[0].prompt, images=p.images, gen_length=8, block_length=8).text for p in problems]
    assert texts[0] != texts[1]
    compared = compare(model, policies="dkv", task="scenes", limit=1, gen_length=8, block_length=8)
    assert len(compared.standings) == 2


def test_what_measures_a_model_answers_as_the_engine_does(training, layout, tokenizer, tmp_path) -> None:
    training.vision.init_random(0, std=0.3)
    training.model.init_random(0, std=0.3)
    save(training, layout, tokenizer, tmp_path)
    model = load_model(tmp_path, device="cpu")
    problems = Scenes().problems("test", 2, seed=0)
    for grey in (False, True):
        shown = [[Image.new("RGB", (96, 96), (128, 128, 128))] if grey else problem.images for problem in problems]
        outputs = generate(model, [problem.prompt for problem in problems], images=shown, gen_length=64)
        assert [output.text for output in outputs] == answers(model, problems, grey)


def test_accuracy_counts_every_kind_of_question(training, layout, tokenizer, tmp_path) -> None:
    save(training, layout, tokenizer, tmp_path)
    model = load_model(tmp_path, device="cpu")
    asked = Scenes().problems("test", 20, seed=0)
    problems = [next(problem for problem in asked if begin in problem.prompt) for begin in ("How many", "the sum")]
    for grey in (False, True):
        shares = accuracy(model, problems, grey)
        assert set(shares) == {"all", "count", "sum"}
        assert set(shares.values()) <= {0.0, 0.5, 1.0}


# The command


def test_an_interrupted_training_continues_where_it_was_saved(tmp_path, monkeypatch, capsys) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    monkeypatch.setattr("dcache.models.tiny.train_v.measure", lambda *given, **more: {"image": {"all": 0.0}})
    main(["--out", str(whole), "--steps", "6", *OPTIONS])
    update = Training.update

    def interrupted(self: Training, batch, progress: float) -> torch.Tensor:
        if self.step == 4:
            raise KeyboardInterrupt
        return update(self, batch, progress)

    every = ["--steps", "6", "--every", "0", *OPTIONS]  # saved after each step
    monkeypatch.setattr(Training, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(["--out", str(broken), *every])
    monkeypatch.setattr(Training, "update", update)
    assert (broken / "state.pt").exists()
    with pytest.raises(SystemExit, match="other options"):
        main(["--out", str(broken), *every, "--seed", "5"])
    main(["--out", str(broken), *every])
    assert "continued from step 4" in capsys.readouterr().out
    assert not (broken / "state.pt").exists()
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (broken, whole))
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name
    record = json.loads((broken / "training.json").read_text())
    assert record["steps"] == 6
    assert set(record["accuracy_by_step"]) == {"1", "2", "3", "5", "6"}  # 4 came after its state was saved


def test_a_training_starts_from_a_checkpoint_measures_itself_and_says_how_it_was_made(tmp_path, capsys) -> None:
    main(["--out", str(tmp_path / "first"), "--steps", "1", *OPTIONS])
    more = ["--init", str(tmp_path / "first"), "--seed", "1", "--steps", "1", *OPTIONS]
    main(["--out", str(tmp_path / "second"), *more])
    assert "accuracy on 1 test scenes, grey: all 0.000" in capsys.readouterr().out
    record = json.loads((tmp_path / "second" / "training.json").read_text())
    assert record["continued_from"]["steps"] == 1
    assert record["tower"] == asdict(TOWER)
    assert record["accuracy"]["image"]["all"] in (0.0, 1.0)
    model = load_model(tmp_path / "second", device="cpu")
    assert record["n_parameters"] == sum(p.numel() for m in (model.transformer, model.vision) for p in m.parameters())


def test_the_checkpoint_of_the_recipe_is_of_five_to_seven_million_weights_and_below_16_mib(capsys) -> None:
    given, recipe, tower = parse(["--out", "x", "--seconds", "480", "--patch-size", "8"])
    assert (given.every, recipe, tower) == (120, RECIPE, Tower(patch_size=8))
    layout = LLaDAVFormat(Tower())
    tokenizer = layout.train_tokenizer(0, RECIPE.vocab_size, n_problems=20)
    vision = Vision(layout.vision_spec(RECIPE, tokenizer), "meta")
    total = layout.spec(RECIPE, tokenizer).n_parameters + sum(p.numel() for p in vision.parameters())
    assert 5e6 < total < 7e6
    assert 2 * total < 16 * 2**20
    with pytest.raises(SystemExit):
        parse(["--out", "x"])
    assert "--steps, --seconds or both" in capsys.readouterr().err
