"""Files of dcache's own: written as a whole or not at all, and the folder for what can be made again."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

FOLDER_VARIABLE = "DCACHE_CACHE_DIR"


def cache_folder() -> Path:
    """$DCACHE_CACHE_DIR, or dcache's part of the user's cache folder. It need not exist."""
    if given := os.environ.get(FOLDER_VARIABLE):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "dcache"


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, and its folder if there is none: at any moment it holds what it held before, or all of `data`.

    Raises:
        OSError: the file is as it was.
    """
    path = Path(os.path.realpath(path))  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
