import json
from dataclasses import replace
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from dcache.decode import decode as decode_with_engine
from dcache.engine import Engine
from dcache.errors import ModelError
from dcache.models.loading import load_model
from dcache.models.tiny import NAMES, folder
from dcache.models.tiny.data import Canvases, canvases, choose_masks
from dcache.models.tiny.formats import TOWER, Format
from dcache.models.tiny.measure import accuracy, decode, rounded
from dcache.models.tiny.optimizers import Muon, clip_scores, orthogonalize
from dcache.models.tiny.recipe import RECIPES, Recipe
from dcache.models.tiny.tokenizer import special_id
from dcache.models.tiny.train import FORMATS, Objective, block_forward, parse, train
from dcache.models.transformer import ModelSpec, Transformer
from dcache.policies.none import NoCache
from dcache.state import State
from dcache.tasks.gsm_mini import GsmMini
from dcache.unmasking.confidence import LowConfidence

SHIPPED = [name for name in NAMES if not (folder(name) / TOWER).exists()]
"""Those of text alone, which this training made."""

SMALL = {"n_layers": 2, "d_model": 64, "mlp_size": 96, "batch": 8, "warmup_steps": 4}
SMALL_RECIPES = {
    "llada": replace(RECIPES["llada"], **SMALL),
    "dream": replace(RECIPES["dream"], **SMALL, heads_per_kv=2),
}


@pytest.fixture(scope="module", params=FORMATS)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def recipe(family: str) -> Recipe:
    return SMALL_RECIPES[family]


@pytest.fixture(scope="module")
def layout(family: str) -> Format:
    return FORMATS[family]


@pytest.fixture(scope="module")
def tokenizer(layout: Format) -> Tokenizer:
    return layout.train_tokenizer(seed=0, n_problems=300)


@pytest.fixture
def model(layout: Format, recipe: Recipe, tokenizer: Tokenizer) -> Transformer:
    model = Transformer(layout.spec(recipe, tokenizer)).init_random(0)
    for block in model.blocks():
        if block.qkv_bias is not None:
            torch.nn.init.normal_(block.qkv_bias, std=0.1, generator=torch.Generator().manual_seed(0))
    return model


def test_a_few_training_steps_lower_the_loss(layout, recipe, model, tokenizer):
    batches = iter(Canvases(layout, tokenizer, recipe.batch, seed=0))
    held_out = [torch.from_numpy(part).long() for part in next(iter(Canvases(layout, tokenizer, 32, seed=9)))]

    def loss():
        with torch.no_grad():
            return float(Objective(0.5, torch.Generator().manual_seed(0))(model, *held_out)[0])

    before = loss()
    biases = [block.qkv_bias.clone() for block in model.blocks() if block.qkv_bias is not None]
    record = train(model, batches, recipe, n_steps=12, seconds=None, compiled=False)
    assert record["steps"] == 12
    assert loss() < before - 0.3
    assert not any(torch.equal(b.qkv_bias, old) for b, old in zip(model.blocks(), biases, strict=False))


def test_the_loss_of_a_position_is_that_of_the_row_that_predicts_it(model, tokenizer, layout):
    """By hand: the cross entropy of every counted position under the row that the decoder reads."""
    tokens, n_prompt = (torch.from_numpy(x).long() for x in next(iter(Canvases(layout, tokenizer, 3, seed=1))))
    masked, counted = choose_masks(n_prompt, tokens.shape[1], 0.5, torch.Generator().manual_seed(7))
    logits = model(tokens.masked_fill(masked, model.spec.mask_id)).log_softmax(-1)
    expected = torch.stack(
        [
            torch.stack([-logits[b, p - model.spec.shift, tokens[b, p]] for p in counted[b].nonzero()[:, 0]]).mean()
            for b in range(3)
        ]
    ).mean()
    found, _ = Objective(0.5, torch.Generator().manual_seed(7))(model, tokens, n_prompt)
    torch.testing.assert_close(found, expected)


def test_a_saved_checkpoint_loads_as_any_other_and_reads_back(layout, recipe, family, model, tokenizer, tmp_path):
    layout.save(model, tokenizer, recipe, {"seed": 0}, tmp_path)
    loaded = load_model(tmp_path, device="cpu")
    assert loaded.spec == model.spec
    assert loaded.spec.family == family
    again = Transformer(model.spec).init_random(1)
    layout.restore(again, tmp_path)
    copies = zip(again.parameters(), loaded.transformer.parameters(), rounded(model).parameters(), strict=True)
    for mine, theirs, original in copies:
        assert torch.equal(mine, original)
        assert torch.equal(theirs, original)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}


