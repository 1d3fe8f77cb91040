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

Nothing here looks at the target's own next token: only at the bytes that were read, and at what the source expected.
"""

from typing import NamedTuple

import numpy as np
from numba import njit
from scipy.sparse import csr_array

from fusion.align.map import Map
from fusion.align.project import in_range, select
from fusion.align.trie import HIGH, LONGER, LOW, TOKEN, make_trie, step, walk, walks
from fusion.align.vocabulary import widest
from fusion.records import Heard, Sparse

# Inside a token: the least share of the mass that may have led there which must stand in the kept entries. With less the
# token that followed is nearly all that is known, and would be taught as sure (docs/log.md).
KNOWN = 0.2
_SETTLED = 0.01  # a row whose longer tokens hold less of it than this is not followed any further
_NEGLIGIBLE = 1e-4  # nor is mass below this
_TINY = 1e-9  # less is not written down
_STEPS = 16  # nor further steps than these


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
        self._trie = (trie.slots, trie.bits, trie.nodes, trie.ids)
        self._spread = _rows(widest(map.matrix, width), None)
        self._ranked = _rows(map.matrix, trie.ranks)
        self._first = _rows(map.first, None)
        ends, longest = walks(*self._trie[:3], source.flat, source.offsets[:-1], source.offsets[1:])
        self._whole = (ends, longest, _open(ends, self._ranked, trie.nodes))
        size = len(map.target)
        self._bag = (np.zeros(size), np.zeros(size, dtype=np.int32))

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
            ValueError: the source read a token that the map does not know. (Entries beyond the vocabulary, the padding
                of an embedding, are mass lost.)
        """
        entries = heard.entries
        in_range(heard.ids, len(self.map.source))
        in_range(entries.ids)
        offsets, ids, probs = _follow(
            (heard.ids, heard.boundary, np.exp(heard.logp.astype(np.float64))),
            (entries.offsets, entries.ids, entries.probs),
            (places, keep),
            (self.map.source.flat, self.map.source.offsets),
            self._spread,
            self._ranked,
            self._first,
            self._trie,
            self._whole,
            self._bag,
            self.known if self.inside else np.inf,
            k,
        )
        counts = np.diff(offsets)
        rows = np.flatnonzero(counts > 0)
        return rows, Sparse(np.append(0, np.cumsum(counts[rows])), ids, probs)


def _rows(matrix: csr_array, ranks: np.ndarray | None) -> _Rows:
    """A matrix's rows, columns in the order of their ranks where these are given; ids that spell nothing left out."""
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    columns = matrix.indices if ranks is None else ranks[matrix.indices]
    kept = np.flatnonzero((columns >= 0) & (matrix.data > 0))
    kept = kept[np.lexsort((columns[kept], rows[kept]))]
    starts = np.append(0, np.cumsum(np.bincount(rows[kept], minlength=matrix.shape[0]))).astype(np.int64)
    values = matrix.data[kept].astype(np.float64)
    return _Rows(starts, columns[kept].astype(np.int32), values, np.append(0.0, np.cumsum(values)))


# ---------------------------------------------------------------- compiled
# Arrays go one by one and not as records: a record is copied at every call that is not inlined.


@njit(cache=True, inline="always")
def _put(mass, used, size, i, share):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    if mass[i] == 0.0:
        used[size] = i
        size += 1
    mass[i] += share
    return size


@njit(cache=True, inline="always")
def _put_row(mass, used, size, starts, columns, values, row, share):  # type: ignore[no-untyped-def]  # pragma: no cover
    for at in range(starts[row], starts[row + 1]):
        size = _put(mass, used, size, columns[at], share * values[at])
    return size


