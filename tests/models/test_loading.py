import json
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

import huggingface_hub
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from dcache.errors import DCacheError, ModelError, UsageError
from dcache.models import loading, tiny
from dcache.models.family import Slot
from dcache.models.llada import LLaDA
from dcache.models.loading import Model, load_model
from dcache.models.transformer import ModelSpec, Transformer


class Draft(Protocol):
    """What the fixture `draft` gives; the class stands in conftest.py."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def save(self, shards: Sequence[Collection[str]] | None = None) -> Path: ...
    def write(self, name: str, value: Any) -> Path: ...
    def add_tokenizer(self, **config: Any) -> None: ...


WTE, HEAD = "model.transformer.wte.weight", "model.transformer.ff_out.weight"
Q0, V1 = "model.transformer.blocks.0.q_proj.weight", "model.transformer.blocks.1.v_proj.weight"


def refused(source: str | Path, *parts: str, **options: Any) -> str:
    """Assert that a load fails with one line that contains all `parts`."""
    with pytest.raises(UsageError) as caught:
        load_model(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make it an error to allocate parameters anywhere but on the meta device."""

    def allocate(spec: ModelSpec, device: torch.device | str, dtype: torch.dtype) -> Transformer:
        assert torch.device(device).type == "meta", "memory was taken before the check"
        return Transformer(spec, device, dtype)

    monkeypatch.setattr(loading, "Transformer", allocate)


# What loads


def test_a_folder_gives_the_weights_that_were_saved(draft: Draft) -> None:
    model = load_model(draft.save())
    qkv = dict(model.transformer.named_parameters())["layers.1.qkv"]
    assert torch.equal(qkv[24:32], draft.tensors[V1])
    assert torch.equal(model.transformer.embedding, draft.tensors[WTE])
    assert (model.device.type, model.dtype) == ("cuda" if torch.cuda.is_available() else "cpu", model.transformer.dtype)
    assert not any(p.requires_grad for p in model.transformer.parameters())


def test_the_name_of_a_folder_is_the_name_of_the_model(draft: Draft) -> None:
    assert load_model(draft.save()).name == draft.folder.name
    assert load_model(str(draft.folder) + "/").name == draft.folder.name


def test_weights_are_cast_to_the_asked_dtype(draft: Draft) -> None:
    model = load_model(draft.save(), device="cpu", dtype="bf16")
    assert model.dtype is torch.bfloat16
    assert torch.equal(model.transformer.embedding, draft.tensors[WTE].bfloat16())
    assert load_model(draft.folder, device="cpu").dtype is torch.float32
    assert load_model(draft.folder, device=torch.device("cpu"), dtype=torch.float16).dtype is torch.float16


