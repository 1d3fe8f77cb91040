"""TIES (Yadav et al. 2023, 2306.01708): keep the largest elements, elect a sign, merge those that have it.

Trim keeps of each model the elements of largest |δ|: by `tensor` the k = int(density × number of elements) largest of
each, the first ones of equals (mergekit's definition); by `model` one threshold over all its tensors, the k-th largest
of all, and whatever reaches it stays. That is the paper's trim; the authors' code keeps one element more, k + 1. Elect
takes the sign of Σ w_k δ_k, 0 counting as +; the authors' code gives a sum of 0 the sign that most elements of the
model have. What is left is averaged over the models that have a part in it; with one weight for all this is the paper's
disjoint mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from fusion.merge.lazy import torch
from fusion.merge.methods.base import Block, Inputs, Merged, Range
from fusion.merge.methods.magnitude import NONE, between, largest, spread
from fusion.merge.methods.select import Cut, bucket, from_bits
from fusion.merge.methods.sparse import Weighing, put_together, restoring

NEEDS_BASE = True
COMPILED = True
SURVEYED = ("trim", "density")
REFERENCE = "Yadav et al. 2023, arXiv 2306.01708"

# The bits of a magnitude, by which the survey closes in on a threshold, so many a round from the top: little is kept
# of a tensor, for a survey keeps it for all tensors.
_WIDTHS = 11, 10, 10


@dataclass(frozen=True)
class Parameters(Weighing):
    """`density`: the share of each model's elements that trim keeps, the largest of a `tensor` or of the `model`.

    `election`: by the `sum` of weighted updates or the `count` of their signs. `rescale`: `norm` gives each trimmed
    update its L1 norm back.
    """

    normalize: bool = True
    density: Annotated[tuple[float, ...], Range(0, 1, open_low=True)] = (0.2,)
    trim: Literal["tensor", "model"] = "tensor"
    election: Literal["sum", "count"] = "sum"
    rescale: Literal["none", "norm"] = "none"


@dataclass(frozen=True)
class Search:
    """How far the survey is: the upper bits of each model's threshold, and how many of what has them are to be kept."""

    round: int
    prefix: tuple[int, ...]
    left: tuple[int, ...]


def merge(inputs: Inputs, parameters: Parameters) -> Merged:
    """θ₀ + scale · Σ w_k δ_k / Σ w_k over the models whose trimmed update has the elected sign."""
    if parameters.trim == "model":
        cuts = [Cut(threshold, 0, inputs.numel - 1) for threshold in inputs.surveyed]
    else:
        (cuts,) = largest(inputs, [[int(density * inputs.numel) for density in parameters.density]])

    def kept(block: Block) -> np.ndarray | torch.Tensor:
        return between(block, cuts)

    scales = restoring(inputs, kept) if parameters.rescale == "norm" else None
    return put_together(inputs, kept, parameters, parameters.election, scales)


def surveys(parameters: Parameters) -> bool:
    """A threshold over all tensors is asked for."""
    return parameters.trim == "model"


def survey(inputs: Inputs, parameters: Parameters, state: Search | None) -> np.ndarray:
    """How often each value of the next bits occurs in this tensor, (K, values), in the smallest type that holds it."""
    now = state or Search(0, (0,) * inputs.models, ())
    counts, _ = spread(inputs, now.prefix, sum(_WIDTHS[now.round + 1 :]), _WIDTHS[now.round])
    return counts.astype(np.min_scalar_type(int(counts.max())))


def conclude(
    parameters: Parameters, state: Search | None, found: Mapping[str, np.ndarray]
) -> tuple[Search | list[float], bool]:
    """The search closed in by the next bits; after the last ones the threshold of each model, and False."""
    counts = sum(table.astype(np.int64) for table in found.values())
    assert isinstance(counts, np.ndarray)
    if state is None:
        wanted = [int(density * row.sum()) for density, row in zip(parameters.density, counts, strict=True)]
        state = Search(0, (0,) * len(wanted), tuple(wanted))
    prefix, left = [], []
    for row, above, needed in zip(counts, state.prefix, state.left, strict=True):
        place, needed = bucket(row, needed) if needed else (0, 0)
        prefix.append(above << _WIDTHS[state.round] | place)
        left.append(needed)
    if state.round + 1 < len(_WIDTHS):
        return Search(state.round + 1, tuple(prefix), tuple(left)), True
    return [from_bits(bits) if needed else NONE for bits, needed in zip(prefix, left, strict=True)], False
