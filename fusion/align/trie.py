"""A vocabulary as a trie over bytes: which tokens begin with what was read, and which is the longest read so far."""

from typing import NamedTuple

import numpy as np

from fusion.align.spelling import Spelling
from fusion.compiled import compiled

_EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


TOKEN, LOW, LONGER, HIGH = range(4)


class Trie(NamedTuple):
    """Nodes are the beginnings of tokens; node 0 is the empty one. Tokens are ranked by their bytes.

    Attributes:
        slots: uint64 (a power of two,), an open hash table: (node · 256 + byte) · 2³² + child.
        bits: log2 of its length.
        nodes: int32 (nodes, 4). TOKEN is the id that a node spells, -1 where it spells none, of several the preferred
            one; ranks from LOW to HIGH begin with the node, and those from LONGER on are longer than it.
        children: uint64 (nodes, 4), the bytes with which a node goes on, byte b as bit b mod 64 of word b div 64: most
            candidates end here, and one look at this spares each of them a look into the table.
        ids: int32 (ranks,), rank → token id.
        ranks: int32 (V,), token id → rank, -1 for ids that spell nothing.
    """

    slots: np.ndarray
    bits: int
    nodes: np.ndarray
    children: np.ndarray
    ids: np.ndarray
    ranks: np.ndarray


def make_trie(spelling: Spelling) -> Trie:
    """The trie of every id that spells something."""
    spelled = np.flatnonzero(spelling.lengths > 0)
    pieces = [spelling.piece(int(i)) for i in spelled]
    order = sorted(range(len(spelled)), key=lambda n: (pieces[n], spelling.kinds[spelled[n]], n))
    ids = spelled[order].astype(np.int32)
    flat = np.frombuffer(b"".join(pieces[n] for n in order), dtype=np.uint8)
    ends = np.cumsum(spelling.lengths[ids]).astype(np.int64)
    bits = max(4, int(2 * len(flat) + 2).bit_length())
    slots, nodes, children = _build(flat, np.append(0, ends), ids, bits)
    ranks = np.full(len(spelling), -1, dtype=np.int32)
    ranks[ids] = np.arange(len(ids), dtype=np.int32)
    return Trie(slots, bits, nodes, children, ids, ranks)


@compiled
def _slot(key, bits):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    return np.int64((key * _GOLDEN) >> np.uint64(64 - bits))


@compiled
def step(slots, bits, node, byte):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """The node after one more byte, -1 where no token goes on so."""
    key = np.uint64(node * 256 + byte)
    at, last = _slot(key, bits), len(slots) - 1
    while slots[at] != _EMPTY:
        if slots[at] >> np.uint64(32) == key:
            return np.int64(slots[at] & np.uint64(0xFFFFFFFF))
        at = (at + 1) & last
    return np.int64(-1)


@compiled
def walk(slots, bits, nodes, node, longest, flat, start, stop):  # type: ignore[no-untyped-def]  # pragma: no cover
    """The node after flat[start:stop] (-1: no token goes on so), and the longest token met on the way."""
    for at in range(start, stop):
        node = step(slots, bits, node, flat[at])
        if node < 0:
            break
        if nodes[node, 0] >= 0:
            longest = nodes[node, 0]
    return node, longest


@compiled
def walks(slots, bits, nodes, flat, starts, stops):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """`walk` from the root along many stretches flat[start:stop]: nodes int64 (n,), longest tokens int32 (n,)."""
    ends, found = np.empty(len(starts), dtype=np.int64), np.empty(len(starts), dtype=np.int32)
    for n in range(len(starts)):
        ends[n], found[n] = walk(slots, bits, nodes, np.int64(0), np.int32(-1), flat, starts[n], stops[n])
    return ends, found


@compiled
def _build(flat, offsets, ids, bits):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    slots = np.full(1 << bits, _EMPTY, dtype=np.uint64)
    nodes = np.zeros((len(flat) + 1, 4), dtype=np.int32)
    children = np.zeros((len(flat) + 1, 4), dtype=np.uint64)
    nodes[:, 0] = -1
    nodes[0, 3] = len(ids)
    last, filled = (1 << bits) - 1, 1
    for rank in range(len(ids)):
        node = np.int64(0)
        for at in range(offsets[rank], offsets[rank + 1]):
            key = np.uint64(node * 256 + flat[at])
            slot = _slot(key, bits)
            while slots[slot] != _EMPTY and slots[slot] >> np.uint64(32) != key:
                slot = (slot + 1) & last
            if slots[slot] == _EMPTY:
                slots[slot] = (key << np.uint64(32)) | np.uint64(filled)
                children[node, flat[at] >> 6] |= np.uint64(1) << np.uint64(flat[at] & 63)
                nodes[filled, 1] = rank
                nodes[filled, 2] = rank
                filled += 1
            node = np.int64(slots[slot] & np.uint64(0xFFFFFFFF))
            nodes[node, 3] = rank + 1
        if nodes[node, 0] < 0:
            nodes[node, 0] = ids[rank]
        nodes[node, 2] = rank + 1
    return slots, nodes[:filled].copy(), children[:filled].copy()
