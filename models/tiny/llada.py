"""LLaDA's published layout: OLMo's config, ``tokenizer.json``, and the mask known to the config alone.

A number is split into single digits, of which the first carries the space before it.
"""

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers

from dcache.models.llada import LLaDA
from dcache.models.tiny.formats import Format, added_tokens, write_json
from dcache.models.tiny.recipe import Recipe
from dcache.models.tiny.tokenizer import special_id

BOS, EOS, MASK = "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"
HEADER, END_HEADER, EOT = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
# A template of LLaDA-8B-Instruct's behaviour: bos once, trimmed turns, and always the assistant's header.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    f"{{{{ '{HEADER}' + message['role'] + '{END_HEADER}\\n\\n' + message['content'] | trim + '{EOT}' }}}}{{% endfor %}}"
    f"{{{{ '{HEADER}assistant{END_HEADER}\\n\\n' }}}}"
)
PIECES = Regex(r" ?\p{L}+| ?\d| ?[^\s\p{L}\d]+|\s*[\r\n]+|\s+(?!\S)|\s+")


class LLaDAFormat(Format):
    """Of `tiny-llada`."""

    family = LLaDA()
    specials = (BOS, EOS, MASK, HEADER, END_HEADER, EOT)
    words = ("user", "assistant", "\n\n")
    eos, turn_end = EOS, EOT

    def split(self, tokenizer: Tokenizer) -> pre_tokenizers.PreTokenizer:
        """Words with the space before them, single digits, punctuation."""
        splitter = pre_tokenizers.Split(PIECES, behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [splitter, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        return splitter

    def render(self, prompt: str) -> str:
        """The chat template for a single user turn."""
        return f"{BOS}{HEADER}user{END_HEADER}\n\n{prompt.strip()}{EOT}{HEADER}assistant{END_HEADER}\n\n"

    def config(self, recipe: Recipe, tokenizer: Tokenizer) -> dict[str, Any]:
        """``config.json`` with the fields of the published checkpoints."""
        return {
            "activation_type": "silu",
            "alibi": False,
            "alibi_bias_max": 8.0,
            "architectures": ["LLaDAModelLM"],
            "attention_dropout": 0.0,
            "attention_layer_norm": False,
            "attention_layer_norm_with_affine": True,
            "bias_for_layer_norm": False,
            "block_group_size": 1,
            "block_type": "llama",
            "d_model": recipe.d_model,
            "embedding_dropout": 0.0,
            "embedding_size": recipe.vocab_size,
            "eos_token_id": special_id(tokenizer, EOS),
            "flash_attention": False,
            "include_bias": False,
            "include_qkv_bias": False,
            "init_cutoff_factor": None,
            "init_device": "meta",
            "init_fn": "mitchell",
            "init_std": 0.02,
            "input_emb_norm": False,
            "layer_norm_type": "rms",
            "layer_norm_with_affine": True,
            "mask_token_id": special_id(tokenizer, MASK),
            "max_sequence_length": 1024,
            "mlp_hidden_size": recipe.mlp_size,
            "mlp_ratio": 4,
            "model_type": "llada",
            "multi_query_attention": None,
            "n_heads": recipe.n_heads,
            "n_kv_heads": recipe.n_kv_heads,
            "n_layers": recipe.n_layers,
            "pad_token_id": special_id(tokenizer, EOS),
            "precision": "amp_bf16",
            "residual_dropout": 0.0,
            "rms_norm_eps": 1e-5,
            "rope": True,
            "rope_full_precision": True,
            "rope_theta": 500000.0,
            "scale_logits": False,
            "torch_dtype": "bfloat16",
            "use_cache": False,
            "vocab_size": recipe.vocab_size,
            "weight_tying": False,
        }

    def save_tokenizer(self, tokenizer: Tokenizer, folder: Path) -> None:
        """Write the three published files."""
        tokenizer.save(str(folder / "tokenizer.json"))
        names = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}  # the mask stands in config.json only
        config = {
            "add_bos_token": False,
            "add_eos_token": False,
            "added_tokens_decoder": added_tokens(tokenizer, self.specials),
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1024,
            "tokenizer_class": "PreTrainedTokenizerFast",
            **names,
        }
        write_json(folder / "tokenizer_config.json", config)
        write_json(folder / "special_tokens_map.json", names)

    def read_tokenizer(self, folder: Path) -> Tokenizer:
        """Read ``tokenizer.json``."""
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
