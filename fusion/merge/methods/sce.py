"""SCE: select, calculate, erase (FuseChat, Wan et al. 2024, 2408.07990), in the three definitions in use.

Select keeps k = int(τ × number of elements whose variance over the models is not 0), the ones of largest
variance; calculate gives a model the weight w_k = Σδ_k² / Σ_kΣδ_k² over the selected; erase drops a model's
element whose sign disagrees with that of Σ_k δ_k, a sum of 0 counting as +. With δ' the deltas that select
filtered:

- `paper`     θ = θ₀ + Σ w_k δ'_k                      over the models that survive erase
- `mergekit`  θ = θ₀ + Σ w_k δ'_k / Σ w_k               over the models that survive erase
- `fuseai`    θ = θ₀ + Σ w_k δ_k / Σ w_k, erase by δ     the authors' code: select acts on the weights alone

An element that is exactly 0 has no sign: it does not survive, so it takes no part in a division. Where
nothing survives θ = θ₀. Where no selected element has moved, w_k = 1/K.

What follows for equals: at τ = 1 select is off, as in both published codes, and a model merged with itself
comes back in every definition. At τ < 1 equal models have no variance, so nothing is selected: `paper` and
`mergekit` give the base (select throws away what all agree on), `fuseai` gives the model. One model alone
comes back always: select chooses among models and there is none to choose from.

Two thresholds of mergekit are left out, for they turn typical fine-tunes into a uniform average: "has not
moved" is an exact 0 here, not below 1e-6, and the division by Σ w_k is not clamped at 1e-6.
"""

from typing import Annotated, Literal

import torch
from torch import Tensor

from fusion.merge.methods.base import Merged, Range, blocks, delta_blocks, largest

NEEDS_BASE = True
SCRATCH_BYTES = 5  # the spread in float32 and the mask


def merge(
    base: Tensor | None,
    models: list[Tensor],
    *,
    tau: Annotated[float, Range(0, 1, open_low=True)] = 0.1,
    definition: Literal["paper", "fuseai", "mergekit"] = "paper",
) -> Merged:
    """The fused tensor and w_k by the chosen definition; `tau` is the share of varying elements to select."""
    assert base is not None
    mask = _select(models, tau)
    weights = _calculate(base, models, mask)
    filter_deltas = mask is not None and definition != "fuseai"
    merged = torch.empty(base.numel(), dtype=torch.float32)
    for place, origin, deltas in delta_blocks(base, models):
        if filter_deltas:
            deltas = _filtered(deltas, mask, place)
        merged[place] = origin + _erase_and_add(deltas, weights, divide=definition != "paper")
    return Merged(merged.view(base.shape), weights.tolist())


def _select(models: list[Tensor], tau: float) -> Tensor | None:
    """Mask (bool, N) of the elements of largest variance over the models; None where every element is kept.

    Ranked by the standard deviation, which orders as the variance does and does not vanish in float32 for
    small updates. It is that of θ_k − θ_1, the same as that of δ_k, and exactly 0 where all models agree.
    """
    if tau == 1 or len(models) == 1:
        return None
    spread = torch.empty(models[0].numel(), dtype=torch.float32)
    for place, values in blocks(models):
        apart = values - values[0]
        apart -= apart.mean(0)
        spread[place] = apart.square_().mean(0).sqrt_()
    return largest(spread, int(tau * int(spread.count_nonzero())))


def _calculate(base: Tensor, models: list[Tensor], mask: Tensor | None) -> Tensor:
    """w_k (float64, K): each model's share of the squared update over the selected elements."""
    energy = torch.zeros(len(models), dtype=torch.float64)
    for place, _, deltas in delta_blocks(base, models):
        energy += _filtered(deltas, mask, place).square().sum(1)
    total = energy.sum()
    return energy / total if total > 0 else torch.full_like(energy, 1 / len(models))


def _filtered(deltas: Tensor, mask: Tensor | None, place: slice) -> Tensor:
    return deltas if mask is None else deltas.masked_fill(~mask[place], 0.0)


def _erase_and_add(deltas: Tensor, weights: Tensor, divide: bool) -> Tensor:
    """Σ w_k δ_k (B,) over the models whose sign is the majority's; with `divide`, divided by their Σ w_k."""
    agree = torch.where(deltas.sum(0) >= 0, deltas > 0, deltas < 0)
    surviving = weights[:, None] * agree
    update = (surviving * deltas).sum(0)
    if divide:
        total = surviving.sum(0)
        update = torch.where(total > 0, update / total.where(total > 0, 1.0), 0.0)
    return update
