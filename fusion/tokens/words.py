"""Token strings as published alignment code compares them: pieces of the vocabulary, with a mark for a space."""

from typing import Any

import numpy as np

from fusion.tokens.bytes import ByteTable, Kind


def token_strings(tokenizer: Any, table: ByteTable) -> list[str | None]:
    """The vocabulary's string of each id, None for control and unused ids."""
    text = np.isin(table.kinds, (Kind.TEXT, Kind.BYTE)).tolist()
    strings = tokenizer.convert_ids_to_tokens(list(range(len(table))))
    return [string if spelled else None for string, spelled in zip(strings, text, strict=True)]


def space_mark(strings: list[str | None], table: ByteTable) -> str:
    """What stands for a space at the beginning of token strings (`▁`, `Ġ`), empty where nothing does."""
    for string, piece in zip(strings, table.pieces, strict=True):
        word = piece[1:]
        if string and piece.startswith(b" ") and word.isalpha() and string.endswith(word.decode("ascii", "replace")):
            return string[: -len(word)]
    return ""
