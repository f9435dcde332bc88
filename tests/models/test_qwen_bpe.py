import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from dcache.errors import ModelError
from dcache.models.qwen_bpe import rebuild

GOLDEN = Path(__file__).parents[1] / "golden" / "models" / "dream"
FILES = ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json")
PIECES = ["hello", " the user", "12", "\n\n", "  ", "'LL", "don't", "<|im_end|>", "<|mask|>", "é", "e\u0301", "!?\n"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        shutil.copyfile(GOLDEN / name, tmp_path / name)
    return tmp_path


def rebuilt(folder: Path) -> tokenizers.Tokenizer:
    tokenizer = rebuild(folder)
    assert tokenizer is not None
    return tokenizer


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(folder: Path, *expected: str) -> None:
    with pytest.raises(ModelError) as caught:
        rebuild(folder)
    for text in expected:
        assert text in str(caught.value)


WHOLE = tokenizers.Tokenizer.from_file(str(GOLDEN / "tokenizer.json"))
REBUILT = rebuilt(GOLDEN)


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=8).map("".join))
def test_it_equals_the_tokenizer_that_the_same_files_describe(text: str) -> None:
    ids = REBUILT.encode(text, add_special_tokens=False).ids
    assert ids == WHOLE.encode(text, add_special_tokens=False).ids
    assert REBUILT.decode(ids, skip_special_tokens=False) == WHOLE.decode(ids, skip_special_tokens=False)


def test_a_folder_without_either_file_has_no_tokenizer_of_this_kind(tmp_path: Path) -> None:
    assert rebuild(tmp_path) is None


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_one_file_without_the_other_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refused(folder, f"{folder / name} does not exist")


def test_added_tokens_keep_their_ids_across_a_gap_and_either_file_is_enough(folder: Path) -> None:
    change(folder / "added_tokens.json", **{"<|far|>": 300})
    tokenizer = rebuilt(folder)
    assert tokenizer.token_to_id("<|far|>") == 300
    assert tokenizer.encode("a<|far|>").ids == [65, 300]
    (folder / "added_tokens.json").unlink()
    assert rebuilt(folder).encode("a<|mask|>").ids == [65, 124]
    shutil.copyfile(GOLDEN / "added_tokens.json", folder / "added_tokens.json")
    (folder / "tokenizer_config.json").unlink()
    assert rebuilt(folder).encode("a<|mask|>").ids == [65, 124]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("vocab.json", "{", "not readable JSON"),
        ("vocab.json", "[]", "holds a JSON list"),
        ("vocab.json", '{"a": "0"}', "token 'a' has the id '0'"),
        ("vocab.json", '{"a": -1}', "token 'a' has the id -1"),
        ("vocab.json", '{"a": 1, "b": 1}', "tokens 'a' and 'b' have the same id, 1"),
        ("merges.txt", "#version: 0.2\nh e\nhe l l\n", "line 3: 'he l l' is not a pair of tokens"),
        ("merges.txt", "h e\nq z\n", "line 2: 'qz' is not in vocab.json"),
        ("added_tokens.json", '{"<|mask|>": true}', "token '<|mask|>' has the id True"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "'added_tokens_decoder' is not an object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"120": {}}}', "no token with a 'content' under '120'"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "y"}}}', "under 'x'"),
    ],
)
def test_a_malformed_file_is_named(folder: Path, name: str, text: str, expected: str) -> None:
    (folder / name).write_text(text)
    refused(folder, str(folder / name), expected)


def test_a_file_that_is_not_utf_8_is_named(folder: Path) -> None:
    (folder / "merges.txt").write_bytes(b"h e\n\xff\xfe\n")
    refused(folder, f"{folder / 'merges.txt'} cannot be read")


@pytest.mark.parametrize("added", [{"<|mask|>": 119}, {"<|mask|>": 123}, {"<|mask|>": 130}, {"the": 130}])
def test_files_that_contradict_each_other_about_an_added_token_are_refused(folder: Path, added: dict[str, int]) -> None:
    change(folder / "added_tokens.json", **added)
    refused(folder, "contradict each other about token")
