"""A checkpoint's tokenizer and chat template, read as data: no code from the checkpoint runs.

Published behaviour renders the chat template to one string and encodes that. A user who types ``<|eot_id|>`` then ends
the turn, and one who types the mask token plants a masked row in the prompt. So `Tokenizer.chat` encodes what the
template wrote and what the messages hold apart: wherever a message spells a special token, the text is cut behind
that token's first character and the pieces are encoded on their own. Text that spells no special token is never cut
and gets exactly the published ids. ``specials=True`` switches to the published behaviour.

A special token that the checkpoint matches only after normalising text cannot be found by its spelling; a message in
which the tokenizer still finds one is refused.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dcache.errors import ModelError, UsageError
from dcache.models.files import one_line, read_json, read_text

Message = Mapping[str, Any]


class Tokenizer:
    """Text to token ids and back.

    Args:
        backend: of the ``tokenizers`` library.
        names: special tokens by role, as in ``tokenizer_config.json``: ``{"bos_token": "<|startoftext|>"}``.
        template: Jinja source of the chat template, if there is one.
        source: what messages call this tokenizer, normally its folder.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        names: Mapping[str, str] | None = None,
        template: str | None = None,
        source: str = "tokenizer",
    ):
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._names = dict(names or {})
        self._source = source
        self._template_text = template or ""
        self._template = None if template is None else _compile(template, source)
        added = backend.get_added_tokens_decoder()
        specials = {t.content: t for t in added.values() if t.special or t.content in self._names.values()}
        self._special = re.compile(f"(?=(?:{'|'.join(map(re.escape, specials))}))(.)", re.S) if specials else None
        self._normalised = {
            i for i, t in added.items() if t.content in specials and (t.normalized or len(t.content) < 2)
        }
        self._normalised -= {self.token_id(getattr(backend.model, "unk_token", None) or "")}

    @classmethod
    def load(
        cls, folder: Path, rebuild: "Callable[[Path], tokenizers.Tokenizer | None] | None" = None
    ) -> "Tokenizer | None":
        """Read ``tokenizer.json`` and its companions from a checkpoint's folder; None if it has no tokenizer.

        Args:
            folder: of the checkpoint.
            rebuild: makes the backend of a folder without ``tokenizer.json`` from older files; None if they are not
                there either. It belongs to a family: those files do not say how text is split before the merges.

        Raises:
            ModelError: naming the file that cannot be used.
        """
        file = folder / "tokenizer.json"
        backend: tokenizers.Tokenizer | None
        if file.is_file():
            try:
                backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
            except Exception as error:  # the library raises bare Exceptions
                raise ModelError(f"{file} is not a tokenizer: {one_line(error)}") from error
        else:
            backend = None if rebuild is None else rebuild(folder)
        if backend is None:
            return None
        config = read_json(folder / "tokenizer_config.json", optional=True)
        names = read_json(folder / "special_tokens_map.json", optional=True) | config
        return cls(backend, _special_names(names), _template_source(folder, config), str(folder))

    def __len__(self) -> int:
        """Embedding rows that the tokenizer needs: its highest id plus one."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def has_template(self) -> bool:
        """Whether the checkpoint has a chat template; base models have none."""
        return self._template is not None

    @property
    def template(self) -> str | None:
        """Jinja source of the chat template, None if the checkpoint has none."""
        return self._template_text if self.has_template else None

    def token_id(self, name: str) -> int | None:
        """Id of one token by its exact text, None if there is no such token."""
        found: int | None = self._backend.token_to_id(name)
        return found

    def special_id(self, role: str) -> int | None:
        """Id of a special token by its role, for instance "mask_token"; None if the checkpoint names none."""
        return self.token_id(self._names[role]) if role in self._names else None

    def encode(self, text: str, *, specials: bool = True) -> list[int]:
        """Ids of a text; nothing is added before or after it.

        Args:
            text: what to encode.
            specials: whether a special token spelled in the text becomes that token, as published. Say False for text
                that you did not write.

        Raises:
            UsageError: for text that holds a lone surrogate.
        """
        _check_unicode(text)
        if specials:
            return self._ids(text)
        return self._pieces(self._cut(text, mark := _unused(text)), mark)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ids; ids that the tokenizer does not know (padding rows of the embedding) give nothing."""
        return str(self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special))

    def render(self, messages: Sequence[Message]) -> str:
        """The chat template's text for messages, with the header of the answer at its end.

        Args:
            messages: ``{"role": "user", "content": "..."}`` and so on, oldest first.
        """
        if self._template is None:
            raise ModelError(f"{self._source} has no chat template; encode plain text instead")
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, tools=None, documents=None, **self._names
            )
        except _Refused as error:
            raise UsageError(
                f"the chat template of {self._source} refuses these messages: {one_line(error)}"
            ) from error
        except Exception as error:  # a template may divide by zero or index past an end
            raise ModelError(f"the chat template of {self._source} fails: {one_line(error)}") from error

    def chat(self, messages: Sequence[Message], *, specials: bool = False) -> list[int]:
        """Ids of a conversation, ready to be answered.

        Args:
            messages: as for `render`.
            specials: whether special tokens spelled inside messages become tokens, as in the published code.

        Raises:
            UsageError: for messages that hold a lone surrogate, or that the template refuses.
        """
        for text in _strings(list(messages)):
            _check_unicode(text)
        if specials:
            return self._ids(self.render(messages))
        mark = _unused(self._template_text, *_strings(list(messages)))
        return self._pieces(self.render(self._cut(list(messages), mark)), mark)

    def chat_around(self, messages: Sequence[Message], placeholder: str) -> list[list[int]]:
        """As `chat`, in chunks: what stands before, between and behind the placeholders that the messages hold.

        Args:
            messages: as for `render`.
            placeholder: text that is no token, for instance "<image>".
        """
        texts = [self._template_text, placeholder, *_strings(list(messages))]
        for text in texts:
            _check_unicode(text)
        sign = _unused(*texts)
        mark = _unused(*texts, sign)
        signed = self._cut(_replaced(list(messages), placeholder, sign), mark)
        return [self._pieces(chunk, mark) for chunk in self.render(signed).split(sign)]

    def _ids(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def _pieces(self, text: str, mark: str) -> list[int]:
        return [i for piece in text.split(mark) for i in self._ids(piece)]

    def _cut(self, value: Any, mark: str) -> Any:
        """`value` with `mark` behind the first character of every special token that its strings spell."""
        if isinstance(value, Mapping):
            return {key: self._cut(item, mark) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._cut(item, mark) for item in value]
        if not isinstance(value, str) or self._special is None:
            return value
        text = self._special.sub(rf"\1{mark}", value)
        if self._normalised and (found := self._normalised.intersection(self._pieces(text, mark))):
            token = self._backend.id_to_token(min(found))
            raise UsageError(
                f"the text spells the special token {token!r}; remove it, or pass specials=True to allow it"
            )
        return text


class _Refused(Exception):
    """Raised by a template through ``raise_exception``: it does not accept the messages."""


def _compile(template: str, source: str) -> jinja2.Template:
    """Settings and helpers are those that published templates are written for."""

    def raise_exception(message: str) -> None:
        raise _Refused(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(template)
    except (jinja2.TemplateError, RecursionError) as error:
        raise ModelError(f"the chat template of {source} is broken: {one_line(error)}") from error


def _template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    """``chat_template.jinja``, else the template, or the one named "default", of ``tokenizer_config.json``."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return read_text(file)
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ModelError(f"{folder / 'tokenizer_config.json'}: 'chat_template' is not text")
    return template


def _special_names(config: Mapping[str, Any]) -> dict[str, str]:
    """``{"bos_token": "<s>"}``: the published value is the text, or an object that holds it as `content`."""
    fields = ((k, v.get("content") if isinstance(v, dict) else v) for k, v in config.items() if k.endswith("_token"))
    return {name: value for name, value in fields if isinstance(value, str)}


def _check_unicode(text: str) -> None:
    """Refuse what has no UTF-8 form: half of a surrogate pair, or a byte that was not UTF-8 where it was read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the text holds a lone surrogate, {text[error.start]!a}, at character {error.start + 1}: half of a "
            "character, or a byte that was not UTF-8; remove it"
        ) from None


def _strings(value: Any) -> list[str]:
    """Every string inside nested lists and objects."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in _strings(item)]
    return [value] if isinstance(value, str) else []


def _replaced(value: Any, old: str, new: str) -> Any:
    """`value` with `new` for `old` in every string inside nested lists and objects."""
    if isinstance(value, Mapping):
        return {key: _replaced(item, old, new) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replaced(item, old, new) for item in value]
    return value.replace(old, new) if isinstance(value, str) else value


def _unused(*texts: str) -> str:
    """A private-use character that none of the texts holds."""
    used = set().union(*texts)
    for code in (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE)):
        if chr(code) not in used:
            return chr(code)
    raise UsageError("the text uses every private-use character of Unicode; shorten it")
