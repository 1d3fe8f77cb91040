"""Metrics-weighted averaging of checkpoints (Yu and Choi 2025, 2504.18580): θ = Σ w_k θ_k, the better the heavier.

From that paper is the idea: a checkpoint's metric (its loss, or the number of steps it was trained) decides, and one
number for all, the penalty, sets how much, 0 not at all. How metrics become weights is a choice by name:

- `power`    w_k ∝ m_k^p where higher is better, m_k^−p where lower is; for metrics above 0
- `softmax`  w_k ∝ exp(p m_k), exp(−p m_k); a temperature T is p = 1/T
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from fusion.merge.methods.base import Inputs, Merged, Part, Range
from fusion.merge.methods.linear import averaged, shares

NEEDS_BASE = False
ONE_PASS = True
COMPILED = True
REFERENCE = "Yu and Choi 2025, arXiv 2504.18580"


@dataclass(frozen=True)
class Parameters:
    """`metrics`, one for each model, and which of them are `better`; `penalty` p of the `scheme`."""

    metrics: tuple[float, ...] = ()
    better: Literal["lower", "higher"] = "lower"
    penalty: Annotated[float, Range(0)] = 1.0
    scheme: Literal["power", "softmax"] = "power"

    def __post_init__(self) -> None:
        if not self.metrics:
            raise ValueError("metrics are missing; list one for each model, such as its loss on held-out text")
        if self.scheme == "power" and min(self.metrics) <= 0:
            raise ValueError(f"metrics = {list(self.metrics)} must be above 0 for scheme: power; set scheme: softmax")


def merge(inputs: Inputs, parameters: Parameters) -> Merged:
    """Σ w_k θ_k; a base plays no part."""
    weights = _weights(parameters)
    return Merged(weights, lambda block: Part(averaged(weights, block)))


def _weights(parameters: Parameters) -> list[float]:
    """The normalized weights; taken from the best one, so that no power and no exponential overflows."""
    scores = [math.log(metric) if parameters.scheme == "power" else metric for metric in parameters.metrics]
    if parameters.better == "lower":
        scores = [-score for score in scores]
    best = max(scores)
    return shares(tuple(math.exp(parameters.penalty * (score - best)) for score in scores), normalize=True)
