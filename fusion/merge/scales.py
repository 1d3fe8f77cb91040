"""How far to go along a merged update: as far as what is measured says, in the layers and outside of them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

LEAST, MOST = 0.1, 2.0  # of the scales that are tried


@dataclass(frozen=True)
class Scales:
    """How much of an update is put on the base: in the layers, and outside of them (embeddings, head, last norm)."""

    layers: float
    outside: float

    def __str__(self) -> str:
        if self.layers == self.outside:
            return f"{self.layers:g}"
        return f"{self.layers:g} in the layers, {self.outside:g} outside"


def alike(scale: float) -> Scales:
    """The same everywhere."""
    return Scales(scale, scale)


def given(scale: float | str | list[float]) -> Scales:
    """Those of a number, or of two: in the layers, outside of them."""
    return Scales(*map(float, scale)) if isinstance(scale, list) else alike(float(scale))


def search(measure: Callable[[Scales], float], apart: bool = True) -> tuple[Scales, dict[Scales, float]]:
    """The scales of a merged update that measure best, after ten measurements at most.

    The loss along the line from one model to another that was trained from it is nearly a parabola (as where Wortsman
    et al. 2109.01903 interpolate them): three points say where its least is. First for all weights alike, where
    the base is one of the three; from there outside of the layers, where as a rule less is better, since Adam moves the
    embeddings of rare tokens as far as those of frequent ones; then within the layers.

    Args:
        measure: scales → bits per byte; 0 and 0 is the base.
        apart: whether layers and the rest are looked at by themselves; not so where a model has one of them alone.

    Returns:
        The best scales that are not 0, and the bits per byte of all that were measured.

    Raises:
        ValueError: no scales give bits per byte that are finite.
    """
    tried: dict[Scales, float] = {}
    attempt = _once(measure, tried)
    attempt(alike(_lowest({scale: attempt(alike(scale)) for scale in (0.0, 0.5, 1.0)})))
    for part in ("outside", "layers") if apart else ():
        _along(attempt, _best(tried), part)
    return _best(tried), tried


def refine(measure: Callable[[Scales], float], known: Mapping[Scales, float]) -> Scales:
    """The best scales near the best of some that are known, after three measurements at most: within the layers."""
    tried = dict(known)
    _along(_once(measure, tried), _best(tried), "layers")
    return _best(tried)


def _once(measure: Callable[[Scales], float], tried: dict[Scales, float]) -> Callable[[Scales], float]:
    """`measure`, asked once for each scales: `tried` keeps what it said."""

    def attempt(scales: Scales) -> float:
        if scales not in tried:
            tried[scales] = measure(scales)
        return tried[scales]

    return attempt


def _along(attempt: Callable[[Scales], float], here: Scales, part: str) -> None:
    """Try less of one part, then still less or else more, and where a parabola through the three is lowest."""

    def moved(scale: float) -> float:
        return attempt(replace(here, **{part: scale}))

    at = float(getattr(here, part))
    less = _within(0.75 * at)
    other = _within((0.5 if moved(less) < moved(at) else 1.25) * at)
    points = {scale: moved(scale) for scale in (at, less, other)}
    if len(points) == 3:  # not so at the ends of what may be tried
        moved(_lowest(points))


def _within(scale: float) -> float:
    return round(min(max(scale, LEAST), MOST), 3)


def _best(tried: Mapping[Scales, float]) -> Scales:
    finite = {scales: bits for scales, bits in tried.items() if scales != alike(0) and math.isfinite(bits)}
    if not finite:
        told = {str(scales): bits for scales, bits in tried.items()}
        raise ValueError(f"merge.scale: no merged model has finite bits per byte on the validation samples: {told}")
    return min(finite, key=finite.__getitem__)


def _lowest(points: Mapping[float, float]) -> float:
    """Where the parabola through three points is lowest, within what may be tried."""
    if not all(map(math.isfinite, points.values())):
        return LEAST  # what is nearest to the base
    (x, fx), (y, fy), (z, fz) = sorted(points.items())
    first, second = (fy - fx) / (y - x), (fz - fy) / (z - y)
    bend = (second - first) / (z - x)  # half the second derivative
    lowest = math.inf if fz < fx else -math.inf
    if bend > 0:
        lowest = (x + y) / 2 - first / (2 * bend)
    return round(_within(lowest), 2)
