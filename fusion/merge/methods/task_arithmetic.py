"""Task arithmetic (Ilharco et al. 2022, 2212.04089): θ = θ₀ + scale · Σ w_k δ_k."""

from typing import Annotated

import torch
from torch import Tensor

from fusion.merge.methods.base import Merged, Range, delta_blocks
from fusion.merge.methods.linear import weighting

NEEDS_BASE = True
SCRATCH_BYTES = 0


def merge(
    base: Tensor | None,
    models: list[Tensor],
    *,
    weights: list[float] | None = None,
    scale: Annotated[float, Range()] = 1.0,
    normalize: bool = False,
) -> Merged:
    """θ = θ₀ + scale · Σ w_k δ_k. `weights` are 1 each unless given.

    With `normalize` they are divided by their sum. The coefficients reported are scale · w_k. Raises
    ValueError for weights that sum to 0 with `normalize`.
    """
    assert base is not None
    shares = [scale * share for share in weighting("task_arithmetic", weights or [1.0] * len(models), normalize)]
    factors = torch.tensor(shares, dtype=torch.float64)[:, None]
    merged = torch.empty(base.numel(), dtype=torch.float32)
    for place, origin, deltas in delta_blocks(base, models):
        merged[place] = origin + (factors * deltas).sum(0)
    return Merged(merged.view(base.shape), shares)
