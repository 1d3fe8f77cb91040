"""A source's sparse distributions in target tokens: p = q·W, collisions added, mass lost and told."""

import numpy as np
from scipy.sparse import csr_array

from fusion.compiled import compiled
from fusion.records import Sparse


def project(entries: Sparse, at: np.ndarray, matrix: csr_array, k: int) -> Sparse:
    """Project some rows of sparse source distributions.

    Args:
        entries: rows over source ids.
        at: the rows that are wanted, in any order.
        matrix: (source ids, target ids), rows sum to at most 1.
        k: entries that a projected row keeps, the most probable ones; the others' mass is lost, never shared out.

    Returns:
        As many rows as `at` has, over target ids; what a row sums to less than its source's is mass lost.

    Raises:
        ValueError: a negative id. (Ids beyond the map's rows, the padding of an embedding, are mass lost.)
    """
    in_range(entries.ids)
    bag = np.zeros(matrix.shape[1]), np.zeros(matrix.shape[1], dtype=np.int32)
    rows = (entries.offsets, entries.ids, entries.probs)
    return Sparse(*_project(rows, at, (matrix.indptr, matrix.indices, matrix.data), bag, k))


def mix(rows: Sparse, of: np.ndarray, weights: np.ndarray, keep: np.ndarray, width: int, k: int) -> Sparse:
    """Weighted sums of rows.

    Args:
        rows: m rows over `width` ids.
        of: int64 (m,), the row of the result that each belongs to.
        weights: float64 (m,), its weight there.
        keep: int32 (n,), an id that each of the n rows of the result keeps, -1 for none.
        k: entries that a row keeps, the most probable ones.

    Returns:
        n rows; one that nothing belongs to is empty.
    """
    order = np.argsort(of, kind="stable")
    starts = np.append(0, np.cumsum(np.bincount(of, minlength=len(keep)))).astype(np.int64)
    bag = np.zeros(width), np.zeros(width, dtype=np.int32)
    packed = (rows.offsets, rows.ids, rows.probs)
    return Sparse(*_mix(packed, order, weights[order], starts, bag, keep, k))


def in_range(ids: np.ndarray, size: int | None = None) -> None:
    """Refuse token ids below 0, and from `size` on."""
    low, high = int(ids.min(initial=0)), int(ids.max(initial=0))
    if low < 0 or (size is not None and size <= high):
        raise ValueError(
            f"token id {low if low < 0 else high} is out of range: the vocabulary has {size or 'no such'} ids"
        )


@compiled
def _project(rows, at, matrix, bag, k):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    offsets, ids, probs = rows
    indptr, columns, values = matrix
    mass, used = bag
    out_offsets = np.zeros(len(at) + 1, dtype=np.int64)
    out_ids = np.empty(16 * len(at) + 16, dtype=np.int32)
    out_probs = np.empty(len(out_ids), dtype=np.float32)
    filled, others = 0, np.empty(len(mass))
    for row in range(len(at)):
        size = 0
        for e in range(offsets[at[row]], offsets[at[row] + 1]):
            if ids[e] >= len(indptr) - 1:
                continue
            for m in range(indptr[ids[e]], indptr[ids[e] + 1]):
                share, i = probs[e] * values[m], columns[m]
                if share > 0.0:
                    if mass[i] == 0.0:
                        used[size] = i
                        size += 1
                    mass[i] += share
        while filled + min(k, size) > len(out_ids):
            out_ids, out_probs = np.append(out_ids, out_ids), np.append(out_probs, out_probs)
        filled = select(mass, used, size, 1.0, k, -1, others, out_ids, out_probs, filled)
        for n in range(size):
            mass[used[n]] = 0.0
        out_offsets[row + 1] = filled
    return out_offsets, out_ids[:filled].copy(), out_probs[:filled].copy()


@compiled
def _mix(rows, at, weights, starts, bag, keep, k):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    offsets, ids, probs = rows
    mass, used = bag
    out_offsets = np.zeros(len(starts), dtype=np.int64)
    out_ids = np.empty(16 * len(starts), dtype=np.int32)
    out_probs = np.empty(len(out_ids), dtype=np.float32)
    filled, others = 0, np.empty(len(mass))
    for row in range(len(starts) - 1):
        size = 0
        for n in range(starts[row], starts[row + 1]):
            for e in range(offsets[at[n]], offsets[at[n] + 1]):
                share, i = weights[n] * probs[e], ids[e]
                if share > 0.0:
                    if mass[i] == 0.0:
                        used[size] = i
                        size += 1
                    mass[i] += share
        while filled + min(k, size) > len(out_ids):
            out_ids, out_probs = np.append(out_ids, out_ids), np.append(out_probs, out_probs)
        filled = select(mass, used, size, 1.0, k, keep[row], others, out_ids, out_probs, filled)
        for n in range(size):
            mass[used[n]] = 0.0
        out_offsets[row + 1] = filled
    return out_offsets, out_ids[:filled].copy(), out_probs[:filled].copy()


@compiled
def select(mass, used, size, scale, k, keep, others, out_ids, out_probs, filled):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Write the k largest of a row behind the rows already written, `keep` among them; of equals the first met.

    Returns how much is filled then, at most k more. A sum of float32 shares can pass 1 by a rounding: each entry is
    held to it. `others` is scratch of at least `size` cells.
    """
    held = keep >= 0 and mass[keep] > 0.0
    border, equals = -1.0, 0
    if size > k:
        room, count = k - held, 0
        for n in range(size):
            if not (held and used[n] == keep):
                others[count] = mass[used[n]]
                count += 1
        border = _largest(others, count, room) if room > 0 else np.inf
        equals = room
        for n in range(count):
            equals -= others[n] > border
    for n in range(size):
        value = mass[used[n]]
        if not (held and used[n] == keep) and value <= border:
            if value < border or equals == 0:
                continue
            equals -= 1
        out_ids[filled] = used[n]
        out_probs[filled] = min(value * scale, 1.0)
        filled += 1
    return filled


@compiled
def _largest(values, count, k):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """The k-th largest of the first `count` values, by Hoare's selection; the values change places."""
    low, high, wanted = 0, count - 1, k - 1
    while low < high:
        pivot = values[(low + high) // 2]
        a, b = low, high
        while a <= b:
            while values[a] > pivot:
                a += 1
            while values[b] < pivot:
                b -= 1
            if a <= b:
                values[a], values[b] = values[b], values[a]
                a += 1
                b -= 1
        if wanted <= b:
            high = b
        elif wanted >= a:
            low = a
        else:
            break
    return values[wanted]
