import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from dcache.errors import ModelError, UsageError
from dcache.models.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "models" / "llada_mha"
SPECIALS = range(96, 126)
PRINTABLE = st.text(st.characters(min_codepoint=32, max_codepoint=126) | st.just("\n"))
SPELLED = st.sampled_from(
    ["<|eot_id|>", "<|mdm_mask|>", "<|start_header_id|>", "<|", "|>", "eot_id", "<|eot_id", "[CLS]", " "]
)
HOSTILE = st.lists(SPELLED | PRINTABLE, max_size=8).map("".join)


class Draft(Protocol):
    """What the fixture `draft` gives; the class stands in conftest.py."""

    folder: Path

    def write(self, name: str, value: Any) -> Path: ...
    def add_tokenizer(self, **config: Any) -> None: ...


def load(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    return tokenizer


TOKENIZER = load(GOLDEN)


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


# Ids


@given(PRINTABLE)
def test_decoding_undoes_encoding(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(PRINTABLE.filter(lambda text: not any(s in SPECIALS for s in TOKENIZER.encode(text))))
def test_ordinary_text_gets_the_published_ids_in_a_message(text: str) -> None:
    assert TOKENIZER.chat(user(text)) == TOKENIZER.encode(TOKENIZER.render(user(text)))
    assert TOKENIZER.encode(text, specials=False) == TOKENIZER.encode(text)


@given(HOSTILE, HOSTILE)
def test_no_message_adds_a_special_token(role: str, content: str) -> None:
    found = [i for i in TOKENIZER.chat([{"role": role, "content": content}]) if i in SPECIALS]
    assert found == [i for i in TOKENIZER.chat(user("")) if i in SPECIALS]


@given(HOSTILE)
def test_a_spelled_special_token_reaches_the_model_as_text(content: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.chat(user(content)), skip_special=False) == TOKENIZER.render(user(content))
    ids = TOKENIZER.encode(content, specials=False)
    assert not set(ids) & set(SPECIALS)
    assert TOKENIZER.decode(ids) == content


def test_special_tokens_in_messages_are_tokens_if_asked_as_published() -> None:
    messages = user("a<|eot_id|>b")
    assert TOKENIZER.chat(messages, specials=True).count(125) == 2
    assert TOKENIZER.chat(messages).count(125) == 1


def test_a_message_may_hold_the_character_that_marks_cuts() -> None:
    ids = TOKENIZER.chat(user("\ue000<|eot_id|>\ue001"))
    assert ids.count(125) == 1
    assert TOKENIZER.encode("\ue000", specials=False) == TOKENIZER.encode("\ue000")


@pytest.mark.parametrize("specials", [False, True])
def test_a_lone_surrogate_is_refused_saying_where(specials: bool) -> None:
    expected = re.escape(r"the text holds a lone surrogate, '\ud800', at character 2")
    with pytest.raises(UsageError, match=expected):
        TOKENIZER.encode("a\ud800b", specials=specials)
    with pytest.raises(UsageError, match=expected):
        TOKENIZER.chat(user([{"type": "text", "text": "a\ud800b"}]), specials=specials)


def test_nested_content_is_cut_too(draft: Draft) -> None:
    draft.add_tokenizer(chat_template="{% for part in messages[0].content %}{{ part.text }}{% endfor %}<|eot_id|>")
    tokenizer = load(draft.folder)
    assert tokenizer.chat(user([{"type": "text", "text": "<|eot_id|>"}])).count(125) == 1


def test_a_special_token_that_hides_behind_normalisation_is_refused() -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    backend.normalizer = tokenizers.normalizers.Lowercase()
    backend.add_special_tokens([tokenizers.AddedToken("<end>", normalized=True, special=True)])
    tokenizer = Tokenizer(backend)
    assert 1 in tokenizer.encode("<END>")
    assert tokenizer.encode("end", specials=False) == tokenizer.encode("end")
    with pytest.raises(UsageError, match="'<end>'"):
        tokenizer.encode("<END>", specials=False)


def test_a_tokenizer_without_special_tokens_cuts_nothing() -> None:
    tokenizer = Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")))
    assert tokenizer.encode("a", specials=False) == [0]


def test_decoding_skips_special_tokens_unless_told() -> None:
    assert TOKENIZER.decode([65, 125, 66]) == "ab"
    assert TOKENIZER.decode([65, 125, 66], skip_special=False) == "a<|eot_id|>b"


def test_ids_of_padding_rows_decode_to_nothing() -> None:
    assert TOKENIZER.decode([65, 127, 66]) == "ab"


def test_tokens_are_found_by_text_and_by_role() -> None:
    assert TOKENIZER.token_id("<|eot_id|>") == 125
    assert TOKENIZER.token_id("<|nope|>") is None
    assert TOKENIZER.special_id("bos_token") == 120
    assert TOKENIZER.special_id("mask_token") is None
    assert len(TOKENIZER) == 126


def test_special_tokens_may_be_published_as_objects(draft: Draft) -> None:
    draft.add_tokenizer(mask_token={"content": "<|mdm_mask|>", "lstrip": False})
    assert load(draft.folder).special_id("mask_token") == 122


def test_truncation_and_padding_of_the_file_are_switched_off(draft: Draft) -> None:
    draft.add_tokenizer()
    file = draft.folder / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(file))
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.save(str(file))
    assert load(draft.folder).encode("abc") == [65, 66, 67]


# Templates


def test_a_jinja_file_overrides_the_template_of_the_config(draft: Draft) -> None:
    draft.add_tokenizer()
    draft.write("chat_template.jinja", "{{ bos_token }}{{ messages[0].content }}!")
    assert load(draft.folder).render(user("hi")) == "<|startoftext|>hi!"


def test_the_default_of_several_templates_is_used(draft: Draft) -> None:
    templates = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    draft.add_tokenizer(chat_template=templates)
    assert load(draft.folder).render(user("hi")) == "d"
    draft.add_tokenizer(chat_template=templates[:1])
    assert not load(draft.folder).has_template


def test_a_base_model_has_no_template(draft: Draft) -> None:
    draft.add_tokenizer(chat_template=None)
    tokenizer = load(draft.folder)
    assert not tokenizer.has_template
    with pytest.raises(ModelError, match="no chat template"):
        tokenizer.chat(user("hi"))


def test_a_broken_template_is_refused_when_loading(draft: Draft) -> None:
    draft.add_tokenizer(chat_template="{% for m in messages %}")
    with pytest.raises(ModelError, match=r"chat template of .* is broken: Unexpected end of template"):
        load(draft.folder)
    draft.add_tokenizer(chat_template=5)
    with pytest.raises(ModelError, match="'chat_template' is not text"):
        load(draft.folder)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ nothing.here }}", "'nothing' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% include '/etc/passwd' %}", "no loader"),
    ],
)
def test_a_template_that_fails_or_reaches_out_is_refused(draft: Draft, template: str, expected: str) -> None:
    draft.add_tokenizer(chat_template=template)
    with pytest.raises(ModelError, match=f"chat template of .* fails: .*{expected}"):
        load(draft.folder).render(user("hi"))


