"""Model Breadcrumbs (Davari & Belilovsky 2023, 2312.06795): neither the smallest changes nor the outliers; and sum.

Of n elements of a tensor, in ascending order of |δ| with equals by position, the int(gamma × n) at the end go, and then
from the beginning until int(density × n) are left. Where fewer than that would be left without the outliers, so many
fewer of these go. The paper gives the two quantiles of |δ| between which elements stay: here 1 − gamma − density and
1 − gamma. The defaults are those that mergekit's manual advises. mergekit keeps nothing at all where gamma comes to no
element (a slice that ends at −0); here only small ones go then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from fusion.merge.lazy import torch
from fusion.merge.methods.base import Block, Inputs, Merged, Range
from fusion.merge.methods.magnitude import between, largest
from fusion.merge.methods.sparse import Election, Weighing, put_together, restoring

NEEDS_BASE = True
COMPILED = True
REFERENCE = "Davari & Belilovsky 2023, arXiv 2312.06795"


@dataclass(frozen=True)
class Parameters(Weighing):
    """`density`: the share of elements that stay. `gamma`: the share that goes for being too large.

    `rescale`: `norm` gives the update of each tensor its L1 norm back.
    """

    density: Annotated[tuple[float, ...], Range(0, 1, open_low=True)] = (0.9,)
    gamma: Annotated[tuple[float, ...], Range(0, 1, open_high=True)] = (0.01,)
    rescale: Literal["none", "norm"] = "none"


def merge(inputs: Inputs, parameters: Parameters) -> Merged:
    """θ₀ + scale · Σ w_k δ'_k of the masked updates δ'."""
    return masked(inputs, parameters, None)


def masked(inputs: Inputs, parameters: Parameters, election: Election | None) -> Merged:
    """The merge of masked updates, with or without an election."""
    stay = [int(density * inputs.numel) for density in parameters.density]
    tops = [int(gamma * inputs.numel) for gamma in parameters.gamma]
    tops = [min(top, inputs.numel - left) for top, left in zip(tops, stay, strict=True)]
    reach = [top + left for top, left in zip(tops, stay, strict=True)]
    keep, drop = largest(inputs, [reach, tops], ties="last")

    def kept(block: Block) -> np.ndarray | torch.Tensor:
        return between(block, keep, drop)

    scales = restoring(inputs, kept) if parameters.rescale == "norm" else None
    return put_together(inputs, kept, parameters, election, scales)
