"""The largest updates of each model, by |δ| in float32: found by two or three passes over a tensor.

`select.top` does the same for any keys. Here several cuts through the same magnitudes share the passes, and each pass
is one compiled loop from the weights to the counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusion.merge.lazy import counting, torch
from fusion.merge.methods.base import Block, Inputs
from fusion.merge.methods.select import Cut, Histogram, bucket, from_bits

ALL, NONE = 0.0, float("inf")  # thresholds; that of `ALL` takes elements that are 0 as well, which is the same


def magnitudes(block: Block) -> torch.Tensor:
    """|δ|, (K, B) float32: it orders as |δ| does."""
    return block.deltas.abs().float()


def spread(inputs: Inputs, prefix: Sequence[int], shift: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each number stands in `width` bits of the magnitudes, from bit `shift`, and how many are 0.

    (K, 2^width) and (K,) int64. Of each model only magnitudes count whose bits above those are its `prefix`.
    """
    tables, zeros = Histogram(inputs.models, 1 << width), Histogram(inputs.models, 1)
    wanted = np.array(prefix, np.int64)

    def look(block: Block) -> None:
        if block.on_cpu:
            own = tables.mine(), zeros.mine()[:, 0]
            counting.count_magnitudes(block.array, wanted, shift, width, *own)
            return
        bits = magnitudes(block).view(torch.int32)
        zeros.mine()[:, 0] += (block.deltas == 0).sum(1).cpu().numpy()
        for row, above, table in zip(bits >> shift, prefix, tables.mine(), strict=True):
            digits = row[row >> width == above] & ((1 << width) - 1)
            table += torch.bincount(digits, minlength=1 << width).cpu().numpy()

    inputs.map(look)
    return tables.total(), zeros.total()[:, 0]


def largest(inputs: Inputs, counts: Sequence[Sequence[int]], ties: str = "first") -> list[list[Cut]]:
    """For each list of `counts`, one number for each model, the cuts that take so many largest elements.

    Of equal elements the `first` are taken, or the `last`; a count beyond the elements that are not 0 takes all.
    """
    whole = Cut(ALL, 0, inputs.numel - 1)
    cuts = [[whole if count >= inputs.numel else Cut(NONE, 0, -1) for count in row] for row in counts]
    if not any(0 < count < inputs.numel for row in counts for count in row):
        return cuts
    high, zeros = spread(inputs, [0] * inputs.models, 16, 15)
    wanted = []  # (which list, which model, bucket, how many of the bucket)
    for which, row in enumerate(counts):
        for model, count in enumerate(row):
            if count >= inputs.numel - zeros[model]:
                cuts[which][model] = whole
            elif count > 0:
                wanted.append((which, model, *bucket(high[model], count)))
    if wanted:
        _refine(inputs, wanted, cuts, ties)
    return cuts


def _refine(inputs: Inputs, wanted: Sequence[tuple[int, int, int, int]], cuts: list[list[Cut]], ties: str) -> None:
    """Put in the cuts that take some of a bucket: (which list, which model, bucket, how many of it) each."""
    models, places = (np.array([entry[i] for entry in wanted], np.int64) for i in (1, 2))
    lows = _lows(inputs, models, places)
    split = []  # those that take a part of the elements that equal their threshold
    for (which, model, place, needed), histogram in zip(wanted, lows, strict=True):
        low, left = bucket(histogram, needed)
        threshold = from_bits(place << 16 | low)
        cuts[which][model] = Cut(threshold, 0, inputs.numel - 1)
        if left < histogram[low]:
            split.append((which, model, threshold, left))
    if not split:
        return
    edges = _edges(inputs, [entry[1:] for entry in split], ties)
    for (which, model, threshold, _), edge in zip(split, edges, strict=True):
        cuts[which][model] = Cut(threshold, *((0, edge) if ties == "first" else (edge, inputs.numel - 1)))


def _lows(inputs: Inputs, models: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Counts of the low 16 bits of the magnitudes in a bucket, (W, 65536), for W models and buckets."""
    tables = Histogram(len(models), 1 << 16)

    def look(block: Block) -> None:
        if block.on_cpu:
            counting.count_lows(block.array, models, places, tables.mine())
            return
        bits = magnitudes(block).view(torch.int32)[models.tolist()]
        for row, place, table in zip(bits, places.tolist(), tables.mine(), strict=True):
            table += torch.bincount(row[row >> 16 == place] & 0xFFFF, minlength=1 << 16).cpu().numpy()

    inputs.map(look)
    return tables.total()


def _edges(inputs: Inputs, wanted: Sequence[tuple[int, float, int]], ties: str) -> list[int]:
    """The place of the last element taken of those that equal a threshold, for (model, threshold, how many) each."""
    models = np.array([model for model, _, _ in wanted], np.int64)
    thresholds = np.array([threshold for _, threshold, _ in wanted], np.float32)

    def look(block: Block) -> tuple[int, list[int]]:
        if block.on_cpu:
            return block.start, counting.count_equal(block.array, models, thresholds).tolist()
        sizes = magnitudes(block)[models.tolist()]
        return block.start, (sizes == sizes.new_tensor(thresholds)[:, None]).sum(1).tolist()

    counts = inputs.map(look)
    if ties == "last":
        counts.reverse()
    return [_edge(inputs, counts, index, *entry, ties) for index, entry in enumerate(wanted)]


def _edge(
    inputs: Inputs,
    counts: Sequence[tuple[int, list[int]]],
    index: int,
    model: int,
    threshold: float,
    needed: int,
    ties: str,
) -> int:
    """Where the `needed`-th equal element lies; `counts`: of each block, in the order in which they are taken."""
    for start, equal in counts:  # noqa: B007 - where it ends is the block wanted
        if equal[index] >= needed:
            break
        needed -= equal[index]

    def find(block: Block) -> int:
        if block.on_cpu:
            sizes = np.abs(block.array[model + 1] - block.array[0]).astype(np.float32)
            places = np.flatnonzero(sizes == np.float32(threshold))
        else:
            equal = (block.models[model] - block.base).abs().float() == threshold
            places = equal.nonzero().squeeze(1).cpu().numpy()
        return block.start + int(places[needed - 1] if ties == "first" else places[-needed])

    return inputs.one(start, find)


def between(block: Block, keep: Sequence[Cut], drop: Sequence[Cut] = ()) -> np.ndarray | torch.Tensor:
    """Which elements of each model the cuts of `keep` take, and those of `drop` do not, (K, B) bool."""
    if not block.on_cpu:
        sizes = magnitudes(block)
        kept = torch.stack([cut.mask(row, block.start) for cut, row in zip(keep, sizes, strict=True)])
        for cut, row, own in zip(drop, sizes, kept, strict=False):
            own &= ~cut.mask(row, block.start)
        return kept
    taken = np.empty((block.count, block.size), np.bool_)
    for cuts in (keep, drop) if drop else (keep,):
        limits, windows = _limits(cuts, block)
        counting.above(block.array, limits, windows, cuts is drop, taken)
    return taken


def _limits(cuts: Sequence[Cut], block: Block) -> tuple[np.ndarray, np.ndarray]:
    """What a magnitude must be above outside and within the places where equals are taken, and these, in the block."""
    size = block.size
    thresholds = np.array([cut.threshold for cut in cuts], np.float32)
    limits = np.stack([thresholds, np.nextafter(thresholds, np.float32(-1))], axis=1)
    windows = [[cut.first - block.start, cut.last + 1 - block.start] for cut in cuts]
    return limits, np.clip(np.array(windows, np.int64), 0, size)