def test_a_layer_may_straddle_files(draft: Draft) -> None:
    single = load_model(draft.save()).transformer
    names = sorted(draft.tensors)
    (draft.folder / "model.safetensors").unlink()
    sharded = load_model(draft.save([names[0::3], names[1::3], names[2::3]])).transformer
    for (name, a), b in zip(single.named_parameters(), sharded.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_an_ignored_tensor_may_be_present(draft: Draft) -> None:
    draft.tensors["model.transformer.blocks.0.rotary_emb.inv_freq"] = torch.ones(2)
    load_model(draft.save())


def test_a_tied_model_has_no_head_of_its_own(draft: Draft) -> None:
    del draft.tensors[HEAD]
    draft.config["weight_tying"] = True
    transformer = load_model(draft.save()).transformer
    assert transformer.head is None
    assert transformer(torch.tensor([[1, 2]])).shape == (1, 2, 128)


def test_a_model_without_tokenizer_takes_ids_only(draft: Draft) -> None:
    model = load_model(draft.save())
    assert model.tokenizer is None
    with pytest.raises(ModelError, match="no tokenizer; give token ids"):
        model.prompt_ids("hi")


def test_a_prompt_is_one_user_turn_and_cannot_hold_special_tokens(draft: Draft) -> None:
    draft.add_tokenizer()
    model = load_model(draft.save())
    ids = model.prompt_ids("a<|mdm_mask|><|eot_id|>")
    assert ids[:2] == [120, 123]
    assert model.spec.mask_id not in ids
    assert ids.count(125) == 1


def test_a_prompt_of_a_base_model_is_encoded_as_it_is(draft: Draft) -> None:
    draft.add_tokenizer(chat_template=None)
    model = load_model(draft.save())
    assert model.prompt_ids("ab") == [65, 66]
    assert model.spec.mask_id not in model.prompt_ids("<|mdm_mask|>")


def test_text_ends_at_the_first_end_token(draft: Draft) -> None:
    draft.add_tokenizer()
    model = load_model(draft.save())
    assert model.spec.end_ids == (121, 125)
    assert model.text([65, 66, 125, 67]) == "ab"
    assert model.text([65, 121, 67]) == "a"
    assert model.text([65, 66]) == "ab"


@settings(max_examples=15, deadline=None)
@given(
    n_kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([2, 4, 8]),
    n_layers=st.integers(1, 3),
    mlp_size=st.integers(1, 9),
    vocab_size=st.integers(5, 20),
    tied=st.booleans(),
    n_files=st.integers(1, 3),
    stored=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 9),
)
def test_a_saved_model_loads_with_the_same_bits(
    n_kv_heads: int,
    group: int,
    head_dim: int,
    n_layers: int,
    mlp_size: int,
    vocab_size: int,
    tied: bool,
    n_files: int,
    stored: torch.dtype,
    seed: int,
) -> None:
    n_heads = n_kv_heads * group
    config = {
        "model_type": "llada",
        "d_model": n_heads * head_dim,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "mlp_hidden_size": mlp_size,
        "vocab_size": vocab_size,
        "max_sequence_length": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "mask_token_id": 4,
        "eos_token_id": 3,
        "weight_tying": tied,
    }
    original = Transformer(LLaDA().spec(config, {}, None)).init_random(seed, std=0.5)
    for parameter in original.parameters():
        parameter.data = parameter.data.to(stored).float()
    tensors = published(original, stored)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(config))
        names = sorted(tensors)
        weight_map = {tensor: f"model-{i % n_files}.safetensors" for i, tensor in enumerate(names)}
        for file in set(weight_map.values()):
            save_file({t: tensors[t] for t in names if weight_map[t] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        loaded = load_model(folder, device="cpu", dtype="float32").transformer
    tokens = torch.arange(6)[None] % vocab_size
    assert torch.equal(loaded(tokens), original(tokens))


def published(transformer: Transformer, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a model under LLaDA's names, taken apart by hand rather than through `LLaDA.slots`."""
    tensors = {"wte": transformer.embedding, "ln_f": transformer.norm}
    if transformer.head is not None:
        tensors["ff_out"] = transformer.head
    for i, block in enumerate(transformer.blocks()):
        gate, up = block.gate_up.chunk(2)
        parts = {name + "_proj": block.qkv[block.slices(name)] for name in "qkv"}
        parts |= {"attn_norm": block.norm1, "attn_out": block.out, "ff_norm": block.norm2}
        parts |= {"ff_proj": gate, "up_proj": up, "ff_out": block.down}
        tensors |= {f"blocks.{i}.{name}": tensor for name, tensor in parts.items()}
    return {f"model.transformer.{n}.weight": t.detach().to(dtype).contiguous() for n, t in tensors.items()}


# Random weights


def test_the_8b_shape_has_the_published_number_of_bytes() -> None:
    model = load_model("llada-8b:random", device="meta", dtype="bfloat16")
    n_bytes = sum(p.numel() * p.element_size() for p in model.transformer.parameters())
    assert n_bytes == 16031162368 == 2 * model.spec.n_parameters
    assert (model.name, model.tokenizer) == ("llada-8b:random", None)


class Small(LLaDA):
    """LLaDA with a shape that fits a test."""

    shapes = {"small": LLaDA.shapes["llada-8b"] | {"d_model": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2}}  # noqa: RUF012


def test_random_weights_are_the_same_each_time() -> None:
    a = load_model("small:random", families=[Small()], device="cpu")
    b = load_model("small:random", families=[Small()], device="cpu")
    assert torch.equal(a.transformer.embedding, b.transformer.embedding)
    assert torch.isfinite(a.transformer(torch.tensor([[1, 2]]))).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_random_weights_are_made_on_the_gpu_in_bfloat16() -> None:
    model = load_model("small:random", families=[Small()])
    assert (model.device.type, model.dtype) == ("cuda", torch.bfloat16)
    assert torch.isfinite(model.transformer(torch.tensor([[1, 2]], device=model.device))).all()


def test_an_unknown_shape_gets_a_suggestion() -> None:
    refused("llada-8B:random", "'llada-8B:random'", "Did you mean 'llada-8b:random'?")


# What the source may be


def test_an_unknown_name_gets_a_suggestion_and_what_is_accepted() -> None:
    refused("tiny-lada", "'tiny-lada'", "Did you mean 'tiny-llada'?", "a local folder", "org/name", "llada-8b:random")


@pytest.mark.parametrize("source", ["", "~nobody-here/x", "x" * 5000, "a\0b", "./missing", "../up/down", "a/../b"])
def test_what_cannot_be_a_model_never_reaches_the_network(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    refused(source, "no model", "Accepted: a local folder")


def test_a_missing_path_object_is_not_taken_for_a_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    refused(Path("runs/model"), "'runs/model'", "no such folder")


def test_a_file_is_not_a_model(draft: Draft) -> None:
    refused(draft.save() / "model.safetensors", "is a file; give the folder")


def test_a_shipped_name_loads_its_folder(draft: Draft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "NAMES", ("tiny-test",))
    monkeypatch.setattr(tiny, "folder", lambda name: draft.save())
    assert load_model("tiny-test").name == "tiny-test"


def test_a_hub_id_is_downloaded_without_python_files(draft: Draft, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(repository=repository, revision=revision, allow_patterns=allow_patterns)
        return str(draft.save())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = load_model("Some-Org/model_1.5", revision="main")
    assert model.name == asked["repository"] == "Some-Org/model_1.5"
    assert asked["revision"] == "main"
    assert asked["allow_patterns"] == ["*.json", "*.safetensors", "merges.txt", "*.jinja"]


def test_a_failed_download_names_the_repository_and_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> NoReturn:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    refused("org/name", "'org/name'", "ConnectionError: no route to host", "'v1'", revision="v1")


def test_a_revision_of_a_local_folder_is_refused(draft: Draft) -> None:
    refused(draft.save(), "'main'", "not a hub id", revision="main")
    refused("llada-8b:random", "'main'", "not a hub id", revision="main")


# Device, dtype, family


def test_an_unknown_device_is_named(draft: Draft) -> None:
    refused(draft.save(), "'gpu'", device="gpu")
    refused(draft.folder, "'xla'", device="xla")


def test_a_gpu_that_is_not_there_is_named(draft: Draft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(draft.save(), "'cuda'", "no CUDA device", device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refused(draft.folder, "'cuda:2'", "there are 2", device="cuda:2")


@pytest.mark.parametrize("dtype", ["bfloat61", "int8", torch.int64, torch.float8_e4m3fn])
def test_an_unusable_dtype_is_named(draft: Draft, dtype: Any) -> None:
    refused(draft.save(), repr(str(dtype)), "Accepted: bfloat16", dtype=dtype)


@pytest.mark.usefixtures("no_memory")
def test_a_model_that_does_not_fit_the_gpu_is_refused_with_both_sizes(
    draft: Draft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    tables = 2 * 4097 * 64 * 4  # cos and sin in float32, the slot behind the canvas included
    refused("llada-8b:random", f"{16031162368 + tables} bytes (14.9 GiB)", "120 bytes", "bfloat16", device="cuda")
    refused(draft.save(), draft.folder.name, "120 bytes", device="cuda")


def test_an_unknown_family_is_named_with_the_known_ones(draft: Draft) -> None:
    refused(draft.save(), "'lada'", "Did you mean 'llada'?", family="lada")


def test_an_unrecognised_checkpoint_says_what_it_declares(draft: Draft) -> None:
    draft.config |= {"model_type": "bert", "architectures": ["BertModel"]}
    draft.tensors = {"bert.embeddings.weight": torch.ones(2, 2)}
    refused(draft.save(), "'bert'", "['BertModel']", "'bert.embeddings.weight'", "llada", "family=")


def test_a_config_of_another_family_is_refused_although_its_tensors_have_known_names(draft: Draft) -> None:
    draft.config |= {"model_type": "qwen2", "architectures": None}
    expected = (
        "config.json declares model_type 'qwen2'; known families: llada, dream, llada-v. "
        "Its tensors are named like those of llada: "
        "give family='llada' (--family llada) to load it all the same"
    )
    assert refused(draft.save()).endswith(expected)


def test_a_config_that_declares_nothing_is_recognised_by_its_tensors(draft: Draft) -> None:
    draft.config |= {"model_type": None, "architectures": None}
    assert load_model(draft.save()).spec.family == "llada"
    draft.tensors = {"bert.embeddings.weight": torch.ones(2, 2)}
    refused(draft.save(), "declares neither model_type nor architectures", "'bert.embeddings.weight'", "--family")


def test_a_named_family_is_used_whatever_the_config_declares(draft: Draft) -> None:
    draft.config |= {"model_type": "other", "architectures": None}
    assert load_model(draft.save(), family="llada").spec.family == "llada"


def test_two_families_that_recognise_a_checkpoint_are_both_named(draft: Draft) -> None:
    class Twin(LLaDA):
        name = "twin"

    refused(draft.save(), "more than one", "llada, twin", families=[LLaDA(), Twin()])


def test_a_family_that_leaves_rows_unfilled_is_refused(draft: Draft) -> None:
    class Careless(LLaDA):
        def slots(self, spec: ModelSpec) -> Mapping[str, Slot]:
            return {**super().slots(spec), V1: Slot("layers.1.qkv", slice(16, 24))}

    class Wrong(LLaDA):
        def slots(self, spec: ModelSpec) -> Mapping[str, Slot]:
            return {**super().slots(spec), "extra": Slot("layers.1.query")}

    refused(draft.save(), "'layers.1.qkv'", "exactly once", families=[Careless()])
    refused(draft.folder, "'extra'", "'layers.1.query'", families=[Wrong()])


# Broken configs


@pytest.mark.parametrize(
    ("text", "expected"),
    [("{", "not readable JSON"), ("[1]", "holds a JSON list; expected an object"), ("\x00", "not readable JSON")],
)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_a_broken_json_file_is_named(draft: Draft, file: str, text: str, expected: str) -> None:
    draft.save()
    draft.write(file, text)
    refused(draft.folder, str(draft.folder / file), expected)


def test_json_nested_past_the_stack_is_refused(draft: Draft) -> None:
    draft.save()
    draft.write("config.json", "[" * 200_000)
    refused(draft.folder, "config.json", "not readable JSON")


def test_a_missing_config_is_named(draft: Draft) -> None:
    (draft.save() / "config.json").unlink()
    refused(draft.folder, str(draft.folder / "config.json"), "does not exist")


def test_a_bad_field_is_named_with_its_folder(draft: Draft) -> None:
    draft.config["n_heads"] = 5
    refused(draft.save(), str(draft.folder), "config.json: 'n_heads' is 5")


def test_a_quantised_checkpoint_is_refused_by_the_name_of_its_method(draft: Draft) -> None:
    draft.config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    refused(draft.save(), "quantization_config", "'gptq'")


# Broken weights


@pytest.mark.usefixtures("no_memory")
def test_all_faults_of_the_tensors_are_reported_together_before_memory_is_taken(draft: Draft) -> None:
    draft.tensors["model.transformer.wpe.weight"] = torch.ones(3)
    draft.tensors[V1] = torch.ones(16, 8)
    draft.tensors[WTE] = draft.tensors[WTE].to(torch.float8_e4m3fn)
    draft.tensors[HEAD] = draft.tensors[HEAD].to(torch.int8)
    del draft.tensors[Q0]
    refused(
        draft.save(),
        str(draft.folder),
        f"1 missing: {Q0!r}",
        "1 unexpected: 'model.transformer.wpe.weight'",
        f"1 misshapen: {V1!r} is (16, 8), expected (8, 16)",
        f"{WTE!r} is F8_E4M3",
        f"{HEAD!r} is I8",
    )


def test_a_long_list_of_tensors_is_cut_and_counted(draft: Draft) -> None:
    kept = {WTE, Q0}
    draft.tensors = {name: tensor for name, tensor in draft.tensors.items() if name in kept}
    message = refused(draft.save(), "19 missing", "and 11 more")
    assert message.count("model.transformer.") == 8


def test_a_deeper_checkpoint_than_its_config_says_is_refused(draft: Draft) -> None:
    draft.config["n_layers"] = 1
    refused(draft.save(), "9 unexpected", "blocks.1.")


def test_the_head_of_a_tied_model_is_unexpected(draft: Draft) -> None:
    draft.config["weight_tying"] = True
    refused(draft.save(), f"1 unexpected: {HEAD!r}")


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize("cut", [1, 4000, 10**9])
def test_a_truncated_file_is_named_with_its_size(draft: Draft, cut: int) -> None:
    file = draft.save() / "model.safetensors"
    content = file.read_bytes()
    content = content[: max(0, len(content) - cut)]
    file.write_bytes(content)
    refused(draft.folder, str(file), f"({len(content)} bytes)", "truncated or corrupt")


def test_a_truncated_file_among_several_is_named(draft: Draft) -> None:
    names = sorted(draft.tensors)
    draft.save([names[:9], names[9:]])
    file = draft.folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    refused(draft.folder, file.name, "bytes)", "truncated")


def test_a_corrupt_header_is_refused(draft: Draft) -> None:
    file = draft.save() / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:40] = b"\xff" * 32
    file.write_bytes(content)
    refused(draft.folder, str(file), "corrupt")


def test_a_git_lfs_pointer_is_recognised(draft: Draft) -> None:
    file = draft.save() / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1000\n")
    refused(draft.folder, str(file), "Git LFS pointer")


def test_pickled_weights_are_refused_with_the_reason(draft: Draft) -> None:
    (draft.save() / "model.safetensors").rename(draft.folder / "pytorch_model.bin")
    refused(draft.folder, "pytorch_model.bin", "pickled", "can run code", "safetensors")


def test_a_folder_without_weights_says_what_is_expected(draft: Draft) -> None:
    (draft.save() / "model.safetensors").unlink()
    refused(draft.folder, "no weights", "model.safetensors.index.json")


def test_files_without_an_index_are_refused(draft: Draft) -> None:
    (draft.save() / "model.safetensors").rename(draft.folder / "model-00001-of-00002.safetensors")
    refused(draft.folder, "model-00001-of-00002.safetensors", "neither model.safetensors nor")


# Broken indexes


@pytest.mark.parametrize(
    "shard",
    ["../up.safetensors", "/etc/passwd", "a/b.safetensors", "a\\b.safetensors", "..", "model.bin", "c:x.safetensors"],
)
def test_an_index_that_leaves_its_folder_is_refused(draft: Draft, shard: str) -> None:
    draft.save()
    draft.write("model.safetensors.index.json", {"weight_map": {WTE: shard}})
    refused(draft.folder, "model.safetensors.index.json", repr(shard))


@pytest.mark.parametrize("weight_map", [None, [], {WTE: 1}])
def test_an_index_without_a_map_of_names_is_refused(draft: Draft, weight_map: Any) -> None:
    draft.save()
    draft.write("model.safetensors.index.json", {"weight_map": weight_map})
    refused(draft.folder, "model.safetensors.index.json", "'weight_map'")


def test_a_missing_shard_is_named(draft: Draft) -> None:
    names = sorted(draft.tensors)
    (draft.save([names[:9], names[9:]]) / "model-00001-of-00002.safetensors").unlink()
    refused(draft.folder, "lacks 1 of 2 files", "model-00001-of-00002.safetensors")


def test_a_tensor_that_is_not_in_its_shard_is_named(draft: Draft) -> None:
    names = sorted(draft.tensors)
    folder = draft.save([names[:9], names[9:]])
    moved = {name: draft.tensors[name] for name in names[10:]}
    save_file(moved, folder / "model-00002-of-00002.safetensors")
    refused(folder, "model-00002-of-00002.safetensors lacks", repr(names[9]))


def test_a_tensor_that_the_index_does_not_list_is_named(draft: Draft) -> None:
    names = sorted(draft.tensors)
    folder = draft.save([names[:9], names[9:]])
    more = {name: draft.tensors[name] for name in names[9:]} | {"stray\n": torch.ones(1)}
    save_file(more, folder / "model-00002-of-00002.safetensors")
    refused(folder, "model-00002-of-00002.safetensors holds 'stray\\n' without an entry")


# Tokenizer and spec together


def test_a_tokenizer_larger_than_the_embedding_is_refused(draft: Draft) -> None:
    draft.add_tokenizer()
    draft.config |= {"vocab_size": 125, "embedding_size": 125}
    for name in (WTE, HEAD):
        draft.tensors[name] = draft.tensors[name][:125].clone()
    refused(draft.save(), "126 ids", "125 rows")


def test_every_refusal_is_a_dcache_error_of_the_user_kind() -> None:
    assert issubclass(ModelError, UsageError)
    assert issubclass(UsageError, DCacheError)
    assert Model.__dataclass_params__.frozen  # type: ignore[attr-defined]
