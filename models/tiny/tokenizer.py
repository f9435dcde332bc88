"""Tokenizer of the tiny checkpoints: byte-level BPE learned from gsm-mini, with LLaDA's special tokens and template.

All 256 bytes are tokens, so any text can be encoded; the merges cover the words of the task. A number is split into
single digits, of which the first carries the space before it.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from dcache.tasks.gsm_mini import GsmMini

BOS, EOS, MASK = "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"
HEADER, END_HEADER, EOT = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
SPECIALS = (BOS, EOS, MASK, HEADER, END_HEADER, EOT)
# A template of LLaDA-8B-Instruct's behaviour: bos once, trimmed turns, and always the assistant's header.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    f"{{{{ '{HEADER}' + message['role'] + '{END_HEADER}\\n\\n' + message['content'] | trim + '{EOT}' }}}}{{% endfor %}}"
    f"{{{{ '{HEADER}assistant{END_HEADER}\\n\\n' }}}}"
)
PIECES = Regex(r" ?\p{L}+| ?\d| ?[^\s\p{L}\d]+|\s*[\r\n]+|\s+(?!\S)|\s+")


def render(prompt: str) -> str:
    """The chat template for a single user turn."""
    return f"{BOS}{HEADER}user{END_HEADER}\n\n{prompt.strip()}{EOT}{HEADER}assistant{END_HEADER}\n\n"


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """Id of one of `SPECIALS`."""
    found: int | None = tokenizer.token_to_id(token)
    assert found is not None, f"the tokenizer lacks {token}"
    return found


def train_tokenizer(seed: int, vocab_size: int = 512, n_problems: int = 20_000) -> Tokenizer:
    """Learn merges from the train split; the special tokens take the last ids, as in LLaDA."""

    splitter = pre_tokenizers.Split(PIECES, behavior="isolated")
    task = GsmMini()
    counts: Counter[str] = Counter()
    for index in range(n_problems):
        problem = task.problem("train", index, seed)
        for text in (problem.prompt, problem.solution or ""):
            counts.update(word for word, _ in splitter.pre_tokenize_str(text))

    def corpus() -> Iterator[str]:
        """Each word, its count damped, so that merges go to rare words too before they go to parts of common ones."""
        for word, count in sorted(counts.items()):
            yield from [word] * round(count**0.25)
        yield from ["user", "assistant", "\n\n"] * 20

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [splitter, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the three files of a published tokenizer."""
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}  # LLaDA's mask stands in config.json only
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "added_tokens_decoder": {str(special_id(tokenizer, token)): {"content": token, **flags} for token in SPECIALS},
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")
