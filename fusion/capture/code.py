"""Numbers as bytes: small ones short, and what one source said of one sample as streams of them and back.

A number v is a symbol, a byte, and some raw bits. Below 16 the symbol is v. Above, with e = ⌊log2 v⌋, it is
16 + 8 (e - 4) + the three bits after v's first, and the e - 3 bits after those follow in the stream of bits, least
significant first. Symbols of one kind stand together, so that zstd's Huffman tables fit them; the raw bits are as good
as even, so nothing is lost by not coding them. docs/cache.md tells it for readers.

Compiled functions take arrays one by one, as those of align do: a record would be copied at each call.
"""

import numpy as np

from fusion.compiled import compiled

PER_POSITION = 1024  # log-probabilities of tokens that followed, and of mass left: (code / 1024)² nats
PER_ENTRY = 48  # of entries: (code / 48)² nats, in a byte
STREAMS = 7  # of distances between ids
FAR_SYMBOL, FAR = 127, 15 << 14  # of a distance that is as long or longer: 32 raw bits


@compiled
def put(value, symbols, filled, bits, at):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Write one number; returns how many bits stand in the stream of bits then. `bits` is clean beyond `at`."""
    if value < 16:
        symbols[filled] = value
        return at
    e = 4
    while value >> (e + 1):
        e += 1
    symbols[filled] = 16 + (e - 4) * 8 + ((value >> (e - 3)) & 7)
    for n in range(e - 3):
        bits[(at + n) >> 3] |= ((value >> n) & 1) << ((at + n) & 7)
    return at + e - 3


@compiled
def get(symbol, bits, at):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """The number of a symbol whose raw bits begin at `at`, and where the next ones begin."""
    if symbol < 16:
        return np.int64(symbol), at
    wide = ((symbol - 16) >> 3) + 1
    first, last = at >> 3, (at + wide - 1) >> 3
    if last >= len(bits):
        raise IndexError
    window = np.int64(0)
    for n in range(last, first - 1, -1):  # a byte at a time: as many as the bits lie in
        window = (window << 8) | bits[n]
    raw = (window >> (at & 7)) & ((1 << wide) - 1)
    return (np.int64(8 | ((symbol - 16) & 7)) << wide) | raw, at + wide


@compiled
def put_all(values, bits, at):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Symbols of some numbers, and where the stream of bits ends then."""
    symbols = np.empty(len(values), dtype=np.uint8)
    for n in range(len(values)):
        at = put(values[n], symbols, n, bits, at)
    return symbols, at


@compiled
def get_all(symbols, bits, at):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """The inverse of `put_all`."""
    values = np.empty(len(symbols), dtype=np.int64)
    for n in range(len(symbols)):
        values[n], at = get(symbols[n], bits, at)
    return values, at


@compiled
def stream_of(rank):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Which of the streams of ids a distance from this rank goes to: near the common ids distances are short."""
    stream, value = 0, (rank + 2) >> 2
    while value > 0 and stream < STREAMS - 1:
        value >>= 2
        stream += 1
    return stream


@compiled
def put_rows(ranks, ids, carried, known, symbols, filled, bits, at):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Rows of distinct ids, ascending by rank, each as its distance from the one before.

    A symbol's highest bit tells whether the id was drawn more than once: mostly rare ids are not.

    Args:
        ranks: the rank of each id.
        ids: (n, K), -1 where a row has no more.
        carried: (n, K), a number below 2^31 with each id, put in the same order; its low 20 bits are how often more
            than once.
        known: (n, M), ids that are left out of their row.
        symbols, filled: (STREAMS, any) the distances' symbols, and how many each stream has; both are added to.

    Returns:
        How many each row has, the carried numbers, and where the bits end.
    """
    n, width = ids.shape
    sizes = np.zeros(n, dtype=np.int64)
    along = np.empty(n * width, dtype=np.int64)
    row = np.empty(width, dtype=np.int64)
    total = 0
    for t in range(n):
        size = 0
        for m in range(width):
            i = ids[t, m]
            if i < 0:
                continue
            out = False
            for j in range(known.shape[1]):
                out |= known[t, j] == i
            if not out:
                row[size] = (np.int64(ranks[i]) << 31) | carried[t, m]
                size += 1
        if size > 24:
            row[:size] = np.sort(row[:size])
        else:
            for m in range(1, size):
                value, back = row[m], m
                while back > 0 and row[back - 1] > value:
                    row[back] = row[back - 1]
                    back -= 1
                row[back] = value
        last = np.int64(-1)
        for m in range(size):
            rank, stream = row[m] >> 31, stream_of(last)
            step, more = rank - last - 1, (row[m] & 0xFFFFF) > 0
            if step < FAR:
                at = put(step, symbols[stream], filled[stream], bits, at)
            else:
                symbols[stream, filled[stream]] = FAR_SYMBOL
                for b in range(32):
                    bits[(at + b) >> 3] |= ((step >> b) & 1) << ((at + b) & 7)
                at += 32
            symbols[stream, filled[stream]] |= more << 7
            filled[stream] += 1
            along[total] = row[m] & 0x7FFFFFFF
            last = rank
            total += 1
        sizes[t] = size
    return sizes, along[:total].copy(), at


