"""Images in the prompt: what LLaVA's published code makes of pixels, before the transformer sees rows.

1. `Vision.tiles`: an image is fitted into the best of the published canvases, which is cut into tiles; before them goes
   the whole image squeezed into one tile. With several images each is padded to a square and gets one tile.
2. `Vision.encode`: the SigLIP tower gives every tile ``side * side`` rows, the projector brings them to `d_model`.
   Merging: the tiles of the canvas are joined to one map, its padding is cropped, a map that is too large is shrunk,
   and every line of the map ends with the newline row. The rows of the squeezed image come first.
3. `Vision.splice`: these rows take the place of `IMAGE` in the ids of a prompt.

The tower is transformers' `SiglipVisionModel`, imported when a model with a tower is built; Pillow reads the images.
Both are the extra ``dcache[vision]``. As in the published code an image is converted to RGB, whatever it was (alpha is
dropped, not blended), and the orientation that EXIF may note is not applied.
"""

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from dcache.errors import UsageError
from dcache.images import PLACEHOLDER, Words, pillow, read
from dcache.models.tokenizer import Message, Tokenizer
from dcache.reuse import ReuseCache, content_key

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE = -200  # stands for an image among ids; no vocabulary has it
_SHRINK_ABOVE = 1.1  # how much longer than allowed the sides of a map may be before it is shrunk
_CANVAS = (0, 0, 0)
_SQUARE = (127, 127, 127)
_SAMPLE = 64  # values of each parameter that tell models apart
_WORDS = Words(
    missing=" does not exist",
    too_large=" is too large to be decoded safely (PIL.Image.MAX_IMAGE_PIXELS is {limit}): {error} Scale it down, or "
    "raise that limit if you trust it",
    unknown=" is not an image in a format that Pillow reads",
    unreadable=" cannot be read: {error}",
    damaged=" is truncated or damaged: {error}",
)


