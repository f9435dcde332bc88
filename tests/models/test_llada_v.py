import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dcache.errors import ModelError
from dcache.models.dream import Dream
from dcache.models.llada import LLaDA
from dcache.models.llada_v import LLaDAV
from dcache.models.loading import load_model
from dcache.models.transformer import ModelSpec, Transformer
from dcache.models.vision import Vision, VisionSpec

GOLDEN = Path(__file__).parents[1] / "golden" / "models" / "llada_v"
CONFIG: dict[str, Any] = {
    **LLaDAV.shapes["llada-v-8b"],
    "model_type": "llava_llada",
    "architectures": ["LlavaLLaDAModelLM"],
}


def spec(**changes: Any) -> ModelSpec:
    return LLaDAV().spec(CONFIG | changes, {}, None)


def looks(folder: Path | None = None, **changes: Any) -> VisionSpec:
    return LLaDAV().vision(CONFIG | changes, spec(), folder)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN, tmp_path / "copy", ignore=shutil.ignore_patterns("io.safetensors"))
    return tmp_path / "copy"


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(folder: Path, *expected: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(folder, device="cpu")
    for text in expected:
        assert text in str(caught.value)
    assert "\n" not in str(caught.value)


# Sizes


def test_the_published_config_gives_the_published_sizes() -> None:
    found = spec()
    assert (found.n_layers, found.d_model, found.n_heads, found.n_kv_heads, found.head_dim) == (32, 4096, 32, 32, 128)
    assert (found.mlp_size, found.vocab_size, found.rope_full_precision, found.shift) == (12288, 126464, False, 0)
    assert (found.mask_id, found.end_ids, found.qkv_bias, found.tied_head) == (126336, (126081,), False, False)
    assert found.n_parameters == 8015581184  # as LLaDA-8B


def test_what_the_published_loop_never_predicts_is_forbidden() -> None:
    """By the tokens' names, where there is a tokenizer that knows them; end-of-text in any case."""
    assert spec().forbidden == (126081,)
    assert load_model(GOLDEN, device="cpu").spec.forbidden == (121, 120, 123, 124)


def test_the_tower_has_the_published_sizes_without_its_last_layer() -> None:
    found = looks()
    assert (found.image_size, found.patch_size, found.side, found.width, found.n_layers) == (384, 14, 27, 1152, 26)
    assert (found.n_heads, found.mlp_size, found.norm_eps, found.d_model) == (16, 4304, 1e-6, 4096)
    assert (found.max_tiles, found.max_rows, found.stand_in) == (4, 8192, 126081)
    assert found.canvases == tuple((384 * i, 384 * j) for i in range(1, 7) for j in range(1, 7))


def test_the_slots_fill_the_transformer_and_the_vision_part_once() -> None:
    slots, seen = LLaDAV().slots(spec()), LLaDAV().vision_slots(looks())
    assert len(slots) == 291
    assert {s.parameter for s in slots.values()} == {name for name, _ in Transformer(spec(), "meta").named_parameters()}
    vision = Vision(looks(), "meta", torch.bfloat16)
    assert sorted(s.parameter for s in seen.values()) == sorted(name for name, _ in vision.named_parameters())
    assert len(seen) == 26 * 16 + 3 + 5
    assert sum(p.numel() for p in vision.parameters()) == pytest.approx((0.795e9 + 0.043e9) / 2, rel=0.02)


def test_the_published_shape_loads_without_memory() -> None:
    shape = load_model("llada-v-8b:random", device="meta", dtype="bfloat16")
    assert shape.vision is not None
    assert shape.vision.newline.shape == (4096,)


# Recognition


def test_the_declared_type_decides_and_tensor_names_only_where_it_is_absent() -> None:
    names = ["model.embed_tokens.weight", "model.mm_projector.0.weight", "model.image_newline"]
    family = LLaDAV()
    assert family.recognises(CONFIG, [])
    assert family.recognises({"model_type": "llava_llada"}, [])
    assert family.recognises({}, names)
    assert not family.recognises({}, names[:1])
    assert not family.recognises({"model_type": "llava_qwen"}, names)
    assert not LLaDA().recognises(CONFIG, names)
    assert not Dream().recognises({}, names)


def test_a_checkpoint_that_declares_nothing_is_recognised_by_its_tensors(copy: Path) -> None:
    change(copy / "config.json", model_type=None, architectures=None)
    assert load_model(copy, device="cpu").spec.family == "llada-v"


# Refusals


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("tie_word_embeddings", True),
        ("rope_scaling", {"type": "linear", "factor": 2}),
        ("num_key_value_heads", 5),
        ("num_attention_heads", 3),
        ("max_position_embeddings", None),
        ("mask_token_id", None),
    ],
)
def test_what_the_text_part_never_uses_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ModelError, match="mask" if field == "mask_token_id" else field):
        spec(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mm_projector_type", "linear"),
        ("mm_hidden_size", 1024),
        ("mm_vision_select_layer", -1),
        ("mm_vision_select_feature", "cls_patch"),
        ("mm_patch_merge_type", "flat"),
        ("mm_use_im_start_end", True),
        ("mm_use_im_patch_token", True),
        ("mm_resampler_type", "perceiver"),
        ("image_aspect_ratio", "anyres"),
        ("image_aspect_ratio", "pad"),
        ("image_aspect_ratio", None),
        ("image_grid_pinpoints", None),
        ("image_grid_pinpoints", []),
        ("image_grid_pinpoints", [[384, 385]]),
        ("image_grid_pinpoints", [[384]]),
        ("image_grid_pinpoints", [[384, True]]),
        ("image_grid_pinpoints", [[384, 384 * 65]]),
        ("image_grid_pinpoints", "(1x1),(6x6)"),
        ("image_grid_pinpoints", "(1x1),...,(99999x99999)"),
        ("image_grid_pinpoints", "(0x1),...,(2x2)"),
        ("tokenizer_model_max_length", 0),
    ],
)
def test_what_the_vision_part_never_uses_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ModelError, match=field):
        looks(**{field: value})


