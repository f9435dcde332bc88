import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

import dcache
from dcache.errors import ModelError
from dcache.models.dream import Dream
from dcache.models.loading import load_model
from dcache.models.tokenizer import Tokenizer
from dcache.models.transformer import ModelSpec, Transformer

GOLDEN = Path(__file__).parents[1] / "golden" / "models" / "dream"
CONFIG: dict[str, Any] = {**Dream.shapes["dream-7b"], "model_type": "Dream", "architectures": ["DreamModel"]}
NAMES = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"]
BIASED = [*NAMES, "model.layers.0.self_attn.q_proj.bias"]
Q_BIAS, K_BIAS = (f"model.layers.1.self_attn.{name}_proj.bias" for name in "qk")


def spec(**changes: Any) -> ModelSpec:
    return Dream().spec(CONFIG | changes, {}, None)


def refusal(
    *, without: str = "", generation: dict[str, Any] | None = None, tokenizer: Any = None, **changes: Any
) -> str:
    config = {name: value for name, value in (CONFIG | changes).items() if name != without}
    with pytest.raises(ModelError) as caught:
        Dream().spec(config, generation or {}, tokenizer)
    return str(caught.value)


def toy(*words: str, **names: str) -> Tokenizer:
    """A tokenizer that knows a few words by their position."""
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0])
    return Tokenizer(tokenizers.Tokenizer(model), names)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The golden checkpoint as its repository would publish it: without tokenizer.json."""
    shutil.copytree(GOLDEN, tmp_path / "copy", ignore=shutil.ignore_patterns("tokenizer.json", "io.safetensors"))
    return tmp_path / "copy"


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(folder: Path, *expected: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(folder, device="cpu")
    for text in expected:
        assert text in str(caught.value)
    assert "\n" not in str(caught.value)


# Config


def test_the_published_config_gives_the_published_sizes() -> None:
    found = spec()
    assert (found.n_layers, found.d_model, found.n_heads, found.n_kv_heads, found.head_dim) == (28, 3584, 28, 4, 128)
    assert (found.mlp_size, found.vocab_size, found.max_positions) == (18944, 152064, 131072)
    assert (found.norm_eps, found.rope_theta, found.rope_full_precision) == (1e-6, 1e6, False)
    assert (found.mask_id, found.eos_id, found.end_ids, found.shift) == (151666, 151643, (151643,), 1)
    assert (found.qkv_bias, found.tied_head, found.q_width, found.kv_width) == (True, False, 3584, 512)
    assert found.n_parameters == 7615616512


def test_a_published_checkpoint_has_339_tensors_and_they_fill_the_model() -> None:
    slots = Dream().slots(spec())
    assert len(slots) == 339
    assert {slot.parameter for slot in slots.values()} == {
        name for name, _ in Transformer(spec(), "meta").named_parameters()
    }
    assert slots["model.layers.3.self_attn.k_proj.bias"].rows == slice(3584, 3584 + 512)
    assert slots["model.layers.3.mlp.down_proj.weight"].parameter == "layers.3.down"


def test_random_weights_of_the_published_shape_need_no_checkpoint() -> None:
    model = load_model("dream-7b:random", device="meta", dtype="bfloat16")
    assert (model.spec.family, model.spec.shift, model.tokenizer) == ("dream", 1, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_bias", False),
        ("use_sliding_window", True),
        ("use_mrope", True),
        ("use_mrope", 0),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("head_dim", 64),
    ],
)
def test_what_the_published_checkpoints_never_use_is_refused_with_a_reason(field: str, value: Any) -> None:
    message = refusal(**{field: value})
    assert f"config.json: {field!r} is {value!r}; expected " in message
    assert ": " in message.split("expected ")[1]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", 3584.0),
        ("num_hidden_layers", True),
        ("num_attention_heads", 27),
        ("num_attention_heads", 3584),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", 56),
        ("intermediate_size", -1),
        ("vocab_size", None),
        ("max_position_embeddings", 10**12),
        ("rms_norm_eps", 0),
        ("rope_theta", "1e6"),
        ("tie_word_embeddings", 1),
        ("mask_token_id", 152064),
        ("eos_token_id", -1),
    ],
)
def test_an_impossible_value_is_named_with_what_is_accepted(field: str, value: Any) -> None:
    assert f"config.json: {field!r} is {value!r}; expected " in refusal(**{field: value})


@pytest.mark.parametrize("field", sorted(Dream.shapes["dream-7b"].keys() - {"mask_token_id"}))
def test_a_size_that_is_absent_is_not_guessed(field: str) -> None:
    assert f"config.json has no {field!r}" in refusal(without=field)


def test_published_fields_that_change_nothing_are_accepted() -> None:
    assert spec(sliding_window=None, use_sliding_window=False, max_window_layers=28, use_mrope=False) == spec()
    assert spec(sliding_window=131072, rope_scaling=None, attention_dropout=0.0, use_cache=True) == spec()
    assert spec(num_key_value_heads=None).n_kv_heads == 28


def test_a_tied_head_is_the_embedding() -> None:
    slots = Dream().slots(spec(tie_word_embeddings=True))
    assert len(slots) == 338
    assert "lm_head.weight" not in slots


def test_the_mask_may_be_known_to_any_source_but_to_none_differently() -> None:
    words = ["[UNK]", "a", "<|mask|>"]
    assert Dream().spec(CONFIG | {"mask_token_id": None}, {"mask_token_id": 7}, None).mask_id == 7
    assert Dream().spec(CONFIG | {"mask_token_id": None}, {}, toy(*words)).mask_id == 2
    assert Dream().spec(CONFIG | {"mask_token_id": None}, {}, toy("[UNK]", "m", mask_token="m")).mask_id == 1
    message = refusal(tokenizer=toy(*words), generation={"mask_token_id": 5})
    assert "mask_token_id of config.json says 151666" in message
    assert "mask_token_id of generation_config.json says 5" in message
    assert "<|mask|> of the tokenizer says 2" in message
    assert "nothing says which token is the mask" in refusal(without="mask_token_id")
    assert "generation_config.json: 'mask_token_id' is 152064" in refusal(generation={"mask_token_id": 152064})


def test_every_known_end_token_ends_a_text() -> None:
    found = Dream().spec(CONFIG, {"eos_token_id": [5, 151643]}, toy("[UNK]", "<|im_end|>"))
    assert (found.eos_id, found.end_ids) == (151643, (151643, 5, 1))
    assert Dream().spec(CONFIG | {"eos_token_id": None}, {"eos_token_id": 9}, None).eos_id == 9


def test_it_is_recognised_by_declaration_and_by_its_biases_where_nothing_is_declared() -> None:
    family = Dream()
    assert family.recognises(CONFIG, [])
    assert family.recognises({"model_type": "Dream"}, [])
    assert family.recognises({"architectures": ["DreamModel"]}, [])
    assert family.recognises({}, BIASED)
    assert not family.recognises({}, NAMES)  # LLaDA-V, iLLaDA and SDAR use the names
    assert not family.recognises({"model_type": "dream"}, BIASED)
    assert not family.recognises({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, BIASED)
    assert not family.recognises({"model_type": "llava_llada", "architectures": ["LLaDAModelLM"]}, BIASED)
    assert not family.recognises({"model_type": "Dream", "architectures": 5}, BIASED)


# Checkpoints


def test_a_checkpoint_is_found_by_its_config_and_decodes(copy: Path) -> None:
    model = dcache.load_model(copy, device="cpu")
    assert (model.spec.family, model.spec.mask_id, model.spec.end_ids) == ("dream", 124, (120, 122))
    out = dcache.generate(model, "What is 1+1?", policy="elastic", gen_length=8)
    assert len(out.canvas) == 8
    assert model.spec.mask_id not in out.canvas


@pytest.mark.parametrize("name", [Q_BIAS, K_BIAS])
def test_a_missing_or_misshapen_bias_is_named(copy: Path, name: str) -> None:
    tensors = load_file(copy / "model.safetensors")
    bias = tensors.pop(name)
    save_file(tensors, copy / "model.safetensors")
    refused(copy, f"1 missing: {name!r}", "dream model")
    save_file(tensors | {name: bias[:8]}, copy / "model.safetensors")
    refused(copy, f"1 misshapen: {name!r} is (8,), expected ({len(bias)},)")
    save_file(tensors | {name: bias, "model.layers.0.self_attn.o_proj.bias": bias.clone()}, copy / "model.safetensors")
    refused(copy, "1 unexpected: 'model.layers.0.self_attn.o_proj.bias'")


def test_each_bias_lands_beside_its_weight(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    block = next(iter(load_model(copy, device="cpu").transformer.blocks()))
    assert block.qkv_bias is not None
    for name in "qkv":
        rows = block.slices(name)
        assert torch.equal(block.qkv[rows], tensors[f"model.layers.0.self_attn.{name}_proj.weight"])
        assert torch.equal(block.qkv_bias[rows], tensors[f"model.layers.0.self_attn.{name}_proj.bias"])


def test_a_contradiction_between_config_and_tokenizer_stops_the_load(copy: Path) -> None:
    change(copy / "config.json", mask_token_id=3)
    refused(copy, "contradicts itself about the mask", "config.json says 3", "<|mask|> of the tokenizer says 124")
