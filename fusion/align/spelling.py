"""A vocabulary's bytes as two arrays: what a map keeps of a tokenizer, and what compiled code can read."""

from dataclasses import dataclass

import numpy as np

from fusion.tokens.bytes import ByteTable, Kind


@dataclass(frozen=True)
class Spelling:
    """The bytes of every id, one after the other.

    Attributes:
        flat: uint8, all pieces joined.
        offsets: int64 (V + 1,), id i spells flat[offsets[i]:offsets[i + 1]]; nothing for control and unused ids.
        kinds: uint8 (V,), a `Kind` each.
        digest: the byte table's.
    """

    flat: np.ndarray
    offsets: np.ndarray
    kinds: np.ndarray
    digest: str

    @staticmethod
    def of(table: ByteTable) -> "Spelling":
        """What a byte table spells."""
        text = np.isin(table.kinds, (Kind.TEXT, Kind.BYTE))
        pieces = [p if spelled else b"" for p, spelled in zip(table.pieces, text.tolist(), strict=True)]
        offsets = np.cumsum([0, *(len(p) for p in pieces)], dtype=np.int64)
        return Spelling(np.frombuffer(b"".join(pieces), dtype=np.uint8), offsets, table.kinds, table.digest)

    def __len__(self) -> int:
        return len(self.kinds)

    @property
    def lengths(self) -> np.ndarray:
        """int64 (V,), bytes of each id."""
        return np.diff(self.offsets)

    def piece(self, i: int) -> bytes:
        """The bytes of one id."""
        return self.flat[self.offsets[i] : self.offsets[i + 1]].tobytes()
