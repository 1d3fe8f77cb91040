"""OPCM: orthogonal projection-based continual merging (Tang et al. 2025, 2501.09522), as the authors' code defines it.

Models are taken in the recipe's order, and memory does not grow with their number. With S = U diag(σ) Vᵀ what the
models so far came to and r the number of leading σ that sum up to no more than `alpha` of all, of a matrix of a layer

    S ← S + δ_k − U (M ⊙ Uᵀ δ_k V) Vᵀ,   M the first r × r entries and the diagonal

is what of the next update lies across what is there. Other tensors are summed up: S ← S + δ_k. In the end
θ = θ₀ + S · mean_k ‖δ_k‖ / ‖S‖, norms over all tensors of the model, or with `norm: tensor` over each by itself; the
authors scale so after every model, which comes to the same. For the norm of the model all is computed twice.

Directions in which S is 0 have no singular vectors, and nothing is taken out of an update there: the code takes out
what its vectors happen to be. The code projects an untied head too, which it knows by its module's class, and no
embedding: `outside: project` does it for both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fusion.merge.lazy import torch
from fusion.merge.methods.base import Block, Inputs, Merged, Range, totals
from fusion.merge.methods.spectral import Placed, combined, is_matrix, moved_by, thin_svd

NEEDS_BASE = True
SURVEYED = ("norm",)
REFERENCE = "Tang et al. 2025 (OPCM), arXiv 2501.09522"


@dataclass(frozen=True)
class Parameters:
    """`alpha`: the share of Σσ whose directions are kept free; `norm`: over what the update is as long as the mean one.

    `outside`: what becomes of matrices outside of layers.
    """

    alpha: Annotated[float, Range(0, 1)] = 0.5
    norm: Literal["model", "tensor"] = "model"
    outside: Literal["sum", "project"] = "sum"


def in_full(tensor: Placed, parameters: Parameters) -> bool:
    """Whether a tensor is held in full, so that it takes `scratch_bytes`."""
    return is_matrix(tensor, parameters.outside == "project")


def scratch_bytes(models: int, itemsize: int = 8) -> int:
    """S beside its decomposition, some seven times its size where it is square; later U, V, an update and products."""
    return 8 * itemsize


def surveys(parameters: Parameters) -> bool:
    """The norm of the model asks for all tensors."""
    return parameters.norm == "model"


def survey(inputs: Inputs, parameters: Parameters, state: Any) -> list[float]:
    """‖δ_k‖² of each model, and last ‖S‖²."""
    return _accumulated(inputs, parameters)[1] if in_full(inputs, parameters) else _sum_squares(inputs)


def conclude(parameters: Parameters, state: Any, found: Mapping[str, list[float]]) -> tuple[float, bool]:
    """What S is multiplied by."""
    return _factor([sum(column) for column in zip(*found.values(), strict=True)]), False


def merge(inputs: Inputs, parameters: Parameters) -> Merged:
    """θ by the formula above; the coefficient reported is what S is multiplied by, the same for all models."""
    given = inputs.surveyed if parameters.norm == "model" else None
    if in_full(inputs, parameters):
        total, squares = _accumulated(inputs, parameters)
        factor = _factor(squares) if given is None else given
        return moved_by(total.mul_(factor), [factor] * inputs.models)
    factor = _factor(_sum_squares(inputs)) if given is None else given
    return combined(inputs, [factor] * inputs.models)


def _factor(squares: list[float]) -> float:
    """mean ‖δ_k‖ / ‖S‖ from their squares, 1 where S is 0."""
    *each, total = (square**0.5 for square in squares)
    return sum(each) / len(each) / total if total > 0 else 1.0


def _sum_squares(inputs: Inputs) -> list[float]:
    """‖δ_k‖² of each model, and last ‖Σ δ_k‖²."""

    def look(block: Block) -> list[float]:
        rows = torch.cat([block.deltas, block.deltas.sum(0, keepdim=True)])
        return rows.square_().sum(1, dtype=torch.float64).tolist()

    return totals(inputs, look, inputs.models + 1)


def _accumulated(inputs: Inputs, parameters: Parameters) -> tuple[torch.Tensor, list[float]]:
    """S of a matrix, and ‖δ_k‖² of each model and last ‖S‖²."""
    total = inputs.delta(0)
    squares = [_square(total)]
    for index in range(1, inputs.models):
        left, sigma, right = thin_svd(total)
        free = _leading(sigma, parameters.alpha)
        delta = inputs.delta(index)
        squares.append(_square(delta))
        total += delta
        inner = left.mT @ (delta @ right.mT)
        del delta
        own = inner.diagonal().clone()
        own[:free] = 0
        total -= left[:, :free] @ inner[:free, :free] @ right[:free]
        total -= (left * own) @ right
        del left, right, inner  # before the next decomposition, which is what takes most
    return total, [*squares, _square(total)]


def _leading(sigma: torch.Tensor, alpha: float) -> int:
    """How many of the largest σ sum up to no more than `alpha` of all."""
    if alpha == 1:
        return len(sigma)  # whatever rounding says of the last one
    sums = sigma.double().cumsum(0)
    return int((sums <= alpha * sums[-1:]).sum())


def _square(matrix: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
