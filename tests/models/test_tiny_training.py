import json
from itertools import islice

import pytest
import torch
from jinja2 import Environment
from safetensors.torch import load_file
from tokenizers import Tokenizer

from dcache.errors import ModelError
from dcache.models.tiny import NAMES, folder
from dcache.models.tiny.tokenizer import BOS, EOS, EOT, MASK, SPECIALS, render, save_tokenizer, train_tokenizer
from dcache.models.tiny.train import (
    Canvases,
    Objective,
    Recipe,
    block_forward,
    canvases,
    choose_masks,
    clip_scores,
    decode,
    make_spec,
    official_tensors,
    orthogonalize,
    restore,
    rounded,
    save,
    train,
)
from dcache.models.transformer import Transformer
from dcache.tasks.gsm_mini import GsmMini

RECIPE = Recipe(n_layers=2, d_model=64, mlp_size=96, batch=8, warmup_steps=4)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(seed=0, n_problems=300)


@pytest.fixture
def model(tokenizer):
    return Transformer(make_spec(RECIPE, tokenizer)).init_random(0)


def test_a_few_training_steps_lower_the_loss(model, tokenizer):
    batches = iter(Canvases(tokenizer, RECIPE.batch, seed=0))
    held_out = [torch.from_numpy(part).long() for part in next(iter(Canvases(tokenizer, 32, seed=9)))]

    def loss():
        with torch.no_grad():
            return float(Objective(0.5, torch.Generator().manual_seed(0))(model, *held_out)[0])

    before = loss()
    record = train(model, batches, RECIPE, n_steps=12, seconds=None, compiled=False)
    assert record["steps"] == 12
    assert loss() < before - 0.3


def test_a_saved_checkpoint_has_the_official_names_and_shapes_and_reads_back(model, tokenizer, tmp_path):
    save(model, tokenizer, {"seed": 0}, tmp_path)
    root, d, m, v = "model.transformer.", RECIPE.d_model, RECIPE.mlp_size, RECIPE.vocab_size
    expected = {f"{root}wte.weight": (v, d), f"{root}ln_f.weight": (d,), f"{root}ff_out.weight": (v, d)}
    for i in range(RECIPE.n_layers):
        shapes = {"attn_norm": (d,), "ff_norm": (d,), "ff_proj": (m, d), "up_proj": (m, d), "ff_out": (d, m)}
        shapes |= {name: (d, d) for name in ("q_proj", "k_proj", "v_proj", "attn_out")}
        expected |= {f"{root}blocks.{i}.{name}.weight": shape for name, shape in shapes.items()}
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    block = model.layers[1]
    assert torch.equal(tensors[f"{root}blocks.1.k_proj.weight"], block.qkv[d : 2 * d].bfloat16())
    assert torch.equal(tensors[f"{root}blocks.1.up_proj.weight"], block.gate_up[m:].bfloat16())
    again = Transformer(model.spec).init_random(1)
    restore(again, tmp_path)
    for mine, theirs in zip(again.parameters(), rounded(model).parameters(), strict=True):
        assert torch.equal(mine, theirs)


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


def test_orthogonalizing_brings_every_singular_value_near_one():
    x = torch.randn(3, 40, 96, generator=torch.Generator().manual_seed(0))
    for matrix in (x, x.mT):
        values = torch.linalg.svdvals(orthogonalize(matrix).float())
        assert values.min() > 0.5
        assert values.max() < 1.4


def test_decoding_fills_every_masked_row_and_leaves_the_padding_of_shorter_prompts_out(model):
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9]]
    together = decode(model, prompts, gen_length=16, block=8, per_step=2)
    assert [len(row) for row in together] == [16, 16]
    assert together == [decode(model, [prompt], 16, 8, 2)[0] for prompt in prompts]


def test_the_rendered_prompt_is_what_the_chat_template_gives(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert "mask_token" not in config
    template = Environment().from_string(config["chat_template"])
    rendered = template.render(messages=[{"role": "user", "content": " Hi there \n"}], bos_token=config["bos_token"])
    assert rendered == render(" Hi there \n")
    assert rendered == (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_shipped_checkpoints_are_complete_small_and_agree_on_the_special_tokens():
    for name in NAMES:
        at = folder(name)
        config, settings = (json.loads((at / f"{file}.json").read_text()) for file in ("config", "tokenizer_config"))
        shipped = Tokenizer.from_file(str(at / "tokenizer.json"))
        assert (at / "model.safetensors").stat().st_size < 16 * 2**20
        assert config["mask_token_id"] == shipped.token_to_id(MASK)
        assert config["eos_token_id"] == config["pad_token_id"] == shipped.token_to_id(EOS)
        assert config["vocab_size"] == shipped.get_vocab_size()
        assert (settings["bos_token"], settings["eos_token"], settings["pad_token"]) == (BOS, EOS, EOS)
        assert {shipped.token_to_id(token) for token in SPECIALS} == set(range(506, 512))
        assert json.loads((at / "training.json").read_text())["accuracy"]["block 32"]["1 per step"] >= 0.9


def test_the_shipped_tokenizer_gives_any_text_back_and_single_digits():
    shipped = Tokenizer.from_file(str(folder("tiny-llada") / "tokenizer.json"))
    for text in ("héllo  wörld\n\n\t日本 <x> 'quoted'", "12345 + 67 = 12412", " ####  8,000"):
        assert shipped.decode(shipped.encode(text, add_special_tokens=False).ids) == text
    assert shipped.encode("So 1234", add_special_tokens=False).tokens[-4:] == ["Ġ1", "2", "3", "4"]


def test_the_shipped_model_predicts_held_out_solutions_from_half_of_their_rows():
    at = folder("tiny-llada")
    shipped = Tokenizer.from_file(str(at / "tokenizer.json"))
    model = Transformer(make_spec(Recipe(), shipped))
    restore(model, at)
    assert {name: tuple(t.shape) for name, t in official_tensors(model).items()} == {
        name: tuple(t.shape) for name, t in load_file(at / "model.safetensors").items()
    }
    eot = shipped.token_to_id(EOT)
    right = total = 0
    problems = GsmMini().problems("test", 12, seed=5)
    for row, n_prompt in islice(canvases(shipped, problems), 12):
        tokens, end = torch.tensor(row), row.index(eot, n_prompt) + 1
        hidden = torch.zeros(len(row), dtype=torch.bool)
        hidden[n_prompt:end] = torch.rand(end - n_prompt, generator=torch.Generator().manual_seed(n_prompt)) < 0.5
        with torch.inference_mode():
            guess = model(tokens.masked_fill(hidden, model.spec.mask_id)[None])[0].argmax(-1)
        right += int((guess == tokens)[hidden].sum())
        total += int(hidden.sum())
    assert right / total > 0.97


def test_an_unknown_checkpoint_is_refused_with_the_names_there_are():
    with pytest.raises(ModelError, match="tiny-llada"):
        folder("tiny-lada")


def test_clipped_scores_are_bounded_by_the_cap() -> None:
    model = Transformer(make_spec(Recipe(n_layers=2, d_model=64), train_tokenizer(0, 512))).init_random(0, std=0.5)
    h = torch.randn(2, 12, 64)
    angles = model.angles(torch.arange(12)[None])
    for block in model.blocks():
        clip_scores(model, torch.stack([block_forward(b, h, *angles)[1] for b in model.blocks()]), cap=3.0)
        assert (block_forward(block, h, *angles)[1] <= 3.0 + 1e-4).all()