@dataclass(frozen=True)
class VisionSpec:
    """Sizes and rules of a model's vision part.

    Attributes:
        image_size: side of a tile in pixels.
        patch_size: side of a patch in pixels; what is left over at the edge of a tile is cut.
        width: of the tower's residual stream.
        n_layers: of the tower, without the last one of the published tower, which is not used.
        n_heads: of the tower.
        mlp_size: of the tower.
        norm_eps: of the tower's LayerNorms.
        d_model: width of the rows that the projector makes.
        canvases: (width, height) in pixels that an image may be fitted into, multiples of `image_size`.
        max_tiles: a map of more rows than so many tiles have is shrunk.
        max_rows: longest prompt.
        stand_in: the token that stands in an image row; its embedding is never used.
        system: system turn of the published conversation.
    """

    image_size: int
    patch_size: int
    width: int
    n_layers: int
    n_heads: int
    mlp_size: int
    norm_eps: float
    d_model: int
    canvases: tuple[tuple[int, int], ...]
    max_tiles: int
    max_rows: int
    stand_in: int
    system: str

    @property
    def side(self) -> int:
        """Patches along the side of a tile."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class Tiles:
    """An image as the tower sees it.

    Attributes:
        raw: (tiles, 3, image_size, image_size) uint8: the squeezed image, then the canvas by lines.
        size: width and height of the image.
        grid: tiles across and down the canvas; None for an image that is one tile.
    """

    raw: Tensor
    size: tuple[int, int]
    grid: tuple[int, int] | None

    def pixels(self, device: torch.device | str = "cpu") -> Tensor:
        """What the tower is given: `raw` as float32 from -1 to 1, scaled on `device`.

        It is scaled in float64 first, as published, which decides the last bit.
        """
        return ((self.raw.to(device).double() * (1 / 255)).float() - 0.5) / 0.5


@dataclass(frozen=True)
class Spliced:
    """A prompt with its images in place.

    Attributes:
        tokens: the id of every row; image rows hold `VisionSpec.stand_in`.
        is_image: (rows,) bool on the CPU.
        embeddings: (image rows, d_model), in order, on the model's device.
        spans: of each image its first row and the row behind its last.
        keys: of each image what `Vision.keys` says, where the prompt was made of images.
        preamble: the ids that the conversation puts in front of every user's turn.
    """

    tokens: list[int]
    is_image: Tensor
    embeddings: Tensor
    spans: tuple[tuple[int, int], ...] = ()
    keys: tuple[str, ...] = ()
    preamble: tuple[int, ...] = ()

    def embed(self, embedding: Tensor) -> Tensor:
        """Embeddings of all rows (rows, d_model), from those of the vocabulary (vocab, d_model)."""
        device = embedding.device
        return embedding[torch.tensor(self.tokens, device=device)].masked_scatter(
            self.is_image.to(device)[:, None], self.embeddings
        )


# Reading images


def open_image(source: "str | PathLike[str] | Image | Tensor") -> "Image":
    """An RGB image of a file, a Pillow image, or a tensor (3, height, width) of uint8.

    Raises:
        UsageError: for what is no image, is damaged, or has more pixels than Pillow's limit (`Image.MAX_IMAGE_PIXELS`).
    """
    pil = pillow()
    if isinstance(source, Tensor):
        return _of_tensor(source)
    if not isinstance(source, (str, PathLike, pil.Image)):
        raise UsageError(f"an image is a {type(source).__name__}; expected a file, a Pillow image or a torch tensor")
    name = f"image {str(source)!r}" if isinstance(source, (str, PathLike)) else "the image"
    image = read(source, lambda found: found.convert("RGB"), name, _WORDS)
    if not image.width or not image.height:
        raise UsageError(f"{name} is empty: {image.width} x {image.height} pixels")
    return image


def _of_tensor(source: Tensor) -> "Image":
    if source.dtype != torch.uint8 or source.ndim != 3 or source.shape[0] != 3 or not source.numel():
        raise UsageError(
            f"an image tensor has shape {tuple(source.shape)} and dtype {source.dtype}; "
            "expected (3, height, width) of torch.uint8"
        )
    return _typed(pillow().fromarray(source.permute(1, 2, 0).cpu().contiguous().numpy()))


def _typed(image: Any) -> "Image":
    typed: Image = image
    return typed


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise UsageError(
            "transformers is needed for the vision tower; install it: pip install 'dcache[vision]'"
        ) from error


# Ids of a prompt


def image_ids(tokenizer: Tokenizer, messages: Sequence[Message], *, drop_first: bool = True) -> list[int]:
    """Ids of a conversation in which every ``<image>`` of a message is `IMAGE`.

    Args:
        tokenizer: of the model.
        messages: as for `Tokenizer.chat`; special tokens that they spell stay text.
        drop_first: drop the id behind every image where the prompt starts with the bos token, as the published helper
            does: it takes that id, usually a newline, for another bos. In training the newline was there.
    """
    first, *others = tokenizer.chat_around(messages, PLACEHOLDER)
    drop = drop_first and bool(first) and first[0] == tokenizer.special_id("bos_token")
    return [*first, *(i for chunk in others for i in (IMAGE, *chunk[drop:]))]


# Tiles


def best_canvas(size: tuple[int, int], canvases: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The canvas that keeps most pixels of an image of `size` (width, height), of these the one that wastes least."""
    width, height = size

    def merit(canvas: tuple[int, int]) -> tuple[int, int]:
        scale = min(canvas[0] / width, canvas[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas[0] * canvas[1]

    return max(canvases, key=merit)


def _fitted(image: "Image", canvas: tuple[int, int]) -> "Image":
    """The image as large as it fits, centred on a black canvas."""
    across, down = canvas[0] / image.width, canvas[1] / image.height
    if across < down:
        size = canvas[0], min(math.ceil(image.height * across), canvas[1])
    else:
        size = min(math.ceil(image.width * down), canvas[0]), canvas[1]
    return _centred(image.resize(size), canvas, _CANVAS)


def _centred(image: "Image", size: tuple[int, int], colour: tuple[int, int, int]) -> "Image":
    page = pillow().new("RGB", size, colour)
    page.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return _typed(page)


def _raw(image: "Image") -> Tensor:
    """(3, height, width) uint8."""
    raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return raw.view(image.height, image.width, 3).permute(2, 0, 1)


# The module


class Vision(nn.Module):
    """Tower, projector and the newline row.

    Args:
        spec: sizes and rules.
        device: where the parameters are created, uninitialised. "meta" allocates nothing.
        dtype: of the parameters and of the computation.

    Raises:
        UsageError: if transformers is not installed.
    """

    def __init__(self, spec: VisionSpec, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        super().__init__()
        self.spec = spec
        self.tower = _tower(spec, torch.device(device), dtype)
        self.projector = nn.Sequential(
            nn.Linear(spec.width, spec.d_model, device=device, dtype=dtype),
            nn.GELU(),
            nn.Linear(spec.d_model, spec.d_model, device=device, dtype=dtype),
        )
        self.newline = nn.Parameter(torch.empty(spec.d_model, device=device, dtype=dtype))

    @torch.no_grad()
    def init_random(self, seed: int = 0, std: float = 0.02) -> "Vision":
        """Fill the parameters in place, on their device: normal weights, biases 0, norms 1."""
        generator = torch.Generator(self.newline.device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            if "layer_norm" in name and name.endswith("weight"):
                parameter.fill_(1)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(0, std, generator=generator)
        return self

    def tiles(self, images: "Sequence[Image]") -> list[Tiles]:
        """The tiles of the images of one prompt, on the CPU: of one image by canvas, of several one tile each."""
        return [self._cut(images[0])] if len(images) == 1 else [self._squared(image) for image in images]

    def tower_rows(self, pixels: Tensor) -> Tensor:
        """Tiles through the tower: (tiles, 3, image_size, image_size) -> (tiles, side * side, width)."""
        rows: Tensor = self.tower(pixel_values=pixels.to(self.newline)).last_hidden_state
        return rows

    def encode(self, tiles: Tiles) -> Tensor:
        """The rows of one image: (rows, d_model)."""
        return self.merge(self.projector(self.tower_rows(tiles.pixels(self.newline.device))), tiles)

    def features(self, images: "Sequence[Image]") -> list[Tensor]:
        """The rows (rows, d_model) of each image of one prompt."""
        return [self.encode(tiles) for tiles in self.tiles(images)]

    def keys(self, images: Sequence[Tiles]) -> list[str]:
        """What the rows of each image follow from, as a hash: its pixels, size and grid, the rules, and the weights.

        Of the weights it is a sample of every parameter, read anew, since they may have been trained in between.
        """
        sample = torch.cat([parameter.flatten()[:_SAMPLE] for parameter in self.parameters()])
        model = content_key(self.spec, sample)
        return [content_key(model, tiles.size, tiles.grid, tiles.raw) for tiles in images]

    def recall(self, key: str, tiles: Tiles, cache: ReuseCache[Tensor] | None) -> Tensor:
        """The rows of one image, from the cache if its key is there; they go into it if not."""
        if cache is None:
            return self.encode(tiles)
        rows = cache.get(key)
        if rows is None:
            rows = self.encode(tiles)
            cache.put(key, rows, rows.nbytes)
        return rows

    def merge(self, rows: Tensor, tiles: Tiles) -> Tensor:
        """Join the projected rows (tiles, side * side, d_model) of an image to (rows, d_model)."""
        if tiles.grid is None:
            return torch.cat([rows[0], self.newline[None]])
        (across, down), side = tiles.grid, self.spec.side
        lines = rows[1:].reshape(down, across, side, side, -1)
        plane = lines.permute(4, 0, 2, 1, 3).flatten(3).flatten(1, 2)  # (d_model, down * side, across * side)
        plane = self._shrunk(_uncovered(plane, tiles.size))
        newlines = self.newline[:, None, None].expand(-1, plane.shape[1], 1)
        return torch.cat([rows[0], torch.cat([plane, newlines], dim=2).flatten(1).T])

    def splice(self, ids: Sequence[int], features: Sequence[Tensor]) -> Spliced:
        """Put the rows of each image in the place of its `IMAGE` among the ids of a prompt.

        Raises:
            UsageError: if there are more or fewer places than images, or too many rows in all.
        """
        check_count(sum(i == IMAGE for i in ids), len(features))
        rest = iter(features)
        tokens: list[int] = []
        is_image: list[bool] = []
        spans: list[tuple[int, int]] = []
        for i in ids:
            n_rows = len(next(rest)) if i == IMAGE else 1
            spans += [(len(tokens), len(tokens) + n_rows)] if i == IMAGE else []
            tokens += [self.spec.stand_in if i == IMAGE else i] * n_rows
            is_image += [i == IMAGE] * n_rows
        if len(tokens) > self.spec.max_rows:
            raise UsageError(
                f"the prompt has {len(tokens)} rows, {sum(is_image)} of them of images; the model takes "
                f"{self.spec.max_rows}. Shorten the text or give fewer images"
            )
        empty = self.newline.new_empty(0, self.spec.d_model)
        image_rows = torch.cat([empty, *features])
        return Spliced(tokens, torch.tensor(is_image, dtype=torch.bool), image_rows, tuple(spans))

    def messages(self, text: str, n_images: int) -> list[dict[str, str]]:
        """The published conversation: the system turn and a user's turn, which starts with its images.

        A text that spells ``<image>`` itself says where the images go.

        Raises:
            UsageError: if it spells more or fewer than there are images.
        """
        places = text.count(PLACEHOLDER)
        if not places and n_images:
            text = " ".join([PLACEHOLDER] * n_images) + f"\n{text}"
        else:
            check_count(places, n_images)
        return [{"role": "system", "content": self.spec.system}, {"role": "user", "content": text}]

    def _cut(self, image: "Image") -> Tiles:
        edge = self.spec.image_size
        canvas = best_canvas(image.size, self.spec.canvases)
        across, down = canvas[0] // edge, canvas[1] // edge
        plane = _raw(_fitted(image, canvas)).reshape(3, down, edge, across, edge)
        cut = plane.permute(1, 3, 0, 2, 4).flatten(0, 1)  # (tiles, 3, edge, edge), line by line
        squeezed = _raw(image.resize((edge, edge)))
        return Tiles(torch.cat([squeezed[None], cut]), image.size, (across, down))

    def _squared(self, image: "Image") -> Tiles:
        side, edge = max(image.size), self.spec.image_size
        square = _centred(image, (side, side), _SQUARE).resize((edge, edge))
        return Tiles(_raw(square)[None], image.size, None)

    def _shrunk(self, plane: Tensor) -> Tensor:
        """A map (d_model, down, across) that has too many rows, scaled down to `max_tiles` tiles."""
        down, across = plane.shape[1:]
        times = math.sqrt(down * across / (self.spec.max_tiles * self.spec.side**2))
        if times <= _SHRINK_ABOVE:
            return plane
        return interpolate(plane[None], (int(down // times), int(across // times)), mode="bilinear")[0]


def check_count(places: int, images: int) -> None:
    """Every image needs its place in the prompt."""
    if places != images:
        raise UsageError(
            f"the prompt has {places} {PLACEHOLDER} and there are {images} images; write one {PLACEHOLDER} for each, "
            "or none to put all images first"
        )


def _uncovered(plane: Tensor, size: tuple[int, int]) -> Tensor:
    """The part of a map (d_model, down, across) that an image of `size` (width, height) covers, as published."""
    (width, height), (down, across) = size, plane.shape[1:]
    if width / height > across / down:
        edge = (down - int(height * (across / width))) // 2
        return plane[:, edge : down - edge]
    edge = (across - int(width * (down / height))) // 2
    return plane[:, :, edge : across - edge]


def _tower(spec: VisionSpec, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The tower, uninitialised and without its final norm, which the published model never applies."""
    siglip = _transformers()
    config = siglip.SiglipVisionConfig(
        hidden_size=spec.width,
        intermediate_size=spec.mlp_size,
        num_hidden_layers=spec.n_layers,
        num_attention_heads=spec.n_heads,
        image_size=spec.image_size,
        patch_size=spec.patch_size,
        layer_norm_eps=spec.norm_eps,
        hidden_act="gelu_pytorch_tanh",
        vision_use_head=False,
    )
    with torch.device("meta"):  # skips the initialisation of weights that are loaded or drawn anyway
        whole = siglip.SiglipVisionModel(config)
    tower: nn.Module = getattr(whole, "vision_model", whole)  # early releases of 5.x have a wrapper around it
    tower.post_layernorm = nn.Identity()
    tower = tower.to(dtype)
    if device.type != "meta":
        tower = tower.to_empty(device=device)
        tower.get_submodule("embeddings").position_ids = torch.arange(spec.side**2, device=device)[None]
    return tower


def tower_slots(n_layers: int) -> Mapping[str, str]:
    """Parameters of the tower under their published names, without the prefix, and under the names of `Vision`."""
    leaves = ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"]
    leaves += [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")]
    modules = [f"encoder.layers.{i}.{leaf}" for i in range(n_layers) for leaf in leaves]
    names = [f"{module}.{kind}" for module in ["embeddings.patch_embedding", *modules] for kind in ("weight", "bias")]
    return {name: f"tower.{name}" for name in [*names, "embeddings.position_embedding.weight"]}
