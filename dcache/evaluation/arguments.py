"""What ``--model_args`` says: a model, a policy, settings; and what a request of the harness adds to the settings.

The harness splits ``model_args`` at commas, and not all of its versions spare those inside parentheses. So knobs may
be separated by semicolons too: ``policy=elastic(gamma=0.95;window=8)``.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dcache.calls import CONSTANTS, Call, parse_call, split_list
from dcache.config import DecodeSettings
from dcache.errors import UsageError
from dcache.generate import settings_from, unmasker_of
from dcache.plugins import explain, make_policy, plugins
from dcache.unmasking.base import MOST

LOADING = ("device", "dtype", "family", "revision")
OTHER = ("model", "pretrained", "policy", *LOADING)
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is there counts
DEFAULT_MOST = 256  # tokens of an answer where neither the task nor the user says: the harness's own default
SAMPLED = ("temperature", "top_p", "top_k")


class EvalSettings(BaseModel):
    """What only an evaluation needs to know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mc_num: int = Field(
        128,
        ge=1,
        le=MOST,
        description="masked copies of an answer whose mean estimates its log-likelihood; an answer that has no more "
        "ways to be masked than this gets the exact expectation",
    )
    check_greedy: bool = Field(
        True,
        description="decode each answer to see whether it is the greedy one; false saves that and says that none is",
    )
    add_bos_token: bool = Field(
        False, description="put the begin-of-text token before every prompt that does not begin with it"
    )


@dataclass(frozen=True)
class Arguments:
    """A model, a policy and settings, checked.

    Attributes:
        model: what to load; None if a loaded one is used.
        policy: as written.
        loading: device, dtype, family, revision: those that were given.
        decoding: fields of `DecodeSettings` that were given.
        evaluation: the rest.
    """

    model: str | None
    policy: Call
    loading: Mapping[str, str] = field(default_factory=dict)
    decoding: Mapping[str, Any] = field(default_factory=dict)
    evaluation: EvalSettings = field(default_factory=EvalSettings)

    @staticmethod
    def read(given: Mapping[str, Any]) -> Arguments:
        """From names and values; text is read as numbers, true, false and none, where it is one.

        Raises:
            UsageError: for a name that there is not, a value out of bounds, and a policy that cannot be.
        """
        values = {name: plain(value) for name, value in given.items()}
        if "pretrained" in values and "model" in values:
            raise UsageError("model and pretrained are two names of the same argument; give one")
        policy = _call("policy", given.get("policy"))
        decoding = {name: values[name] for name in DecodeSettings.model_fields if name in values}
        if "unmask" in decoding:
            decoding["unmask"] = str(_call("unmask", given["unmask"]))
        known = (*OTHER, *DecodeSettings.model_fields, *EvalSettings.model_fields)
        for name in values:
            if name not in known:
                raise UsageError(_unknown(name, policy, known))
        unmasker_of(make_policy(policy), settings_from(**decoding))
        loading = {name: str(values[name]) for name in LOADING if values.get(name) is not None}
        return Arguments(_model(values), policy, loading, decoding, _evaluation(values))


def arguments_in(text: str) -> dict[str, str]:
    """Names and values of ``model=tiny-llada,policy=elastic(gamma=0.95,window=8)``; the last of a name counts."""
    found = {}
    for item in split_list(text) if text.strip() else []:
        name, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"{item!r} in the model arguments {text!r} is not name=value")
        found[name.strip()] = value.strip()
    return found


def plain(value: Any) -> Any:
    """A number, a boolean or None from the text of one; anything else as it is."""
    if not isinstance(value, str):
        return value
    if value.lower() in CONSTANTS:
        return CONSTANTS[value.lower()]
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            pass
    return value


def _call(name: str, value: Any) -> Call:
    """A policy or unmasker as written, semicolons for commas allowed; None is how the harness reads "none"."""
    text = "none" if value is None else str(value)
    if text.count("(") != text.count(")"):
        raise UsageError(
            f"{name}={text!r} has lost a parenthesis: this version of lm_eval cuts model_args at every comma. "
            f"Separate knobs by semicolons, as in {name}={parse_call(text.partition('(')[0])}(knob=1;other=2)"
        )
    return parse_call(text.replace(";", ","))


def _model(values: Mapping[str, Any]) -> str | None:
    found = values.get("model", values.get("pretrained"))
    return None if found is None else str(found)


def _evaluation(values: Mapping[str, Any]) -> EvalSettings:
    try:
        return EvalSettings.model_validate({k: values[k] for k in EvalSettings.model_fields if k in values})
    except ValidationError as error:
        raise UsageError("; ".join(explain("the evaluation", EvalSettings, e) for e in error.errors())) from None


def _unknown(name: str, policy: Call, known: tuple[str, ...]) -> str:
    if name in plugins().policies.get(policy.name).thing.Config.model_fields:
        return f"{name} is a knob of the policy; write it in its parentheses: policy={policy.name}({name}=...)"
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"there is no model argument {name!r}.{hint}  There are: {', '.join(known)}"


@dataclass(frozen=True)
class Request:
    """How one request is decoded.

    Attributes:
        settings: of the run; requests of the same settings can share a batch.
        most: tokens of the answer at most; None: all of the canvas.
        until: texts that end the answer.
        ignored: generation arguments of the task that mean nothing here.
    """

    settings: DecodeSettings
    most: int | None
    until: tuple[str, ...]
    ignored: tuple[str, ...]

    @staticmethod
    def read(asked: Mapping[str, Any], given: Mapping[str, Any]) -> Request:
        """From the generation arguments of a task; the model arguments `given` win over them.

        A canvas is a whole number of blocks, so a task's number of tokens is rounded up, and the text cut.
        """
        rest = dict(asked)
        stops = rest.pop("until", None) or []
        lengths = [rest.pop(name) for name in LENGTHS if rest.get(name) is not None]
        sampled = rest.pop("do_sample", None)
        found = {name: plain(rest.pop(name)) for name in DecodeSettings.model_fields if name in rest}
        if sampled is False or not found.get("temperature"):
            found = {name: value for name, value in found.items() if name not in SAMPLED}
        settings, most = found | dict(given), None
        if settings.get("gen_length") is None:
            most = int(lengths[0]) if lengths else DEFAULT_MOST
            settings["gen_length"] = _whole_blocks(most, settings)
        until = tuple(stop for stop in ([stops] if isinstance(stops, str) else stops) if stop)
        return Request(settings_from(**settings), most, until, tuple(rest))

    def cut(self, text: str) -> str:
        """The answer up to the first text that ends it."""
        for stop in self.until:
            text = text.partition(stop)[0]
        return text


def _whole_blocks(rows: int, settings: Mapping[str, Any]) -> int:
    block = settings.get("block_length", DecodeSettings.model_fields["block_length"].default)
    if block is None or ("block_length" not in settings and rows < block):  # then the canvas is one block
        return rows
    return -(-rows // int(block)) * int(block)
