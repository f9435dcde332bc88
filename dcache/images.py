"""Reading images with Pillow: what is checked whenever one is read, whoever reads it and words the refusal."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dcache.errors import UsageError
from dcache.models.files import one_line

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")

PLACEHOLDER = "<image>"
"""Where an image belongs in a text."""


@dataclass(frozen=True)
class Words:
    """How a reader goes on after the name of an image that it refuses.

    ``{error}`` stands for what Pillow or the system said, ``{limit}`` for the pixels that an image may have.

    Attributes:
        missing: there is no such file.
        too_large: more pixels than Pillow's limit (`Image.MAX_IMAGE_PIXELS`).
        unknown: Pillow does not recognise the format.
        unreadable: the system does not give the file out.
        damaged: the format is known, but decoding fails.
    """

    missing: str
    too_large: str
    unknown: str
    unreadable: str
    damaged: str


def pillow() -> Any:
    """The module ``PIL.Image``; imported here alone, because text needs no Pillow."""
    try:
        import PIL.Image
    except ImportError:
        raise UsageError("images need Pillow: pip install 'dcache[vision]'") from None
    return PIL.Image


def read(source: "str | PathLike[str] | Image", use: "Callable[[Image], T]", name: str, words: Words) -> T:
    """What `use` makes of an image; its file is open until then and closed after that.

    Args:
        source: a file, or a Pillow image, which may not have been decoded yet.
        use: takes the image as it is stored, in its own mode; what it decodes is covered by the checks.
        name: what the image is called in an error.
        words: the rest of the error.

    Raises:
        UsageError: if the image is missing, too large, of an unknown format, or damaged.
    """
    pil = pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # for instance on transparency, which a conversion drops
            warnings.simplefilter("error", pil.DecompressionBombWarning)
            if not isinstance(source, (str, PathLike)):
                return use(source)
            with pil.open(Path(source)) as found:
                return use(found)
    except FileNotFoundError as error:
        raise UsageError(name + words.missing) from error
    except (pil.DecompressionBombError, pil.DecompressionBombWarning) as error:
        told = words.too_large.format(error=one_line(error), limit=pil.MAX_IMAGE_PIXELS)
        raise UsageError(name + told) from error
    except pil.UnidentifiedImageError as error:
        raise UsageError(name + words.unknown) from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and others on damage
        told = words.unreadable if getattr(error, "errno", None) else words.damaged
        raise UsageError(name + told.format(error=one_line(error))) from error
