"""Qwen2's byte-level BPE from ``vocab.json`` and ``merges.txt``, for repositories without ``tokenizer.json``.

Text is normalised to NFC and split by `PIECES`, each piece's bytes are spelled as printable characters, and the merges
apply within a piece. The added tokens stand in ``added_tokens.json`` (text to id) and, with flags, in the
`added_tokens_decoder` of ``tokenizer_config.json`` (id to token); they are matched in the text before anything else.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from dcache.errors import ModelError
from dcache.models.files import one_line, read_json, read_text

VOCAB, MERGES, ADDED, CONFIG = "vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json"
PIECES = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # contractions
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # letters, and what stands before them
        r"\p{N}",  # one digit
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # punctuation up to the end of the line
        r"\s*[\r\n]+",
        r"\s+(?!\S)",  # spaces, but the last belongs to what follows
        r"\s+",
    )
)


def rebuild(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder that holds the two files; None if it holds neither.

    Raises:
        ModelError: naming the file that is missing or cannot be used.
    """
    if not (folder / VOCAB).exists() and not (folder / MERGES).exists():
        return None
    vocab = _vocab(folder / VOCAB)
    added = _added(folder, vocab)
    ids = vocab | {token.content: i for i, token in added.items()}  # so that each gets its published id
    try:
        tokenizer = Tokenizer(models.BPE(ids, _merges(folder / MERGES, vocab)))
    except Exception as error:  # the library raises bare Exceptions
        raise ModelError(f"{folder / MERGES} does not fit {VOCAB}: {one_line(error)}") from error
    split(tokenizer)
    tokenizer.add_tokens([added[i] for i in sorted(added)])
    return tokenizer


def split(tokenizer: Tokenizer) -> None:
    """Give a BPE model the normalisation, the splitting and the decoding of Qwen2, in place."""
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()


def _vocab(file: Path) -> dict[str, int]:
    """Text of a token to its id, each id once."""
    vocab = read_json(file)
    if bad := next((text for text, i in vocab.items() if not _is_id(i)), None):
        raise ModelError(f"{file}: token {bad!r} has the id {vocab[bad]!r}; expected an integer from 0 on")
    owner: dict[int, str] = {}
    for text, i in vocab.items():
        if owner.setdefault(i, text) != text:
            raise ModelError(f"{file}: tokens {owner[i]!r} and {text!r} have the same id, {i}")
    return vocab


def _merges(file: Path, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs in order of priority; the first line may name the version of the format."""
    merges = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip() or (number == 1 and line.startswith("#version:")):
            continue
        parts = line.split()
        if len(parts) != 2:
            raise ModelError(f"{file}, line {number}: {line!r} is not a pair of tokens")
        if unknown := [text for text in (*parts, "".join(parts)) if text not in vocab]:
            raise ModelError(f"{file}, line {number}: {unknown[0]!r} is not in {VOCAB}")
        merges.append((parts[0], parts[1]))
    return merges


def _added(folder: Path, vocab: Mapping[str, int]) -> dict[int, AddedToken]:
    """The added tokens by id; both files may tell, but not differently, and none may take a place in the vocabulary."""
    listed = read_json(folder / ADDED, optional=True)
    if bad := next((text for text, i in listed.items() if not _is_id(i)), None):
        raise ModelError(f"{folder / ADDED}: token {bad!r} has the id {listed[bad]!r}; expected an integer from 0 on")
    added = {i: AddedToken(text, special=True, normalized=False) for text, i in listed.items()}
    added |= _decoder(folder / CONFIG)
    homes = dict(vocab)
    owners = {i: text for text, i in vocab.items()}
    for i, token in added.items():
        text = token.content
        known = homes.setdefault(text, i), owners.setdefault(i, text), listed.get(text, i)
        if known != (i, text, i):
            raise ModelError(
                f"{folder}: {VOCAB}, {ADDED} and {CONFIG} contradict each other about token {text!r}, id {i}: "
                f"{text!r} also has the id {known[0] if known[0] != i else known[2]}, and {i} is also {known[1]!r}"
            )
    return added


def _decoder(file: Path) -> dict[int, AddedToken]:
    """The `added_tokens_decoder`: id to token with its flags."""
    entries = read_json(file, optional=True).get("added_tokens_decoder") or {}
    if not isinstance(entries, dict):
        raise ModelError(f"{file}: 'added_tokens_decoder' is not an object")
    added = {}
    for i, entry in entries.items():
        if not (i.isascii() and i.isdigit() and isinstance(entry, dict) and isinstance(entry.get("content"), str)):
            raise ModelError(f"{file}: 'added_tokens_decoder' has no token with a 'content' under {i!r}")
        added[int(i)] = AddedToken(entry["content"], **_flags(entry))
    return added


def _flags(entry: Mapping[str, Any]) -> dict[str, bool]:
    return {name: bool(entry.get(name)) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 24
