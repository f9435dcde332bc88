"""Untrusted text made safe to show in a terminal."""

import unicodedata

_HIDDEN = {0x2028, 0x2029, 0xFEFF, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}  # separators; text direction


def printable(text: str) -> str:
    """Keep newlines and tabs; write other control characters, and those that reorder text, as visible escapes."""
    return "".join(_escaped(c) if _hides(c) else c for c in text)


def _hides(char: str) -> bool:
    return char not in "\n\t" and (unicodedata.category(char) in ("Cc", "Cs") or ord(char) in _HIDDEN)


def _escaped(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
