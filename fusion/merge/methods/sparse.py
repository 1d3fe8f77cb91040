"""What the methods on thinned updates share: which elements of each model stay, and how those are put together.

A method says what each element of each update is multiplied by (0 drops it, 1 keeps it, 1/p keeps its expectation);
here the updates are so thinned, scaled back to the norm they had if that is asked for, weighted, summed, over the
models of the elected sign alone where there is an election, and added to the base.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np

from fusion.merge.lazy import draws, kernels, torch
from fusion.merge.methods.base import Block, Inputs, Merged, Part, Range
from fusion.merge.methods.linear import update_shares

# What each element is multiplied by: (K, B), bool or of the values' type.
Factors = Callable[[Block], "np.ndarray | torch.Tensor"]
Election = Literal["sum", "count"]

DRAWS = 1 << 24  # what is drawn is one of 0 … 2^24 - 1


@dataclass(frozen=True)
class Weighing:
    """`weights` of the updates; `normalize` divides by those of the models summed, but not by 0; `scale` multiplies.

    Without an election all models are summed. With one, those are that have the elected sign, element by element.
    """

    weights: tuple[float, ...] = (1.0,)
    normalize: bool = False
    scale: Annotated[float, Range()] = 1.0


def put_together(
    inputs: Inputs,
    factors: Factors,
    weighing: Weighing,
    election: Election | None = None,
    scales: Sequence[float] | None = None,
    rows: bool = False,
) -> Merged:
    """θ₀ + scale · Σ w_k s_k f_k δ_k with `factors` f and a number for each model, `scales` s.

    With an election, as TIES has it, only over models whose w_k s_k f_k δ_k has the sign of their sum, or of the sum of
    their signs: 0 counts as + there, and an element that is 0 has no sign; with `normalize` divided by the sum of the
    weights of these, unless that cancels to 0. The coefficients reported are scale · w_k, normalized over all models.
    """
    by_model = [1.0] * inputs.models if scales is None else list(scales)
    chosen = update_shares(weighing.weights, weighing.normalize)
    reported = [weighing.scale * share for share in chosen]
    weights = list(weighing.weights) if election else chosen
    # Weights of one sign sum to 0 only where none is left; of two signs their rounding must not pass for a sum.
    floor = 1e-6 * sum(map(abs, weights)) if min(weights) < 0 else 0.0
    settings = by_model, weights, election, floor if election and weighing.normalize else -1.0, weighing.scale

    def work(block: Block) -> Part:
        values, kept, erased = settle(block, factors(block), *settings)
        return Part(values, kept, erased if election else ())

    return Merged(reported, work, rows)


def settle(
    block: Block,
    factors_KB: np.ndarray | torch.Tensor,
    scales: Sequence[float],
    weights: Sequence[float],
    election: Election | None,
    floor: float,
    scale: float,
) -> tuple[np.ndarray | torch.Tensor, list[int], list[int]]:
    """The merged values of a block, and how many elements of each model were kept, and dropped for their sign."""
    if not isinstance(factors_KB, np.ndarray):
        return _settle(block, factors_KB, scales, weights, election, floor, scale)
    vote = 0 if election is None else 1 if election == "sum" else 2
    out = np.empty(block.size, block.array.dtype)
    by_model, weight = (np.array(numbers, out.dtype) for numbers in (scales, weights))
    kept, erased = kernels.settle(block.array, factors_KB, by_model, weight, vote, floor, scale, out).tolist()
    return out, kept, erased


def _settle(
    block: Block,
    factors_KB: torch.Tensor,
    scales: Sequence[float],
    weights: Sequence[float],
    election: Election | None,
    floor: float,
    scale: float,
) -> tuple[torch.Tensor, list[int], list[int]]:
    """The same in torch's operators."""
    thinned = block.deltas * factors_KB
    kept = thinned.count_nonzero(1).tolist()
    weight = thinned.new_tensor(weights)[:, None]
    thinned *= weight * thinned.new_tensor(scales)[:, None]
    if election is None:
        return thinned.sum(0).mul_(scale).add_(block.base), kept, []
    votes = (thinned if election == "sum" else thinned.sign()).sum(0)
    ours = torch.where(votes >= 0, thinned > 0, thinned < 0)
    erased = ((thinned != 0) & ~ours).sum(1).tolist()
    update = thinned.mul_(ours).sum(0)
    if floor >= 0:
        mass = (weight * ours).sum(0)
        update /= mass.masked_fill_(mass.abs() <= floor, 1.0)
    return update.mul_(scale).add_(block.base), kept, erased


