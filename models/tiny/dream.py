"""Dream's published layout: Qwen's config, a tokenizer in ``vocab.json`` and ``merges.txt``, and ChatML turns.

There is no ``tokenizer.json``, as in the published repositories. A number is split into single digits, and the space
before it is a token of its own.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers

from dcache.models import qwen_bpe
from dcache.models.dream import Dream
from dcache.models.tiny.formats import Format, added_tokens, write_json
from dcache.models.tiny.recipe import Recipe
from dcache.models.tiny.tokenizer import special_id

EOS, START, END, BOS, MASK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"
SYSTEM = "You are a helpful assistant."
# ChatML as in Dream-v0-Instruct: content as it is, and a system turn where the messages begin without one.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    f"{{{{ '{START}system\\n{SYSTEM}{END}\\n' }}}}{{% endif %}}{{% for message in messages %}}"
    f"{{{{ '{START}' + message['role'] + '\\n' + message['content'] + '{END}\\n' }}}}{{% endfor %}}"
    f"{{% if add_generation_prompt %}}{{{{ '{START}assistant\\n' }}}}{{% endif %}}"
)


class DreamFormat(Format):
    """Of `tiny-dream`."""

    family = Dream()
    specials = (EOS, START, END, BOS, MASK)
    words = ("system", "user", "assistant", "\n", "You", " are", " a", " helpful", " assistant")
    eos, turn_end = EOS, END

    def split(self, tokenizer: Tokenizer) -> pre_tokenizers.PreTokenizer:
        """As Qwen2."""
        qwen_bpe.split(tokenizer)
        return pre_tokenizers.Split(Regex(qwen_bpe.PIECES), behavior="isolated")

    def render(self, prompt: str) -> str:
        """The chat template for a single user turn."""
        return f"{START}system\n{SYSTEM}{END}\n{START}user\n{prompt}{END}\n{START}assistant\n"

    def config(self, recipe: Recipe, tokenizer: Tokenizer) -> dict[str, Any]:
        """``config.json`` with the fields of the published checkpoints."""
        return {
            "architectures": ["DreamModel"],
            "attention_dropout": 0.0,
            **self._ids(tokenizer),
            "hidden_act": "silu",
            "hidden_size": recipe.d_model,
            "initializer_range": 0.02,
            "intermediate_size": recipe.mlp_size,
            "max_position_embeddings": 1024,
            "max_window_layers": recipe.n_layers,
            "model_type": "Dream",
            "num_attention_heads": recipe.n_heads,
            "num_hidden_layers": recipe.n_layers,
            "num_key_value_heads": recipe.n_kv_heads,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": False,
            "use_mrope": False,
            "use_sliding_window": False,
            "vocab_size": recipe.vocab_size,
        }

    def generation(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """``generation_config.json``: the special ids once more."""
        return {"_from_model_config": True, **self._ids(tokenizer)}

    @staticmethod
    def _ids(tokenizer: Tokenizer) -> dict[str, int]:
        roles = {"bos": EOS, "eos": EOS, "mask": MASK, "pad": EOS}  # bos as published: not the tokenizer's
        return {f"{role}_token_id": special_id(tokenizer, token) for role, token in roles.items()}

    def save_tokenizer(self, tokenizer: Tokenizer, folder: Path) -> None:
        """Write the five published files."""
        vocab = tokenizer.get_vocab(with_added_tokens=False)
        write_json(folder / "vocab.json", dict(sorted(vocab.items(), key=lambda entry: entry[1])))
        merges = json.loads(tokenizer.to_str())["model"]["merges"]
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        write_json(folder / "added_tokens.json", {token: special_id(tokenizer, token) for token in self.specials})
        names: dict[str, Any] = {"bos_token": BOS, "eos_token": EOS, "mask_token": MASK, "pad_token": EOS}
        names |= {"additional_special_tokens": [BOS, MASK]}
        config = {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": added_tokens(tokenizer, self.specials),
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "errors": "replace",
            "model_max_length": 1024,
            "split_special_tokens": False,
            "tokenizer_class": "DreamTokenizer",
            "unk_token": None,
            **names,
        }
        write_json(folder / "tokenizer_config.json", config)
        write_json(folder / "special_tokens_map.json", names)

    def read_tokenizer(self, folder: Path) -> Tokenizer:
        """Rebuild it, as the loader does."""
        tokenizer = qwen_bpe.rebuild(folder)
        assert tokenizer is not None, f"{folder} holds no vocab.json"
        return tokenizer
