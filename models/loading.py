"""Load a checkpoint: a folder, a shipped tiny model, random weights of a published shape, or a repository of the hub.

Everything is checked before memory is taken: the config by its family, then the header of every safetensors file
against the tensors that the family expects. Only then are the parameters allocated, on their device, and filled tensor
by tensor, so that neither a second copy of the model nor a layer that straddles two files matters.

No code from a checkpoint runs: no Python file is downloaded, pickled weights are refused, chat templates are sandboxed.
"""

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dcache.errors import ModelError, UsageError
from dcache.models.dream import Dream
from dcache.models.family import Family, Slot
from dcache.models.files import one_line, read_json
from dcache.models.llada import LLaDA
from dcache.models.llada_v import LLaDAV
from dcache.models.tokenizer import Tokenizer
from dcache.models.transformer import ModelSpec, Transformer
from dcache.models.vision import IMAGE, Spliced, Vision, VisionSpec, image_ids, open_image
from dcache.reuse import ReuseCache

if TYPE_CHECKING:
    from PIL.Image import Image

HUB_PATTERNS = ("*.json", "*.safetensors", "merges.txt", "*.jinja")
DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
    "float64": torch.float64,
}
_STORED = ("BF16", "F16", "F32", "F64")
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_RANDOM = ":random"
_SHOWN = 8
_VISION = "vision."  # before the names of the vision part's parameters, where they stand beside the transformer's


@dataclass(frozen=True)
class Source:
    """How a model is loaded: what another process needs to load it too.

    Attributes:
        name: what `load_model` takes; a folder with its whole path.
        device: "cpu", "cuda", or None for the GPU if there is one.
        dtype: of weights and computation; None for that of the device.
        revision: branch, tag or commit of a hub id.
        family: adapter to use whatever the config declares.
        weights: fingerprint that the loaded weights must have; None if any will do.
    """

    name: str
    device: str | None = None
    dtype: str | None = None
    revision: str | None = None
    family: str | None = None
    weights: str | None = None

    @staticmethod
    def of(
        source: str | PathLike[str],
        device: str | None = None,
        dtype: str | None = None,
        revision: str | None = None,
        family: str | None = None,
    ) -> "Source":
        """The source of arguments of `load_model`; a folder of this machine gets its whole path."""
        folder = _local(str(source))
        return Source(str(source) if folder is None else str(folder.resolve()), device, dtype, revision, family)


