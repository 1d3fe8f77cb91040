"""Fisher-weighted averaging (Matena & Raffel 2021, 2111.09832): θ = Σ w_k F_k θ_k / Σ w_k F_k, element by element.

F_k is the diagonal of model k's Fisher information (`fusion.merge.collect`), so each element is taken mostly from the
models whose predictions depend on it. Where all F_k are 0, and in a tensor without statistics (a buffer, which no
gradient reaches), θ is the weighted average.

The authors' code raises the first model's F to at least 1e-6 and divides each model's F by its norm over all tensors.
Both are choices here. The floor is relative: F of language models lies orders of magnitude below 1e-6, where that
floor alone would decide, and none is needed to divide by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fusion.merge.lazy import torch
from fusion.merge.methods import linear
from fusion.merge.methods.base import Block, Inputs, Merged, Part, Range, totals

NEEDS_BASE = False
STATISTICS = "element"
SURVEYED = ("normalize_fisher",)
REFERENCE = "Matena & Raffel 2021, arXiv 2111.09832"

Coefficients = Callable[[Block], "torch.Tensor"]


@dataclass(frozen=True)
class Parameters:
    """`weights` of the models, divided by their sum.

    `floor`: the least F of a model's elements, as a share of its mean over the tensor (the authors' preference for one
    model, a floor for it alone, is a list such as [1e-6, 0]). `normalize_fisher`: F_k is divided by its L2 norm over
    all tensors, so that no model wins by the size of its gradients alone.
    """

    weights: Annotated[tuple[float, ...], Range(0)] = (1.0,)
    floor: Annotated[tuple[float, ...], Range(0)] = (0.0,)
    normalize_fisher: bool = False

    def __post_init__(self) -> None:
        linear.shares(self.weights, True)


def merge(inputs: Inputs, parameters: Parameters) -> Merged:
    """The average weighted by F; the coefficients reported are means over elements."""
    weights = linear.shares(parameters.weights, True)
    if not inputs.statistics_given:
        return averaged(weights)
    floors = _floors(inputs, parameters)
    factors = [weight / (norm or 1.0) for weight, norm in zip(weights, _norms(inputs, parameters), strict=True)]

    def coefficients(block: Block) -> torch.Tensor:
        fisher = checked(inputs, block.statistics)
        return divided(fisher.maximum(column(floors, fisher)).mul_(column(factors, fisher)), weights)

    means = mean_coefficients(inputs, coefficients, weights)
    return Merged(means, lambda block: Part(weighted(block.models, coefficients(block))))


def surveys(parameters: Parameters) -> bool:
    """The norms over all tensors are wanted."""
    return parameters.normalize_fisher


def survey(inputs: Inputs, parameters: Parameters, state: Any) -> list[float]:
    """Σ F_k² of a tensor."""
    if not inputs.statistics_given:
        return [0.0] * inputs.models
    return _summed(inputs, lambda fisher: fisher.square_())


def conclude(parameters: Parameters, state: Any, found: Mapping[str, list[float]]) -> tuple[list[float], bool]:
    """The norm of each model's F over all tensors; one round is enough."""
    return [sum(column) ** 0.5 for column in zip(*found.values(), strict=True)], False


def averaged(weights: list[float]) -> Merged:
    """Σ w_k θ_k, for weights that sum to 1; equal models come back exactly."""

    def work(block: Block) -> Part:
        return Part(weighted(block.models, column(weights, block.models)))

    return Merged(weights, work)


def weighted(models_KB: torch.Tensor, shares_KB: torch.Tensor) -> torch.Tensor:
    """Σ s_k θ_k for s that sum to 1 over the models, as θ_1 + Σ s_k (θ_k − θ_1): equal models come back exactly."""
    total = models_KB[0].clone()
    for model, share in zip(models_KB[1:], shares_KB[1:], strict=True):
        total.add_((model - models_KB[0]).mul_(share))
    return total


def divided(masses_KB: torch.Tensor, weights: list[float]) -> torch.Tensor:
    """Masses of the models divided by their sum, and the weights where that is 0; in place."""
    total = masses_KB.sum(0)
    none = total == 0
    masses_KB.div_(total.masked_fill_(none, 1.0))
    return torch.where(none, column(weights, masses_KB), masses_KB) if none.any() else masses_KB


def mean_coefficients(inputs: Inputs, coefficients: Coefficients, weights: list[float]) -> list[float]:
    """Means over the elements of a tensor; the weights for one that has none."""
    sums = totals(inputs, lambda block: coefficients(block).sum(1, dtype=torch.float64).tolist(), len(weights))
    return [total / inputs.numel for total in sums] if inputs.numel else weights


def checked(inputs: Inputs, statistics_KB: torch.Tensor) -> torch.Tensor:
    """The statistics; ValueError for such as squares cannot be."""
    if (statistics_KB < 0).any():
        raise ValueError(f"{inputs.name}: its statistics have numbers below 0, so they are none of squared gradients")
    return statistics_KB


def column(numbers: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """A number for each model, (K, 1)."""
    return like.new_tensor(numbers)[:, None]


def _floors(inputs: Inputs, parameters: Parameters) -> list[float]:
    if not any(parameters.floor):
        return [0.0] * inputs.models
    means = [total / max(1, inputs.numel) for total in _summed(inputs, lambda fisher: fisher)]
    return [floor * mean for floor, mean in zip(parameters.floor, means, strict=True)]


def _norms(inputs: Inputs, parameters: Parameters) -> list[float]:
    if not parameters.normalize_fisher:
        return [1.0] * inputs.models
    assert inputs.surveyed is not None
    return list(inputs.surveyed)


def _summed(inputs: Inputs, of: Callable[[torch.Tensor], torch.Tensor]) -> list[float]:
    """Sums over a tensor's elements of something of F, which is handed over in float64."""

    def look(block: Block) -> list[float]:
        return of(block.statistics.to(torch.float64, copy=True)).sum(1).tolist()

    return totals(inputs, look, inputs.models)
