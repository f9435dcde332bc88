"""LLaDA-V against tensors recorded from the published code; `models/README.md` describes the files."""

import json
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dcache.generate import Prompt, Runner, settings_from
from dcache.models.loading import Model, load_model
from dcache.models.tokenizer import Tokenizer
from dcache.models.vision import IMAGE, Spliced, Vision, image_ids, open_image
from dcache.state import Embeddings

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
    assert torch.equal(torch.cat([image.pixels() for image in tiles]), io[f"{prompt}.pixel_values"])


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


def generated(model: Model, rows: Spliced, forbidden: tuple[int, ...]) -> list[int]:
    """12 rows in 2 blocks and 6 steps, by loop and engine, with other tokens forbidden."""
    given = Embeddings(rows.is_image.nonzero()[:, 0].numpy(), rows.embeddings)
    spec, transformer = replace(model.spec, forbidden=forbidden), copy(model.transformer)
    transformer.spec = spec
    settings = settings_from(gen_length=12, block_length=6, unmask="low-confidence(steps=6)", after_end="decode")
    runner = Runner(replace(model, spec=spec, transformer=transformer), "none", settings)
    return runner.run([Prompt(rows.tokens, given)])[0].canvas


def plainly(model: Model, rows: Spliced, forbidden: tuple[int, ...]) -> list[int]:
    """The same as the specification tells it: two surest rows of the block per step, probabilities in float64."""
    prompt, ids = rows.embed(model.transformer.embedding), torch.full((12,), model.spec.mask_id)
    for step in range(6):
        embeddings = torch.cat([prompt, model.transformer.embed(ids)])[None]
        logits = model.transformer(embeddings=embeddings)[0, -12:].clone()
        logits[:, [*forbidden, model.spec.mask_id]] = float("-inf")
        confidence, best = logits.double().softmax(-1).max(-1)
        block = torch.arange(12) // 6 == step // 3
        surest = confidence.where(block & (ids == model.spec.mask_id), -1).topk(2).indices
        ids[surest] = best[surest]
    return ids.tolist()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_generated_ids_are_the_recorded_ones(
    model: Model, vision: Vision, io: dict[str, Tensor], prompt: str
) -> None:
    assert sorted(model.spec.forbidden) == [120, 121, 123, 124]
    rows, recorded = spliced(vision, io, prompt), io[f"{prompt}.generated"][0].tolist()
    assert generated(model, rows, model.spec.forbidden) == recorded
    assert plainly(model, rows, model.spec.forbidden) == recorded


@pytest.mark.parametrize("prompt", PROMPTS)
def test_other_ids_are_generated_where_recorded_ones_are_forbidden(
    model: Model, vision: Vision, io: dict[str, Tensor], prompt: str
) -> None:
    """Those that were forbidden in the recorded runs would not have been predicted there."""
    rows, forbidden = spliced(vision, io, prompt), (100, 94, 16)
    found = generated(model, rows, forbidden)
    assert not set(forbidden) & set(found)
    assert found == plainly(model, rows, forbidden)