@dataclass(frozen=True)
class Model:
    """A loaded model.

    Attributes:
        name: what it was loaded as, for reports.
        spec: sizes and special ids.
        transformer: the weights.
        tokenizer: None if the checkpoint has none, or the weights are random.
        vision: what makes rows of images; None for a model of text alone.
        source: how it was loaded; None if it was made by hand.
    """

    name: str
    spec: ModelSpec
    transformer: Transformer
    tokenizer: Tokenizer | None = None
    vision: Vision | None = None
    source: Source | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights and of the computation."""
        return self.transformer.dtype

    @property
    def n_parameters(self) -> int:
        """Weights of the transformer, and of the vision part if there is one."""
        return self.spec.n_parameters + (0 if self.vision is None else sum(p.numel() for p in self.vision.parameters()))

    def prompt_ids(self, text: str) -> list[int]:
        """Ids of a prompt: one user turn if there is a chat template, else the text as it is.

        The text is not trusted: special tokens that it spells stay text. `Tokenizer` has the published behaviour.
        """
        tokenizer = self._tokenizer()
        if tokenizer.has_template:
            system = [] if self.vision is None else [{"role": "system", "content": self.vision.spec.system}]
            return tokenizer.chat([*system, {"role": "user", "content": text}])
        return tokenizer.encode(text, specials=False)

    def image_prompt(
        self,
        text: str,
        images: "Sequence[str | PathLike[str] | Image | Tensor]",
        *,
        drop_first: bool = True,
        features: ReuseCache[Tensor] | None = None,
    ) -> Spliced:
        """A prompt with images: the published conversation around one user turn, with the rows of the images in it.

        Args:
            text: as for `prompt_ids`. It may say where the images go, by one ``<image>`` for each; else they go first.
            images: files, Pillow images, or tensors (3, height, width) of uint8.
            drop_first: leave out the token behind each image, as the published code does; see `image_ids`.
            features: keeps the rows of images by content, so that one that comes again is not encoded again.

        Raises:
            UsageError: if the model has no vision, an image cannot be read, their number does not fit the text, or the
                prompt gets too long.
        """
        if self.vision is None:
            raise UsageError(f"model {self.name!r} takes no images: it has no vision part; load a LLaDA-V")
        messages = self.vision.messages(text, len(images))
        ids = image_ids(self._tokenizer(), messages, drop_first=drop_first)
        tiles = self.vision.tiles([open_image(image) for image in images])
        keys = self.vision.keys(tiles)
        rows = [self.vision.recall(key, one, features) for key, one in zip(keys, tiles, strict=True)]
        bare = image_ids(self._tokenizer(), self.vision.messages("", 1))
        preamble = tuple(bare[: bare.index(IMAGE)])
        return replace(self.vision.splice(ids, rows), keys=tuple(keys), preamble=preamble)

    def text(self, ids: Sequence[int]) -> str:
        """Text of generated ids up to the first end token."""
        end = next((n for n, i in enumerate(ids) if i in self.spec.end_ids), len(ids))
        return self._tokenizer().decode(ids[:end])

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ModelError(f"model {self.name!r} has no tokenizer; give token ids instead of text")
        return self.tokenizer


def load_model(
    source: str | PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    family: str | None = None,
    families: Sequence[Family] | None = None,
) -> Model:
    """Load a model for inference.

    Args:
        source: a local folder; the name of a shipped model ("tiny-llada"); a published shape with random weights and no
            tokenizer ("llada-8b:random"); or an id of the Hugging Face hub ("GSAI-ML/LLaDA-8B-Instruct").
        device: None is the GPU if there is one, else the CPU.
        dtype: of weights and computation. None is bfloat16 on a GPU and float32 on the CPU.
        revision: branch, tag or commit of a hub id.
        family: adapter to use whatever the config declares.
        families: the adapters to choose from; None is the built-in ones.

    Raises:
        ModelError: naming the file, field or tensor that is at fault.
        UsageError: for a device or dtype that does not exist here.
    """
    known = {f.name: f for f in ([LLaDA(), Dream(), LLaDAV()] if families is None else families)}
    if family is not None and family not in known:
        raise ModelError(f"unknown model family {family!r}.{_did_you_mean(family, known)} Known: {', '.join(known)}")
    place = _device(device)
    kind = _dtype(dtype, place)
    name = str(source)
    if name.endswith(_RANDOM) and not _local(name):
        _no_revision(name, revision)
        return _random(name, known, place, kind)
    folder = _folder(name, known, revision, is_path=not isinstance(source, str))
    name = folder.resolve().name if _local(name) else name
    return _load(name, folder, [known[family]] if family else list(known.values()), family is not None, place, kind)


# Where the source is


def _folder(source: str, known: Mapping[str, Family], revision: str | None, is_path: bool) -> Path:
    path = _local(source)
    if path and path.is_dir():
        _no_revision(source, revision)
        return path
    if path:
        raise ModelError(f"{source!r} is a file; give the folder that holds config.json and the weights")
    shipped = _shipped()
    if source in shipped:
        _no_revision(source, revision)
        return shipped[source]
    if not is_path and _HUB_ID.fullmatch(source) and ".." not in source:
        return _download(source, revision)
    presets = [shape + _RANDOM for f in known.values() for shape in f.shapes]
    accepted = "a local folder, a hub id 'org/name'" + "".join(
        f", {what} ({', '.join(names)})"
        for what, names in (("a shipped model", shipped), ("random weights of a published shape", presets))
        if names
    )
    hint = _did_you_mean(source, [*shipped, *presets])
    raise ModelError(f"no model {source!r}: there is no such folder.{hint} Accepted: {accepted}")


def _local(source: str) -> Path | None:
    """What `source` names on this machine, None if that is nothing."""
    try:
        path = Path(source).expanduser()
        return path if source and path.exists() else None
    except (OSError, RuntimeError):  # too long for a file name; the home of a user who does not exist
        return None


def _shipped() -> dict[str, Path]:
    """The trained checkpoints inside the package, by name."""
    from dcache.models import tiny  # here, because that package also trains them, with what this module provides

    return {name: tiny.folder(name) for name in tiny.NAMES}


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download  # here, because most runs load from a folder

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(HUB_PATTERNS)))
    except Exception as error:  # the hub client passes on whatever its HTTP library raises
        at = f" at revision {revision!r}" if revision else ""
        raise ModelError(
            f"{repository!r} is no local folder, and the hub did not provide it{at}: "
            f"{type(error).__name__}: {one_line(error)}"
        ) from error


def _no_revision(source: str, revision: str | None) -> None:
    if revision is not None:
        raise UsageError(f"revision {revision!r} was given, but {source!r} is not a hub id; leave the revision out")


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


# Device, dtype, memory


def _device(device: str | torch.device | None) -> torch.device:
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UsageError(f"unknown device {device!r}; expected 'cpu', 'cuda' or 'cuda:1'") from error
    if chosen.type not in ("cpu", "cuda", "meta"):
        raise UsageError(f"device {str(device)!r} is not supported; expected 'cpu', 'cuda' or 'cuda:1'")
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"device {str(device)!r} is not available: torch {torch.__version__} sees no CUDA device")
        if chosen.index is not None and chosen.index >= (count := torch.cuda.device_count()):
            raise UsageError(f"device {str(device)!r} is not available: there are {count} CUDA devices, from 'cuda:0'")
    return chosen


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        hint = _did_you_mean(dtype, DTYPES) if isinstance(dtype, str) else ""
        raise UsageError(f"unknown dtype {str(dtype)!r}.{hint} Accepted: {', '.join(DTYPES)}")
    assert isinstance(found, torch.dtype)
    return found


def _check_room(name: str, modules: Sequence[nn.Module], device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a model that does not fit on its GPU, before anything is allocated there."""
    if device.type != "cuda":
        return
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    needed = sum(t.numel() * t.element_size() for t in tensors)
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + reusable
    if needed > free:
        raise ModelError(
            f"model {name!r} needs {needed} bytes ({needed / 2**30:.1f} GiB) for its weights in {dtype}, but "
            f"{device} has {free} bytes ({free / 2**30:.1f} GiB) free; use another device or a smaller dtype"
        )