def test_llada_is_saved_with_the_official_names_and_shapes(tmp_path):
    recipe, layout = SMALL_RECIPES["llada"], FORMATS["llada"]
    tokenizer = layout.train_tokenizer(0, n_problems=300)
    model = Transformer(layout.spec(recipe, tokenizer)).init_random(0)
    root, d, m, v = "model.transformer.", recipe.d_model, recipe.mlp_size, recipe.vocab_size
    expected = {f"{root}wte.weight": (v, d), f"{root}ln_f.weight": (d,), f"{root}ff_out.weight": (v, d)}
    for i in range(recipe.n_layers):
        shapes = {"attn_norm": (d,), "ff_norm": (d,), "ff_proj": (m, d), "up_proj": (m, d), "ff_out": (d, m)}
        shapes |= {name: (d, d) for name in ("q_proj", "k_proj", "v_proj", "attn_out")}
        expected |= {f"{root}blocks.{i}.{name}.weight": shape for name, shape in shapes.items()}
    tensors = layout.tensors(model)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    block = model.layers[1]
    assert torch.equal(tensors[f"{root}blocks.1.k_proj.weight"], block.qkv[d : 2 * d].bfloat16())
    assert torch.equal(tensors[f"{root}blocks.1.up_proj.weight"], block.gate_up[m:].bfloat16())


def test_dream_is_saved_as_published_without_tokenizer_json(tmp_path):
    recipe, layout = SMALL_RECIPES["dream"], FORMATS["dream"]
    tokenizer = layout.train_tokenizer(0, n_problems=300)
    model = Transformer(layout.spec(recipe, tokenizer)).init_random(0)
    layout.save(model, tokenizer, recipe, {}, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "training.json"),
        *("vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"),
    }
    tensors = load_file(tmp_path / "model.safetensors")
    assert tuple(tensors["model.layers.1.self_attn.k_proj.weight"].shape) == (32, 64)
    assert tuple(tensors["model.layers.1.self_attn.k_proj.bias"].shape) == (32,)
    assert "lm_head.weight" in tensors


def test_a_tokenizer_that_was_saved_gives_the_same_ids(layout, tokenizer, tmp_path):
    layout.save_tokenizer(tokenizer, tmp_path)
    again, loaded = layout.read_tokenizer(tmp_path), layout.family.tokenizer(tmp_path)
    for problem in GsmMini().problems("test", 20, seed=0):
        for text in (layout.render(problem.prompt), problem.solution, f"héllo  wörld\n\n\t{problem.answer}"):
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert again.encode(text, add_special_tokens=False).ids == loaded.encode(text) == ids
            assert loaded.decode(ids, skip_special=False) == text


def test_the_compiled_unit_computes_what_the_transformer_computes(model):
    tokens = torch.randint(0, 512, (2, 20), generator=torch.Generator().manual_seed(0))
    h = model.embed(tokens)
    for block in model.blocks():
        h, _ = block_forward(block, h, *model.angles(torch.arange(20)[None]))
    torch.testing.assert_close(model.logits(h), model(tokens))


def test_masks_lie_in_the_response_and_every_sequence_counts():
    n_prompt = torch.randint(30, 60, (400,), generator=torch.Generator().manual_seed(1))
    for share in (0.0, 0.5, 1.0):
        masked, counted = choose_masks(n_prompt, 160, share, torch.Generator().manual_seed(0))
        assert not (masked & (torch.arange(160) < n_prompt[:, None])).any()
        assert (counted <= masked).all()
        assert (counted.sum(1) >= 1).all()
        assert (counted == masked).all() or share > 0
    # Without block masks the share of masked rows is uniform on (0, 1], and stratified over the batch.
    masked, _ = choose_masks(n_prompt, 160, 0.0, torch.Generator().manual_seed(0))
    shares = (masked.sum(1) / (160 - n_prompt)).sort().values
    torch.testing.assert_close(shares, (torch.arange(400) + 0.5) / 400, atol=0.02, rtol=0)


