"""What a source said of a sample as a row of the cache, and back; docs/cache.md tells what each byte means."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusion.capture import code
from fusion.records import Heard, Sparse

_NUMBERS = ("tokens", "ends", "carries", "logp", "left", "head", "drawn")  # in the order of their raw bits
_IDS = tuple(f"ids_{n}" for n in range(code.STREAMS))
COLUMNS = (*_NUMBERS, *_IDS, "counts", "head_logp", "drawn_logp", "bits", "id_bits")
PLAIN = ("carries", "bits", "id_bits")  # too short or too even for a compressor, which takes time to begin
_MOST = 1 << 24  # the largest code of a log-probability: of one that is nought


@dataclass(frozen=True, slots=True)
class Said:
    """What a source said of one sample, before it is coded. Arrays have n rows, one a position.

    Attributes:
        id: the sample's.
        heard: ids, places, carries and log-probabilities as they are read back; its entries are not asked.
        left: float32 (n,), mass beyond the exact entries and the token that followed.
        head, head_logp: exact entries (n, K), id -1 where a row has no more.
        drawn, counts, drawn_logp: drawn ones (n, D).
    """

    id: str
    heard: Heard
    left: np.ndarray
    head: np.ndarray
    head_logp: np.ndarray
    drawn: np.ndarray
    counts: np.ndarray
    drawn_logp: np.ndarray


class Coder:
    """Rows of the cache to bytes and back.

    Args:
        order: int32, token ids, the most frequent first: an id's place is its rank, and low ranks take less room.
        temperature: of the proposal that entries were drawn from. With 1 an entry's weight is its count alone.
    """

    def __init__(self, order: np.ndarray, temperature: float = 1.0):
        self.order, self.temperature = np.ascontiguousarray(order, np.int32), temperature
        self._ranks = np.empty(len(order), dtype=np.int32)
        self._ranks[self.order] = np.arange(len(order), dtype=np.int32)

    def encode(self, said: Said) -> dict[str, Any]:
        """A row."""
        heard, tempered = said.heard, self.temperature != 1
        n, tokens = len(heard.ids), heard.ids.astype(np.int64)[:, None]
        room = said.head.size + said.drawn.size
        symbols, filled = np.empty((code.STREAMS, room), np.uint8), np.zeros(code.STREAMS, np.int64)
        bits, end = np.zeros(7 * room + 8, np.uint8), 0
        head = np.where(np.isfinite(said.head_logp), said.head, -1)
        coded = _coded(said.head_logp, code.PER_ENTRY, 255) << 20
        heads, head_logp, end = code.put_rows(self._ranks, head, coded, tokens, symbols, filled, bits, end)
        coded = _coded(said.drawn_logp, code.PER_ENTRY, 255) << 20 | said.counts.astype(np.int64) - 1
        known = np.concatenate([tokens, head], axis=1)
        draws, along, end = code.put_rows(self._ranks, said.drawn, coded, known, symbols, filled, bits, end)
        more = along & 0xFFFFF
        counts, end = code.put_counts(more[more > 0] - 1, bits, end)
        row: dict[str, Any] = {
            "id": said.id,
            "content_bytes": heard.content_bytes,
            "positions": n,
            "counts": counts,
            "head_logp": (head_logp >> 20).astype(np.uint8),
            "drawn_logp": (along >> 20).astype(np.uint8) if tempered else b"",
            "id_bits": bits[: (end + 7) // 8],
            **{name: symbols[s, : filled[s]] for s, name in enumerate(_IDS)},
        }
        left = np.log(np.maximum(said.left, 1e-30)) if said.head.shape[1] else np.zeros(0)
        numbers = {
            "tokens": self._ranks[heard.ids].astype(np.int64),
            "ends": _steps(heard.boundary),
            "carries": _runs(heard.carries),
            "logp": _coded(heard.logp, code.PER_POSITION, _MOST),
            "left": _coded(left, code.PER_POSITION, _MOST),
            "head": heads if heads.any() else heads[:0],
            "drawn": draws if draws.any() else draws[:0],
        }
        bits, end = np.zeros(4 * sum(map(len, numbers.values())) + 8, np.uint8), 0
        for name, values in numbers.items():
            row[name], end = code.put_all(values, bits, end)
        row["bits"] = bits[: (end + 7) // 8]
        return {k: v.tobytes() if isinstance(v, np.ndarray) else v for k, v in row.items()}

    def decode(self, row: Mapping[str, Any]) -> Heard:
        """What `encode` was given, entries and log-probabilities as exactly as they are kept.

        Args:
            row: the columns; of those of bytes, uint8 arrays.
        """
        at, n = 0, {}
        for name in _NUMBERS:
            n[name], at = code.get_all(row[name], row["bits"], at)
        for name in ("head", "drawn"):
            n[name] = n[name] if len(n[name]) else np.zeros(len(n["tokens"]), np.int64)
        _check(row, n, at)
        tokens, logp = self.order[n["tokens"]], _plain(n["logp"], code.PER_POSITION)
        left = np.exp(_plain(n["left"], code.PER_POSITION)) if len(n["left"]) else -np.expm1(logp)
        symbols = np.concatenate([row[name] for name in _IDS])
        ends = np.cumsum([0, *(len(row[name]) for name in _IDS)])
        heads = ends[:-1].copy()
        head, _, at = code.get_rows(self.order, n["head"], symbols, heads, row["id_bits"], 0)
        drawn, more, at = code.get_rows(self.order, n["drawn"], symbols, heads, row["id_bits"], at)
        if not np.array_equal(heads, ends[1:]):
            raise IndexError("streams of ids end too soon or too late")
        counts = 1 + more.astype(np.int64)
        counts[more > 0] += code.get_counts(row["counts"], int(more.sum()), row["id_bits"], at)[0]
        weights = counts.astype(np.float64)
        if self.temperature != 1:
            weights = weights * np.exp(_plain(row["drawn_logp"], code.PER_ENTRY) * (1 - self.temperature))
        exact = (n["head"], head, np.exp(_plain(row["head_logp"], code.PER_ENTRY)))
        *entries, grain = code.together(tokens, logp, left, exact, (n["drawn"], drawn, counts, weights))
        return Heard(
            tokens,
            _places(n["ends"]),
            np.repeat(n["carries"][::2], n["carries"][1::2]).astype(np.uint8),
            logp.astype(np.float32),
            Sparse(*entries),
            row["content_bytes"],
            grain if len(drawn) else None,
        )


def _coded(logp: np.ndarray, unit: int, most: int) -> np.ndarray:
    """Log-probabilities as whole numbers, by their square root: the likely ones exactly, and none out of range."""
    return np.minimum(np.rint(np.sqrt(np.maximum(-logp.astype(np.float64), 0)) * unit), most).astype(np.int64)


def _plain(coded: np.ndarray, unit: int) -> np.ndarray:
    return -np.square(coded.astype(np.float64) / unit)


def _check(row: Mapping[str, Any], n: Mapping[str, np.ndarray], bits: int) -> None:
    """Streams of a row fit each other: compiled code does not look."""
    positions, heads, draws = len(n["tokens"]), int(n["head"].sum()), int(n["drawn"].sum())
    sizes = [len(n[name]) for name in ("ends", "logp", "head", "drawn")]
    fits = sizes == [positions] * 4 and len(n["left"]) in (0, positions) and bits <= 8 * len(row["bits"])
    fits &= int(n["carries"][1::2].sum()) == positions and len(n["carries"]) % 2 == 0
    fits &= len(row["head_logp"]) == heads and len(row["drawn_logp"]) in (0, draws)
    fits &= sum(len(row[name]) for name in _IDS) == heads + draws
    if not fits:
        raise IndexError("columns do not fit each other")


def _runs(values: np.ndarray) -> np.ndarray:
    """Each value and how often it stands there in a row, one after the other."""
    starts = np.flatnonzero(np.diff(values.astype(np.int64), prepend=-1))
    return np.stack([values[starts], np.diff(starts, append=len(values))], axis=1).astype(np.int64).ravel()


def _steps(places: np.ndarray) -> np.ndarray:
    """0 where a position stands at no place, else 1 + how far it is from the place before (the first one from 0)."""
    stands = np.flatnonzero(places >= 0)
    steps = np.zeros(len(places), dtype=np.int64)
    steps[stands] = np.diff(places[stands], prepend=0) + 1
    return steps


def _places(steps: np.ndarray) -> np.ndarray:
    return np.where(steps > 0, np.cumsum(np.maximum(steps - 1, 0)), -1)
