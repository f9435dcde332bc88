"""Byte-level BPE learned from gsm-mini, for a tiny checkpoint of any family.

All 256 bytes are tokens, so any text can be encoded; the merges cover the words of the task.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from dcache.tasks.gsm_mini import GsmMini


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """Id of a special token."""
    found: int | None = tokenizer.token_to_id(token)
    assert found is not None, f"the tokenizer lacks {token}"
    return found


def learn(
    split: Callable[[Tokenizer], pre_tokenizers.PreTokenizer],
    specials: Sequence[str],
    words: Sequence[str],
    seed: int,
    vocab_size: int,
    n_problems: int,
) -> Tokenizer:
    """Learn merges from the train split; the special tokens take the last ids, as in published checkpoints.

    Args:
        split: gives a bare BPE model its splitting and decoding, and returns what splits a text into words.
        specials: in order of id.
        words: of the chat template, learned as if they stood in every problem.
        seed: of the problems.
        vocab_size: with the special tokens.
        n_problems: whose words are counted.
    """
    tokenizer = Tokenizer(models.BPE())
    splitter = split(tokenizer)
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
        yield from [*words] * 20

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return tokenizer
