"""A source's distributions in target tokens, followed along the text: exact where two tokenizers cut it differently.

A vocabulary map W alone answers "which target token begins where the source's token t begins?" by an average over the
corpus. Three things that it averages away are known at each position of a text that the source has read (its
following steps stand in the cache), and are used here:

- The source's probability of the token that did follow is known exactly, whether it was among the kept entries or not.
- Where that token is shorter than the target's (digits apart against whole numbers), its mass is not spread by W: the
  source's next step says how it goes on, and the one after that. Each candidate there is one continuation, and the
  target token is the one that these bytes begin with, taken from W's row as far as it agrees with them.
- Where a target position lies inside the source's token (a run of spaces against single ones), the source's step before
  it still teaches: by its entries that begin with the bytes read since, as shares of their sum.

The text after a position is used, but only as the path along which the source was asked: mass is given out by what the
source said at each step of it, and never by what the target's next token is.
"""

from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array

from fusion.align.kernel import fitted, follow, opens
from fusion.align.map import Map
from fusion.align.project import in_range
from fusion.align.trie import make_trie, walks
from fusion.align.vocabulary import widest
from fusion.records import Heard, Sparse

# Inside a token: the least share of the mass that may have led there which must stand in the kept entries. With less
# the token that followed is nearly all that is known, and would be taught as sure (docs/log.md).
KNOWN = 0.2


class _Rows(NamedTuple):
    """Compressed rows; `running[n]` is the sum of the values before n."""

    starts: np.ndarray
    columns: np.ndarray
    values: np.ndarray
    running: np.ndarray


class Follower:
    """Projects what one source said of a sample.

    Args:
        map: the pair's map.
        width: entries of a row of W that a token which did not follow is spread over, the largest ones.
        inside: teach target positions inside a source's token too.
        known: where at least this share of the mass that may have led there stands in the kept entries.
    """

    def __init__(self, map: Map, width: int, inside: bool = True, known: float = KNOWN):
        self.map, self.inside, self.known = map, inside, known
        trie, source = make_trie(map.target), map.source
        self._trie = (trie.slots, trie.bits, trie.nodes, trie.children, trie.ids)
        self._spread = _largest_first(widest(map.matrix, width))
        self._ranked = _rows(map.matrix, trie.ranks)
        self._first = _rows(map.first, None)[:3]
        ends, longest = walks(*self._trie[:3], source.flat, source.offsets[:-1], source.offsets[1:])
        heads = np.full(len(source), -1, dtype=np.int16)  # each token's first byte, -1 where it spells nothing
        spelled = np.flatnonzero(source.lengths > 0)
        heads[spelled] = source.flat[source.offsets[spelled]]
        self._whole = (ends, longest, opens(ends, self._ranked, trie.nodes), heads)
        self._bags: list[tuple[np.ndarray, np.ndarray]] = []  # scratch, clean; taken and given back by each call

    def project(self, heard: Heard, places: np.ndarray, keep: np.ndarray, k: int) -> tuple[np.ndarray, Sparse]:
        """What the source says at some places.

        Args:
            heard: the source's reading of a sample.
            places: int64 (n,), ascending places of target positions, -1 where one has none.
            keep: int32 (n,), an id of each row that is kept however improbable it is: the label, whose probability is
                known.
            k: entries that a row keeps, the most probable ones; the others' mass is lost, never shared out.

        Returns:
            The rows among `places` that are taught, ascending, and as many rows over target ids.

        Raises:
            ValueError: the source read a token that the map does not know, or a probability is no number. (Entries
                beyond the vocabulary, the padding of an embedding, are mass lost.)
        """
        in_range(heard.ids, len(self.map.source))
        in_range(heard.entries.ids)
        follows = np.minimum(np.exp(heard.logp.astype(np.float64)), 1.0)
        if np.isnan(follows).any() or not (heard.entries.probs >= 0).all():
            raise ValueError("a reading has probabilities that are no numbers; capture this source again")
        # of one type each, whatever a cache gives: another type would be compiled once more
        offsets, ids, probs = (
            np.require(array, kind, ["C", "W"])
            for array, kind in (
                (heard.entries.offsets, np.int64),
                (heard.entries.ids, np.int32),
                (heard.entries.probs, np.float32),
            )
        )
        read, stood = np.require(heard.ids, np.int32, ["C", "W"]), np.require(heard.boundary, np.int64, ["C", "W"])
        grain = np.zeros(len(read)) if heard.grain is None else heard.grain.astype(np.float64)
        size = len(self.map.target)
        bag = self._bags.pop() if self._bags else (np.zeros(size, dtype=np.float32), np.zeros(size, dtype=np.int32))
        found = follow(
            (read, stood, follows, *fitted(read, follows, offsets, ids, probs), grain),
            (offsets, ids, probs),
            (np.require(places, np.int64, ["C", "W"]), np.require(keep, np.int32, ["C", "W"])),
            (self.map.source.flat, self.map.source.offsets),
            self._spread,
            self._ranked,
            self._first,
            self._trie,
            self._whole,
            bag,
            self.known if self.inside else np.inf,
            k,
        )
        self._bags.append(bag)
        counts = np.diff(found[0])
        rows = np.flatnonzero(counts > 0)
        return rows, Sparse(np.append(0, np.cumsum(counts[rows])), found[1], found[2])


def _largest_first(matrix: csr_array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A matrix's rows as starts, columns and values."""
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    order = np.lexsort((matrix.indices, -matrix.data, rows))
    return matrix.indptr.astype(np.int32), matrix.indices[order].astype(np.int32), matrix.data[order].astype(np.float32)


def _rows(matrix: csr_array, ranks: np.ndarray | None) -> _Rows:
    """A matrix's rows, columns in the order of their ranks where these are given; ids that spell nothing left out."""
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    columns = matrix.indices if ranks is None else ranks[matrix.indices]
    kept = np.flatnonzero((columns >= 0) & (matrix.data > 0))
    kept = kept[np.lexsort((columns[kept], rows[kept]))]
    starts = np.append(0, np.cumsum(np.bincount(rows[kept], minlength=matrix.shape[0]))).astype(np.int64)
    values = matrix.data[kept].astype(np.float64)
    return _Rows(starts, columns[kept].astype(np.int32), values, np.append(0.0, np.cumsum(values)))
