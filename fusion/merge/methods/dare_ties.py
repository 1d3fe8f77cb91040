"""DARE with TIES (Yu et al. 2023, 2311.03099): thinned by chance as in `dare_linear`, merged as in TIES."""

from fusion.merge.methods.base import Inputs, Merged
from fusion.merge.methods.dare_linear import Parameters as Parameters
from fusion.merge.methods.dare_linear import thinned
from fusion.merge.methods.sparse import in_full as in_full
from fusion.merge.methods.sparse import one_pass as one_pass
from fusion.merge.methods.sparse import scratch_bytes as scratch_bytes

NEEDS_BASE = True
COMPILED = True
REFERENCE = "Yu et al. 2023, arXiv 2311.03099"


def merge(inputs: Inputs, parameters: Parameters) -> Merged:
    """θ₀ + scale · Σ w_k δ'_k over the models whose thinned update has the elected sign; see `sparse.put_together`."""
    return thinned(inputs, parameters, "sum")
