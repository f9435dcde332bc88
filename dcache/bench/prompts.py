"""Prompts of benchmarks: random tokens, and random images as the model's own vision part makes rows of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dcache.errors import UsageError
from dcache.generate import Prompt
from dcache.models.loading import Model
from dcache.models.transformer import ModelSpec
from dcache.models.vision import IMAGE, Spliced, Vision, open_image
from dcache.reuse import ReuseCache
from dcache.state import Embeddings, Span

if TYPE_CHECKING:
    from PIL.Image import Image

BEFORE = 32  # tokens in front of the images, if the text has twice as many: about a system turn


def random_prompts(spec: ModelSpec, length: int, batch: int, seed: int) -> list[list[int]]:
    """Prompts without special tokens."""
    ordinary = np.setdiff1d(np.arange(spec.vocab_size), [spec.mask_id, spec.eos_id, *spec.end_ids])
    drawn: list[list[int]] = np.random.default_rng(seed).choice(ordinary, size=(batch, length)).tolist()
    return drawn


def pictures(size: int, n: int, seed: int) -> list[Image]:
    """`n` square images of noise, `size` pixels wide, no two alike."""
    random = np.random.default_rng([seed, size])
    drawn = (random.integers(0, 256, (3, size, size), dtype=np.uint8) for _ in range(n))
    return [open_image(torch.from_numpy(pixels)) for pixels in drawn]


def vision_of(model: Model) -> Vision:
    """The vision part; raises UsageError for a model of text alone."""
    if model.vision is None:
        raise UsageError(f"model {model.name!r} takes no images: it has no vision part; try llada-v-8b:random")
    return model.vision


def with_images(
    model: Model, ids: Sequence[int], images: Sequence[Image], features: ReuseCache[Tensor] | None = None
) -> Prompt:
    """A prompt of token ids and images, made as `generate` makes one of a text and images; it needs no tokenizer."""
    vision = vision_of(model)
    with torch.inference_mode():
        tiles = vision.tiles([open_image(image) for image in images])
        keys = vision.keys(tiles)
        rows = [vision.recall(key, one, features) for key, one in zip(keys, tiles, strict=True)]
        return prompt_of(vision.splice(places(ids, len(images)), rows), keys)


def places(ids: Sequence[int], n_images: int) -> list[int]:
    """The ids of a prompt with `IMAGE` where its images go."""
    before = min(BEFORE, len(ids) // 2)
    return [*ids[:before], *[IMAGE] * n_images, *ids[before:]]


def prompt_of(spliced: Spliced, keys: Sequence[str]) -> Prompt:
    """What the engine takes; `keys` tell the images apart by their content."""
    spans = tuple(Span(*span, key) for span, key in zip(spliced.spans, keys, strict=True))
    return Prompt(spliced.tokens, Embeddings(np.flatnonzero(spliced.is_image.numpy()), spliced.embeddings, spans))
