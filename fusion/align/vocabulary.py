"""Maps between vocabularies: sparse matrices W (source ids × target ids) whose rows sum to at most 1."""

from collections.abc import Iterable

import numpy as np
from scipy.sparse import csr_array

from fusion.align.spelling import Spelling
from fusion.align.trie import make_trie, walks
from fusion.tokens.bytes import ByteTable, Kind


def exact(source: ByteTable, target: ByteTable) -> csr_array:
    """Each source id to the target id of the same bytes, where there is one; control ids are left empty."""
    by_bytes = _by_bytes(target)
    return _from_pairs([(t, by_bytes.get(p, -1)) for t, p in _spelled(source)], (len(source), len(target)))


def prefix(source: ByteTable, target: ByteTable) -> csr_array:
    """Each source id to the longest target token that its bytes begin with.

    Where a source token is longer than any target token, its mass goes to the token that has to come first. (By bytes
    and not by the target's encoding of them: a token may be part of a character, which no encoder takes.)
    """
    by_bytes = _by_bytes(target)
    longest = max((len(p) for p in by_bytes), default=0)
    pairs = []
    for t, piece in _spelled(source):
        heads = (piece[:n] for n in range(min(len(piece), longest), 0, -1))
        pairs.append((t, next((by_bytes[h] for h in heads if h in by_bytes), -1)))
    return _from_pairs(pairs, (len(source), len(target)))


def statistics(counts: csr_array, hard: bool, width: int) -> csr_array:
    """From how often the target's next token was s where the source's was t (FuseChat, Wan et al. 2402.16107).

    Args:
        counts: C[t, s].
        hard: each t to argmax_s C[t, s] alone; else the share C[t, s] / Σ_s C[t, s], an estimate of P(s | t).
        width: entries kept in a row; what the others had is lost, not shared out.
    """
    counts = csr_array(counts, dtype=np.float64)
    totals = np.maximum(counts.sum(axis=1), 1)
    shares = csr_array(
        (counts.data / np.repeat(totals, np.diff(counts.indptr)), counts.indices, counts.indptr), counts.shape
    )
    kept = widest(shares, 1 if hard else width)
    if hard:
        kept.data[:] = 1.0
    return kept


