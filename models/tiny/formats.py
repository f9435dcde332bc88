"""What a published layout is: a family's config, tensor names, tokenizer files and chat template, to be written.

The adapter of the family reads the same facts, so the shape of the model comes from the config through `Family.spec`,
and the tensors go through `Family.slots`: nothing is written that the loader would not read.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from torch import Tensor, nn

from dcache.models import tokenizer as reading
from dcache.models.family import Family, Slot
from dcache.models.tiny.recipe import Recipe
from dcache.models.tiny.tokenizer import learn, special_id
from dcache.models.transformer import ModelSpec, Transformer
from dcache.models.vision import Vision
from dcache.tasks.gsm_mini import GsmMini

TOWER = "siglip_vision_tower"


class Format(ABC):
    """The layout of one family.

    Attributes:
        family: the adapter that reads it.
        specials: the special tokens in order of id.
        words: of the chat template.
        eos: the end-of-text token, which also pads a canvas.
        turn_end: the token that ends a turn.
    """

    family: ClassVar[Family]
    specials: ClassVar[tuple[str, ...]]
    words: ClassVar[tuple[str, ...]]
    eos: ClassVar[str]
    turn_end: ClassVar[str]

    @abstractmethod
    def split(self, tokenizer: Tokenizer) -> pre_tokenizers.PreTokenizer:
        """Give a bare BPE model its splitting and decoding; returns what splits a text into words."""

    @abstractmethod
    def render(self, prompt: str) -> str:
        """The chat template for a single user turn."""

    @abstractmethod
    def config(self, recipe: Recipe, tokenizer: Tokenizer) -> dict[str, Any]:
        """``config.json``."""

    @abstractmethod
    def save_tokenizer(self, tokenizer: Tokenizer, folder: Path) -> None:
        """Write the published files of the tokenizer."""

    @abstractmethod
    def read_tokenizer(self, folder: Path) -> Tokenizer:
        """Read them back."""

    def generation(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """``generation_config.json``; empty where it says nothing that counts."""
        return {}

    def tower(self) -> dict[str, Any]:
        """``config.json`` of the vision tower, in a folder of its own; empty without one."""
        return {}

    def texts(self, seed: int, n_problems: int) -> Iterator[str]:
        """Texts of the train split, for the tokenizer."""
        for index in range(n_problems):
            problem = GsmMini().problem("train", index, seed)
            yield from (problem.prompt, problem.solution or "")

    def train_tokenizer(self, seed: int, vocab_size: int = 512, n_problems: int = 20_000) -> Tokenizer:
        """Learn a tokenizer from the train split."""
        return learn(self.split, self.specials, self.words, self.texts(seed, n_problems), vocab_size)

    def spec(self, recipe: Recipe, tokenizer: Tokenizer) -> ModelSpec:
        """The shape of the checkpoint."""
        config, generation = self.config(recipe, tokenizer), self.generation(tokenizer)
        return self.family.spec(config, generation, reading.Tokenizer(tokenizer))

    def tensors(self, model: Transformer, vision: Vision | None = None) -> dict[str, Tensor]:
        """The weights under their published names, in bfloat16."""
        return {
            name: part.detach().to("cpu", torch.bfloat16, copy=True)
            for name, part in self._parts(model, vision).items()
        }

    def save(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        recipe: Recipe,
        record: dict[str, Any],
        folder: Path,
        vision: Vision | None = None,
    ) -> None:
        """Write a checkpoint: config, weights, tokenizer and the record of the training."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", self.config(recipe, tokenizer))
        if generation := self.generation(tokenizer):
            write_json(folder / "generation_config.json", generation)
        self.write_tower(folder)
        write_json(folder / "training.json", record)
        self.save_tokenizer(tokenizer, folder)
        save_file(self.tensors(model, vision), folder / "model.safetensors", metadata={"format": "pt"})

    def write_tower(self, folder: Path) -> None:
        """Write the tower's config, if there is a tower."""
        if tower := self.tower():
            (folder / TOWER).mkdir(exist_ok=True)
            write_json(folder / TOWER / "config.json", tower)

    @torch.no_grad()
    def restore(self, model: Transformer, folder: Path, vision: Vision | None = None) -> None:
        """Read the weights that `save` wrote back into a model of the same shape."""
        tensors = load_file(folder / "model.safetensors")
        for name, part in self._parts(model, vision).items():
            part.copy_(tensors[name])

    def _parts(self, model: Transformer, vision: Vision | None) -> dict[str, Tensor]:
        """Views of the parameters by published name."""
        parts = _named(model, self.family.slots(model.spec))
        return parts if vision is None else parts | _named(vision, self.family.vision_slots(vision.spec))


def _named(module: nn.Module, slots: Mapping[str, Slot]) -> dict[str, Tensor]:
    parameters = dict(module.named_parameters())
    return {name: parameters[slot.parameter][slot.rows or slice(None)] for name, slot in slots.items()}


def added_tokens(tokenizer: Tokenizer, specials: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The `added_tokens_decoder` of ``tokenizer_config.json``."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {str(special_id(tokenizer, token)): {"content": token, **flags} for token in specials}


def write_json(file: Path, value: Any) -> None:
    """Write a JSON file."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
