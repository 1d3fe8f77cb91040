"""Which source teaches which sample."""

from collections.abc import Mapping
from typing import Literal


def choose(bits: Mapping[str, float], gate: Literal["min_ce", "all", "none"]) -> dict[str, float]:
    """The weight of each source on one sample, summing to 1; empty where nobody teaches.

    Args:
        bits: each source's cross-entropy on the sample in bits per byte (FuseLLM's measure, Wan et al. 2401.10491, made
            comparable across tokenizers). A source that has not read the sample is absent.
        gate: `min_ce`, the best source alone, the first named of equals; `all`, every source alike; `none`.
    """
    if gate == "none" or not bits:
        return {}
    if gate == "all":
        return {name: 1 / len(bits) for name in bits}
    return {min(bits, key=lambda name: bits[name]): 1.0}
