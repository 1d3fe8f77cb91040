"""What is drawn by chance for each element of a tensor, compiled: NumPy arrays in and out.

A draw is a function of seed, tensor, model and place alone, so any block, thread or rank comes to the same. Beside each
caller stands the same in torch, for other devices and for tests.
"""

import numpy as np
from numpy.typing import NDArray

from fusion.compiled import compiled


@compiled
def _drawn(low: np.uint32, low_key: np.uint32, high: np.uint32) -> np.uint32:
    """24 bits for a place in a tensor: a hash of key and place.

    Three rounds of a 32-bit multiply and shift (C. Wellons' triple32). `low`: the lower half of the place; `high`: its
    upper half and that of the key, summed, which the caller's loop over places has made once, or else there are no
    vectors. numba widens each step to 64 bits, so each is cut back.
    """
    h = np.uint32(low ^ low_key)
    h = np.uint32(h ^ (h >> np.uint32(17)))
    h = np.uint32(h * np.uint32(0xED5AD4BB))
    h = np.uint32(h ^ (h >> np.uint32(11)))
    h = np.uint32(h + high)
    h = np.uint32(h * np.uint32(0xAC4C1B51))
    h = np.uint32(h ^ (h >> np.uint32(15)))
    h = np.uint32(h * np.uint32(0x31848BAB))
    h = np.uint32(h ^ (h >> np.uint32(14)))
    return np.uint32(h >> np.uint32(8))


@compiled
def draw(start: int, keys: NDArray, limits: NDArray, kept: NDArray) -> None:
    """Whether what is drawn for each place start, start + 1, … is below a row's limit, into `kept` (K, B) bool.

    `keys`: (K, 2) uint32, `limits`: (K,) uint32 of 2^24.
    """
    size, begin = kept.shape[1], 0
    while begin < size:
        end = _alike(start, begin, size)
        first = np.uint32(start + begin)
        for k in range(kept.shape[0]):
            row, low, limit = kept[k, begin:end], keys[k, 0], limits[k]
            high = np.uint32(keys[k, 1] + np.uint32((start + begin) >> 32))
            for i in range(end - begin):
                row[i] = _drawn(np.uint32(first + np.uint32(i)), low, high) < limit
        begin = end


@compiled
def _draws(start: int, key: NDArray, drawn: NDArray) -> None:
    """What is drawn for the places from `start` on, into `drawn` (n,) int32."""
    size, begin = drawn.shape[0], 0
    while begin < size:
        end = _alike(start, begin, size)
        first, low = np.uint32(start + begin), key[0]
        high = np.uint32(key[1] + np.uint32((start + begin) >> 32))
        row = drawn[begin:end]
        for i in range(end - begin):
            row[i] = np.int32(_drawn(np.uint32(first + np.uint32(i)), low, high))
        begin = end


@compiled
def _alike(start: int, begin: int, size: int) -> int:
    """Up to where, of `size` places from `start`, those from `begin` on share their upper half."""
    return min(size, begin + (1 << 32) - (start + begin & 0xFFFFFFFF))


@compiled
def _shortened(keys: NDArray, short: NDArray) -> int:
    """Keys (n,) uint32 as smaller numbers of the same order, 0 as 0, into `short`; how many bits these have."""
    least, most, every = np.uint32(0xFFFFFFFF), np.uint32(0), np.uint32(0)
    for i in range(keys.shape[0]):
        key = keys[i]
        every = np.uint32(every | key)
        most = max(most, key)
        least = min(least, np.uint32(key - np.uint32(1)))  # 0 becomes the largest
    if most == 0:
        short[:] = 0
        return 1
    least = np.uint32(least + np.uint32(1))
    drop = np.uint32(0)  # bits at the end that are 0 in all
    while (every >> drop) & np.uint32(1) == 0:
        drop = np.uint32(drop + np.uint32(1))
    for i in range(keys.shape[0]):
        key = keys[i]
        short[i] = np.uint32((np.uint32(key - least) >> drop) + np.uint32(1)) if key != 0 else np.uint32(0)
    bits = 1
    while ((most - least) >> drop) + 1 >> bits:
        bits += 1
    return bits