# Random weights


def _random(name: str, known: Mapping[str, Family], device: torch.device, dtype: torch.dtype) -> Model:
    shapes = {shape + _RANDOM: (f, config) for f in known.values() for shape, config in f.shapes.items()}
    if name not in shapes:
        hint = _did_you_mean(name, shapes)
        raise ModelError(f"no published shape is called {name!r}.{hint} Known: {', '.join(shapes) or 'none'}")
    family, config = shapes[name]
    spec = family.spec(config, {}, None)
    looks = family.vision(config, spec, None)
    _check_room(name, _modules(spec, looks, torch.device("meta"), dtype), device, dtype)
    modules = _modules(spec, looks, device, dtype)
    if device.type != "meta":
        for module in modules:
            module.init_random()
    return _model(name, spec, modules, None)


# The modules of a model: the transformer, and the vision part if there is one


def _modules(
    spec: ModelSpec, looks: VisionSpec | None, device: torch.device, dtype: torch.dtype
) -> list[Transformer | Vision]:
    transformer = Transformer(spec, device, dtype)
    return [transformer] if looks is None else [transformer, Vision(looks, device, dtype)]


def _parameters(modules: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Every parameter, under the names that slots use."""
    return {
        (_VISION if isinstance(module, Vision) else "") + name: parameter
        for module in modules
        for name, parameter in module.named_parameters()
    }


def _slots(family: Family, spec: ModelSpec, looks: VisionSpec | None) -> dict[str, Slot]:
    """Every tensor that a checkpoint must hold, and where it lands among `_parameters`."""
    seen = {} if looks is None else family.vision_slots(looks)
    return {**family.slots(spec), **{name: Slot(_VISION + s.parameter, s.rows) for name, s in seen.items()}}


def _model(name: str, spec: ModelSpec, modules: Sequence[Transformer | Vision], tokenizer: Tokenizer | None) -> Model:
    transformer, *others = (module.eval().requires_grad_(False) for module in modules)
    vision = others[0] if others else None
    assert isinstance(transformer, Transformer)
    assert vision is None or isinstance(vision, Vision)
    return Model(name, spec, transformer, tokenizer, vision)


# A folder


@dataclass(frozen=True)
class _Stored:
    """A tensor as the header of its file describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def _load(
    name: str, folder: Path, families: Sequence[Family], forced: bool, device: torch.device, dtype: torch.dtype
) -> Model:
    config = read_json(folder / "config.json")
    generation = read_json(folder / "generation_config.json", optional=True)
    _refuse_quantised(folder, config)
    stored = _headers(folder)
    family = families[0] if forced else _recognise(folder, families, config, stored)
    tokenizer = family.tokenizer(folder)
    try:
        spec = family.spec(config, generation, tokenizer)
        looks = family.vision(config, spec, folder)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error
    if tokenizer is not None and len(tokenizer) > spec.vocab_size:
        raise ModelError(f"{folder}: the tokenizer has {len(tokenizer)} ids, the embedding {spec.vocab_size} rows")
    slots = _slots(family, spec, looks)
    skeleton = _modules(spec, looks, torch.device("meta"), dtype)
    _check_slots(family, slots, _parameters(skeleton))
    _check_tensors(folder, family, slots, _parameters(skeleton), stored)
    _check_room(name, skeleton, device, dtype)
    modules = _modules(spec, looks, device, dtype)
    _fill(_parameters(modules), slots, stored)
    return _model(name, spec, modules, tokenizer)


def _refuse_quantised(folder: Path, config: Mapping[str, Any]) -> None:
    quantised = config.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ModelError(
            f"{folder / 'config.json'}: the checkpoint is quantised ('quantization_config', method {method!r}); "
            f"load the original {', '.join(_STORED)} weights"
        )


def _recognise(folder: Path, families: Sequence[Family], config: Mapping[str, Any], tensors: Collection[str]) -> Family:
    found = [f for f in families if f.recognises(config, tensors)]
    if len(found) == 1:
        return found[0]
    declared = " and ".join(f"{key} {config[key]!r}" for key in ("model_type", "architectures") if config.get(key))
    problem = f"{folder}: config.json declares {declared or 'neither model_type nor architectures'}; "
    if found:
        names = ", ".join(f.name for f in found)
        raise ModelError(f"{problem}more than one family recognises it: {names}. Name one with family= (--family)")
    problem += f"known families: {', '.join(f.name for f in families)}. "
    if alike := [f.name for f in families if f.recognises({}, tensors)]:
        raise ModelError(
            f"{problem}Its tensors are named like those of {', '.join(alike)}: "
            f"give family={alike[0]!r} (--family {alike[0]}) to load it all the same"
        )
    raise ModelError(
        f"{problem}A tensor is called {next(iter(tensors), None)!r}. If it is of one of them all the same, name that "
        "with family= (--family)"
    )


def _headers(folder: Path) -> dict[str, _Stored]:
    """Every tensor of a checkpoint, from the headers of its files; no weight is read."""
    if (folder / _INDEX).exists():
        return _indexed(folder)
    if (folder / _SINGLE).exists():
        return _header(folder / _SINGLE)
    if loose := sorted(file.name for file in folder.glob("*.safetensors")):
        raise ModelError(f"{folder} holds {_quoted(loose)} but neither {_SINGLE} nor {_INDEX}")
    if pickled := sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern)):
        raise ModelError(
            f"{folder} holds only pickled weights ({_quoted(pickled)}), which can run code when read; "
            "convert them to safetensors"
        )
    raise ModelError(f"{folder} holds no weights; expected {_SINGLE} or {_INDEX}")


