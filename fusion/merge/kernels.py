"""What torch's operators cannot fuse, compiled: one pass over a block in place of ten. NumPy arrays in and out.

Every loop runs over elements with nothing carried from one to the next, in stretches that stay in the first cache, so
that the compiler makes vectors of it. Beside each caller stands the same in torch, for other devices and for tests.
"""

from functools import partial

import numpy as np
from numpy.typing import NDArray

from fusion.compiled import compiled

STRETCH = 1024
_INFINITE = np.uint32(0x7F800000)  # the exponent of what is not finite


@compiled
def widen(stored: NDArray, out: NDArray) -> bool:
    """bfloat16 as its bits, (B,) uint16, into `out` (B,) float32; whether all of it is finite."""
    bits, most = out.view(np.uint32), np.uint32(0)
    for i in range(stored.shape[0]):
        wide = np.uint32(stored[i]) << np.uint32(16)
        bits[i] = wide
        most = max(most, np.uint32(wide & _INFINITE))
    return bool(most < _INFINITE)


@compiled
def narrow(values: NDArray, out: NDArray) -> bool:
    """Float32 (B,) as the bits of the nearest bfloat16, of two the even one, (B,) uint16; whether all are finite."""
    bits, most = values.view(np.uint32), np.uint32(0)
    for i in range(bits.shape[0]):
        rounded = np.uint32(bits[i] + np.uint32(0x7FFF) + ((bits[i] >> np.uint32(16)) & np.uint32(1)))
        out[i] = np.uint16(rounded >> np.uint32(16))
        most = max(most, np.uint32(rounded & _INFINITE), np.uint32(bits[i] & _INFINITE))
    return bool(most < _INFINITE)


@compiled
def weighted(values: NDArray, weights: NDArray, out: NDArray) -> None:
    """Σ w_k x_k of the rows of `values` (K, B) into `out` (B,), summed in their order; `weights` (K,)."""
    for start in range(0, out.shape[0], STRETCH):
        count = min(STRETCH, out.shape[0] - start)
        row, weight, total = values[0, start : start + count], weights[0], out[start : start + count]
        for i in range(count):
            total[i] = weight * row[i]  # and not 0 + that, which would make 0 of -0
        for k in range(1, weights.shape[0]):
            row, weight = values[k, start : start + count], weights[k]
            for i in range(count):
                total[i] += weight * row[i]


@compiled
def updated(values: NDArray, weights: NDArray, out: NDArray) -> None:
    """θ₀ + Σ w_k (θ_k − θ₀) into `out` (B,), summed in order; `values` (R, B) as above, `weights` (K,)."""
    for start in range(0, out.shape[0], STRETCH):
        count = min(STRETCH, out.shape[0] - start)
        base, total = values[0, start : start + count], out[start : start + count]
        total[:] = values.dtype.type(0)
        for k in range(weights.shape[0]):
            row, weight = values[k + 1, start : start + count], weights[k]
            for i in range(count):
                total[i] += weight * (row[i] - base[i])
        for i in range(count):
            total[i] += base[i]


@compiled
def elect(values: NDArray, votes: NDArray, weights: NDArray, by_count: bool, total: NDArray, mass: NDArray) -> NDArray:
    """Σ w_k x_k and Σ w_k over the models whose sign is the elected one, into `total` and `mass`, (B,).

    `values`: (K, B); the sign of Σ votes_k x_k is elected, or with `by_count` that of Σ votes_k sign(x_k); 0 counts as
    +. A value of 0 has no sign. Gives how many values of each model were dropped for their sign.
    """
    models, size = values.shape
    dropped = np.zeros(models, np.int64)
    sums = np.empty(STRETCH, values.dtype)
    tallies = np.zeros((models, STRETCH), np.int32)
    zero = values.dtype.type(0)
    for start in range(0, size, STRETCH):
        count = min(STRETCH, size - start)
        sums[:] = zero
        for k in range(models):
            vote = votes[k]
            row = values[k, start : start + count]
            if by_count:
                for i in range(count):
                    x = row[i]
                    sums[i] += vote if x > zero else (-vote if x < zero else zero)
            else:
                for i in range(count):
                    sums[i] += vote * row[i]
        sub_total, sub_mass = total[start : start + count], mass[start : start + count]
        sub_total[:] = zero
        sub_mass[:] = zero
        for k in range(models):
            weight, lost = weights[k], tallies[k]
            row = values[k, start : start + count]
            for i in range(count):
                x = row[i]
                ours = x > zero if sums[i] >= zero else x < zero
                sub_total[i] += weight * x if ours else zero
                sub_mass[i] += weight if ours else zero
                lost[i] += x != zero and not ours
    for k in range(models):
        dropped[k] = tallies[k].sum()
    return dropped


