"""Images to prompt rows: what is read, how it is cut and merged, where it goes. `tests/golden` has recorded values."""

import shutil
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile, PngImagePlugin
from torch import Tensor

from dcache.errors import UsageError
from dcache.models.loading import Model, load_model
from dcache.models.vision import IMAGE, Tiles, Vision, best_canvas, image_ids, open_image

GOLDEN = Path(__file__).parents[1] / "golden" / "models"
CANVASES = [(384 * i, 384 * j) for i in range(1, 7) for j in range(1, 7)]
ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(GOLDEN / "llada_v", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def vision(model: Model) -> Vision:
    assert model.vision is not None
    return model.vision


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    raw = np.random.default_rng(0).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), raw.tobytes())


def refusal(source: object, *parts: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_image(source)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


# Reading


def test_a_file_an_image_and_a_tensor_of_the_same_pixels_are_the_same_image(tmp_path: Path) -> None:
    image = noise(5, 7)
    image.save(tmp_path / "image.png")
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    read = [open_image(source) for source in (image, tmp_path / "image.png", str(tmp_path / "image.png"), tensor)]
    assert {found.mode for found in read} == {"RGB"}
    assert {found.tobytes() for found in read} == {image.tobytes()}


@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "CMYK", "1", "P"])
def test_other_modes_are_converted_as_pillow_converts_them(mode: str, tmp_path: Path) -> None:
    image = noise(6, 4).convert(mode) if mode in ("1", "P") else noise(6, 4, mode)
    image.save(file := tmp_path / ("image.tiff" if mode == "CMYK" else "image.png"))
    assert open_image(file).tobytes() == image.convert("RGB").tobytes()


def test_alpha_is_dropped_and_not_blended() -> None:
    assert open_image(Image.new("RGBA", (2, 2), (9, 8, 7, 0))).getpixel((0, 0)) == (9, 8, 7)


def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path: Path) -> None:
    image = noise(6, 4).convert("P")
    image.save(tmp_path / "image.png", transparency=bytes([0, 128, 255]))
    assert open_image(tmp_path / "image.png").size == (6, 4)


def test_the_orientation_in_exif_is_not_applied(tmp_path: Path) -> None:
    image = noise(6, 4)
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # turned by a quarter
    image.save(tmp_path / "image.png", exif=exif)
    assert open_image(tmp_path / "image.png").tobytes() == image.tobytes()


