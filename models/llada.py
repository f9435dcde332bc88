"""LLaDA-8B-Base, LLaDA-8B-Instruct and LLaDA-1.5 (arXiv:2502.09992, arXiv:2505.19223).

The config speaks OLMo's dialect (`d_model`, `n_layers`, `mlp_hidden_size`). Where LLaDA differs from other families:

- `embedding_size`, not `vocab_size`, counts the rows of embedding and head; rows beyond the tokenizer are padding.
- The mask id stands in ``config.json``; the tokenizer's `mask_token` is unset.
- Two kinds of `ff_out`: ``model.transformer.ff_out`` is the head, ``...blocks.i.ff_out`` the MLP's down projection.
- Rotation in float32 (`rope_full_precision`); logits are aligned, row i predicts position i.
"""

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from dcache.models.family import Family, Fields, Slot, check_heads, find_ends, find_mask
from dcache.models.tokenizer import Tokenizer
from dcache.models.transformer import ModelSpec

_FIXED: Mapping[str, tuple[Any, str]] = {
    "alibi": (False, "positions come from the rotary embedding alone"),
    "rope": (True, "positions come from the rotary embedding alone"),
    "block_type": ("llama", "other blocks fuse q, k and v and have no up_proj"),
    "block_group_size": (1, "groups rename the blocks to block_groups"),
    "activation_type": ("silu", "'swiglu' means a ff_proj twice as wide with the gate in its second half"),
    "layer_norm_type": ("rms", "every norm is an RMSNorm"),
    "layer_norm_with_affine": (True, "every norm has a weight"),
    "attention_layer_norm": (False, "queries and keys are not normalised"),
    "bias_for_layer_norm": (False, "no norm has a bias"),
    "include_bias": (False, "no projection has a bias"),
    "include_qkv_bias": (False, "no projection has a bias"),
    "input_emb_norm": (False, "embeddings are not normalised"),
    "scale_logits": (False, "logits are not scaled"),
}


class LLaDA(Family):
    """The adapter; `_FIXED` lists what the published checkpoints never use and why it is refused."""

    name = "llada"
    ignored: ClassVar[tuple[str, ...]] = ("*rotary_emb.inv_freq",)
    shapes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "llada-8b": {
            "d_model": 4096,
            "n_layers": 32,
            "n_heads": 32,
            "n_kv_heads": 32,
            "mlp_hidden_size": 12288,
            "vocab_size": 126464,
            "embedding_size": 126464,
            "max_sequence_length": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "mask_token_id": 126336,
            "eos_token_id": 126081,
        }
    }

    def recognises(self, config: Mapping[str, Any], tensors: Collection[str]) -> bool:
        """LLaDA-MoE also declares the type "llada", so the architecture counts."""
        kind, architectures = config.get("model_type") or None, config.get("architectures") or None
        if kind is None and architectures is None:
            return {"model.transformer.wte.weight", "model.transformer.blocks.0.q_proj.weight"} <= set(tensors)
        return kind in (None, "llada") and architectures in (None, ["LLaDAModelLM"])

    def spec(self, config: Mapping[str, Any], generation: Mapping[str, Any], tokenizer: Tokenizer | None) -> ModelSpec:
        """Translate the config table; see `Family.spec`."""
        fields = Fields(config)
        for name, (value, reason) in _FIXED.items():
            fields.fixed(name, value, reason)
        d_model, n_heads = check_heads(fields, "d_model", "n_heads")
        vocab_size = _vocab_size(fields)
        ends = find_ends(fields, generation, tokenizer, "<|eot_id|>", vocab_size)
        return ModelSpec(
            family=self.name,
            n_layers=fields.integer("n_layers", 4096),
            d_model=d_model,
            n_heads=n_heads,
            n_kv_heads=_kv_heads(fields, n_heads),
            head_dim=d_model // n_heads,
            mlp_size=_mlp_size(fields, d_model),
            vocab_size=vocab_size,
            norm_eps=fields.number("rms_norm_eps"),
            rope_theta=fields.number("rope_theta"),
            max_positions=fields.integer("max_sequence_length", 1 << 20),
            mask_id=find_mask(fields, generation, tokenizer, "<|mdm_mask|>", vocab_size),
            eos_id=ends[0],
            end_ids=ends,
            rope_full_precision=fields.flag("rope_full_precision", True),
            tied_head=fields.flag("weight_tying", False),
        )

    def slots(self, spec: ModelSpec) -> Mapping[str, Slot]:
        """Published names; q, k and v share one matrix here, and so do gate (`ff_proj`) and up."""
        q, kv, m = spec.q_width, spec.kv_width, spec.mlp_size
        block = {
            "attn_norm": Slot("norm1"),
            "q_proj": Slot("qkv", slice(0, q)),
            "k_proj": Slot("qkv", slice(q, q + kv)),
            "v_proj": Slot("qkv", slice(q + kv, q + 2 * kv)),
            "attn_out": Slot("out"),
            "ff_norm": Slot("norm2"),
            "ff_proj": Slot("gate_up", slice(0, m)),
            "up_proj": Slot("gate_up", slice(m, 2 * m)),
            "ff_out": Slot("down"),
        }
        slots = {"wte": Slot("embedding"), "ln_f": Slot("norm")} | ({} if spec.tied_head else {"ff_out": Slot("head")})
        for i in range(spec.n_layers):
            slots |= {f"blocks.{i}.{name}": Slot(f"layers.{i}.{s.parameter}", s.rows) for name, s in block.items()}
        return {f"model.transformer.{name}.weight": slot for name, slot in slots.items()}


def _vocab_size(fields: Fields) -> int:
    named = fields.integer("vocab_size", 1 << 24)
    rows = fields.integer("embedding_size", 1 << 24, default=named)
    if rows < named:
        raise fields.refuse("embedding_size", f"at least the vocab_size, {named}")
    return rows


def _kv_heads(fields: Fields, n_heads: int) -> int:
    shared = fields.flag("multi_query_attention", False)
    n_kv_heads = fields.integer("n_kv_heads", n_heads, default=1 if shared else n_heads)
    if shared and n_kv_heads != 1:
        raise fields.refuse("n_kv_heads", "1 or null, since multi_query_attention is true")
    if n_heads % n_kv_heads:
        raise fields.refuse("n_kv_heads", f"a divisor of n_heads, {n_heads}")
    return n_kv_heads


def _mlp_size(fields: Fields, d_model: int) -> int:
    if fields.has("mlp_hidden_size") or not fields.has("mlp_ratio"):
        return fields.integer("mlp_hidden_size", 1 << 22)
    return fields.integer("mlp_ratio", 64) * d_model
