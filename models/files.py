"""Small files of a checkpoint, read with errors that name the file."""

import json
from pathlib import Path
from typing import Any

from dcache.errors import ModelError


def read_json(file: Path, *, optional: bool = False) -> dict[str, Any]:
    """The JSON object in a file; empty if the file is absent and `optional`.

    Raises:
        ModelError: naming the file.
    """
    if optional and not file.exists():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{file} does not exist") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not readable JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file} holds a JSON {type(value).__name__}; expected an object")
    return value


def read_text(file: Path) -> str:
    """The text in a file.

    Raises:
        ModelError: naming the file.
    """
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ModelError(f"{file} does not exist") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
