"""Which source teaches what: a whole sample, a segment of it, or a single token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Gate = Literal["min_ce", "avg_ce", "all", "fixed", "none"]
Level = Literal["sample", "segment", "token"]
Unit = Literal["bytes", "tokens"]


@dataclass(frozen=True, slots=True)
class Gating:
    """How sources are chosen.

    Attributes:
        gate, temperature, fixed: see `choose`.
        level: what is costed, and chosen for, by itself.
        confident: positions are taught by the share that softmax(−bits / temperature) over all that the gate asks gives
            to those which teach there: little where they are no better than the others, the pivot among them.
        unit: what the cross-entropy on a sample is taken by: bytes, or as published the source's own tokens.
    """

    gate: Gate = "min_ce"
    level: Level = "sample"
    temperature: float = 1.0
    fixed: Mapping[str, float] = field(default_factory=dict)
    confident: bool = False
    unit: Unit = "bytes"


def choose(
    bits_SU: np.ndarray,
    gate: Gate,
    temperature: float = 1.0,
    fixed: Mapping[str, float] | None = None,
    names: Sequence[str] = (),
) -> np.ndarray:
    """The weight of each of S sources on each of U units (samples, segments or tokens).

    Args:
        bits_SU: each source's cross-entropy in bits per byte (FuseLLM's measure, Wan et al. 2401.10491, made comparable
            across tokenizers), NaN where a source has not read the unit: it is absent there.
        gate: `min_ce`, the best source alone, the first named of equals; `avg_ce`, softmax(−bits / temperature); `all`,
            every source alike; `fixed`, as told; `none`.
        fixed: with `fixed`, name → weight, 0 where a source is not named.
        names: with `fixed`, the sources in order.

    Returns:
        float64 (S, U), a column sums to 1, or to 0 where nobody teaches.
    """
    here = ~np.isnan(bits_SU)
    weights = np.zeros(bits_SU.shape)
    if gate == "none" or not len(bits_SU):
        return weights
    if gate == "avg_ce":
        return soft(bits_SU, temperature)
    if gate == "min_ce":
        best = np.argmin(np.where(here, bits_SU, np.inf), axis=0)
        best = np.where(np.take_along_axis(here, best[None], 0)[0], best, np.argmax(here, axis=0))  # all infinite
        np.put_along_axis(weights, best[None], 1.0, 0)
        return weights * here
    told = [1.0] * len(bits_SU) if gate == "all" else [(fixed or {}).get(name, 0.0) for name in names]
    weights = np.array(told, dtype=np.float64)[:, None] * here
    return np.divide(weights, weights.sum(0), out=np.zeros_like(weights), where=weights.sum(0) > 0)


def soft(bits_SU: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(−bits / temperature) over the sources that are not NaN: float64 (S, U), columns of NaN are 0.

    Where every source is infinite they share alike.
    """
    here = ~np.isnan(bits_SU)
    bits = np.where(here, bits_SU, np.inf)
    least = bits.min(0, initial=np.inf)
    # only what has no finite bits at all stands at inf − inf: there all that are present share alike
    over = np.where(np.isfinite(least), bits - np.where(np.isfinite(least), least, 0), 0)
    lifted = np.where(here, np.exp(-over / temperature), 0.0)
    return np.divide(lifted, lifted.sum(0), out=np.zeros_like(lifted), where=lifted.sum(0) > 0)