class PairCounts:
    """How often each (row, column) comes, in memory that does not grow with the text."""

    def __init__(self, shape: tuple[int, int]):
        self._shape, self._total = shape, csr_array(shape, dtype=np.int64)
        self._waiting: list[np.ndarray] = []
        self._size = 0

    def add(self, rows: np.ndarray, columns: np.ndarray) -> None:
        """Count some pairs, int (n,) each."""
        self._waiting.append(rows.astype(np.int64) * self._shape[1] + columns)
        self._size += len(rows)
        if self._size > 4_000_000:
            self._fold()

    def total(self) -> csr_array:
        """int64, the counts so far."""
        self._fold()
        return self._total

    def _fold(self) -> None:
        values, counts = np.unique(np.concatenate([np.zeros(0, np.int64), *self._waiting]), return_counts=True)
        at = (values // self._shape[1], values % self._shape[1])
        self._total = csr_array(self._total + csr_array((counts.astype(np.int64), at), shape=self._shape))
        self._waiting, self._size = [], 0


def count_pairs(pairs: Iterable[tuple[np.ndarray, np.ndarray]], shape: tuple[int, int]) -> csr_array:
    """How often each (source token, target token) comes together."""
    counts = PairCounts(shape)
    for t, s in pairs:
        counts.add(t, s)
    return counts.total()


def ends(counts: csr_array, source: ByteTable, target: ByteTable) -> csr_array:
    """From the counts, where a source's control token stood for a target's: the ends of texts and turns."""
    found = csr_array(counts, dtype=np.float64).tocoo()
    control = (source.kinds[found.coords[0]] == Kind.CONTROL) & (target.kinds[found.coords[1]] == Kind.CONTROL)
    kept = csr_array((found.data[control], tuple(c[control] for c in found.coords)), shape=counts.shape)
    return statistics(kept, False, counts.shape[1])


class FirstTokens:
    """Counts which token the target's text begins with where the longest token that it could begin with is another.

    A tokenizer does not always take the longest (GPT-2 leaves the last of a run of spaces to the word after it), so the
    longest is a row here, and what was taken a column.
    """

    def __init__(self, target: Spelling):
        self._trie, self._target = make_trie(target), target
        self._counts = PairCounts((len(target), len(target)))

    def add(self, ids: np.ndarray, follows: np.ndarray) -> None:
        """Count a text's tokens.

        Args:
            ids: int32 (n,), tokens one after the other.
            follows: bool (n,), whether the token before stands right before it in the text; the first one's is ignored.
        """
        sizes = self._target.lengths[ids]
        ends = np.cumsum(sizes)
        flat = self._target.flat[np.repeat(self._target.offsets[ids] - (ends - sizes), sizes) + np.arange(sizes.sum())]
        silent = sizes == 0  # an unknown character, say: what is before it and after it is not one text
        breaks = np.append(np.flatnonzero(~follows[1:] | silent[:-1] | silent[1:]), len(ids) - 1)  # ends of runs
        stops = ends[breaks[np.searchsorted(breaks, np.arange(len(ids)))]]
        _, longest = walks(self._trie.slots, self._trie.bits, self._trie.nodes, flat, ends - sizes, stops)
        known = (longest >= 0) & (sizes > 0)
        self._counts.add(longest[known], ids[known])

    def counts(self) -> csr_array:
        """int64 (target ids, target ids)."""
        return self._counts.total()


def chain(first: csr_array, *others: csr_array) -> csr_array:
    """The first map, with the rows it leaves empty taken from the next one that has them."""
    result = csr_array(first, dtype=np.float64)
    for other in others:
        empty = np.diff(result.indptr) == 0
        taken = csr_array(other, dtype=np.float64).multiply(empty[:, None])
        result = csr_array(result + taken)
    result.eliminate_zeros()
    result.sort_indices()
    return result


def pair(source_id: int | None, target_id: int | None, shape: tuple[int, int]) -> csr_array:
    """A map of one entry: the end of a text to the end of a text."""
    known = source_id is not None and target_id is not None
    return _from_pairs([(source_id, target_id)] if known else [], shape)  # type: ignore[list-item]


def widest(matrix: csr_array, width: int) -> csr_array:
    """The `width` largest entries of each row; of equal ones, that of the smaller column."""
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    order = np.lexsort((matrix.indices, -matrix.data, rows))
    place = np.arange(len(order)) - matrix.indptr[rows[order]]
    kept = np.sort(order[place < width])
    return csr_array((matrix.data[kept], (rows[kept], matrix.indices[kept])), shape=matrix.shape)


def _spelled(table: ByteTable) -> list[tuple[int, bytes]]:
    return [(i, p) for i, p in enumerate(table.pieces) if p and table.kinds[i] in (Kind.TEXT, Kind.BYTE)]


def _by_bytes(table: ByteTable) -> dict[bytes, int]:
    """Bytes → id; a text token before a byte token of the same bytes, then the smaller id."""
    found: dict[bytes, int] = {}
    for i, piece in sorted(_spelled(table), key=lambda item: (table.kinds[item[0]], item[0])):
        found.setdefault(piece, i)
    return found


def _from_pairs(pairs: list[tuple[int, int]], shape: tuple[int, int]) -> csr_array:
    kept = np.array([p for p in pairs if p[1] >= 0], dtype=np.int64).reshape(-1, 2)
    return csr_array((np.ones(len(kept)), (kept[:, 0], kept[:, 1])), shape=shape)


def identity(size: int) -> csr_array:
    """Each id to itself: two models of one vocabulary."""
    return _from_pairs([(i, i) for i in range(size)], (size, size))
