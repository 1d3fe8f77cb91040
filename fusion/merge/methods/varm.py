"""VaRM (FuseChat v1, Wan et al. 2024, 2402.16107): models weighted by how far they moved from the base.

θ = Σ w_k θ_k, computed as θ₀ + Σ w_k δ_k, with w_k = E[δ_k²] / Σ_k E[δ_k²]. The mean E is over the elements of the
whole model, of a layer, of a tensor (`matrix`, the paper's choice), or over one element alone (`parameter`). Where no
model has moved w_k = 1/K.

The authors' code agrees for matrices, for the whole model and for single elements where all of that has moved. Else:
it gives equal weights to a matrix that one model alone left as it was, and writes 0 for an element that none moved;
by layer it adds up the means of a layer's tensors, so that a norm counts as much as a matrix, and gives equal weights
to tensors outside of layers, each of which is weighted by itself here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fusion.merge.lazy import kernels, torch
from fusion.merge.methods.base import Block, Inputs, Merged, Part, totals
from fusion.merge.methods.linear import updated

NEEDS_BASE = True
SURVEYED = ("granularity",)
REFERENCE = "Wan et al. 2024 (FuseChat v1), arXiv 2402.16107"


@dataclass(frozen=True)
class Parameters:
    """`granularity`: what one weight for each model is for."""

    granularity: Literal["model", "layer", "matrix", "parameter"] = "matrix"


@dataclass(frozen=True)
class Moved:
    """What a survey keeps of a tensor: its layer, and Σ δ_k² of each model."""

    layer: int | None
    energies: tuple[float, ...]


def surveys(parameters: Parameters) -> bool:
    """Whether weights depend on more than the tensor they are for."""
    return parameters.granularity in ("model", "layer")


def survey(inputs: Inputs, parameters: Parameters, state: None) -> Moved:
    """How far each model moved in one tensor."""
    return Moved(inputs.layer, tuple(_energies(inputs)))


def conclude(parameters: Parameters, state: None, found: Mapping[str, Moved]) -> tuple[dict[str, list[float]], bool]:
    """The weights of the models for each tensor by name; one look at all tensors is enough."""

    def group(name: str) -> Any:
        if parameters.granularity == "model":
            return "all"
        layer = found[name].layer
        return name if layer is None else layer

    members: dict[Any, list[tuple[float, ...]]] = {}
    for name, moved in found.items():
        members.setdefault(group(name), []).append(moved.energies)
    # fsum is exact, whatever the order the tensors come in; all models have as many elements, so sums do for means.
    weights = {
        key: _weights([math.fsum(column) for column in zip(*rows, strict=True)]) for key, rows in members.items()
    }
    return {name: weights[group(name)] for name in found}, False


def merge(inputs: Inputs, parameters: Parameters) -> Merged:
    """θ and w_k, or the mean of w_k over the elements of `parameter`."""
    if parameters.granularity == "parameter":
        return _by_element(inputs)
    weights = inputs.surveyed[inputs.name] if surveys(parameters) else _weights(_energies(inputs))
    return Merged(weights, lambda block: Part(updated(weights, block)))


def _energies(inputs: Inputs) -> list[float]:
    """Σ δ_k² of each model."""

    def squares(block: Block) -> list[float]:
        if not block.on_cpu:
            return block.deltas.square().sum(1, dtype=torch.float64).tolist()
        energy = np.empty(block.count)
        kernels.energies(block.array, np.ones(block.size, np.bool_), energy)
        return energy.tolist()

    return totals(inputs, squares, inputs.models)


def _weights(energies: Sequence[float]) -> list[float]:
    total = math.fsum(energies)
    return [energy / total if total > 0 else 1 / len(energies) for energy in energies]


def _by_element(inputs: Inputs) -> Merged:
    def work(block: Block) -> Part:
        return Part(_shares(block.deltas).mul_(block.deltas).sum(0).add_(block.base))

    sums = totals(inputs, lambda block: _shares(block.deltas).sum(1, dtype=torch.float64).tolist(), inputs.models)
    mean = [total / inputs.numel for total in sums] if inputs.numel else _weights(sums)
    return Merged(mean, work)


def _shares(deltas_KB: torch.Tensor) -> torch.Tensor:
    """δ_k² / Σ_k δ_k² of each element, (K, B); 1/K where that sum is 0."""
    squares = deltas_KB.square()
    total = squares.sum(0)
    still = total == 0
    return squares.div_(total.masked_fill_(still, 1.0)).masked_fill_(still, 1 / len(deltas_KB))