def test_both_spellings_of_the_canvases_mean_the_same() -> None:
    pairs = [[384 * i, 384 * j] for i in range(1, 4) for j in range(2, 4)]
    assert looks(image_grid_pinpoints=pairs).canvases == looks(image_grid_pinpoints="(1x2),...,(3x3)").canvases


# The tower's config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "siglip2_vision_model"),
        ("hidden_act", "gelu"),
        ("num_channels", 1),
        ("num_hidden_layers", 1),
        ("patch_size", 19),
        ("layer_norm_eps", 0),
    ],
)
def test_another_tower_is_refused_by_its_file_and_field(copy: Path, field: str, value: Any) -> None:
    change(copy / "siglip_vision_tower" / "config.json", **{field: value})
    refused(copy, "siglip_vision_tower", "config.json", field, str(value))


@pytest.mark.parametrize(
    "named", ["/mnt/models/siglip", "google/siglip2-so400m-patch14-384", "../elsewhere", "", None, 3]
)
def test_a_tower_that_is_not_in_the_folder_has_the_published_sizes(tmp_path: Path, named: Any) -> None:
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(GOLDEN / "siglip_vision_tower" / "config.json", tmp_path / "elsewhere")
    (tmp_path / "checkpoint").mkdir()
    assert looks(tmp_path / "checkpoint", mm_vision_tower=named) == looks()


# Tensors


def test_tensors_of_the_vision_part_that_are_missing_or_unexpected_are_named(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tower = "model.vision_tower.vision_tower.vision_model."
    del tensors["model.image_newline"], tensors[f"{tower}post_layernorm.weight"]
    tensors[f"{tower}encoder.layers.2.mlp.fc1.bias"] = torch.zeros(48)
    tensors[f"{tower}head.probe"] = torch.zeros(1, 1, 32)  # a pooling head is never used
    tensors["model.mm_projector.0.weight"] = torch.zeros(64, 31)
    save_file(tensors, copy / "model.safetensors")
    refused(
        copy,
        "1 missing: 'model.image_newline'",
        f"1 unexpected: '{tower}encoder.layers.2.mlp.fc1.bias'",
        "1 misshapen: 'model.mm_projector.0.weight' is (64, 31), expected (64, 32)",
    )


def test_the_vision_part_is_frozen_and_of_the_dtype_and_device_of_the_model() -> None:
    model = load_model(GOLDEN, device="cpu", dtype="bfloat16")
    assert model.vision is not None
    assert not model.vision.training
    assert {(p.dtype, p.requires_grad) for p in model.vision.parameters()} == {(torch.bfloat16, False)}


def test_random_weights_give_finite_rows_that_depend_on_the_seed() -> None:
    vision = load_model(GOLDEN, device="cpu").vision
    assert vision is not None
    first, again, other = (
        Vision(vision.spec).init_random(seed).tower_rows(torch.ones(1, 3, 18, 18)) for seed in (0, 0, 1)
    )
    assert torch.isfinite(first).all()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
