"""What a map does well and badly, by example: for a reader, not for a machine."""

from typing import Any

import numpy as np

from fusion.align.map import Map


def examples(map: Map, used: np.ndarray, count: int = 20) -> dict[str, list[dict[str, Any]]]:
    """Source tokens that matter most, by the probability that was put on them.

    Args:
        map: the pair's map.
        used: float64 (source ids,), the probability mass that each id was given on a corpus.
        count: how many of each kind.

    Returns:
        `best`: those mapped whole to one target token. `worst`: those with most mass spread over several or lost.
    """
    sizes = np.diff(map.matrix.indptr)
    largest = np.zeros(len(used))
    filled = np.flatnonzero(sizes)
    if len(filled):
        largest[filled] = np.maximum.reduceat(map.matrix.data, map.matrix.indptr[:-1][filled])
    spread = used * (1 - np.minimum(largest, 1))
    sure = np.where(largest >= 0.999, used, 0)
    return {
        kind: [
            _entry(map, int(t), float(used[t]), used.sum())
            for t in np.argsort(-weight, kind="stable")[:count]
            if weight[t] > 0
        ]
        for kind, weight in (("best", sure), ("worst", spread))
    }


def _entry(map: Map, t: int, mass: float, whole: float) -> dict[str, Any]:
    row = slice(map.matrix.indptr[t], map.matrix.indptr[t + 1])
    ids, shares = map.matrix.indices[row], map.matrix.data[row]
    order = np.argsort(-shares, kind="stable")[:5]
    return {
        "id": t,
        "token": _shown(map.source.piece(t)),
        "share of mass": round(mass / whole, 6),
        "mapped": round(float(shares.sum()), 4),
        "to": {_shown(map.target.piece(int(ids[n]))): round(float(shares[n]), 4) for n in order},
    }


def _shown(piece: bytes) -> str:
    return piece.decode(errors="backslashreplace")
