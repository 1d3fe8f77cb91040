"""DARE (Yu et al. 2023, 2311.03099): drop elements of each update by chance, scale what stays, and sum.

Each element of each model stays with probability `density`, whatever the others do. `rescale`: `paper` divides what
stays by the density, so that its expectation is the update; `norm` gives the update of each tensor its L1 norm back
(mergekit's); `none` leaves it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from fusion.merge.methods.base import Inputs, Merged, Range
from fusion.merge.methods.sparse import Election, Remembered, Weighing, drawn, put_together, restoring
from fusion.merge.methods.sparse import in_full as in_full
from fusion.merge.methods.sparse import one_pass as one_pass
from fusion.merge.methods.sparse import scratch_bytes as scratch_bytes

NEEDS_BASE = True
COMPILED = True
REFERENCE = "Yu et al. 2023, arXiv 2311.03099"


@dataclass(frozen=True)
class Parameters(Weighing):
    """`density`: the chance of each element to stay. `rescale`: what makes up for those that go."""

    density: Annotated[tuple[float, ...], Range(0, 1, open_low=True)] = (0.5,)
    rescale: Literal["paper", "norm", "none"] = "paper"


def merge(inputs: Inputs, parameters: Parameters) -> Merged:
    """θ₀ + scale · Σ w_k δ'_k of the thinned and rescaled updates δ'."""
    return thinned(inputs, parameters, None)


def thinned(inputs: Inputs, parameters: Parameters, election: Election | None) -> Merged:
    """The merge of updates that are thinned by chance, with or without an election."""
    kept = drawn(inputs, parameters.density)
    scales = [1 / density if parameters.rescale == "paper" else 1.0 for density in parameters.density]
    if parameters.rescale == "norm":
        kept = Remembered(kept)
        scales = restoring(inputs, kept)
    return put_together(inputs, kept, parameters, election, scales)