def test_a_canvas_is_prompt_solution_turn_end_and_padding(layout, tokenizer):
    problem = GsmMini().problem("train", 0, seed=0)
    ((tokens, n_prompt),) = canvases(layout, tokenizer, [problem])
    assert tokenizer.decode(tokens[:n_prompt], skip_special_tokens=False) == layout.render(problem.prompt)
    end = tokens.index(special_id(tokenizer, layout.turn_end), n_prompt)
    assert tokenizer.decode(tokens[n_prompt:end], skip_special_tokens=False) == problem.solution
    assert set(tokens[end + 1 :]) == {special_id(tokenizer, layout.eos)}
    assert len(tokens) % 16 == 0
    assert len(tokens) >= n_prompt + GsmMini.gen_length
    assert list(canvases(layout, tokenizer, [replace(problem, solution="x" * 97)])) == []


def test_orthogonalizing_brings_every_singular_value_near_one():
    x = torch.randn(3, 40, 96, generator=torch.Generator().manual_seed(0))
    for matrix in (x, x.mT):
        values = torch.linalg.svdvals(orthogonalize(matrix).float())
        assert values.min() > 0.5
        assert values.max() < 1.4


def test_the_parts_of_a_fused_matrix_are_orthogonalized_apart():
    x = torch.randn(3, 80, 32, generator=torch.Generator().manual_seed(0))
    found = Muon._direction(x, ((1, 48), (2, 16)))
    for part, rows in ((found[:, :48], 48), (found[:, 48:64], 16), (found[:, 64:], 16)):
        values = torch.linalg.svdvals(part) / max(1, rows / 32) ** 0.5
        assert values.min() > 0.5
        assert values.max() < 1.4
    torch.testing.assert_close(found[:, 64:], orthogonalize(x[:, 64:]).float())


def test_decoding_fills_every_masked_row_and_leaves_the_padding_of_shorter_prompts_out(model):
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9]]
    together = decode(model, prompts, gen_length=16, block=8, per_step=2)
    assert [len(row) for row in together] == [16, 16]
    assert together == [decode(model, [prompt], 16, 8, 2)[0] for prompt in prompts]


def test_what_measures_a_model_decodes_as_the_engine_does(model):
    prompts = [[5, 2, 3], [4, 5, 6, 7, 8, 9]]
    state = State(model.spec, prompts, 16, 8)
    decode_with_engine(Engine(model, NoCache(), LowConfidence(tokens_per_step=2)), state)
    expected = [state.tokens[b, len(p) : len(p) + 16].tolist() for b, p in enumerate(prompts)]
    assert decode(model, prompts, gen_length=16, block=8, per_step=2) == expected


def test_accuracy_of_an_untrained_model_is_a_share(model, layout, tokenizer):
    problems = GsmMini().problems("test", 2, seed=0)
    assert accuracy(model, layout, tokenizer, problems, block=32, per_step=32) in (0.0, 0.5, 1.0)


def test_the_rendered_prompt_is_what_the_chat_template_gives(layout, tokenizer, tmp_path):
    layout.save_tokenizer(tokenizer, tmp_path)
    loaded = layout.family.tokenizer(tmp_path)
    assert loaded.render([{"role": "user", "content": "Hi there"}]) == layout.render("Hi there")
    problem = GsmMini().problem("train", 0, seed=0)
    ids = tokenizer.encode(layout.render(problem.prompt), add_special_tokens=False).ids
    assert loaded.chat([{"role": "user", "content": problem.prompt}]) == ids


