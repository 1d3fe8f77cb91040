"""Counting and cutting by magnitude, compiled: one pass over a block in place of ten. NumPy arrays in and out.

Loops are written as those of `kernels` are. Beside each caller stands the same in torch, for other devices and for
tests.
"""

import numpy as np
from numpy.typing import NDArray

from fusion.compiled import compiled

STRETCH = 1024


@compiled
def count_high(keys: NDArray, counts: NDArray) -> None:
    """Add to `counts` (R, 32769) the high 16 bits of `keys` (R, B), the bits of numbers ≥ 0; zeros come last."""
    for row in range(keys.shape[0]):
        for i in range(keys.shape[1]):
            key = keys[row, i]
            counts[row, key >> 16] += 1
            if key == 0:
                counts[row, 32768] += 1


@compiled
def count_low(keys: NDArray, high: NDArray, counts: NDArray) -> None:
    """Add to `counts` (R, 65536) the low 16 bits of the keys whose high bits are those of their row, `high` (R,)."""
    for row in range(keys.shape[0]):
        wanted = high[row]
        for i in range(keys.shape[1]):
            key = keys[row, i]
            if key >> 16 == wanted:
                counts[row, key & 0xFFFF] += 1


@compiled
def count_magnitudes(values: NDArray, prefix: NDArray, shift: int, width: int, counts: NDArray, zeros: NDArray) -> None:
    """Add to `counts` (K, 2^width) the bits from `shift` of |θ_k − θ₀| as float32 where those above are `prefix` (K,).

    `values` (R, B) begins with the base, and the models follow. `zeros` (K,) grows by how many are 0.
    """
    size, last = values.shape[1], (1 << width) - 1
    magnitude = np.empty(STRETCH, np.float32)
    bits = magnitude.view(np.int32)
    for start in range(0, size, STRETCH):
        count = min(STRETCH, size - start)
        base = values[0, start : start + count]
        for k in range(counts.shape[0]):
            row, own, wanted, still = values[k + 1, start : start + count], counts[k], prefix[k], 0
            for i in range(count):
                magnitude[i] = np.float32(abs(row[i] - base[i]))
                still += row[i] == base[i]
            zeros[k] += still
            for i in range(count):
                key = bits[i] >> shift
                if key >> width == wanted:
                    own[key & last] += 1


@compiled
def count_lows(values: NDArray, models: NDArray, high: NDArray, counts: NDArray) -> None:
    """Add to `counts` (W, 65536) the low 16 bits of |θ_k − θ₀| as float32 where the high ones are those wanted.

    For W of `models`, each with the `high` bits wanted, (W,); `values` (R, B) as above.
    """
    size = values.shape[1]
    magnitude, lows = np.empty(STRETCH, np.float32), np.empty(STRETCH + 1, np.uint16)
    bits = magnitude.view(np.int32)
    for start in range(0, size, STRETCH):
        count = min(STRETCH, size - start)
        base = values[0, start : start + count]
        for w in range(models.shape[0]):
            row, own, wanted, found = values[models[w] + 1, start : start + count], counts[w], high[w], 0
            for i in range(count):
                magnitude[i] = np.float32(abs(row[i] - base[i]))
            for i in range(count):  # gathered without a branch, which would be guessed wrongly half of the time
                key = bits[i]
                lows[found] = np.uint16(key & 0xFFFF)
                found += (key >> 16) == wanted
            for i in range(found):
                own[lows[i]] += 1


@compiled
def count_equal(values: NDArray, models: NDArray, thresholds: NDArray) -> NDArray:
    """How many |θ_k − θ₀| of W of the models are their threshold, (W,) float32; `values` (R, B) as above."""
    found = np.zeros(models.shape[0], np.int64)
    base = values[0]
    for w in range(models.shape[0]):
        row, wanted, equal = values[models[w] + 1], thresholds[w], 0
        for i in range(row.shape[0]):
            equal += np.float32(abs(row[i] - base[i])) == wanted
        found[w] = equal
    return found


@compiled
def above(values: NDArray, limits: NDArray, windows: NDArray, drop: bool, kept: NDArray) -> None:
    """Whether |θ_k − θ₀| as float32 is above a model's limit, into `kept` (K, B) bool; with `drop` taken out of it.

    `values` (R, B) begins with the base, and the models follow. `limits`: (K, 2) float32, the second one within
    the model's window, `windows` (K, 2), the first one outside.
    """
    size = values.shape[1]
    for k in range(kept.shape[0]):
        for part in range(3):
            start = 0 if part == 0 else windows[k, part - 1]
            end = size if part == 2 else windows[k, part]
            limit = limits[k, part % 2]
            base, row, into = values[0, start:end], values[k + 1, start:end], kept[k, start:end]
            if drop:
                for i in range(row.shape[0]):
                    into[i] = into[i] & (np.float32(abs(row[i] - base[i])) <= limit)
            else:
                for i in range(row.shape[0]):
                    into[i] = np.float32(abs(row[i] - base[i])) > limit
