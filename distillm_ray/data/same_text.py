"""Whether two texts say the same: what tokenizers and templates may change, and what not."""

from __future__ import annotations

import unicodedata


def normalized(text: str) -> str:
    """One form for texts that look the same; many tokenizers normalize to it.

    A raised or circled digit is not the digit.
    """
    if text.isascii() or unicodedata.is_normalized("NFKC", text):
        return text
    return unicodedata.normalize(
        "NFC",
        "".join(
            one if _changes(one) else unicodedata.normalize("NFKC", one)
            for one in unicodedata.normalize("NFC", text)
        ),
    )


def _changes(character: str) -> bool:
    tag, _, _ = unicodedata.decomposition(character).partition(" ")
    return tag in ("<super>", "<sub>", "<fraction>", "<circle>", "<square>")


def loses_indentation(response: str, tail: str) -> bool:
    """Whether the first line's indentation, which other lines share, is missing in `tail`."""
    first, *rest = response.lstrip("\r\n").splitlines() or [""]
    space = first[: len(first) - len(first.lstrip())]
    deep = space.strip(" ") or len(space) > 1  # one space before a word is no indentation
    shared = any(line.startswith(space) and line.strip() for line in rest)
    return bool(space and deep and shared and (space + response.strip()) not in tail)
