"""FuseLLM's and FuseChat's published procedure as a run takes it: what `paper` has, behind the contract of projectors.

FuseLLM's map is by edit distance; FuseChat's takes the target token that its path most often pairs alone with a
source's. What they have in common: tokens are paired by the cheapest path over their strings, entries are renormalised
over what the map finds, and a position without a fitting partner is taught its own token (not the one that follows) as
sure. The end of a text or turn goes to the target's, which is more than the published code has.
"""

from typing import Literal

import numpy as np

from fusion.align import paper
from fusion.align.map import Map
from fusion.align.project import in_range
from fusion.records import Heard, Sparse

# the vocabulary map of each procedure, as `align.maps` names it
MAPS: dict[str, tuple[Literal["min_edit", "hard"]]] = {"fusellm": ("min_edit",), "fusechat": ("hard",)}


class Published:
    """Projects what one source said of a sample.

    Args:
        map: the pair's map, made for a published procedure: it holds the token strings.
        method: which.
    """

    def __init__(self, map: Map, method: paper.Method):
        if map.strings is None:
            raise ValueError(f"the map holds no token strings, which {method} compares; run the align stage again")
        self.map, self._strings, self._method = map, map.strings, method
        self._mapping = np.full(len(map.source), -1, dtype=np.int64)
        best = map.matrix.tocoo()
        # of a row the largest share comes last and stays, of equals the first id
        order = np.lexsort((-best.coords[1], best.data, best.coords[0]))
        self._mapping[best.coords[0][order]] = best.coords[1][order]

    def project(self, heard: Heard, places: np.ndarray, labels: np.ndarray, k: int) -> tuple[np.ndarray, Sparse]:
        """As `follow.Follower.project`; `places` are not asked. Position 0 has read nothing and is not taught."""
        in_range(heard.ids, len(self.map.source))
        none = np.zeros(0, dtype=np.int64)
        if len(heard.ids) < 2 or len(labels) < 2:
            return none, Sparse(np.zeros(1, dtype=np.int64), none.astype(np.int32), none.astype(np.float32))
        # position n predicts token n: it has read token n - 1
        read, own = heard.ids[:-1], labels[:-1]
        first, stop = paper.pairs(self._strings, read, own, self._method)
        nearest = self._mapping if self._method == "fusellm" else None
        at = paper.taught(self._strings, read, own, first, stop, self._method, nearest)
        said = paper.first_kept(heard.entries, np.where(at >= 0, at + 1, -1), self._mapping, own)
        full = np.diff(said.offsets) > 0
        return np.flatnonzero(full) + 1, said.rows(full)


def paired(strings: paper.Strings, heard: Heard, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What FuseChat counts of a sample: source ids and target ids that its path pairs with each other alone."""
    if not len(heard.ids) or not len(labels):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    in_range(heard.ids, len(strings.source_bare))
    first, stop = paper.pairs(strings, heard.ids, labels, "fusechat")
    uses = np.zeros(len(heard.ids) + 1, dtype=np.int64)  # by how many target positions each source position is taken
    np.add.at(uses, first, 1)
    np.add.at(uses, stop, -1)
    alone = np.flatnonzero((stop - first == 1) & (np.cumsum(uses)[first] == 1))
    return heard.ids[first[alone]], labels[alone]
