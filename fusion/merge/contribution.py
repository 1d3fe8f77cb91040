"""How much each target counts in an average: by what it gains over the base alone, as measured."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from fusion.merge.scales import Scales, alike, refine, search

POWERS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, math.inf)
FIRST = 4.0


def shares(gains: Sequence[float], power: float) -> tuple[float, ...]:
    """Weights in proportion to the gains raised to a power, which sum to 1.

    With power 0 all count alike, with an infinite one the best alone. What gains nothing counts for nothing, unless
    nothing does: then all count alike.
    """
    most = max(gains)
    if power == 0 or most <= 0:
        return (1 / len(gains),) * len(gains)
    raised = [(max(gain, 0.0) / most) ** power for gain in gains]
    return tuple(share / sum(raised) for share in raised)


def search_power(
    measure: Callable[[float, Scales], float], far: Scales | None, apart: bool = True
) -> tuple[float, Scales, dict[Scales, float]]:
    """The power of the gains by which an average measures best, and how far to go along it.

    First how far with `FIRST`, then so far with powers up and down from there until none is better, then once more how
    far within the layers with the best.

    Args:
        measure: power and scales → bits per byte; scales of 0 are the base.
        far: the scales where they are given; None searches for them.
        apart: see `scales.search`.

    Returns:
        The power, the scales, and the bits per byte of all scales that were measured with that power.

    Raises:
        ValueError: no scales give bits per byte that are finite.
    """
    tried: dict[float, dict[Scales, float]] = {}

    def attempt(power: float, scales: Scales) -> float:
        known = tried.setdefault(power, {})
        if scales not in known:
            known[scales] = measure(power, scales)
        return known[scales]

    scales = far or search(lambda scales: attempt(FIRST, scales), apart)[0]
    at = POWERS.index(FIRST)
    for step in (1, -1):
        while 0 <= at + step < len(POWERS) and attempt(POWERS[at + step], scales) < attempt(POWERS[at], scales):
            at += step
    power = POWERS[at]
    if far is None and power != FIRST:
        attempt(power, alike(1))  # the middle of what a mean may need, which alone reaches far from where FIRST ended
        scales = refine(lambda scales: attempt(power, scales), tried[power])
    return power, scales, tried[power]


class Refused(NamedTuple):
    """Scales that measure best and are not taken: how far ahead of all of the update, and how much may be noise."""

    scales: Scales
    ahead: float
    noise: float


class Choice(NamedTuple):
    """What was chosen; `tried`: the bits per byte of all scales that were measured with the weights."""

    weights: tuple[float, ...]
    scales: Scales
    tried: dict[Scales, float]
    refused: Refused | None


def choose(
    measure: Callable[[tuple[float, ...], Scales], float],
    alone: Sequence[float],
    far: Scales | None,
    lead: Callable[[tuple[float, ...], Scales, Scales], tuple[float, float]],
    apart: bool = True,
) -> Choice:
    """How much each target counts, and how far to go, by what is measured.

    Of scales that are measured, those that go further than all of the update have to be better than it by more than the
    noise of the samples: some scale suits a few of them by chance, and the merged model would be worse than what was
    trained. Less of the update is taken as measured: it holds the model near the base, and asking for certainty there
    costs more than it saves (docs/log.md).

    Args:
        measure: weights, none where they are the recipe's, and scales → bits per byte; scales of 0 are the base.
        alone: each target's bits per byte; none where targets are not to be weighed.
        far: see `search_power`.
        lead: weights and two scales that were measured → bits per byte by which the first are below the second, and
            how much of that may be noise.
        apart: see `scales.search`.

    Raises:
        ValueError: no scales give bits per byte that are finite.
    """
    if not alone:
        if far:
            return Choice((), far, {}, None)
        _, tried = search(partial(measure, ()), apart)
        scales, refused = surely(tried, partial(lead, ()))
        return Choice((), scales, tried, refused)
    base = measure((), alike(0))
    gains = [base - bits if math.isfinite(base - bits) else 0.0 for bits in alone]

    def attempt(power: float, scales: Scales) -> float:
        return measure(shares(gains, power), scales)

    power, best, tried = search_power(attempt, far, apart)
    scales, refused = (far, None) if far else surely(tried, partial(lead, shares(gains, power)))
    if scales != best:  # for which the power was chosen
        again, _, those = search_power(attempt, scales, apart)
        power, tried = again, tried if again == power else those
    return Choice(shares(gains, power), scales, tried, refused)


def surely(
    tried: Mapping[Scales, float], lead: Callable[[Scales, Scales], tuple[float, float]]
) -> tuple[Scales, Refused | None]:
    """The scales that measure best, and those that do better still and are refused.

    None may go further than all of the update that is not ahead of it by more than noise.
    """
    whole = alike(1)
    may = {scales: bits for scales, bits in tried.items() if scales != alike(0) and math.isfinite(bits)}
    best = min(may, key=may.__getitem__)
    ahead: dict[Scales, tuple[float, float]] = {}
    if whole in may:
        ahead = {scales: lead(scales, whole) for scales in may if max(scales.layers, scales.outside) > 1}
        may = {s: bits for s, bits in may.items() if s not in ahead or ahead[s][0] > ahead[s][1]}
    scales = min(may, key=may.__getitem__)
    return scales, None if scales == best else Refused(best, *ahead[best])