@njit(cache=True, inline="always")
def _first_at(columns, low, high, rank):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Where among columns[low:high] the ranks from `rank` on begin."""
    while low < high:
        middle = (low + high) // 2
        if columns[middle] < rank:
            low = middle + 1
        else:
            high = middle
    return low


@njit(cache=True)
def _settle(mass, used, size, share, node, longest, row, rs, rc, rv, rr, fs, fc, fv, nodes, ids):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Give out a share whose bytes are at `node` (-1: no token goes on so; `longest` is the longest that was read).

    Tokens that go on beyond these bytes, or are these bytes, as W's row has them (rs, rc, rv, rr); else the longest
    token read, as the target cuts such a beginning (fs, fc, fv).
    """
    if share < _TINY:
        return size
    if node >= 0 and row >= 0:
        start = _first_at(rc, rs[row], rs[row + 1], nodes[node, LOW])
        stop = _first_at(rc, start, rs[row + 1], nodes[node, HIGH])
        whole = rr[stop] - rr[start]
        if stop > start:
            for at in range(start, stop):
                size = _put(mass, used, size, ids[rc[at]], share * rv[at] / whole)
            return size
    if longest >= 0:
        if fs[longest + 1] > fs[longest]:
            size = _put_row(mass, used, size, fs, fc, fv, longest, share)
        else:
            size = _put(mass, used, size, longest, share)
    return size


@njit(cache=True)
def _goes_on(node, row, rs, rc, rr, nodes):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Whether the target's token may well be longer than what is read."""
    if nodes[node, HIGH] <= nodes[node, LONGER]:
        return False
    if row >= 0:
        start = _first_at(rc, rs[row], rs[row + 1], nodes[node, LOW])
        exact = _first_at(rc, start, rs[row + 1], nodes[node, LONGER])
        stop = _first_at(rc, exact, rs[row + 1], nodes[node, HIGH])
        if stop > start:
            return rr[stop] - rr[exact] > _SETTLED * (rr[stop] - rr[start])
    return True


@njit(cache=True)
def _open(ends, ranked, nodes):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """For each source token whether the target's may well be longer; bool (V,)."""
    rs, rc, _, rr = ranked
    found = np.zeros(len(ends), dtype=np.bool_)
    for t in range(len(ends)):
        found[t] = ends[t] >= 0 and _goes_on(ends[t], t, rs, rc, rr, nodes)
    return found


