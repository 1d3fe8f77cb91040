"""Where tokens lie in the bytes of a text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from fusion.tokens.bytes import ByteTable


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids and the bytes starts[n]..ends[n] of a text that each one covers, int64; an end is -1 where unknown."""

    ids: list[int]
    starts: np.ndarray
    ends: np.ndarray
    lossy: bool = False

    def moved(self, by: int) -> "Tokens":
        """The same tokens in a text that has `by` more bytes in front."""
        starts, ends = (np.where(at >= 0, at + by, -1) for at in (self.starts, self.ends))
        return Tokens(self.ids, starts, ends, self.lossy)

    @staticmethod
    def joined(parts: Sequence["Tokens"]) -> "Tokens":
        """Several runs of tokens of one text as one."""
        empty = np.zeros(0, dtype=np.int64)
        return Tokens(
            [i for part in parts for i in part.ids],
            np.concatenate([empty, *(part.starts for part in parts)]),
            np.concatenate([empty, *(part.ends for part in parts)]),
            any(part.lossy for part in parts),
        )


def bytes_before(text: str) -> np.ndarray:
    """int64 (len(text) + 1,): how many UTF-8 bytes come before each character."""
    if text.isascii():
        return np.arange(len(text) + 1, dtype=np.int64)
    return np.fromiter(accumulate((len(c.encode()) for c in text), initial=0), dtype=np.int64, count=len(text) + 1)


def place(table: ByteTable, ids: list[int], offsets: Sequence[tuple[int, int]], text: str) -> Tokens:
    """Place the tokens of `text` in its bytes.

    Where the tokens' bytes spell the text (with or without a space put before it) the places are exact, inside
    characters too. Where they do not, the tokenizer changed the text; the same then holds of each smallest run of
    tokens that shares no character with its neighbours, and the tokens of a run that spells something else have no end.

    Args:
        offsets: the characters start..stop of `text` that each token came from.
    """
    raw = text.encode()
    if not ids:
        return Tokens([], np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), lossy=bool(raw))
    if (exact := _spelled_by(table, ids, table.join(ids), raw)) is not None:
        return Tokens(ids, *exact)
    bounds = bytes_before(text)[np.asarray(offsets, dtype=np.int64)]
    starts, ends = bounds[:, 0].copy(), np.full(len(ids), -1, dtype=np.int64)
    reached = 0
    for first, stop, low, high in _runs(bounds.tolist()):
        run = ids[first:stop]
        spelled = table.join(run)
        if low > reached and raw[low - 1 : high] == spelled:
            low -= 1  # pre-tokenizers that part words by their spaces leave those out of the offsets
        reached = high
        if (exact := _spelled_by(table, run, spelled, raw[low:high])) is not None:
            starts[first:stop], ends[first:stop] = exact[0] + low, exact[1] + low
        elif len(run) > 1 and bounds[first + 1, 0] == low and raw[low : low + 1] != b" " == table.pieces[run[0]]:
            ends[first] = low  # a mark by itself before what was changed
    return Tokens(ids, starts, ends, lossy=True)


def _spelled_by(table: ByteTable, ids: list[int], spelled: bytes, raw: bytes) -> tuple[np.ndarray, np.ndarray] | None:
    """Starts and ends in `raw` of tokens that spell it, a space put before it or not; None where they do not."""
    marked = len(spelled) - len(raw)
    if marked not in (0, 1) or spelled[marked:] != raw or (marked and spelled[:1] != b" "):
        return None
    lengths = table.lengths[ids]
    if not lengths.all():  # an unknown token stands for something
        return None
    ends = np.cumsum(lengths) - marked
    return np.concatenate([[0], ends[:-1]]), ends


def _runs(bounds: list[list[int]]) -> Iterator[tuple[int, int, int, int]]:
    """Smallest runs first..stop of tokens that share no byte with other runs, each with the bytes it covers."""
    first, (low, high) = 0, bounds[0]
    for n, (start, stop) in enumerate(bounds):
        if start >= high and n:
            yield first, n, low, high
            first, low = n, start
        high = max(high, stop)
    yield first, len(bounds), low, high
