"""The contract of a model family: how its published ``config.json`` and tensor names become the one transformer.

An adapter states facts and computes nothing: `Family.spec` reads the config, `Family.slots` says where each published
tensor lands. `loading.py` does the rest, the same for all families: it reads headers, compares names and shapes, and
copies. A family registers through the ``register_models`` hook like every other plugin.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dcache.errors import ModelError
from dcache.models.tokenizer import Tokenizer
from dcache.models.transformer import ModelSpec
from dcache.models.vision import VisionSpec


@dataclass(frozen=True)
class Slot:
    """Where a published tensor lands.

    Attributes:
        parameter: name among `Transformer.named_parameters`, or `Vision.named_parameters`.
        rows: the part of its first axis; None for all of it.
    """

    parameter: str
    rows: slice | None = None


class Family(ABC):
    """One published checkpoint format.

    Attributes:
        name: what ``load_model(..., family=name)`` and messages call it.
        ignored: `fnmatch` patterns of tensors that may be present and are not used.
        shapes: published configs by short name; ``"llada-8b"`` makes ``load_model("llada-8b:random")`` work.
    """

    name: ClassVar[str]
    ignored: ClassVar[tuple[str, ...]] = ()
    shapes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @abstractmethod
    def recognises(self, config: Mapping[str, Any], tensors: Collection[str]) -> bool:
        """Whether a checkpoint is of this family: by the `model_type` and `architectures` that its config declares.

        Tensor names count only where it declares neither: forks of a format keep its names and compute something else.
        """

    @abstractmethod
    def spec(self, config: Mapping[str, Any], generation: Mapping[str, Any], tokenizer: Tokenizer | None) -> ModelSpec:
        """Validate a config and translate it.

        Args:
            config: ``config.json``.
            generation: ``generation_config.json``, empty if there is none.
            tokenizer: the checkpoint's, if it has one: special ids may be known to it alone.

        Raises:
            ModelError: naming the field and its value. What published checkpoints never use is refused, not guessed.
        """

    @abstractmethod
    def slots(self, spec: ModelSpec) -> Mapping[str, Slot]:
        """Every tensor that a checkpoint must hold, and where it lands; together they fill the transformer."""

    def vision(self, config: Mapping[str, Any], spec: ModelSpec, folder: Path | None) -> VisionSpec | None:
        """Validate and translate what a config says of images; None for a family without them.

        Args:
            config: ``config.json``.
            spec: of the text part.
            folder: the checkpoint's, for config files inside it; None for a published shape.

        Raises:
            ModelError: as `spec` does.
        """
        return None

    def vision_slots(self, vision: VisionSpec) -> Mapping[str, Slot]:
        """As `slots`, for the tensors that fill the vision part."""
        return {}

    def tokenizer(self, folder: Path) -> Tokenizer | None:
        """The tokenizer in a checkpoint's folder, None if it has none."""
        return Tokenizer.load(folder)


class Fields:
    """Validated reading of a published config; each method refuses by naming the field, its value and what is accepted.

    Args:
        values: the parsed JSON object.
        file: what messages call it.
    """

    def __init__(self, values: Mapping[str, Any], file: str = "config.json"):
        self.values = values
        self.file = file

    def has(self, name: str) -> bool:
        """Whether a field is present and not null."""
        return self.values.get(name) is not None

    def refuse(self, name: str, expected: str) -> ModelError:
        """The error for a field, to be raised."""
        if name not in self.values:
            return ModelError(f"{self.file} has no {name!r}; expected {expected}")
        return ModelError(f"{self.file}: {name!r} is {self.values[name]!r}; expected {expected}")

    def integer(self, name: str, high: int, low: int = 1, default: int | None = None) -> int:
        """An integer from `low` to `high`; `default`, if given, stands for absent or null."""
        if default is not None and not self.has(name):
            return default
        value = self.values.get(name)
        if type(value) is not int or not low <= value <= high:
            raise self.refuse(name, f"an integer from {low} to {high}")
        return value

    def number(self, name: str) -> float:
        """A finite number above 0."""
        value = self.values.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self.refuse(name, "a finite number above 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """A boolean; `default` stands for absent or null."""
        value = self.values[name] if self.has(name) else default
        if type(value) is not bool:
            raise self.refuse(name, "true or false")
        return value

    def fixed(self, name: str, value: Any, reason: str) -> None:
        """A field that must have one value where it is present."""
        found = self.values.get(name)
        if found is not None and (found != value or type(found) is not type(value)):
            raise self.refuse(name, f"{value!r}: {reason}")

    def absent(self, name: str, reason: str) -> None:
        """A field that must be null where it is present."""
        if self.has(name):
            raise self.refuse(name, f"null: {reason}")

    def ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """Token ids: published as a number, a list of numbers, or not at all (then empty)."""
        value = self.values.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
            raise self.refuse(name, f"token ids from 0 to {vocab_size - 1}, the rows of the embedding")
        return tuple(ids)


def one_answer(what: str, answers: Mapping[str, int | None]) -> int:
    """The value that all sources agree on; sources that know none say None.

    Raises:
        ModelError: if two disagree or nobody knows.
    """
    known = {source: value for source, value in answers.items() if value is not None}
    if not known:
        raise ModelError(f"nothing says which token is the {what}; looked at {', '.join(answers)}")
    if len(set(known.values())) > 1:
        found = ", ".join(f"{source} says {value}" for source, value in known.items())
        raise ModelError(f"the checkpoint contradicts itself about the {what}: {found}")
    return next(iter(known.values()))


def find_mask(
    fields: Fields, generation: Mapping[str, Any], tokenizer: Tokenizer | None, spelling: str, vocab_size: int
) -> int:
    """The mask id, on which both configs, the tokenizer's `mask_token` and the token spelled `spelling` agree."""
    generation_fields = Fields(generation, "generation_config.json")
    mask_id = one_answer(
        "mask",
        {
            "mask_token_id of config.json": next(iter(fields.ids("mask_token_id", vocab_size)), None),
            "mask_token_id of generation_config.json": next(
                iter(generation_fields.ids("mask_token_id", vocab_size)), None
            ),
            "mask_token of the tokenizer": tokenizer.special_id("mask_token") if tokenizer else None,
            f"{spelling} of the tokenizer": tokenizer.token_id(spelling) if tokenizer else None,
        },
    )
    if mask_id >= vocab_size:
        raise ModelError(f"the mask is token {mask_id}, but the embedding has {vocab_size} rows")
    return mask_id


def find_ends(
    fields: Fields, generation: Mapping[str, Any], tokenizer: Tokenizer | None, turn_end: str, vocab_size: int
) -> tuple[int, ...]:
    """Every token that ends a text: end-of-text of both configs first, then the token spelled `turn_end`."""
    eos = fields.ids("eos_token_id", vocab_size)
    ends = eos + Fields(generation, "generation_config.json").ids("eos_token_id", vocab_size)
    if not ends:
        raise fields.refuse("eos_token_id", f"the id of the end-of-text token, below {vocab_size}")
    if tokenizer is not None and (turn := tokenizer.token_id(turn_end)) is not None:
        ends += (turn,)
    return tuple(dict.fromkeys(ends))


def check_heads(fields: Fields, width: str, heads: str) -> tuple[int, int]:
    """Width of the residual stream and number of query heads, which divide it into heads of even width."""
    d_model = fields.integer(width, 1 << 20)
    n_heads = fields.integer(heads, d_model)
    if d_model % n_heads or d_model // n_heads % 2:
        raise fields.refuse(heads, f"a divisor of {width} {d_model} that leaves heads of even width")
    return d_model, n_heads
