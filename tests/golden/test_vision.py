"""LLaDA-V against tensors recorded from the published code; `models/README.md` describes the files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dcache.models.loading import Model, load_model
from dcache.models.tokenizer import Tokenizer
from dcache.models.vision import IMAGE, Spliced, Vision, image_ids, open_image

PROMPTS = {"p0": ("img0",), "p1": ("img1",), "p2": ("img0", "img1")}
ATOL = 5e-5  # float32 in another order of operations


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    root = Path(request.config.getoption("--golden", default=None) or Path(__file__).parent)
    folders = [file.parent for file in root.rglob("io.safetensors") if file.parent.name == "llada_v"]
    if not folders:
        pytest.skip(f"{root} has no llada_v")
    return folders[0]


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def vision(model: Model) -> Vision:
    assert model.vision is not None
    return model.vision


@pytest.fixture(scope="module")
def io(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "io.safetensors")


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)


def spliced(vision: Vision, io: dict[str, Tensor], prompt: str) -> Spliced:
    images = [open_image(io[f"{name}.rgb"].permute(2, 0, 1)) for name in PROMPTS[prompt]]
    return vision.splice(io[f"{prompt}.input_ids"][0].tolist(), vision.features(images))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_pixels_of_the_tiles_equal_the_recorded_ones(vision: Vision, io: dict[str, Tensor], prompt: str) -> None:
    tiles = vision.tiles([open_image(io[f"{name}.rgb"].permute(2, 0, 1)) for name in PROMPTS[prompt]])
    assert torch.equal(torch.cat([image.pixels for image in tiles]), io[f"{prompt}.pixel_values"])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_tower_and_projector_give_the_recorded_features(vision: Vision, io: dict[str, Tensor], prompt: str) -> None:
    rows = vision.tower_rows(io[f"{prompt}.pixel_values"])
    close(rows, io[f"{prompt}.vision_features"])
    close(vision.projector(rows), io[f"{prompt}.projected"])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_spliced_embeddings_are_the_recorded_ones(
    model: Model, vision: Vision, io: dict[str, Tensor], prompt: str
) -> None:
    found = spliced(vision, io, prompt)
    close(found.embed(model.transformer.embedding), io[f"{prompt}.inputs_embeds"][0])
    ids = [i for i in io[f"{prompt}.input_ids"][0].tolist() if i != IMAGE]
    assert [i for i, image in zip(found.tokens, found.is_image.tolist(), strict=True) if not image] == ids
    assert {i for i, image in zip(found.tokens, found.is_image.tolist(), strict=True) if image} == {model.spec.eos_id}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_transformer_continues_the_embeddings_as_recorded(
    model: Model, vision: Vision, io: dict[str, Tensor], prompt: str
) -> None:
    prompt_rows = spliced(vision, io, prompt).embed(model.transformer.embedding)
    masks = model.transformer.embed(torch.full((12,), model.spec.mask_id))
    keep: dict[str, Tensor] = {}
    logits = model.transformer(embeddings=torch.cat([prompt_rows, masks])[None], keep=keep)
    close(logits, io[f"{prompt}.logits"])
    for name in ("hidden.0", "hidden.1", "q.0", "q.1", "k.0", "k.1"):
        if f"{prompt}.{name}" in io:
            close(keep[name], io[f"{prompt}.{name}"])


def test_the_ids_around_an_image_are_the_published_ones(model: Model, folder: Path) -> None:
    first, second = json.loads((folder / "tokenizer_cases.json").read_text())["image_prompt"]
    assert model.tokenizer is not None
    messages = [{"role": "system", "content": "You see."}, {"role": "user", "content": "<image>\nDescribe it."}]
    assert model.tokenizer.render(messages) == first["text"]
    assert image_ids(model.tokenizer, messages) == first["ids"]
    plain = Tokenizer(model.tokenizer._backend, template="{{ messages[0].content }}")
    assert image_ids(plain, [{"role": "user", "content": second["text"]}]) == second["ids"]


def test_the_token_behind_an_image_stays_if_it_is_asked_for(model: Model) -> None:
    assert model.tokenizer is not None
    messages = [{"role": "user", "content": "<image>\nWhat?"}]
    whole = image_ids(model.tokenizer, messages, drop_first=False)
    at = whole.index(IMAGE)
    assert model.tokenizer.decode([whole[at + 1]]) == "\n"
    assert image_ids(model.tokenizer, messages) == whole[: at + 1] + whole[at + 2 :]
