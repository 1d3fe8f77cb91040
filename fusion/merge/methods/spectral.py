"""What methods that look at a weight matrix as a whole share: its singular vectors, and which tensors they look at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from fusion.merge.lazy import torch
from fusion.merge.methods.base import Block, Inputs, Merged, Part
from fusion.merge.methods.linear import updated

TALL = 4  # one side this many times the other: the small side's triangle is decomposed in place of the matrix


class Placed(Protocol):
    """What is known of a tensor before it is read: its shape, and its layer's number, None outside of layers."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def layer(self) -> int | None:
        """Its layer's number."""


def is_matrix(tensor: Placed, outside: bool) -> bool:
    """Whether a tensor is merged as a matrix: of two dimensions and of a layer; of none too with `outside`."""
    return len(tensor.shape) == 2 and math.prod(tensor.shape) > 0 and (outside or tensor.layer is not None)


def thin_svd(matrix_MN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (M, R), σ (R,) from the largest, Vᵀ (R, N) with U diag(σ) Vᵀ the matrix; R is its rank in its own precision.

    Directions in which nothing moved have no singular vectors but what rounding makes up, so there are none here: of
    a matrix of zeros R is 0. σ counts above (4 + √max(M, N)) ε σ₁, some times what rounding was seen to leave.
    """
    rows, columns = matrix_MN.shape
    if rows < columns:
        right, sigma, left = thin_svd(matrix_MN.mT)
        return left.mT, sigma, right.mT
    if rows >= TALL * columns:
        basis, triangle = torch.linalg.qr(matrix_MN)
        left, sigma, right = torch.linalg.svd(triangle)
        left = basis @ left
    else:
        left, sigma, right = torch.linalg.svd(matrix_MN, full_matrices=False)
    least = (4 + math.sqrt(rows)) * torch.finfo(matrix_MN.dtype).eps
    rank = int((sigma > least * sigma[:1]).sum())
    return left[:, :rank], sigma[:rank], right[:rank]


def polar(matrix_MN: torch.Tensor) -> torch.Tensor:
    """U Vᵀ, (M, N): the nearest matrix all of whose singular values are 1, within the range that the matrix has."""
    left, _, right = thin_svd(matrix_MN)
    return left @ right


def combined(inputs: Inputs, coefficients: Sequence[float]) -> Merged:
    """θ₀ + Σ c_k δ_k, streamed: what becomes of tensors that a method does not look at as matrices."""
    chosen = list(coefficients)
    return Merged(chosen, lambda block: Part(updated(chosen, block)))


def moved_by(update: torch.Tensor, weights: Sequence[float]) -> Merged:
    """θ₀ + an update that is there in full; `weights` as they are reported."""
    flat = update.reshape(-1)

    def work(block: Block) -> Part:
        return Part(flat[block.start : block.start + block.values.shape[1]] + block.base)

    return Merged(list(weights), work)
