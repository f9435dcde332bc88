"""Adapters against outputs recorded from the published modelling code; `models/README.md` describes the files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dcache.models.dream import Dream
from dcache.models.llada import LLaDA
from dcache.models.llada_v import LLaDAV
from dcache.models.loading import Model, load_model
from dcache.models.tokenizer import Tokenizer

SUPPORTED = {"llada": LLaDA, "Dream": Dream, "llava_llada": LLaDAV}
ATOL = 5e-5  # float32 in another order of operations; the recording's own reimplementation is off by 1.2e-5


def golden_root(config: pytest.Config) -> Path:
    return Path(config.getoption("--golden", default=None) or Path(__file__).parent)


def kind_of(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text())["model_type"])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    root = golden_root(metafunc.config)
    folders = sorted(file.parent for file in root.rglob("io.safetensors"))
    if "io" in metafunc.fixturenames:  # recorded from ids; `test_vision.py` has the prompts with images
        folders = [folder for folder in folders if kind_of(folder) != "llava_llada"]
    metafunc.parametrize("folder", [pytest.param(f, id=str(f.relative_to(root))) for f in folders], scope="module")


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    kind = kind_of(folder)
    if kind not in SUPPORTED:
        pytest.skip(f"no adapter for model_type {kind!r} yet; there are: {', '.join(SUPPORTED)}")
    return load_model(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def io(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "io.safetensors")


def run(model: Model, io: dict[str, Tensor], batch: str) -> dict[str, Tensor]:
    """Everything a batch can be compared with, under the names of the recording."""
    mask = io.get(f"{batch}.attention_mask")
    keep: dict[str, Tensor] = {}
    logits = model.transformer(io[f"{batch}.input_ids"], valid=None if mask is None else mask.bool(), keep=keep)
    return keep | {"logits": logits}


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("batch", ["b0", "b1"])
def test_every_recorded_tensor_of_an_unpadded_batch_is_reproduced(
    model: Model, io: dict[str, Tensor], batch: str
) -> None:
    found = run(model, io, batch)
    keys = {key.split(".", 1)[1]: key for key in io if key.startswith(batch + ".")}
    names = keys.keys() - {"input_ids", "logits_shifted"}
    assert {"logits", "hidden.0"} <= names <= found.keys()
    for name in names:
        close(found[name], io[keys[name]])


def test_padding_hides_keys_and_leaves_valid_rows_right(model: Model, io: dict[str, Tensor]) -> None:
    found = run(model, io, "b2")
    valid = io["b2.attention_mask"].bool()
    assert not valid.all()
    for i in range(model.spec.n_layers):
        close(found[f"hidden.{i}"][valid], io[f"b2.hidden.{i}"][valid])
    close(found["logits"][valid], io["b2.logits"][valid])


def test_a_sequence_without_its_padding_gives_the_rows_that_the_padded_batch_gives(
    model: Model, io: dict[str, Tensor]
) -> None:
    for b, mask in enumerate(io["b2.attention_mask"].bool()):
        if "b2.position_ids" in io:  # the published positions count from the first valid row, as here
            assert io["b2.position_ids"][b][mask].tolist() == list(range(int(mask.sum())))
        alone = model.transformer(io["b2.input_ids"][b][mask][None])[0]
        close(alone, io["b2.logits"][b][mask])


def test_a_position_is_predicted_by_the_row_that_the_spec_names(model: Model, io: dict[str, Tensor]) -> None:
    if "b0.logits_shifted" not in io:
        assert model.spec.shift == 0
        return
    rows = (torch.arange(io["b0.logits"].shape[1]) - model.spec.shift).clamp_min(0)
    close(model.transformer(io["b0.input_ids"])[:, rows], io["b0.logits_shifted"])


def test_without_a_mask_padding_is_read_as_text(model: Model, io: dict[str, Tensor]) -> None:
    if "b2.logits_mask_ignored" not in io:
        pytest.skip("recorded for LLaDA only: its first revision ignored the mask")
    close(model.transformer(io["b2.input_ids"]), io["b2.logits_mask_ignored"])


def gives_the_published_ids(tokenizer: Tokenizer | None, folder: Path) -> None:
    assert tokenizer is not None
    cases: dict[str, list[dict[str, Any]]] = json.loads((folder / "tokenizer_cases.json").read_text())
    for case in cases["encode"]:
        assert tokenizer.encode(case["text"]) == case["ids"]
    for case in cases["chat"]:
        assert tokenizer.render(case["messages"]) == case["text"]
        assert tokenizer.chat(case["messages"]) == tokenizer.chat(case["messages"], specials=True) == case["ids"]


def test_the_tokenizer_gives_the_published_ids(model: Model, folder: Path) -> None:
    gives_the_published_ids(model.tokenizer, folder)


def test_a_tokenizer_rebuilt_from_vocabulary_and_merges_gives_the_published_ids(
    model: Model, folder: Path, tmp_path: Path
) -> None:
    if not (folder / "vocab.json").exists():
        pytest.skip("published with tokenizer.json alone")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("tokenizer.json"))
    gives_the_published_ids(load_model(copy, device="cpu").tokenizer, folder)
