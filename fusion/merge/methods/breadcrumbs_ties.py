"""Model Breadcrumbs with TIES (Davari & Belilovsky 2023, 2312.06795): masked as in `breadcrumbs`, merged as in TIES."""

from fusion.merge.methods.base import Inputs, Merged
from fusion.merge.methods.breadcrumbs import Parameters as Parameters
from fusion.merge.methods.breadcrumbs import masked

NEEDS_BASE = True
COMPILED = True
REFERENCE = "Davari & Belilovsky 2023, arXiv 2312.06795"


def merge(inputs: Inputs, parameters: Parameters) -> Merged:
    """θ₀ + scale · Σ w_k δ'_k over the models whose masked update has the elected sign; see `sparse.put_together`."""
    return masked(inputs, parameters, "sum")
