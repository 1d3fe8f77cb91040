"""DELLA (Deep et al. 2024, 2406.11617): elements go by chance, small ones rather than large ones; then as in TIES.

MAGPRUNE ranks the |δ| of each row of a model, r = 0 … n − 1, equal ones by position, and keeps an element with the
probability p = density − epsilon + 2 · epsilon · r / (n − 1): from density − epsilon for the smallest to density +
epsilon for the largest. These are mergekit's ends and its epsilon; the paper's ε is the whole width, 2 · epsilon, and
its steps are ε / n. A row is a stretch of the last dimension, and a vector is one row; the only element of its row has
p = density. `rescale`: `paper` divides what stays by its own p, so that its expectation is the update; `norm` gives the
update of each tensor its L1 norm back (mergekit's); `none` leaves it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from fusion.merge.lazy import draws, torch
from fusion.merge.methods.base import Block, Inputs, Merged, Range
from fusion.merge.methods.sparse import (
    DRAWS,
    Election,
    Factors,
    Remembered,
    Weighing,
    keys,
    numbers,
    put_together,
    restoring,
)
from fusion.merge.methods.sparse import in_full as in_full
from fusion.merge.methods.sparse import one_pass as one_pass
from fusion.merge.methods.sparse import scratch_bytes as scratch_bytes

NEEDS_BASE = True
COMPILED = True
REFERENCE = "Deep et al. 2024, arXiv 2406.11617"


@dataclass(frozen=True)
class Sampling(Weighing):
    """`density`: the mean chance of an element to stay; at 1 all do. `epsilon`: how far the chances lie around it."""

    density: Annotated[tuple[float, ...], Range(0, 1, open_low=True)] = (0.5,)
    epsilon: Annotated[tuple[float, ...], Range(0, 0.5, open_high=True)] = (0.15,)
    rescale: Literal["paper", "norm", "none"] = "paper"

    def __post_init__(self) -> None:
        for density, epsilon in zip(self.density, self.epsilon, strict=True):
            if density < 1 and epsilon >= min(density, 1 - density):
                raise ValueError(
                    f"density = {density:g} with epsilon = {epsilon:g} gives probabilities from "
                    f"{density - epsilon:g} to {density + epsilon:g}, which must lie between 0 and 1; "
                    f"give an epsilon below {min(density, 1 - density):g}"
                )


@dataclass(frozen=True)
class Parameters(Sampling):
    """The weights of the models that have the elected sign are normalized unless asked otherwise."""

    normalize: bool = True


def merge(inputs: Inputs, parameters: Parameters) -> Merged:
    """θ₀ + scale · Σ w_k δ'_k / Σ w_k over the models whose thinned update δ' has the elected sign."""
    return thinned(inputs, parameters, "sum")


def thinned(inputs: Inputs, parameters: Sampling, election: Election | None) -> Merged:
    """The merge of updates thinned by rank, with or without an election."""
    factors, scales = sampled(inputs, parameters), None
    if parameters.rescale == "norm":
        factors = Remembered(factors)  # ranking twice would cost more
        scales = restoring(inputs, factors, rows=True)
    return put_together(inputs, factors, parameters, election, scales, rows=True)


def sampled(inputs: Inputs, parameters: Sampling) -> Factors:
    """What stays, or where rescale is `paper` 1/p for that and else 0; for blocks of whole rows."""
    least, steps = np.empty(inputs.models), np.empty(inputs.models)
    for k, (density, epsilon) in enumerate(zip(parameters.density, parameters.epsilon, strict=True)):
        spread = 0.0 if density >= 1 or inputs.row == 1 else epsilon
        least[k], steps[k] = density - spread, 2 * spread / max(1, inputs.row - 1)
    own, inverse = keys(inputs), parameters.rescale == "paper"

    def factors(block: Block) -> np.ndarray | torch.Tensor:
        if not block.on_cpu:
            return _sampled(block.deltas, inputs.row, block.start, own, least, steps, inverse)
        out = np.empty((block.count, block.size), block.array.dtype if inverse else np.bool_)
        draws.sample(block.array, inputs.row, block.start, own, least, steps, inverse, out)
        return out

    return factors


def _sampled(
    deltas_KB: torch.Tensor,
    row: int,
    start: int,
    own: np.ndarray,
    least: np.ndarray,
    steps: np.ndarray,
    inverse: bool,
) -> torch.Tensor:
    """The same in torch's operators."""
    count, size = deltas_KB.shape
    sizes = deltas_KB.abs().float().view(count, -1, row)
    order = sizes.argsort(dim=2, stable=True)
    places = torch.arange(row, device=deltas_KB.device).expand_as(order)
    ranks = torch.empty_like(order).scatter_(2, order, places).view(count, size)
    first, step = (torch.from_numpy(of).to(deltas_KB.device)[:, None] for of in (least, steps))
    p = first + ranks * step
    kept = numbers(own, start, size, deltas_KB.device) < p * DRAWS
    return (kept / p).to(deltas_KB.dtype) if inverse else kept
