"""How true a source stays in a target's tokens: both its distributions measured over the very same bytes."""

from typing import NamedTuple

import numpy as np

from fusion.records import Heard, Sparse


class Compared(NamedTuple):
    """What was found at the rows that are taught, float64 (n,) or bool (n,) each.

    Attributes:
        probability: what the projected row gives to the token that follows.
        lost: mass that the row does not have.
        nats: the source's own cross-entropy over the bytes of that token, where `same`.
        same: the token begins and ends where tokens of the source do.
    """

    probability: np.ndarray
    lost: np.ndarray
    nats: np.ndarray
    same: np.ndarray


def compare(heard: Heard, places: np.ndarray, labels: np.ndarray, sizes: np.ndarray, said: Sparse) -> Compared:
    """Set projected rows beside the source's own reading.

    Args:
        heard: the source's reading.
        places: int64 (n,), where the rows stand.
        labels: int (n,), the target's token that follows each.
        sizes: int64 (n,), bytes of that token.
        said: the n rows.
    """
    of = np.repeat(np.arange(len(labels)), np.diff(said.offsets))
    right = said.ids == labels[of]
    probability = np.zeros(len(labels))
    probability[of[right]] = said.probs[right]
    standing = np.flatnonzero((heard.boundary >= 0) & (heard.carries > 0))
    stood = heard.boundary[standing]
    begin, end = (np.searchsorted(stood, at) for at in (places, places + sizes))
    last = max(len(stood) - 1, 0)
    met = [np.append(stood, -9)[np.minimum(n, last)] == at for n, at in ((begin, places), (end, places + sizes))]
    same = met[0] & met[1] & (sizes > 0)
    run = np.append(0.0, np.cumsum(-heard.logp, dtype=np.float64))
    nats = np.zeros(len(labels))
    nats[same] = run[standing[end[same]]] - run[standing[begin[same]]]
    return Compared(probability, np.maximum(1 - said.mass().astype(np.float64), 0), nats, same)
