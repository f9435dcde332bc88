"""LLaDA-V's published layout: LLaVA's config, LLaDA's tokenizer, and the tower's config in a folder of its own."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from tokenizers import Tokenizer, pre_tokenizers

from dcache.images import PLACEHOLDER
from dcache.models import tokenizer as reading
from dcache.models.llada_v import SYSTEM, LLaDAV
from dcache.models.tiny.formats import TOWER, Format
from dcache.models.tiny.llada import BOS, CHAT_TEMPLATE, END_HEADER, EOS, EOT, HEADER, MASK, LLaDAFormat
from dcache.models.tiny.recipe import Recipe
from dcache.models.tiny.tokenizer import special_id
from dcache.models.vision import VisionSpec, image_ids
from dcache.tasks.scenes import CELL, SIDE, Scenes

_TEXT = LLaDAFormat()  # the tokenizer is LLaDA's


@dataclass(frozen=True)
class Tower:
    """Sizes of the vision tower, for images of the task's size.

    Attributes:
        patch_size: side of a patch in pixels.
        tower_width: of the residual stream.
        tower_layers: that are used; the config counts one more, as published.
        tower_heads: of the attention.
        tower_mlp_size: of the MLP.
    """

    patch_size: int = 16
    tower_width: int = 192
    tower_layers: int = 3
    tower_heads: int = 6
    tower_mlp_size: int = 512


class LLaDAVFormat(Format):
    """Of `tiny-llada-v`. The one canvas is one tile, so an image has its rows twice: squeezed, and line by line."""

    family: ClassVar[LLaDAV] = LLaDAV()
    specials = (BOS, EOS, MASK, HEADER, END_HEADER, EOT)
    words = ("system", "user", "assistant", "\n\n", "\n", *re.findall(r" ?\w+", SYSTEM))
    eos, turn_end = EOS, EOT

    def __init__(self, sizes: Tower) -> None:
        self.sizes = sizes

    def split(self, tokenizer: Tokenizer) -> pre_tokenizers.PreTokenizer:
        """As LLaDA."""
        return _TEXT.split(tokenizer)

    def texts(self, seed: int, n_problems: int) -> Iterator[str]:
        """Questions and solutions of scenes."""
        for index in range(n_problems):
            problem = Scenes().problem("train", index, seed)
            yield from (problem.prompt.removeprefix(PLACEHOLDER), problem.solution or "")

    def render(self, prompt: str) -> str:
        """The published conversation around a user turn."""
        turns = (("system", SYSTEM), ("user", prompt.strip()))
        text = "".join(f"{HEADER}{role}{END_HEADER}\n\n{content}{EOT}" for role, content in turns)
        return f"{BOS}{text}{HEADER}assistant{END_HEADER}\n\n"

    def reader(self, tokenizer: Tokenizer) -> reading.Tokenizer:
        """The tokenizer as the checkpoint's user has it, with the chat template."""
        return reading.Tokenizer(tokenizer, {"bos_token": BOS}, CHAT_TEMPLATE)

    def prompt(self, reader: reading.Tokenizer, text: str) -> list[int]:
        """Ids of a user turn in the published conversation; `IMAGE` stands for its image."""
        turns = (("system", SYSTEM), ("user", text))
        return image_ids(reader, [{"role": role, "content": content} for role, content in turns])

    def config(self, recipe: Recipe, tokenizer: Tokenizer) -> dict[str, Any]:
        """``config.json`` with the fields of the published checkpoint that the model depends on."""
        return {
            "architectures": ["LlavaLLaDAModelLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": special_id(tokenizer, BOS),
            "eos_token_id": special_id(tokenizer, EOS),
            "hidden_act": "silu",
            "hidden_size": recipe.d_model,
            "image_aspect_ratio": "anyres_max_1",
            "image_grid_pinpoints": [[SIDE * CELL, SIDE * CELL]],
            "initializer_range": 0.02,
            "intermediate_size": recipe.mlp_size,
            "max_position_embeddings": 1024,
            "mm_hidden_size": self.sizes.tower_width,
            "mm_newline_position": "grid",
            "mm_patch_merge_type": "spatial_unpad",
            "mm_projector_type": "mlp2x_gelu",
            "mm_resampler_type": None,
            "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "mm_vision_tower": TOWER,
            "model_type": "llava_llada",
            "num_attention_heads": recipe.n_heads,
            "num_hidden_layers": recipe.n_layers,
            "num_key_value_heads": recipe.n_kv_heads,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "tokenizer_model_max_length": 1024,
            "torch_dtype": "bfloat16",
            "use_cache": False,
            "use_mm_proj": True,
            "vocab_size": recipe.vocab_size,
        }

    def generation(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """``generation_config.json``."""
        ids = {"bos_token_id": special_id(tokenizer, BOS), "eos_token_id": special_id(tokenizer, EOS)}
        return {"_from_model_config": True, **ids}

    def tower(self) -> dict[str, Any]:
        """``config.json`` of the tower."""
        return {
            "architectures": ["SiglipVisionModel"],
            "attention_dropout": 0.0,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": self.sizes.tower_width,
            "image_size": SIDE * CELL,
            "intermediate_size": self.sizes.tower_mlp_size,
            "layer_norm_eps": 1e-6,
            "model_type": "siglip_vision_model",
            "num_attention_heads": self.sizes.tower_heads,
            "num_channels": 3,
            "num_hidden_layers": self.sizes.tower_layers + 1,
            "patch_size": self.sizes.patch_size,
        }

    def vision_spec(self, recipe: Recipe, tokenizer: Tokenizer) -> VisionSpec:
        """The shape of the vision part; the tower's is read from a file, as the adapter does."""
        with TemporaryDirectory() as folder:
            self.write_tower(Path(folder))
            return self.family.vision(self.config(recipe, tokenizer), self.spec(recipe, tokenizer), Path(folder))

    def save_tokenizer(self, tokenizer: Tokenizer, folder: Path) -> None:
        """Write LLaDA's three files."""
        _TEXT.save_tokenizer(tokenizer, folder)

    def read_tokenizer(self, folder: Path) -> Tokenizer:
        """Read ``tokenizer.json``."""
        return _TEXT.read_tokenizer(folder)