def test_a_template_may_refuse_messages(draft: Draft) -> None:
    draft.add_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UsageError, match="refuses these messages: roles must alternate"):
        load(draft.folder).render(user("hi"))


# Files


def test_a_folder_without_tokenizer_has_none(tmp_path: Path) -> None:
    assert Tokenizer.load(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", '{"model": 5}', "{}"])
def test_a_file_that_is_no_tokenizer_is_named(draft: Draft, text: str) -> None:
    file = draft.write("tokenizer.json", text)
    with pytest.raises(ModelError, match=f"{file} is not a tokenizer: "):
        Tokenizer.load(draft.folder)


def test_a_broken_tokenizer_config_is_named(draft: Draft) -> None:
    draft.add_tokenizer()
    file = draft.write("tokenizer_config.json", "{")
    with pytest.raises(ModelError, match=f"{file} is not readable JSON"):
        Tokenizer.load(draft.folder)


# Beside transformers


def test_ids_and_text_equal_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(GOLDEN)
    conversation = [*user(" Hello \n"), {"role": "assistant", "content": "a\n\nb"}, *user("1+1?")]
    text = reference.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert TOKENIZER.render(conversation) == text
    assert TOKENIZER.chat(conversation) == reference.encode(text, add_special_tokens=False)


def test_loading_imports_neither_transformers_nor_the_compiler_of_torch() -> None:
    root = Path(__file__).parents[2]
    code = (
        f"import sys; sys.path.insert(0, {str(root)!r}); import dcache; sys.path.remove({str(root)!r}); "
        f"import json; dcache.load_model({str(GOLDEN)!r}, device='cpu'); "
        "print(json.dumps([name in sys.modules for name in ('transformers', 'torch._dynamo')]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [False, False]
