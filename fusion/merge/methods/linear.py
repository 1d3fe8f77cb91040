"""Weighted average of the models (model soups, Wortsman et al. 2022, 2203.05482): θ = Σ w_k θ_k."""

import torch
from torch import Tensor

from fusion.merge.methods.base import Merged, blocks

NEEDS_BASE = False
SCRATCH_BYTES = 0


def merge(
    base: Tensor | None, models: list[Tensor], *, weights: list[float] | None = None, normalize: bool = True
) -> Merged:
    """θ = Σ w_k θ_k. `weights` are 1/K each unless given; with `normalize` they are divided by their sum.

    The base plays no part. Raises ValueError for weights that sum to 0 where they are to be divided by that.
    """
    shares = weighting("linear", weights or [1 / len(models)] * len(models), normalize)
    factors = torch.tensor(shares, dtype=torch.float64)[:, None]
    merged = torch.empty(models[0].numel(), dtype=torch.float32)
    for place, values in blocks(models):
        merged[place] = (factors * values).sum(0)
    return Merged(merged.view(models[0].shape), shares)


def weighting(method: str, weights: list[float], normalize: bool) -> list[float]:
    """The weights, divided by their sum if `normalize`; ValueError names `method` where that sum is 0."""
    if not normalize:
        return list(weights)
    total = sum(weights)
    # A sum that is only the rounding of one that cancels would blow the weights up just the same.
    if abs(total) <= 1e-12 * sum(map(abs, weights)):
        raise ValueError(f"{method}: weights = {weights} sum to 0 and cannot be normalized; set normalize: false")
    return [weight / total for weight in weights]
