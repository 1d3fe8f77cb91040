"""What a map makes of a source's reading, in the way that the config names."""

from typing import Protocol

import numpy as np

from fusion.align.follow import Follower
from fusion.align.map import Map
from fusion.align.project import in_range, project
from fusion.align.published import Published
from fusion.align.spans import shared
from fusion.align.vocabulary import widest
from fusion.config import Align
from fusion.records import Heard, Sparse


class Projector(Protocol):
    """Says in target tokens what a source said of a sample."""

    def project(self, heard: Heard, places: np.ndarray, keep: np.ndarray, k: int) -> tuple[np.ndarray, Sparse]:
        """See `follow.Follower.project`."""


class Plain:
    """The map alone: p = q·W at shared places, by what the cache kept and nothing else.

    Args:
        map: the pair's map.
        width: entries of a row of W that are used, the largest ones; the others' mass is lost.
    """

    def __init__(self, map: Map, width: int):
        self.map, self._matrix = map, widest(map.matrix, width)

    def project(self, heard: Heard, places: np.ndarray, keep: np.ndarray, k: int) -> tuple[np.ndarray, Sparse]:
        """As `follow.Follower.project`; `keep` is not asked."""
        in_range(heard.ids, len(self.map.source))
        at, rows = shared(heard.boundary, places)
        said = project(heard.entries, at, self._matrix, k)
        counts = np.diff(said.offsets)
        full = counts > 0  # a row that the map loses whole teaches nothing, and must not weigh in a mean with others
        return rows[full], Sparse(np.append(0, np.cumsum(counts[full])), said.ids, said.probs)


def projector(map: Map, settings: Align) -> Projector:
    """The projector that the config names."""
    if settings.procedure != "boundaries":
        return Published(map, settings.procedure)
    if settings.follow:
        return Follower(map, settings.targets_per_token, settings.inside)
    return Plain(map, settings.targets_per_token)
