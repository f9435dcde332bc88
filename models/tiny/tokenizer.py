"""Byte-level BPE learned from the texts of a task, for a tiny checkpoint of any family.

All 256 bytes are tokens, so any text can be encoded; the merges cover the words of the task.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """Id of a special token."""
    found: int | None = tokenizer.token_to_id(token)
    assert found is not None, f"the tokenizer lacks {token}"
    return found


def learn(
    split: Callable[[Tokenizer], pre_tokenizers.PreTokenizer],
    specials: Sequence[str],
    words: Sequence[str],
    texts: Iterable[str],
    vocab_size: int,
) -> Tokenizer:
    """Learn merges from texts; the special tokens take the last ids, as in published checkpoints.

    Args:
        split: gives a bare BPE model its splitting and decoding, and returns what splits a text into words.
        specials: in order of id.
        words: of the chat template, learned as if they stood in every problem.
        texts: whose words are counted.
        vocab_size: with the special tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    splitter = split(tokenizer)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in splitter.pre_tokenize_str(text))

    def corpus() -> Iterator[str]:
        """Each word, its count damped, so that merges go to rare words too before they go to parts of common ones."""
        for word, count in sorted(counts.items()):
            yield from [word] * round(count**0.25)
        yield from [*words] * 20

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return tokenizer
