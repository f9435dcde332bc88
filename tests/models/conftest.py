import json
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden" / "models"

CONFIG: dict[str, Any] = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "d_model": 16,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "mlp_hidden_size": 24,
    "vocab_size": 126,
    "embedding_size": 128,
    "max_sequence_length": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "mask_token_id": 122,
    "eos_token_id": 121,
}


@dataclass
class Draft:
    """A LLaDA checkpoint in the making: change `config` and `tensors`, then `save`."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def save(self, shards: Sequence[Collection[str]] | None = None) -> Path:
        """Write config and weights; each of `shards` names the tensors of one file, None means a single file."""
        self.write("config.json", self.config)
        if shards is None:
            save_file(self.tensors, self.folder / "model.safetensors")
            return self.folder
        weight_map = {}
        for i, names in enumerate(shards, 1):
            file = f"model-{i:05}-of-{len(shards):05}.safetensors"
            save_file({name: self.tensors[name] for name in names}, self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        self.write("model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
        return self.folder

    def write(self, name: str, value: Any) -> Path:
        """Write a file: text as it is, everything else as JSON."""
        file = self.folder / name
        file.write_text(value if isinstance(value, str) else json.dumps(value))
        return file

    def add_tokenizer(self, **config: Any) -> None:
        """Copy the golden toy tokenizer, with changes to its config."""
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(GOLDEN / "llada_mha" / name, self.folder / name)
        file = self.folder / "tokenizer_config.json"
        self.write(file.name, json.loads(file.read_text()) | config)


@pytest.fixture
def draft(tmp_path: Path) -> Draft:
    """Two layers, four query and two KV heads, random float32 weights, no tokenizer."""
    generator = torch.Generator().manual_seed(0)
    block = {
        "attn_norm": (16,),
        "q_proj": (16, 16),
        "k_proj": (8, 16),
        "v_proj": (8, 16),
        "attn_out": (16, 16),
        "ff_norm": (16,),
        "ff_proj": (24, 16),
        "up_proj": (24, 16),
        "ff_out": (16, 24),
    }
    shapes: dict[str, tuple[int, ...]] = {"wte": (128, 16), "ln_f": (16,), "ff_out": (128, 16)}
    shapes |= {f"blocks.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    tensors = {
        f"model.transformer.{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()
    }
    return Draft(tmp_path, dict(CONFIG), tensors)
