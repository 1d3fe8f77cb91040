"""Weighted average of the models (model soups, Wortsman et al. 2022, 2203.05482): θ = Σ w_k θ_k."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fusion.merge.lazy import kernels
from fusion.merge.methods.base import Block, Inputs, Merged, Part

if TYPE_CHECKING:
    import torch

NEEDS_BASE = False
ONE_PASS = True
COMPILED = True
REFERENCE = "Wortsman et al. 2022, arXiv 2203.05482"


@dataclass(frozen=True)
class Parameters:
    """`weights` of the models; with `normalize` they are divided by their sum."""

    weights: tuple[float, ...] = (1.0,)
    normalize: bool = True

    def __post_init__(self) -> None:
        shares(self.weights, self.normalize)


def merge(inputs: Inputs, parameters: Parameters) -> Merged:
    """θ = Σ w_k θ_k; a base plays no part."""
    chosen = shares(parameters.weights, parameters.normalize)
    return Merged(chosen, lambda block: Part(averaged(chosen, block)))


def weighted_sum(weights: list[float], rows_KB: "torch.Tensor") -> "torch.Tensor":
    """Σ w_k x_k, (B,), summed in the order of the rows."""
    total = rows_KB[0] * weights[0]
    for weight, row in zip(weights[1:], rows_KB[1:], strict=True):
        total.add_(row, alpha=weight)
    return total


def averaged(weights: list[float], block: Block) -> "np.ndarray | torch.Tensor":
    """Σ w_k θ_k, (B,), summed in the order of the models."""
    if not block.on_cpu:
        return weighted_sum(weights, block.models)
    models = block.array[block.has_base : block.has_base + block.count]
    out = np.empty(block.size, models.dtype)
    kernels.weighted(models, np.array(weights, models.dtype), out)
    return out


def updated(weights: list[float], block: Block) -> "np.ndarray | torch.Tensor":
    """θ₀ + Σ w_k δ_k, (B,), summed in the order of the models."""
    if not block.on_cpu:
        return weighted_sum(weights, block.deltas).add_(block.base)
    out = np.empty(block.size, block.array.dtype)
    kernels.updated(block.array, np.array(weights, out.dtype), out)
    return out


def shares(weights: tuple[float, ...], normalize: bool) -> list[float]:
    """The weights, divided by their sum if `normalize`; ValueError where that sum is 0."""
    if not normalize:
        return list(weights)
    if _cancels(weights):
        raise ValueError(f"weights = {list(weights)} sum to 0 and cannot be normalized; set normalize: false")
    return [weight / sum(weights) for weight in weights]


def update_shares(weights: tuple[float, ...], normalize: bool) -> list[float]:
    """Those of updates: where their sum is 0 the weights as they are, as mergekit has them.

    So a recipe may give a tensor to no model, which leaves it the base's.
    """
    return shares(weights, normalize and not _cancels(weights))


def _cancels(weights: tuple[float, ...]) -> bool:
    # A sum that is only the rounding of one that cancels would blow the weights up just the same.
    return abs(sum(weights)) <= 1e-12 * sum(map(abs, weights))
