"""DELLA without the election (Deep et al. 2024, 2406.11617): thinned by rank as in `della`, and summed."""

from dataclasses import dataclass

from fusion.merge.methods.base import Inputs, Merged
from fusion.merge.methods.della import Sampling, thinned
from fusion.merge.methods.sparse import in_full as in_full
from fusion.merge.methods.sparse import one_pass as one_pass
from fusion.merge.methods.sparse import scratch_bytes as scratch_bytes

NEEDS_BASE = True
COMPILED = True
REFERENCE = "Deep et al. 2024, arXiv 2406.11617"


@dataclass(frozen=True)
class Parameters(Sampling):
    """As in `della`, but that weights are taken as they are unless asked otherwise."""


def merge(inputs: Inputs, parameters: Parameters) -> Merged:
    """θ₀ + scale · Σ w_k δ'_k of the thinned updates δ'."""
    return thinned(inputs, parameters, None)