@njit(cache=True, nogil=True)
def _follow(heard, entries, wanted, spelled, spread, ranked, first, trie, whole, bag, least, k):  # type: ignore[no-untyped-def]  # pragma: no cover
    tokens, places, follows = heard
    offsets, kept_ids, probs = entries
    targets, keep = wanted
    flat, ends = spelled
    ss, sc, sv, _ = spread
    rs, rc, rv, rr = ranked
    fs, fc, fv, _ = first
    slots, bits, nodes, ids = trie
    whole_node, whole_longest, opens = whole
    mass, used = bag
    known_ids = len(ends) - 1
    out_offsets = np.zeros(len(targets) + 1, dtype=np.int64)
    out_ids = np.empty(32 * len(targets) + 16, dtype=np.int32)
    out_probs = np.empty(len(out_ids), dtype=np.float32)
    at, ahead, filled = -1, 0, 0
    for n in range(len(targets)):
        out_offsets[n + 1] = filled
        if targets[n] < 0:
            continue
        while ahead < len(tokens) and places[ahead] <= targets[n]:
            if places[ahead] >= 0:
                at = ahead
            ahead += 1
        if at < 0:
            continue
        read, followed, size, scale = targets[n] - places[at], tokens[at], 0, 1.0
        length, share = ends[followed + 1] - ends[followed], follows[at]
        row, node, longest = np.int64(followed), whole_node[followed], whole_longest[followed]
        going = length > 0 and opens[followed]
        if read == 0:
            for e in range(offsets[at], offsets[at + 1]):
                t = kept_ids[e]
                if t != followed and t < known_ids and probs[e] > _TINY:
                    size = _put_row(mass, used, size, ss, sc, sv, t, probs[e])
            if length == 0:
                size = _put_row(mass, used, size, ss, sc, sv, followed, share)
                share = 0.0
        elif least <= 1 and read < length and at + 1 < len(tokens) and places[at + 1] == places[at] + length:
            known, left, row = share, 1.0 - share, np.int64(-1)
            for e in range(offsets[at], offsets[at + 1]):
                t = kept_ids[e]
                if t == followed:
                    continue
                left -= probs[e]
                if t >= known_ids or ends[t + 1] - ends[t] < read:
                    continue
                agrees = True
                for b in range(read):
                    if flat[ends[t] + b] != flat[ends[followed] + b]:
                        agrees = False
                        break
                if not agrees:
                    continue
                known += probs[e]
                if ends[t + 1] - ends[t] > read:  # else the token ends here, and nobody asked what it is followed by
                    node, longest = walk(
                        slots, bits, nodes, np.int64(0), np.int32(-1), flat, ends[t] + read, ends[t + 1]
                    )
                    size = _settle(
                        mass, used, size, probs[e], node, longest, -1, rs, rc, rv, rr, fs, fc, fv, nodes, ids
                    )
            left = max(left, 0.0)
            if known < least * (known + left):
                for m in range(size):
                    mass[used[m]] = 0.0
                continue
            scale = (1.0 - left) / known  # of the mass that nobody knows, as much may have led here as of the rest
            node, longest = walk(
                slots, bits, nodes, np.int64(0), np.int32(-1), flat, ends[followed] + read, ends[followed + 1]
            )
            going = node >= 0 and nodes[node, HIGH] > nodes[node, LONGER]
        else:
            continue
        # the mass of the token that did follow, by the source's next steps
        now, steps = at, 0
        while going and steps < _STEPS and share > _NEGLIGIBLE:
            after = now + 1
            if after >= len(tokens) or places[after] < 0 or places[after] != places[now] + length:
                break
            now, followed, steps = after, tokens[after], steps + 1
            length, exact = ends[followed + 1] - ends[followed], nodes[node, TOKEN]
            rest, over = 1.0 - follows[now], 0.0
            for e in range(offsets[now], offsets[now + 1]):
                t = kept_ids[e]
                if t == followed:
                    continue
                rest -= probs[e]
                if t >= known_ids:
                    continue
                start, stop = ends[t], ends[t + 1]
                if start == stop:  # the text ends here
                    if exact >= 0:
                        over += probs[e]
                    else:
                        rest += probs[e]
                    continue
                there, met = step(slots, bits, node, flat[start]), longest
                if there < 0:  # as most do: a new word begins, the token is over
                    over += probs[e]
                    continue
                if nodes[there, TOKEN] >= 0:
                    met = nodes[there, TOKEN]
                there, met = walk(slots, bits, nodes, there, met, flat, start + 1, stop)
                size = _settle(
                    mass, used, size, share * probs[e], there, met, row, rs, rc, rv, rr, fs, fc, fv, nodes, ids
                )
            size = _settle(mass, used, size, share * over, -1, longest, row, rs, rc, rv, rr, fs, fc, fv, nodes, ids)
            size = _settle(mass, used, size, share * rest, node, longest, row, rs, rc, rv, rr, fs, fc, fv, nodes, ids)
            share *= follows[now]
            if length == 0:  # the text ended here
                node = node if exact < 0 else np.int64(-1)
                break
            node, longest = walk(slots, bits, nodes, node, longest, flat, ends[followed], ends[followed + 1])
            going = node >= 0 and _goes_on(node, row, rs, rc, rr, nodes)
        size = _settle(mass, used, size, share, node, longest, row, rs, rc, rv, rr, fs, fc, fv, nodes, ids)
        while filled + min(k, size) > len(out_ids):
            out_ids, out_probs = np.append(out_ids, out_ids), np.append(out_probs, out_probs)
        filled = select(mass, used, size, scale, k, keep[n], out_ids, out_probs, filled)
        for m in range(size):
            mass[used[m]] = 0.0
        out_offsets[n + 1] = filled
    return out_offsets, out_ids[:filled].copy(), out_probs[:filled].copy()