@compiled
def spread(models: NDArray, out: NDArray) -> None:
    """The population standard deviation over K models of each element, (K, B) → `out` (B,) float32.

    That of θ_k − θ_1, so it is exactly 0 where all agree; in float64, so that elements that tie in truth do tie.
    """
    count, size = models.shape
    first = models[0]
    total, square = np.empty(STRETCH, np.float64), np.empty(STRETCH, np.float64)
    share = 1.0 / count
    for start in range(0, size, STRETCH):
        length = min(STRETCH, size - start)
        origin, part = first[start : start + length], out[start : start + length]
        total[:], square[:] = 0.0, 0.0
        for k in range(1, count):
            row = models[k, start : start + length]
            for i in range(length):
                apart = np.float64(row[i] - origin[i])
                total[i] += apart
                square[i] += apart * apart
        for i in range(length):
            mean = total[i] * share
            part[i] = np.sqrt(max(square[i] * share - mean * mean, 0.0))


@partial(compiled, reassociate=True)
def account(values: NDArray, products: NDArray) -> tuple[int, int]:
    """⟨δ_j, δ_k⟩ into `products` (K, K) float64; how many elements a model moved, and of how many two moved apart.

    `values` (R, B) begins with the base, and the models follow. For the report alone: sums are in the blocks' type.
    """
    models, size = products.shape[0], values.shape[1]
    deltas, seen = np.empty((models, STRETCH), values.dtype), np.empty(STRETCH, np.uint8)
    zero = values.dtype.type(0)
    moved, conflicts = 0, 0
    products[:] = 0.0
    for start in range(0, size, STRETCH):
        count = min(STRETCH, size - start)
        base = values[0, start : start + count]
        seen[:] = 0
        for k in range(models):
            row, delta = values[k + 1, start : start + count], deltas[k]
            for i in range(count):
                x = row[i] - base[i]
                delta[i] = x
                seen[i] |= np.uint8(x > zero) | (np.uint8(x < zero) << np.uint8(1))
        for i in range(count):
            moved += seen[i] != 0
            conflicts += seen[i] == 3
        for j in range(models):
            for k in range(j + 1):
                one, other, total = deltas[j], deltas[k], zero
                for i in range(count):
                    total += one[i] * other[i]
                products[j, k] += total
    for j in range(models):
        for k in range(j):
            products[k, j] = products[j, k]
    return moved, conflicts


