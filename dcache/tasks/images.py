"""The image files that a prompt names."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from dcache.images import Words, read

if TYPE_CHECKING:
    from PIL.Image import Image

WORDS = Words(
    missing=": no such file; a path is relative to the file of prompts",
    too_large=": more than {limit:,} pixels, Pillow's limit; make it smaller",
    unknown=": not an image in a format that Pillow knows",
    unreadable=": cannot be read: {error}",
    damaged=": cannot be read: {error}",
)


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
            self._read(path, pixels=False)

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self._read(path, pixels=True) for path in self.paths[index]]
        return self._read(self.paths[index], pixels=True)

    def _read(self, path: Path, pixels: bool) -> "Image":
        """The image as it is stored, in its own mode, its pixels decoded if asked for and its file closed."""

        def loaded(image: "Image") -> "Image":
            if pixels:
                image.load()
            return image

        return read(path, loaded, f"{self.where}: image {path}", WORDS)