@compiled
def _ranks(keys: NDArray, short: NDArray, packed: NDArray, spare: NDArray, counts: NDArray, out: NDArray) -> None:
    """The place of each key (n,) uint32 < 2^31 in ascending order, equal ones by position, into `out` (n,) uint32.

    A radix sort. `short` (n,) uint32, `packed` and `spare` (n,) uint64, `counts` (6, 2048) uint32 are for its own use.
    """
    n = keys.shape[0]
    bits, widest = _shortened(keys, short), 6
    while widest < 11 and 1 << widest < n:  # clearing a table must not cost more than the keys
        widest += 1
    rounds = max(2, (bits + widest - 1) // widest)
    width = (bits + rounds - 1) // rounds
    size, last = 1 << width, np.uint32((1 << width) - 1)
    for r in range(rounds):
        table, shift, total = counts[r, :size], np.uint32(r * width), np.uint32(0)
        table[:] = 0
        for i in range(n):
            table[(short[i] >> shift) & last] += np.uint32(1)
        for j in range(size):
            own = table[j]
            table[j] = total
            total = np.uint32(total + own)
    table = counts[0, :size]
    for i in range(n):
        digit = short[i] & last
        place = table[digit]
        table[digit] = np.uint32(place + np.uint32(1))
        packed[place] = np.uint64(short[i] >> np.uint32(width)) << np.uint64(32) | np.uint64(i)
    for r in range(1, rounds - 1):
        table = counts[r, :size]
        for i in range(n):
            entry = packed[i]
            digit = np.uint32(entry >> np.uint64(32)) & last
            place = table[digit]
            table[digit] = np.uint32(place + np.uint32(1))
            spare[place] = (entry >> np.uint64(32 + width)) << np.uint64(32) | entry & np.uint64(0xFFFFFFFF)
        packed, spare = spare, packed
    table = counts[rounds - 1, :size]
    for i in range(n):
        entry = packed[i]
        digit = np.uint32(entry >> np.uint64(32))
        place = table[digit]
        table[digit] = np.uint32(place + np.uint32(1))
        out[np.uint32(entry)] = place


@compiled
def sample(
    values: NDArray, row: int, start: int, keys: NDArray, least: NDArray, steps: NDArray, inverse: bool, out: NDArray
) -> None:
    """Whether what is drawn is below p = least_k + rank · steps_k, or with `inverse` 1/p there and else 0, into `out`.

    `values` (R, B), the base and the models, of whole rows of `row` elements, in which |θ_k − θ₀| as float32 ranks.
    `start`, `keys`: as `draw` takes them. `least`, `steps`: (K,) float64. `out`: (K, B), bool without `inverse`.
    """
    magnitude, short, ranks = np.empty(row, np.float32), np.empty(row, np.uint32), np.empty(row, np.uint32)
    packed, spare, counts = np.empty(row, np.uint64), np.empty(row, np.uint64), np.empty((6, 2048), np.uint32)
    kind = out.dtype.type
    drawn = np.empty(row, np.int32)
    for k in range(out.shape[0]):
        first, step = least[k], steps[k]
        for begin in range(0, out.shape[1], row):
            base, those, into = (
                values[0, begin : begin + row],
                values[k + 1, begin : begin + row],
                out[k, begin : begin + row],
            )
            for i in range(row):
                magnitude[i] = np.float32(abs(those[i] - base[i]))
            _draws(start + begin, keys[k], drawn)
            _ranks(magnitude.view(np.uint32), short, packed, spare, counts, ranks)
            for i in range(row):
                p = first + np.float64(np.int32(ranks[i])) * step
                kept = np.float64(drawn[i]) < p * 16777216.0
                into[i] = kind((np.divide(1.0, p) if kept else 0.0) if inverse else kept)  # / would have a branch
