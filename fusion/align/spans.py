"""Which positions of two token sequences have read the same bytes."""

import numpy as np


def shared(source: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of positions that stand at one place.

    Exact and linear in the lengths: two sorted lists are merged, nothing is compared by edit distance. Where several
    positions of one sequence stand at one place (tokens of no length between), the last one counts: it has read all.

    Args:
        source: int64 (n,), place of each source position in ascending order, -1 where it has none.
        target: int64 (m,), likewise.

    Returns:
        Indices into `source` and into `target`, of equal length, ascending.
    """
    at_source, at_target = _last_at_place(source), _last_at_place(target)
    _, i, j = np.intersect1d(source[at_source], target[at_target], assume_unique=True, return_indices=True)
    return at_source[i], at_target[j]


def _last_at_place(places: np.ndarray) -> np.ndarray:
    known = np.flatnonzero(places >= 0)
    if not len(known):
        return known
    return known[np.append(places[known][1:] != places[known][:-1], True)]
