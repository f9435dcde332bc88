from typing import Any

import pytest
import tokenizers

from dcache.errors import ModelError
from dcache.models.llada import LLaDA
from dcache.models.tokenizer import Tokenizer
from dcache.models.transformer import ModelSpec, Transformer

CONFIG: dict[str, Any] = {**LLaDA.shapes["llada-8b"], "model_type": "llada", "architectures": ["LLaDAModelLM"]}
HF_NAMES = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"]
OWN_NAMES = ["model.transformer.wte.weight", "model.transformer.blocks.0.q_proj.weight"]


def spec(**changes: Any) -> ModelSpec:
    return LLaDA().spec(CONFIG | changes, {}, None)


def refusal(
    *, without: str = "", generation: dict[str, Any] | None = None, tokenizer: Any = None, **changes: Any
) -> str:
    config = {name: value for name, value in (CONFIG | changes).items() if name != without}
    with pytest.raises(ModelError) as caught:
        LLaDA().spec(config, {}, tokenizer)
    return str(caught.value)


def toy(*words: str, **names: str) -> Tokenizer:
    """A tokenizer that knows a few words by their position."""
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0])
    return Tokenizer(tokenizers.Tokenizer(model), names)


def test_the_published_config_gives_the_published_sizes() -> None:
    found = spec()
    assert (found.n_layers, found.d_model, found.n_heads, found.n_kv_heads, found.head_dim) == (32, 4096, 32, 32, 128)
    assert (found.mlp_size, found.vocab_size, found.max_positions) == (12288, 126464, 4096)
    assert (found.norm_eps, found.rope_theta, found.rope_full_precision) == (1e-5, 500000.0, True)
    assert (found.mask_id, found.eos_id, found.end_ids, found.shift) == (126336, 126081, (126081,), 0)
    assert found.n_parameters == 8015581184


def test_a_published_checkpoint_has_291_tensors_and_they_fill_the_model() -> None:
    slots = LLaDA().slots(spec())
    assert len(slots) == 291
    assert {slot.parameter for slot in slots.values()} == {
        name for name, _ in Transformer(spec(), "meta").named_parameters()
    }


def test_the_two_kinds_of_ff_out_are_not_confused() -> None:
    slots = LLaDA().slots(spec())
    assert slots["model.transformer.ff_out.weight"].parameter == "head"
    assert slots["model.transformer.blocks.7.ff_out.weight"].parameter == "layers.7.down"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alibi", True),
        ("rope", False),
        ("block_type", "sequential"),
        ("block_group_size", 2),
        ("activation_type", "swiglu"),
        ("layer_norm_type", "default"),
        ("layer_norm_with_affine", False),
        ("attention_layer_norm", True),
        ("bias_for_layer_norm", True),
        ("include_bias", True),
        ("include_qkv_bias", True),
        ("input_emb_norm", True),
        ("scale_logits", True),
        ("alibi", 0),
    ],
)
def test_what_the_published_checkpoints_never_use_is_refused_with_a_reason(field: str, value: Any) -> None:
    message = refusal(**{field: value})
    assert f"config.json: {field!r} is {value!r}; expected " in message
    assert ": " in message.split("expected ")[1]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("d_model", 0),
        ("d_model", "4096"),
        ("d_model", 4096.0),
        ("n_layers", 10**9),
        ("n_layers", True),
        ("n_heads", 33),
        ("n_heads", 4096),
        ("n_kv_heads", 5),
        ("n_kv_heads", 64),
        ("mlp_hidden_size", -1),
        ("vocab_size", None),
        ("embedding_size", 126000),
        ("max_sequence_length", 10**12),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", float("nan")),
        ("rope_theta", float("inf")),
        ("rope_theta", "5e5"),
        ("rope_full_precision", "yes"),
        ("weight_tying", 1),
        ("mask_token_id", 126464),
        ("mask_token_id", -1),
        ("eos_token_id", 126464),
        ("eos_token_id", [1, "2"]),
    ],
)
def test_an_impossible_value_is_named_with_what_is_accepted(field: str, value: Any) -> None:
    assert f"config.json: {field!r} is {value!r}; expected " in refusal(**{field: value})


