"""Dream-v0-Base and -Instruct, Dream-Coder-v0 and DiffuCoder (arXiv:2508.15487, arXiv:2506.20639).

A Qwen2.5 whose attention is full, under Qwen's names. Where Dream differs from other families:

- Row t predicts token t + 1, as in the autoregressive parent: the sampler reads position p from row p - 1 (`shift`).
- q, k and v have biases, the output projection has none; few KV heads are shared by many query heads.
- cos and sin are rounded to the compute dtype and the rotation stays there (`rope_full_precision` false).
- The repositories hold no ``tokenizer.json``: `qwen_bpe.py` rebuilds it. Base models are prompted without a template.

`max_position_embeddings`, 131072 in Dream-v0, is inherited from the parent; training saw 2048 positions.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

from dcache.models.family import Family, Fields, Slot, check_heads, find_ends, find_mask
from dcache.models.qwen_bpe import rebuild
from dcache.models.tokenizer import Tokenizer
from dcache.models.transformer import ModelSpec

_FIXED: Mapping[str, tuple[Any, str]] = {
    "hidden_act": ("silu", "the gate of the MLP is a SiLU"),
    "attention_bias": (True, "q, k and v have biases"),
    "use_sliding_window": (False, "every row attends to all rows"),
    "use_mrope": (False, "positions have one axis"),
}


class Dream(Family):
    """The adapter; `_FIXED` lists what the published checkpoints never use and why it is refused."""

    name = "dream"
    ignored: ClassVar[tuple[str, ...]] = ("*rotary_emb.inv_freq",)
    shapes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "dream-7b": {
            "hidden_size": 3584,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "intermediate_size": 18944,
            "vocab_size": 152064,
            "max_position_embeddings": 131072,  # a rotary table of 64 MiB beside 15 GB of weights
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "mask_token_id": 151666,
            "eos_token_id": 151643,
        }
    }

    def recognises(self, config: Mapping[str, Any], tensors: Collection[str]) -> bool:
        """Other families use Qwen's names too; among those of full attention the biases are Dream's alone."""
        kind, architectures = config.get("model_type") or None, config.get("architectures") or None
        if kind is None and architectures is None:
            return {"model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.bias"} <= set(tensors)
        return kind in (None, "Dream") and architectures in (None, ["DreamModel"])

    def spec(self, config: Mapping[str, Any], generation: Mapping[str, Any], tokenizer: Tokenizer | None) -> ModelSpec:
        """Translate the config table; see `Family.spec`."""
        fields = Fields(config)
        for name, (value, reason) in _FIXED.items():
            fields.fixed(name, value, reason)
        fields.absent("rope_scaling", "rotary angles are not scaled")
        d_model, n_heads = check_heads(fields, "hidden_size", "num_attention_heads")
        fields.fixed("head_dim", d_model // n_heads, "heads divide hidden_size")
        vocab_size = fields.integer("vocab_size", 1 << 24)
        ends = find_ends(fields, generation, tokenizer, "<|im_end|>", vocab_size)
        return ModelSpec(
            family=self.name,
            n_layers=fields.integer("num_hidden_layers", 4096),
            d_model=d_model,
            n_heads=n_heads,
            n_kv_heads=_kv_heads(fields, n_heads),
            head_dim=d_model // n_heads,
            mlp_size=fields.integer("intermediate_size", 1 << 22),
            vocab_size=vocab_size,
            norm_eps=fields.number("rms_norm_eps"),
            rope_theta=fields.number("rope_theta"),
            max_positions=fields.integer("max_position_embeddings", 1 << 20),
            mask_id=find_mask(fields, generation, tokenizer, "<|mask|>", vocab_size),
            eos_id=ends[0],
            end_ids=ends,
            rope_full_precision=False,
            qkv_bias=True,
            tied_head=fields.flag("tie_word_embeddings", False),
            shift=1,
        )

    def slots(self, spec: ModelSpec) -> Mapping[str, Slot]:
        """Published names; q, k and v share one matrix and one bias here, and so do gate and up."""
        q, kv, m = spec.q_width, spec.kv_width, spec.mlp_size
        rows = {"q": slice(0, q), "k": slice(q, q + kv), "v": slice(q + kv, q + 2 * kv)}
        block = {
            "input_layernorm.weight": Slot("norm1"),
            "self_attn.o_proj.weight": Slot("out"),
            "post_attention_layernorm.weight": Slot("norm2"),
            "mlp.gate_proj.weight": Slot("gate_up", slice(0, m)),
            "mlp.up_proj.weight": Slot("gate_up", slice(m, 2 * m)),
            "mlp.down_proj.weight": Slot("down"),
        }
        for name, part in rows.items():
            block[f"self_attn.{name}_proj.weight"] = Slot("qkv", part)
            block[f"self_attn.{name}_proj.bias"] = Slot("qkv_bias", part)
        slots = {"model.embed_tokens.weight": Slot("embedding"), "model.norm.weight": Slot("norm")}
        slots |= {} if spec.tied_head else {"lm_head.weight": Slot("head")}
        for i in range(spec.n_layers):
            slots |= {
                f"model.layers.{i}.{name}": Slot(f"layers.{i}.{s.parameter}", s.rows) for name, s in block.items()
            }
        return slots

    def tokenizer(self, folder: Path) -> Tokenizer | None:
        """As published, from ``vocab.json`` and ``merges.txt``, unless there is a ``tokenizer.json``."""
        return Tokenizer.load(folder, rebuild)


def _kv_heads(fields: Fields, n_heads: int) -> int:
    """A null means as many as query heads; a number that is absent is not guessed."""
    null = "num_key_value_heads" in fields.values
    n_kv_heads = fields.integer("num_key_value_heads", n_heads, default=n_heads if null else None)
    if n_heads % n_kv_heads:
        raise fields.refuse("num_key_value_heads", f"a divisor of num_attention_heads, {n_heads}")
    return n_kv_heads