@compiled
def settle(
    values: NDArray,
    factors: NDArray,
    scales: NDArray,
    weights: NDArray,
    vote: int,
    floor: float,
    scale: float,
    out: NDArray,
) -> NDArray:
    """θ₀ + `scale` times what the y_k = w_k · s_k · f_k · δ_k come to, into `out` (B,).

    `values` (R, B) begins with the base, and the models follow; factors f (K, B), `scales` s and `weights` w (K,).
    With `vote` 0 it is Σ y_k. With 1 or 2 the sum of those whose sign is that of Σ y_k, or of Σ sign(y_k): 0 counts as
    +, and a y of 0 has no sign. Unless `floor` is negative that is divided by their Σ w_k, where its size is above
    `floor`. Gives how many f_k · δ_k are not 0, and how many y_k were dropped for their sign, (2, K) int64.
    """
    models, size = factors.shape
    counts = np.zeros((2, models), np.int64)
    kind = values.dtype.type
    zero, one, least, times = kind(0), kind(1), kind(floor), kind(scale)
    y = np.empty((models, STRETCH), values.dtype)
    sums = np.empty((3, STRETCH), values.dtype)
    total, votes, mass = sums[0], sums[1], sums[2]
    tallies = np.zeros((2, models, STRETCH), np.int32)  # a count of 64 bits would halve the width of the vectors
    for start in range(0, size, STRETCH):
        count = min(STRETCH, size - start)
        origin, into = values[0, start : start + count], out[start : start + count]
        total[:], votes[:], mass[:] = zero, zero, zero
        for k in range(models):
            row, factor, own = values[k + 1, start : start + count], factors[k, start : start + count], y[k]
            by, kept = weights[k] * scales[k], tallies[0, k]
            for i in range(count):
                x = (row[i] - origin[i]) * kind(factor[i])
                kept[i] += x != zero
                x *= by
                own[i] = x
                total[i] += x
            if vote == 2:
                for i in range(count):
                    votes[i] += one if own[i] > zero else (-one if own[i] < zero else zero)
        if vote == 0:
            for i in range(count):
                into[i] = origin[i] + times * total[i]
            continue
        if vote == 1:
            votes[:] = total
        total[:] = zero
        for k in range(models):
            weight, own, lost = weights[k], y[k], tallies[1, k]
            for i in range(count):
                x = own[i] if votes[i] >= zero else -own[i]
                total[i] += x if x > zero else zero
                mass[i] += weight if x > zero else zero
                lost[i] += x < zero
        for i in range(count):
            by = mass[i] if least >= zero and abs(mass[i]) > least else one
            x = times * np.divide(total[i], by)  # unlike /, it asks for no 0, so that there is no branch
            into[i] = origin[i] + (x if votes[i] >= zero else -x)
    for k in range(models):
        counts[0, k], counts[1, k] = tallies[0, k].sum(), tallies[1, k].sum()
    return counts


@compiled
def energies(values: NDArray, mask: NDArray, energy: NDArray) -> None:
    """Σ δ_k² where `mask` (B,) bool is set, into `energy` (K,) float64; `values` (R, B): the base, and the models."""
    square = np.empty(STRETCH, np.float64)
    zero = values.dtype.type(0)
    for k in range(energy.shape[0]):
        square[:] = 0.0
        for start in range(0, mask.shape[0], STRETCH):
            count = min(STRETCH, mask.shape[0] - start)
            origin, row = values[0, start : start + count], values[k + 1, start : start + count]
            taken = mask[start : start + count]
            for i in range(count):
                x = np.float64(row[i] - origin[i] if taken[i] else zero)
                square[i] += x * x
        total = 0.0
        for i in range(STRETCH):
            total += square[i]
        energy[k] = total


@compiled
def selected(values: NDArray, mask: NDArray, out: NDArray) -> NDArray:
    """δ_k where `mask` (B,) bool is set, else 0, into `out` (K, B).

    `values` (R, B) begins with the base, and the models follow. Gives how many of each model are not 0.
    """
    models, size = out.shape
    kept = np.zeros(models, np.int64)
    zero = values.dtype.type(0)
    tally = np.empty(STRETCH, np.int32)
    for k in range(models):
        tally[:] = 0
        for start in range(0, size, STRETCH):
            count = min(STRETCH, size - start)
            origin, row = values[0, start : start + count], values[k + 1, start : start + count]
            taken, into = mask[start : start + count], out[k, start : start + count]
            for i in range(count):
                x = row[i] - origin[i] if taken[i] else zero
                into[i] = x
                tally[i] += x != zero
        kept[k] = tally.sum()
    return kept


@compiled
def norms(values: NDArray, kept: NDArray, sums: NDArray) -> None:
    """Σ |δ_k|, and Σ |δ_k| of those `kept` (K, B) bool, into `sums` (2, K) float64; `values` (R, B) as above."""
    models, size = kept.shape
    whole, left = np.empty(STRETCH, np.float64), np.empty(STRETCH, np.float64)
    for k in range(models):
        whole[:], left[:] = 0.0, 0.0
        for start in range(0, size, STRETCH):
            count = min(STRETCH, size - start)
            base, row = values[0, start : start + count], values[k + 1, start : start + count]
            taken = kept[k, start : start + count]
            for i in range(count):
                x = np.float64(abs(row[i] - base[i]))
                whole[i] += x
                left[i] += x if taken[i] else 0.0
        sums[0, k], sums[1, k] = 0.0, 0.0
        for i in range(STRETCH):
            sums[0, k] += whole[i]
            sums[1, k] += left[i]
