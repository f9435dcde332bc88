"""Pillow where it is installed, and the image files that a prompt names."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from dcache.errors import UsageError

PLACEHOLDER = "<image>"


def pillow() -> Any:
    """The module ``PIL.Image``; imported here alone, because text needs no Pillow."""
    try:
        from PIL import Image
    except ImportError:
        raise UsageError("images need Pillow: pip install 'dcache[vision]'") from None
    return Image


@dataclass(frozen=True)
class ImageFiles(Sequence[Any]):
    """Image files, each checked when the list is made and read anew whenever it is taken out.

    A folder of photographs would not fit into memory as pixels, so the list holds paths.

    Args:
        paths: files in any format that Pillow reads.
        where: begins every message: the file and line that name the images.
    """

    paths: tuple[Path, ...]
    where: str

    def __post_init__(self) -> None:
        for path in self.paths:
            _open(path, self.where, pixels=False)

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [_open(path, self.where, pixels=True) for path in self.paths[index]]
        return _open(self.paths[index], self.where, pixels=True)


def _open(path: Path, where: str, pixels: bool) -> Any:
    """The image, its pixels decoded if asked for and its file closed; as it is stored, in its own mode."""
    image = pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", image.DecompressionBombWarning)
            with image.open(path) as found:
                if pixels:
                    found.load()
                return found
    except FileNotFoundError:
        raise UsageError(f"{where}: image {path}: no such file; a path is relative to the file of prompts") from None
    except (image.DecompressionBombError, image.DecompressionBombWarning):
        raise UsageError(
            f"{where}: image {path}: more than {image.MAX_IMAGE_PIXELS:,} pixels, Pillow's limit; make it smaller"
        ) from None
    except image.UnidentifiedImageError:
        raise UsageError(f"{where}: image {path}: not an image in a format that Pillow knows") from None
    except Exception as error:  # on damaged files decoders raise OSError, SyntaxError, struct.error and more
        raise UsageError(f"{where}: image {path}: cannot be read: {error}") from error
