"""Task arithmetic (Ilharco et al. 2022, 2212.04089): θ = θ₀ + scale · Σ w_k δ_k."""

from dataclasses import dataclass
from typing import Annotated

from fusion.merge.methods.base import Inputs, Merged, Part, Range
from fusion.merge.methods.linear import update_shares, updated

NEEDS_BASE = True
ONE_PASS = True
COMPILED = True
REFERENCE = "Ilharco et al. 2022, arXiv 2212.04089"


@dataclass(frozen=True)
class Parameters:
    """`weights` of the updates, with `normalize` divided by their sum unless it is 0; `scale` multiplies the result."""

    weights: tuple[float, ...] = (1.0,)
    scale: Annotated[float, Range()] = 1.0
    normalize: bool = False


def merge(inputs: Inputs, parameters: Parameters) -> Merged:
    """θ = θ₀ + scale · Σ w_k δ_k; the coefficients reported are scale · w_k."""
    chosen = [parameters.scale * share for share in update_shares(parameters.weights, parameters.normalize)]
    return Merged(chosen, lambda block: Part(updated(chosen, block)))