def _header(file: Path) -> dict[str, _Stored]:
    try:
        with safe_open(file, framework="pt") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 (not a mapping)
            return {name: _Stored(file, tuple(s.get_shape()), str(s.get_dtype())) for name, s in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(_unreadable(file, error)) from error


def _unreadable(file: Path, error: Exception) -> str:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            pointer = stream.read(40).startswith(b"version https://git-lfs")
    except OSError as cause:
        return f"{file} cannot be read: {one_line(cause)}"
    advice = "it is a Git LFS pointer, not the weights" if pointer else "it is truncated or corrupt; fetch it again"
    return f"{file} ({size} bytes) is not a whole safetensors file: {one_line(error)}; {advice}"


def _indexed(folder: Path) -> dict[str, _Stored]:
    index = folder / _INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ModelError(f"{index}: 'weight_map' is not an object of tensor name to file name")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if not shard.endswith(".safetensors") or ".." in shard or any(c in shard for c in "/\\:\0"):
            raise ModelError(f"{index} names {shard!r}; expected the name of a .safetensors file in the same folder")
    if absent := [shard for shard in shards if not (folder / shard).is_file()]:
        raise ModelError(f"{folder} lacks {len(absent)} of {len(shards)} files that {_INDEX} names: {_quoted(absent)}")
    stored: dict[str, _Stored] = {}
    problems = []
    for shard in shards:
        header = _header(folder / shard)
        listed = {name for name, home in weight_map.items() if home == shard}
        if absent := sorted(listed - header.keys()):
            problems.append(f"{shard} lacks {_quoted(absent)}")
        if extra := sorted(header.keys() - listed):
            problems.append(f"{shard} holds {_quoted(extra)} without an entry")
        stored |= {name: header[name] for name in listed & header.keys()}
    if problems:
        raise ModelError(f"{index} does not describe its files: {'; '.join(problems)}")
    return stored


def _check_slots(family: Family, slots: Mapping[str, Slot], parameters: Mapping[str, Tensor]) -> None:
    """Believed of every adapter: its slots cover each parameter exactly once."""
    covered: dict[str, list[range]] = {name: [] for name in parameters}
    sizes = {name: p.shape[0] for name, p in parameters.items()}
    for tensor, slot in slots.items():
        if slot.parameter not in covered:
            raise ModelError(f"family {family.name!r} puts {tensor!r} into {slot.parameter!r}, which does not exist")
        covered[slot.parameter].append(range(*(slot.rows or slice(None)).indices(sizes[slot.parameter])))
    for name, parts in covered.items():
        rows = [row for part in sorted(parts, key=lambda r: r.start) for row in (part.start, part.stop)]
        if rows[:1] != [0] or rows[-1:] != [sizes[name]] or rows[1:-1:2] != rows[2::2]:
            raise ModelError(f"family {family.name!r} does not fill {name!r} exactly once: it fills {parts}")


def _check_tensors(
    folder: Path,
    family: Family,
    slots: Mapping[str, Slot],
    parameters: Mapping[str, Tensor],
    stored: Mapping[str, _Stored],
) -> None:
    """Name every tensor that is missing, unexpected, misshapen or of a dtype that is not a plain float."""
    shapes = {
        name: tuple((parameters[s.parameter] if s.rows is None else parameters[s.parameter][s.rows]).shape)
        for name, s in slots.items()
    }
    missing = [name for name in slots if name not in stored]
    extra = [n for n in stored if n not in slots and not any(fnmatchcase(n, pattern) for pattern in family.ignored)]
    there = [(name, stored[name]) for name in slots if name in stored]
    misshapen = [f"{n!r} is {t.shape}, expected {shapes[n]}" for n, t in there if t.shape != shapes[n]]
    mistyped = [f"{n!r} is {t.dtype}" for n, t in there if t.dtype not in _STORED]
    problems = [
        f"{len(names)} {what}: {_listed(names)}"
        for what, names in (
            ("missing", [repr(n) for n in missing]),
            ("unexpected", [repr(n) for n in extra]),
            ("misshapen", misshapen),
            (f"of a dtype other than {', '.join(_STORED)}", mistyped),
        )
        if names
    ]
    if problems:
        raise ModelError(f"{folder} does not hold the tensors of a {family.name} model: {'; '.join(problems)}")


@torch.no_grad()
def _fill(parameters: Mapping[str, Tensor], slots: Mapping[str, Slot], stored: Mapping[str, _Stored]) -> None:
    for file, names in _by_file(slots, stored):
        try:
            with safe_open(file, framework="pt") as shard:
                for name in names:
                    slot = slots[name]
                    target = parameters[slot.parameter]
                    (target if slot.rows is None else target[slot.rows]).copy_(shard.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise ModelError(_unreadable(file, error)) from error


def _by_file(slots: Mapping[str, Slot], stored: Mapping[str, _Stored]) -> Iterator[tuple[Path, list[str]]]:
    files: dict[Path, list[str]] = {}
    for name in slots:
        files.setdefault(stored[name].file, []).append(name)
    yield from files.items()


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _quoted(names: Sequence[str]) -> str:
    return _listed([repr(name) for name in names])
