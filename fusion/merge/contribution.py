"""How much each target counts in an average: by what it gains over the base alone, as measured."""

from collections.abc import Callable, Sequence

from fusion.merge.scales import Scales, alike, refine, search

POWERS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
FIRST = 4.0


def shares(gains: Sequence[float], power: float) -> tuple[float, ...]:
    """Weights in proportion to the gains raised to a power, which sum to 1.

    With power 0 all count alike, with a high one the best alone. What gains nothing counts for nothing, unless nothing
    does: then all count alike.
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
