"""LiNeS (Wang et al. 2024, 2410.17146): over any method, the deeper a layer the more of its merged update stays.

θ = θ₀ + λ_l (θ_merged − θ₀) with λ_l = α + β · l/(L − 1) for layer l of L, counted from 0. Outside of layers λ = α, as
in the authors' code, unless another is given. For one fine-tuned model the paper keeps α + β = 1, so that the top layer
stays as it is.
"""

from __future__ import annotations

REFERENCE = "Wang et al. 2024, arXiv 2410.17146"


def scale(alpha: float, beta: float, layer: int | None, layers: int, outside: float | None = None) -> float:
    """λ of a layer's tensors, of those outside of layers for None; the only layer of one counts as the first."""
    if layer is None:
        return alpha if outside is None else outside
    if layers < 2:
        return alpha
    return alpha + beta * layer / (layers - 1)