@compiled
def get_rows(order, sizes, symbols, heads, bits, at):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """The ids that `put_rows` wrote, by rank, whether each was drawn more than once, and where the bits end.

    Args:
        order: the id of each rank.
        symbols, heads: the streams one after the other, and where the next symbol of each stands; `heads` is moved on.

    Raises:
        IndexError: a rank is beyond the vocabulary, or a stream ends too soon.
    """
    ids, more = np.empty(sizes.sum(), dtype=np.int32), np.empty(sizes.sum(), dtype=np.uint8)
    n = 0
    for t in range(len(sizes)):
        rank = np.int64(-1)
        for _ in range(sizes[t]):
            stream = stream_of(rank)
            if heads[stream] >= len(symbols):
                raise IndexError
            symbol = symbols[heads[stream]]
            heads[stream] += 1
            step, more[n] = np.int64(0), symbol >> 7
            symbol &= 127
            if symbol != FAR_SYMBOL:
                step, at = get(symbol, bits, at)
            else:
                if at + 32 > 8 * len(bits):
                    raise IndexError
                for b in range(32):
                    step |= np.int64((bits[(at + b) >> 3] >> ((at + b) & 7)) & 1) << b
                at += 32
            rank += step + 1
            if rank >= len(order):
                raise IndexError
            ids[n] = order[rank]
            n += 1
    return ids, more, at


@compiled
def put_counts(values, bits, at):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Small numbers, two in a byte, the first in its low half; 12 to 15 mean more, of which raw bits tell how much."""
    packed = np.zeros((len(values) + 1) // 2, dtype=np.uint8)
    for n in range(len(values)):
        value, half, wide = values[n], values[n], 0
        if value >= 40:
            half, value, wide = 15, value - 40, 20
        elif value >= 24:
            half, value, wide = 14, value - 24, 4
        elif value >= 16:
            half, value, wide = 13, value - 16, 3
        elif value >= 12:
            half, value, wide = 12, value - 12, 2
        packed[n >> 1] |= half << (4 * (n & 1))
        for b in range(wide):
            bits[(at + b) >> 3] |= ((value >> b) & 1) << ((at + b) & 7)
        at += wide
    return packed, at


@compiled
def get_counts(packed, size, bits, at):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """The first `size` numbers that `put_counts` wrote, and where the bits end."""
    if len(packed) != (size + 1) // 2:
        raise IndexError
    values = np.empty(size, dtype=np.int64)
    for n in range(size):
        half = (packed[n >> 1] >> (4 * (n & 1))) & 15
        values[n], wide = half, 0
        if half == 15:
            values[n], wide = 40, 20
        elif half >= 12:
            values[n], wide = (12, 16, 24)[half - 12], half - 10
        if at + wide > 8 * len(bits):
            raise IndexError
        for b in range(wide):
            values[n] += np.int64((bits[(at + b) >> 3] >> ((at + b) & 7)) & 1) << b
        at += wide
    return values, at


@compiled
def together(tokens, logp, left, head, drawn):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Entries of all positions: the token that followed, exact ones, drawn ones.

    Exact entries are coded in a byte each and what they leave out more exactly: they share out what is known to be
    theirs. Drawn ones share out by their weights what no exact one has; where nothing was drawn that is mass left out.

    Args:
        tokens, logp: the tokens that followed and their log-probabilities.
        left: the mass that neither they nor the exact entries have.
        head, drawn: sizes, ids and weights of the two kinds of entries, with counts before the weights of drawn ones.

    Returns:
        Offsets, ids and probabilities of compressed rows, and `Heard.grain`.
    """
    head_sizes, head_ids, head_weights = head
    drawn_sizes, drawn_ids, counts, drawn_weights = drawn
    n = len(tokens)
    offsets, grain = np.zeros(n + 1, dtype=np.int64), np.zeros(n, dtype=np.float32)
    ids = np.empty(n + len(head_ids) + len(drawn_ids), dtype=np.int32)
    probs = np.empty(len(ids), dtype=np.float32)
    filled, h, d = 0, 0, 0
    for t in range(n):
        p = np.exp(logp[t])
        ids[filled], probs[filled] = tokens[t], p
        filled += 1
        total = 0.0
        for m in range(head_sizes[t]):
            total += head_weights[h + m]
        scale = max(1.0 - p - left[t], 0.0) / total if total > 0.0 else 0.0
        for _ in range(head_sizes[t]):
            ids[filled], probs[filled] = head_ids[h], head_weights[h] * scale
            filled += 1
            h += 1
        total, count = 0.0, 0
        for m in range(drawn_sizes[t]):
            total += drawn_weights[d + m]
            count += counts[d + m]
        scale = left[t] / total if total > 0.0 else 0.0
        grain[t] = left[t] / count if count > 0 else 0.0
        for _ in range(drawn_sizes[t]):
            ids[filled], probs[filled] = drawn_ids[d], drawn_weights[d] * scale
            filled += 1
            d += 1
        offsets[t + 1] = filled
    return offsets, ids, probs, grain