def test_each_template_behaves_as_published(tmp_path):
    messages = [{"role": "user", "content": " Hi there \n"}]
    for name in FORMATS:
        layout = FORMATS[name]
        (tmp_path / name).mkdir()
        layout.save_tokenizer(layout.train_tokenizer(0, n_problems=20), tmp_path / name)
    llada, dream = (FORMATS[name].family.tokenizer(tmp_path / name) for name in ("llada", "dream"))
    assert llada.special_id("mask_token") is None
    assert llada.render(messages) == (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert dream.special_id("mask_token") == 511
    assert dream.render(messages) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n Hi there \n<|im_end|>\n<|im_start|>assistant\n"
    )
    assert dream.render([{"role": "system", "content": "Be brief."}, *messages]).startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    )


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_checkpoint_is_complete_small_accurate_and_of_its_recipe(name):
    at = folder(name)
    model, record = load_model(name, device="cpu"), json.loads((at / "training.json").read_text())
    layout = FORMATS[model.spec.family]
    assert (at / "model.safetensors").stat().st_size < 16 * 2**20
    recipe = Recipe(**record["recipe"])
    shipped = layout.read_tokenizer(at)
    assert layout.spec(recipe, shipped) == model.spec
    assert json.loads((at / "config.json").read_text()) == layout.config(recipe, shipped)
    assert shipped.get_vocab_size() == model.spec.vocab_size
    n = len(layout.specials)
    assert [special_id(shipped, token) for token in layout.specials] == list(range(512 - n, 512))
    assert record["accuracy"]["block 32"]["1 per step"] >= 0.9


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_tokenizer_gives_any_text_back_and_single_digits(name):
    shipped = load_model(name, device="cpu").tokenizer
    for text in ("héllo  wörld\n\n\t日本 <x> 'quoted'", "12345 + 67 = 12412", " ####  8,000"):
        assert shipped.decode(shipped.encode(text)) == text
    assert [shipped.decode([i]) for i in shipped.encode("So 1234")[-3:]] == ["2", "3", "4"]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_predicts_held_out_solutions_from_half_of_their_rows(name):
    loaded = load_model(name, device="cpu")
    model, layout = loaded.transformer, FORMATS[loaded.spec.family]
    shipped = layout.read_tokenizer(folder(name))
    right = total = 0
    problems = GsmMini().problems("test", 12, seed=5)
    for row, n_prompt in islice(canvases(layout, shipped, problems), 12):
        tokens, end = torch.tensor(row), row.index(special_id(shipped, layout.turn_end), n_prompt) + 1
        hidden = torch.zeros(len(row), dtype=torch.bool)
        hidden[n_prompt:end] = torch.rand(end - n_prompt, generator=torch.Generator().manual_seed(n_prompt)) < 0.5
        with torch.inference_mode():
            guess = model(tokens.masked_fill(hidden, model.spec.mask_id)[None])[0].argmax(-1)
        right += int((guess.roll(model.spec.shift) == tokens)[hidden].sum())
        total += int(hidden.sum())
    assert right / total > 0.97


def test_an_unknown_checkpoint_is_refused_with_the_names_there_are():
    with pytest.raises(ModelError, match="tiny-llada"):
        folder("tiny-lada")


def biased(spec: ModelSpec) -> Transformer:
    model = Transformer(spec).init_random(0, std=0.5)
    for block in model.blocks():
        if block.qkv_bias is not None:
            torch.nn.init.normal_(block.qkv_bias, std=2.0, generator=torch.Generator().manual_seed(1))
    return model


def scores(model: Transformer, h: torch.Tensor) -> torch.Tensor:
    """The largest attention score of each head, (layers, heads)."""
    found = []
    for block in model.blocks():
        q, k, _ = block.project(block.normed(h), *model.angles(torch.arange(h.shape[1])[None]))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        found.append((q @ k.mT).abs().amax((0, 2, 3)) * block.spec.head_dim**-0.5)
    return torch.stack(found)


def test_clipped_scores_are_bounded_by_the_cap_and_keep_their_pattern(layout, recipe, tokenizer):
    wide = replace(recipe, d_model=128)
    model = biased(layout.spec(wide, tokenizer))
    h = torch.randn(2, 12, 128, generator=torch.Generator().manual_seed(0))
    angles = model.angles(torch.arange(12)[None])

    def bounds() -> torch.Tensor:
        return torch.stack([block_forward(block, h, *angles)[1] for block in model.blocks()])

    before, raw = bounds(), scores(model, h)
    per_head = before.repeat_interleave(wide.heads_per_kv, dim=1)
    assert before.shape == (2, wide.n_kv_heads)
    assert (raw <= per_head + 1e-4).all()
    assert before.min() > 3.0
    clip_scores(model, before, cap=3.0)
    torch.testing.assert_close(bounds(), torch.full_like(before, 3.0))
    torch.testing.assert_close(scores(model, h), raw * 3.0 / per_head)
    calm = scores(model, h)
    clip_scores(model, bounds(), cap=4.0)
    torch.testing.assert_close(scores(model, h), calm)


def test_the_family_decides_the_recipe_and_a_flag_changes_it(capsys):
    given, recipe = parse(["--out", "x", "--seconds", "480", "--family", "dream", "--seed", "3"])
    assert recipe == replace(RECIPES["dream"], seed=3)
    assert given.seconds == 480
    assert parse(["--out", "x", "--steps", "1"])[1] == RECIPES["llada"]
    with pytest.raises(SystemExit):
        parse(["--out", "x"])
    assert "--steps, --seconds or both" in capsys.readouterr().err
