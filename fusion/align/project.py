"""A source's sparse distributions in target tokens: p = q·W, collisions added, mass lost and told."""

import numpy as np
from scipy.sparse import csr_array

from fusion.records import Sparse


def project(entries: Sparse, at: np.ndarray, matrix: csr_array, k: int) -> Sparse:
    """Project some rows of sparse source distributions.

    Args:
        entries: rows over source ids.
        at: the rows that are wanted, in any order.
        matrix: (source ids, target ids), rows sum to at most 1. Ids beyond its rows (padding of an embedding) are lost.
        k: entries that a projected row keeps, the most probable ones; the others' mass is lost, never shared out.

    Returns:
        As many rows as `at` has, over target ids, most probable entry first.
    """
    whole = csr_array((entries.probs, entries.ids, entries.offsets), shape=(len(entries), _width(entries, matrix)))
    wanted = csr_array(whole[at][:, : matrix.shape[0]]) if whole.shape[1] > matrix.shape[0] else csr_array(whole[at])
    result = csr_array(wanted @ matrix)
    rows = np.repeat(np.arange(len(at)), np.diff(result.indptr))
    order = np.lexsort((result.indices, -result.data, rows))
    place = np.arange(len(order)) - result.indptr[rows[order]]
    kept = order[(place < k) & (result.data[order] > 0)]
    counts = np.bincount(rows[kept], minlength=len(at))
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    # a sum of float32 shares can pass 1 by a rounding
    return Sparse(offsets, result.indices[kept].astype(np.int32), np.minimum(result.data[kept], 1).astype(np.float32))


def _width(entries: Sparse, matrix: csr_array) -> int:
    return max(int(entries.ids.max(initial=-1)) + 1, matrix.shape[0])