def test_what_is_no_image_is_refused_by_name(tmp_path: Path) -> None:
    (text := tmp_path / "notes.txt").write_text("no pixels here")
    (empty := tmp_path / "empty.png").write_bytes(b"")
    refusal(text, "notes.txt", "not an image")
    refusal(empty, "empty.png", "not an image")
    refusal(tmp_path / "absent.png", "absent.png", "does not exist")
    refusal(tmp_path, "cannot be read", "directory")
    refusal(Image.new("RGB", (0, 3)), "0 x 3")
    refusal(3, "int")


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "bmp", "webp"])
def test_a_truncated_image_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"cut.{kind}"
    noise(64, 64).save(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    refusal(file, f"cut.{kind}")


def test_a_lazily_opened_image_that_is_truncated_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "cut.png"
    noise(64, 64).save(file)
    file.write_bytes(file.read_bytes()[:4000])
    with Image.open(file) as image:
        refusal(image, "truncated")


@pytest.mark.parametrize("limit", [90, 40])
def test_more_pixels_than_pillows_limit_are_refused(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise(10, 10).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # Pillow warns above it, and raises above twice of it
    refusal(tmp_path / "bomb.png", "bomb.png", "100 pixels", f"MAX_IMAGE_PIXELS is {limit}")


def test_a_text_chunk_that_inflates_without_end_is_refused(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * (2 * PngImagePlugin.MAX_TEXT_CHUNK), zip=True)
    noise(4, 4).save(tmp_path / "bomb.png", pnginfo=info)
    refusal(tmp_path / "bomb.png", "bomb.png")


def test_a_tensor_of_another_shape_or_dtype_is_refused() -> None:
    refusal(torch.zeros(4, 5, 3, dtype=torch.uint8), "(4, 5, 3)", "(3, height, width)")
    refusal(torch.zeros(3, 4, 5), "torch.float32", "torch.uint8")


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    refusal("image.png", "Pillow", "pip install 'dcache[vision]'")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"transformers is needed .* pip install 'dcache\[vision\]'"):
        load_model(GOLDEN / "llada_v", device="cpu")


# Tiles


@pytest.mark.parametrize(
    ("size", "canvas"),
    [
        ((384, 384), (384, 384)),
        ((100, 100), (384, 384)),  # a larger canvas keeps no more pixels and wastes more
        ((1000, 500), (1152, 768)),
        ((4000, 3000), (2304, 1920)),
        ((9000, 30), (2304, 384)),
    ],
)
def test_the_canvas_keeps_most_pixels_and_then_wastes_least(size: tuple[int, int], canvas: tuple[int, int]) -> None:
    assert best_canvas(size, CANVASES) == canvas


def test_of_equally_good_canvases_the_first_is_taken() -> None:
    assert best_canvas((10, 10), [(20, 40), (40, 20)]) == (20, 40)
    assert best_canvas((10, 10), [(40, 20), (20, 40)]) == (40, 20)


def test_an_image_that_fills_its_canvas_is_cut_line_by_line(vision: Vision) -> None:
    image = noise(36, 54)
    (tiles,) = vision.tiles([image])
    assert tiles.grid == (2, 3)
    for n, pixels in enumerate(tiles.pixels()[1:]):
        left, top = n % 2 * 18, n // 2 * 18
        part = np.array(image.crop((left, top, left + 18, top + 18)))
        torch.testing.assert_close(pixels, torch.from_numpy(part).permute(2, 0, 1) / 127.5 - 1, atol=1e-6, rtol=0)


def test_several_images_get_one_tile_each_padded_to_a_square(vision: Vision) -> None:
    wide, high = vision.tiles([Image.new("RGB", (36, 18), (255, 0, 0)), Image.new("RGB", (18, 36), (255, 0, 0))])
    assert (wide.grid, high.grid, wide.pixels().shape) == (None, None, (1, 3, 18, 18))
    assert wide.pixels()[0, 0, 9, 9] == 1
    grey = (torch.tensor(127.0) / 255 - 0.5) / 0.5
    torch.testing.assert_close(wide.pixels()[0, :, 0, 9], grey.expand(3))
    torch.testing.assert_close(high.pixels()[0, :, 9, 0], grey.expand(3))


# Merging


def cells(vision: Vision, tiles: Tiles) -> Tensor:
    """Rows that hold their own place: tile 0 is all -1, the others have line * 1000 + column in the joined map."""
    across, down = tiles.grid or (1, 1)
    side = vision.spec.side
    line, column = torch.meshgrid(torch.arange(down * side), torch.arange(across * side), indexing="ij")
    joined = (line * 1000 + column).float()
    cut = joined.reshape(down, side, across, side).transpose(1, 2).reshape(down * across, side * side)
    rows = torch.cat([-torch.ones(1, side * side), cut])
    return rows[..., None].expand(-1, -1, vision.spec.d_model)


def test_the_map_is_joined_cropped_and_ends_each_line_with_the_newline_row(vision: Vision) -> None:
    tiles = Tiles(torch.empty(0), (36, 20), (2, 2))  # 8 by 8 cells, of which int(20 * 8 / 36) = 4 lines are covered
    merged = vision.merge(cells(vision, tiles), tiles)
    assert torch.equal(merged[:16], -torch.ones(16, vision.spec.d_model))
    lines = merged[16:].reshape(4, 9, -1)
    assert torch.equal(lines[:, 8], vision.newline.expand(4, -1))
    assert lines[:, :8, 0].tolist() == [[line * 1000 + column for column in range(8)] for line in range(2, 6)]


def test_the_columns_of_a_tall_image_are_cropped(vision: Vision) -> None:
    tiles = Tiles(torch.empty(0), (20, 36), (2, 2))
    lines = vision.merge(cells(vision, tiles), tiles)[16:].reshape(8, 5, -1)
    assert lines[0, :4, 0].tolist() == [2, 3, 4, 5]


def test_a_single_tile_ends_with_the_newline_row(vision: Vision) -> None:
    tiles = Tiles(torch.empty(0), (18, 18), None)
    merged = vision.merge(cells(vision, tiles), tiles)
    assert merged.shape == (17, vision.spec.d_model)
    assert torch.equal(merged[16], vision.newline)


@given(st.integers(1, 400), st.integers(1, 400))
def test_an_image_of_any_size_gives_its_own_tile_and_lines_of_one_length(
    vision: Vision, width: int, height: int
) -> None:
    (tiles,) = vision.tiles([Image.new("RGB", (width, height))])
    rows = vision.merge(torch.zeros(len(tiles.raw), vision.spec.side**2, vision.spec.d_model), tiles)
    newlines = (rows == vision.newline).all(1).nonzero().flatten().tolist()
    assert newlines == sorted(newlines)
    assert len({b - a for a, b in pairwise([15, *newlines])}) <= 1
    assert len(rows) == (newlines[-1] + 1 if newlines else 16)
    across = newlines[0] - 16 if newlines else 0
    assert len(newlines) * across <= 4 * 16 * 1.1**2


# Splicing


def test_rows_of_images_take_their_places_in_order(vision: Vision) -> None:
    first, second = torch.full((2, 64), 1.0), torch.full((3, 64), 2.0)
    prompt = vision.splice([5, IMAGE, 6, IMAGE], [first, second])
    eos = vision.spec.stand_in
    assert prompt.tokens == [5, eos, eos, 6, eos, eos, eos]
    assert prompt.is_image.tolist() == [False, True, True, False, True, True, True]
    table = torch.arange(128.0)[:, None].expand(128, 64)
    assert prompt.embed(table)[:, 0].tolist() == [5, 1, 1, 6, 2, 2, 2]


def test_a_prompt_without_images_is_its_text(vision: Vision) -> None:
    prompt = vision.splice([5, 6], [])
    assert (prompt.tokens, prompt.is_image.any().item(), prompt.embeddings.shape) == ([5, 6], False, (0, 64))
    assert torch.equal(prompt.embed(torch.eye(64))[1], torch.eye(64)[6])


def test_another_number_of_places_than_images_is_refused(model: Model, vision: Vision) -> None:
    with pytest.raises(UsageError, match="has 2 <image> and there are 1 images"):
        vision.splice([IMAGE, 4, IMAGE], [torch.zeros(2, 64)])
    for text, images in (("<image> <image>", 1), ("<image>", 0), ("<image>", 2)):
        with pytest.raises(UsageError, match="one <image> for each"):
            model.image_prompt(text, [noise(9, 9)] * images)


def test_a_prompt_of_too_many_rows_is_refused_with_its_length(vision: Vision) -> None:
    with pytest.raises(UsageError, match=r"has 9001 rows, 9000 of them of images; the model takes 8192"):
        vision.splice([3, IMAGE], [torch.zeros(9000, 64)])


# A model's prompt


def test_images_come_first_unless_the_text_says_where(model: Model, vision: Vision) -> None:
    assert model.tokenizer is not None
    assert vision.messages("What?", 2)[1]["content"] == "<image> <image>\nWhat?"
    assert vision.messages("A <image> B", 1)[1]["content"] == "A <image> B"
    ids = image_ids(model.tokenizer, vision.messages("What?", 1), drop_first=False)
    assert [model.tokenizer.decode(ids[ids.index(IMAGE) + 1 :][:6])] == ["\nWhat?"]


def test_a_prompt_of_text_alone_has_the_published_system_turn(model: Model, vision: Vision) -> None:
    assert model.tokenizer is not None
    assert vision.spec.system in model.tokenizer.decode(model.prompt_ids("Hi"))
    assert model.image_prompt("Hi", []).tokens == model.prompt_ids("Hi")


def test_special_tokens_that_a_prompt_with_images_spells_stay_text(model: Model) -> None:
    mask = model.spec.mask_id
    prompt = model.image_prompt("<|mdm_mask|><image><|eot_id|>", [noise(18, 18)])
    text = [i for i, image in zip(prompt.tokens, prompt.is_image.tolist(), strict=True) if not image]
    assert mask not in text
    assert text.count(125) == 2  # the ends of the two turns, written by the template


def test_a_prompt_with_an_image_is_longer_by_the_rows_of_the_image(model: Model, vision: Vision) -> None:
    image = noise(30, 20)
    (rows,) = vision.features([image])
    prompt = model.image_prompt("What?", [image])
    assert int(prompt.is_image.sum()) == len(rows)
    assert torch.equal(prompt.embeddings, rows)


def test_an_image_is_refused_by_a_model_of_text_alone() -> None:
    text_only = load_model(GOLDEN / "llada_mha", device="cpu")
    assert text_only.vision is None
    with pytest.raises(UsageError, match="'llada_mha' takes no images"):
        text_only.image_prompt("What?", [noise(9, 9)])


def test_half_precision_gives_the_same_rows_but_for_rounding(vision: Vision) -> None:
    half = load_model(GOLDEN / "llada_v", device="cpu", dtype="bfloat16").vision
    assert half is not None
    found, expected = half.features([noise(40, 20)])[0], vision.features([noise(40, 20)])[0]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.15, rtol=0.1)


def test_the_features_of_a_golden_folder_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("connects"))
    shutil.copytree(GOLDEN / "llada_v", tmp_path / "copy")
    assert load_model(tmp_path / "copy", device="cpu").vision is not None