@pytest.mark.parametrize(
    "field", ["d_model", "n_layers", "n_heads", "vocab_size", "max_sequence_length", "rms_norm_eps", "rope_theta"]
)
def test_a_size_that_is_absent_is_not_guessed(field: str) -> None:
    assert f"config.json has no {field!r}" in refusal(without=field)


def test_absent_or_null_kv_heads_mean_all_heads_or_one() -> None:
    assert spec(n_kv_heads=None).n_kv_heads == 32
    assert spec(n_kv_heads=None, multi_query_attention=True).n_kv_heads == 1
    assert spec(n_kv_heads=8, multi_query_attention=False).n_kv_heads == 8
    assert "'n_kv_heads' is 8" in refusal(n_kv_heads=8, multi_query_attention=True)


def test_a_null_embedding_size_means_the_vocabulary() -> None:
    assert spec(embedding_size=None, vocab_size=126400).vocab_size == 126400
    assert spec(embedding_size=126464, vocab_size=126349).vocab_size == 126464


def test_a_null_mlp_size_is_a_multiple_of_the_width() -> None:
    assert spec(mlp_hidden_size=None, mlp_ratio=4).mlp_size == 4 * 4096
    assert "'mlp_hidden_size'" in refusal(mlp_hidden_size=None)


def test_the_mask_may_be_known_to_any_source_but_to_none_differently() -> None:
    assert LLaDA().spec(CONFIG | {"mask_token_id": None}, {"mask_token_id": 7}, None).mask_id == 7
    words = ["[UNK]", "a", "<|mdm_mask|>"]
    assert LLaDA().spec(CONFIG | {"mask_token_id": None}, {}, toy(*words)).mask_id == 2
    assert LLaDA().spec(CONFIG | {"mask_token_id": None}, {}, toy("[UNK]", "m", mask_token="m")).mask_id == 1
    message = refusal(tokenizer=toy(*words))
    assert "mask_token_id of config.json says 126336" in message
    assert "<|mdm_mask|> of the tokenizer says 2" in message
    assert "nothing says which token is the mask" in refusal(without="mask_token_id")


def test_a_mask_outside_the_embedding_is_refused() -> None:
    message = refusal(
        mask_token_id=None, embedding_size=2, vocab_size=2, eos_token_id=0, tokenizer=toy("u", "a", "<|mdm_mask|>")
    )
    assert "token 2" in message
    assert "2 rows" in message


def test_every_known_end_token_ends_a_text() -> None:
    found = LLaDA().spec(CONFIG | {"eos_token_id": [5, 6]}, {"eos_token_id": 5}, toy("[UNK]", "<|eot_id|>"))
    assert (found.eos_id, found.end_ids) == (5, (5, 6, 1))
    assert LLaDA().spec(CONFIG | {"eos_token_id": None}, {"eos_token_id": 9}, None).eos_id == 9
    assert "'eos_token_id'" in refusal(without="eos_token_id")


def test_it_is_recognised_by_declaration_and_by_tensor_names_where_nothing_is_declared() -> None:
    family = LLaDA()
    assert family.recognises(CONFIG, [])
    assert family.recognises({"model_type": "llada"}, [])
    assert family.recognises({"architectures": ["LLaDAModelLM"]}, [])
    assert family.recognises({}, OWN_NAMES)
    assert family.recognises({"model_type": None, "architectures": []}, OWN_NAMES)
    assert not family.recognises({}, HF_NAMES)
    assert not family.recognises({"model_type": "mmada", "architectures": ["MMadaModelLM"]}, OWN_NAMES)
    assert not family.recognises({"model_type": "qwen2"}, OWN_NAMES)
    assert not family.recognises({"architectures": ["Qwen2ForCausalLM"]}, OWN_NAMES)
    assert not family.recognises({"model_type": "llada", "architectures": ["LLaDAMoEModelLM"]}, HF_NAMES)
    assert not family.recognises({"model_type": "llava_llada", "architectures": ["LLaDAModelLM"]}, HF_NAMES)
    assert not family.recognises({"model_type": "Dream", "architectures": 5}, HF_NAMES)