def restoring(inputs: Inputs, factors: Factors, rows: bool = False) -> list[float]:
    """For each model the number that gives its thinned update the L1 norm of the whole one; 1 where nothing is left.

    `factors` say what is kept, as bool.
    """

    def look(block: Block) -> np.ndarray:
        kept = factors(block)
        if not isinstance(kept, np.ndarray):
            sizes = block.deltas.abs()
            return np.array(
                [sizes.sum(1, dtype=torch.float64).tolist(), sizes.mul_(kept).sum(1, dtype=torch.float64).tolist()]
            )
        sums = np.empty((2, inputs.models))
        kernels.norms(block.array, kept, sums)
        return sums

    before, after = sum(inputs.map(look, rows=rows), np.zeros((2, inputs.models))).tolist()
    return [whole / left if left > 0 else 1.0 for whole, left in zip(before, after, strict=True)]


def one_pass(parameters: Any) -> bool:
    """Of a method with a `rescale`: not where norms are restored, for these are taken before."""
    return parameters.rescale != "norm"


def in_full(tensor: Any, parameters: Any) -> bool:
    """Of such a method: what was kept is remembered where norms are restored."""
    return not one_pass(parameters)


def scratch_bytes(models: int, itemsize: int) -> int:
    """That takes a bit for each element of each model."""
    return -(-models // 8)


class Remembered:
    """Which elements a method keeps, a bit each, for one whose choice costs more than to remember it.

    `factors` gives what is 0 or not for each element.
    """

    def __init__(self, factors: Factors) -> None:
        self._factors, self._bits = factors, dict[int, np.ndarray]()

    def __call__(self, block: Block) -> np.ndarray | torch.Tensor:
        """(K, B) bool."""
        if block.start not in self._bits:
            kept = self._factors(block) != 0
            bits = kept if isinstance(kept, np.ndarray) else kept.cpu().numpy()
            self._bits[block.start] = np.packbits(bits.reshape(-1))
            return kept
        bits = np.unpackbits(self._bits[block.start], count=block.count * block.size).view(np.bool_)
        bits = bits.reshape(block.count, block.size)
        return bits if block.on_cpu else torch.from_numpy(bits).to(block.values.device)


def keys(inputs: Inputs) -> np.ndarray:
    """What the draws of a tensor depend on, for each model, (K, 2) uint32: the merge's seed, its name, the model."""
    texts = [f"{inputs.seed}\n{inputs.name}\n{index}" for index in range(inputs.models)]
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, "<u4").astype(np.uint32).reshape(-1, 2)


def drawn(inputs: Inputs, densities: Sequence[float]) -> Factors:
    """Keeps each element of model k with the chance `densities`[k], whatever the others do."""
    own = keys(inputs)
    limits = np.array([math.ceil(density * DRAWS) for density in densities], np.uint32)

    def factors(block: Block) -> np.ndarray | torch.Tensor:
        if not block.on_cpu:
            device = block.values.device
            places = numbers(own, block.start, block.size, device)
            return places < torch.from_numpy(limits.astype(np.int64)).to(device)[:, None]
        kept = np.empty((block.count, block.size), np.bool_)
        draws.draw(block.start, own, limits, kept)
        return kept

    return factors


def numbers(keys_K2: np.ndarray, start: int, count: int, device: torch.device) -> torch.Tensor:
    """What is drawn for the places from `start`, (K, count) int64 below 2^24: `draws._drawn` in torch's operators."""
    low, high = torch.from_numpy(keys_K2.astype(np.int64)).to(device).T[:, :, None]
    places = torch.arange(start, start + count, device=device)
    whole = 0xFFFFFFFF
    h = (places & whole) ^ low
    h = ((h ^ (h >> 17)) * 0xED5AD4BB) & whole  # the product may wrap: its lower half is right all the same
    h = ((h ^ (h >> 11)) + high + (places >> 32)) & whole
    h = (h * 0xAC4C1B51) & whole
    h = ((h ^ (h >> 15)) * 0x31848BAB) & whole
    return (h ^ (h >> 14)) >> 8
