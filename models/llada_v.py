"""LLaDA-V (arXiv:2505.16933): LLaDA with images in the prompt.

The text part is LLaDA under Dream's names and without biases. Where LLaDA-V differs from LLaDA:

- The tower (SigLIP, 26 layers), the projector and the newline row lie in the same files; `vision.py` computes with
  them.
- cos and sin are rounded to the compute dtype and the rotation stays there (`rope_full_precision` false).
- Decoding never predicts end-of-text, bos, and the two tokens around a role (`ModelSpec.forbidden`): a text ends with
  the end of a turn.
- No config field names the mask: the tokenizer's ``<|mdm_mask|>`` does.
- The sizes of the tower are constants of the published code. A file ``<mm_vision_tower>/config.json`` in the
  checkpoint's folder overrides them; the published checkpoint has none. That path is never fetched, nor followed out of
  the folder.

The published loader cuts embedding and head to the tokenizer's ids; here the padding rows stay, as in LLaDA. The
published code cuts prompts of more than `tokenizer_model_max_length` rows; here they are refused.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

from dcache.models.family import Family, Fields, Slot, check_heads, find_ends, find_mask
from dcache.models.files import read_json
from dcache.models.tokenizer import Tokenizer
from dcache.models.transformer import ModelSpec
from dcache.models.vision import VisionSpec, tower_slots

SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)

_FIXED: Mapping[str, tuple[Any, str]] = {
    "hidden_act": ("silu", "the gate of the MLP is a SiLU"),
    "attention_bias": (False, "no projection of the text part has a bias"),
    "mlp_bias": (False, "no projection of the text part has a bias"),
    "pretraining_tp": (1, "projections are whole"),
    "tie_word_embeddings": (False, "the head is a matrix of its own"),
}
_FIXED_VISION: Mapping[str, tuple[Any, str]] = {
    "mm_projector_type": ("mlp2x_gelu", "the projector is two linear layers around a GELU"),
    "mm_vision_select_layer": (-2, "the last layer of the tower is not used"),
    "mm_vision_select_feature": ("patch", "the tower has no class token"),
    "mm_patch_merge_type": ("spatial_unpad", "padding is cropped and every line of the map ends with a newline row"),
    "mm_use_im_start_end": (False, "no token marks the borders of an image"),
    "mm_use_im_patch_token": (False, "no token marks the patches of an image"),
}
_TOWER: Mapping[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
}
_FIXED_TOWER: Mapping[str, tuple[Any, str]] = {
    "model_type": ("siglip_vision_model", "the tower is a SigLIP of fixed resolution"),
    "hidden_act": ("gelu_pytorch_tanh", "the MLP of the tower is an approximated GELU"),
    "num_channels": (3, "images are RGB"),
}
_SPAN = re.compile(r"\((\d\d?)x(\d\d?)\),\s*\.\.\.,\s*\((\d\d?)x(\d\d?)\)")
_NEVER = ("<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>")  # and the end-of-text token
_INSIDE = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")
_PROJECTOR = ("0.weight", "0.bias", "2.weight", "2.bias")
_TOWER_PREFIX = "model.vision_tower.vision_tower.vision_model."


class LLaDAV(Family):
    """The adapter; what the published checkpoints never use is refused, with the reason."""

    name = "llada-v"
    ignored: ClassVar[tuple[str, ...]] = (
        "*rotary_emb.inv_freq",
        f"{_TOWER_PREFIX}post_layernorm.*",
        f"{_TOWER_PREFIX}head.*",
    )
    shapes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "llada-v-8b": {
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "intermediate_size": 12288,
            "vocab_size": 126464,
            "max_position_embeddings": 8192,  # the published tokenizer_model_max_length
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "mask_token_id": 126336,
            "eos_token_id": 126081,
            "mm_hidden_size": 1152,
            "image_aspect_ratio": "anyres_max_4",
            "image_grid_pinpoints": "(1x1),...,(6x6)",
        }
    }

    def recognises(self, config: Mapping[str, Any], tensors: Collection[str]) -> bool:
        """Other families use these names for the text; the newline row beside them is LLaVA's."""
        kind, architectures = config.get("model_type") or None, config.get("architectures") or None
        if kind is None and architectures is None:
            return {"model.embed_tokens.weight", "model.mm_projector.0.weight", "model.image_newline"} <= set(tensors)
        return kind in (None, "llava_llada") and architectures in (None, ["LlavaLLaDAModelLM"])

    def spec(self, config: Mapping[str, Any], generation: Mapping[str, Any], tokenizer: Tokenizer | None) -> ModelSpec:
        """Translate the fields of the text part; see `Family.spec`."""
        fields = Fields(config)
        for name, (value, reason) in _FIXED.items():
            fields.fixed(name, value, reason)
        fields.absent("rope_scaling", "rotary angles are not scaled")
        d_model, n_heads = check_heads(fields, "hidden_size", "num_attention_heads")
        fields.fixed("head_dim", d_model // n_heads, "heads divide hidden_size")
        n_kv_heads = fields.integer("num_key_value_heads", n_heads, default=n_heads)
        if n_heads % n_kv_heads:
            raise fields.refuse("num_key_value_heads", f"a divisor of num_attention_heads, {n_heads}")
        vocab_size = fields.integer("vocab_size", 1 << 24)
        ends = find_ends(fields, generation, tokenizer, "<|eot_id|>", vocab_size)
        return ModelSpec(
            family=self.name,
            n_layers=fields.integer("num_hidden_layers", 4096),
            d_model=d_model,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=d_model // n_heads,
            mlp_size=fields.integer("intermediate_size", 1 << 22),
            vocab_size=vocab_size,
            norm_eps=fields.number("rms_norm_eps"),
            rope_theta=fields.number("rope_theta"),
            max_positions=fields.integer("max_position_embeddings", 1 << 20),
            mask_id=find_mask(fields, generation, tokenizer, "<|mdm_mask|>", vocab_size),
            eos_id=ends[0],
            end_ids=ends,
            rope_full_precision=False,
            forbidden=_forbidden(ends[0], tokenizer),
        )

    def vision(self, config: Mapping[str, Any], spec: ModelSpec, folder: Path | None) -> VisionSpec:
        """Translate the fields of the vision part; see `Family.vision`."""
        fields = Fields(config)
        for name, (value, reason) in _FIXED_VISION.items():
            fields.fixed(name, value, reason)
        fields.absent("mm_resampler_type", "nothing stands between tower and projector")
        tower = _tower_fields(fields, folder)
        for name, (value, reason) in _FIXED_TOWER.items():
            tower.fixed(name, value, reason)
        width, n_heads = check_heads(tower, "hidden_size", "num_attention_heads")
        fields.fixed("mm_hidden_size", width, "the width of the tower")
        image_size = tower.integer("image_size", 1 << 14)
        return VisionSpec(
            image_size=image_size,
            patch_size=tower.integer("patch_size", image_size),
            width=width,
            n_layers=tower.integer("num_hidden_layers", 4096, low=2) - 1,
            n_heads=n_heads,
            mlp_size=tower.integer("intermediate_size", 1 << 22),
            norm_eps=tower.number("layer_norm_eps"),
            d_model=spec.d_model,
            canvases=_canvases(fields, image_size),
            max_tiles=_max_tiles(fields),
            max_rows=fields.integer("tokenizer_model_max_length", 1 << 20, default=spec.max_positions),
            stand_in=spec.eos_id,
            system=SYSTEM,
        )

    def slots(self, spec: ModelSpec) -> Mapping[str, Slot]:
        """Published names; q, k and v share one matrix here, and so do gate and up."""
        q, kv, m = spec.q_width, spec.kv_width, spec.mlp_size
        block = {
            "input_layernorm": Slot("norm1"),
            "self_attn.q_proj": Slot("qkv", slice(0, q)),
            "self_attn.k_proj": Slot("qkv", slice(q, q + kv)),
            "self_attn.v_proj": Slot("qkv", slice(q + kv, q + 2 * kv)),
            "self_attn.o_proj": Slot("out"),
            "post_attention_layernorm": Slot("norm2"),
            "mlp.gate_proj": Slot("gate_up", slice(0, m)),
            "mlp.up_proj": Slot("gate_up", slice(m, 2 * m)),
            "mlp.down_proj": Slot("down"),
        }
        slots = {"model.embed_tokens": Slot("embedding"), "model.norm": Slot("norm"), "lm_head": Slot("head")}
        for i in range(spec.n_layers):
            slots |= {f"model.layers.{i}.{n}": Slot(f"layers.{i}.{s.parameter}", s.rows) for n, s in block.items()}
        return {f"{name}.weight": slot for name, slot in slots.items()}

    def vision_slots(self, vision: VisionSpec) -> Mapping[str, Slot]:
        """Published names of tower, projector and newline row."""
        slots = {_TOWER_PREFIX + name: parameter for name, parameter in tower_slots(vision.n_layers).items()}
        slots |= {f"model.mm_projector.{part}": f"projector.{part}" for part in _PROJECTOR}
        return {name: Slot(parameter) for name, parameter in (slots | {"model.image_newline": "newline"}).items()}


def _forbidden(eos_id: int, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """What the published loop forbids by number (126081, 126080, 126346 and 126347); without a tokenizer the first."""
    others = () if tokenizer is None else (tokenizer.token_id(name) for name in _NEVER)
    return tuple(dict.fromkeys([eos_id, *(i for i in others if i is not None)]))


def _tower_fields(fields: Fields, folder: Path | None) -> Fields:
    """The tower's config beside the checkpoint, if `mm_vision_tower` names a folder in there; else the constants."""
    named = fields.values.get("mm_vision_tower")
    if folder is None or not isinstance(named, str) or not _INSIDE.fullmatch(named):
        return Fields(_TOWER)  # for instance an absolute path of the authors
    file = folder / named / "config.json"
    return Fields(read_json(file), str(file)) if file.is_file() else Fields(_TOWER)


def _canvases(fields: Fields, image_size: int) -> tuple[tuple[int, int], ...]:
    """Published as (width, height) pairs, or as the smallest and largest number of tiles: "(1x1),...,(6x6)"."""
    value = fields.values.get("image_grid_pinpoints")
    if isinstance(value, str) and (ends := _SPAN.fullmatch(value)):
        left, top, right, bottom = map(int, ends.groups())
        value = [[i * image_size, j * image_size] for i in range(left, right + 1) for j in range(top, bottom + 1)]
    pairs = value if isinstance(value, list) else []
    if not pairs or not all(_is_canvas(pair, image_size) for pair in pairs):
        raise fields.refuse(
            "image_grid_pinpoints", f"pairs of width and height, multiples of the tile of {image_size} pixels"
        )
    return tuple((pair[0], pair[1]) for pair in pairs)


def _is_canvas(pair: Any, image_size: int) -> bool:
    if not isinstance(pair, list) or len(pair) != 2:
        return False
    return all(type(x) is int and 0 < x <= 64 * image_size and x % image_size == 0 for x in pair)


def _max_tiles(fields: Fields) -> int:
    value = fields.values.get("image_aspect_ratio")
    found = re.fullmatch(r"anyres_max_([1-9]\d{0,3})", value) if isinstance(value, str) else None
    if found is None:
        raise fields.refuse("image_aspect_ratio", "'anyres_max_4' or another number: an image is cut into tiles")
    return int(found[1])
