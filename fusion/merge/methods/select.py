"""Selection of the largest elements of a tensor that is seen block by block: by two histograms, without sorting.

The bits of floats ≥ 0 order as integers do: the high half of a threshold's bits comes from one pass over the tensor,
the low half from another. torch.topk leaves open which of equal elements it takes, and bfloat16 checkpoints are full of
equal differences; here it is the first ones, or the last.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fusion.merge.lazy import counting, torch
from fusion.merge.methods.base import Block, Inputs

Keys = Callable[[Block], "torch.Tensor"]


@dataclass(frozen=True)
class Cut:
    """Elements above `threshold` are taken, and those equal to it at places `first` to `last`."""

    threshold: float
    first: int
    last: int

    def mask(self, keys_B: torch.Tensor, start: int) -> torch.Tensor:
        """Which of a block's elements are taken; `start` is the place of its first one."""
        end = start + keys_B.shape[0] - 1
        if self.first <= start and end <= self.last:
            return keys_B >= self.threshold
        taken = keys_B > self.threshold
        first, last = max(self.first, start) - start, min(self.last, end) - start
        if first <= last:
            taken[first : last + 1] |= keys_B[first : last + 1] == self.threshold
        return taken


def masks(cuts: Sequence[Cut], keys_RB: torch.Tensor, start: int) -> torch.Tensor:
    """Which elements of a block are taken, (R, B), by a cut for each row."""
    return torch.stack([cut.mask(row, start) for cut, row in zip(cuts, keys_RB, strict=True)])


class Histogram:
    """Counts that many threads add to, each in its own table."""

    def __init__(self, rows: int, buckets: int) -> None:
        self._shape, self._own, self._all = (rows, buckets), threading.local(), list[np.ndarray]()

    def mine(self) -> np.ndarray:
        """This thread's table, (rows, buckets) int64."""
        if not hasattr(self._own, "table"):
            self._own.table = np.zeros(self._shape, np.int64)
            self._all.append(self._own.table)
        return self._own.table

    def total(self) -> np.ndarray:
        """The sum over threads; whole numbers, so their order does not matter."""
        return np.sum(self._all, axis=0) if self._all else np.zeros(self._shape, np.int64)


def top(
    inputs: Inputs, keys: Keys, rows: int, count: Callable[[int], int] | Sequence[int], ties: str = "first"
) -> list[Cut]:
    """The cut that takes the `count` largest elements, for each of R rows of keys.

    `keys(block)` gives (R, B) float32 ≥ 0; it is asked two or three times. `count` is a number for each row, or is
    asked with the number of elements that are not 0. Of elements equal to the threshold the first are taken, or the
    last.
    """
    high = high_counts(inputs, keys, rows)
    zeros = high[:, -1]
    wanted = [count(inputs.numel - int(zero)) if callable(count) else count[row] for row, zero in enumerate(zeros)]
    tops, left = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    for row in range(rows):
        tops[row], left[row] = bucket(high[row, :-1], wanted[row])
    low = low_counts(inputs, keys, tops)
    cuts = []
    for row in range(rows):
        if wanted[row] <= 0 or inputs.numel == 0:
            cuts.append(Cut(float("inf"), 0, -1))
            continue
        bottom, needed = bucket(low[row], int(left[row]))
        threshold = from_bits(int(tops[row]) << 16 | bottom)
        limits = 0, inputs.numel - 1
        if needed < low[row, bottom]:
            limits = _places(inputs, keys, row, threshold, needed, ties)
        cuts.append(Cut(threshold, *limits))
    return cuts


def high_counts(inputs: Inputs, keys: Keys, rows: int) -> np.ndarray:
    """Counts of the high 16 bits of keys, (R, 32768), and last of all how many are 0: (R, 32769) int64."""
    found = Histogram(rows, 32769)

    def look(block: Block) -> None:
        bits = keys(block).view(torch.int32)
        if bits.is_cpu:
            counting.count_high(bits.numpy(), found.mine())
            return
        for row, table in zip(bits, found.mine(), strict=True):
            table[:-1] += torch.bincount(row >> 16, minlength=32768).cpu().numpy()
            table[-1] += row.numel() - int(row.count_nonzero())

    inputs.map(look)
    return found.total()


def low_counts(inputs: Inputs, keys: Keys, high: np.ndarray) -> np.ndarray:
    """Counts of the low 16 bits of the keys whose high bits are those given for their row, (R, 65536) int64."""
    found = Histogram(len(high), 65536)

    def look(block: Block) -> None:
        bits = keys(block).view(torch.int32)
        if bits.is_cpu:
            counting.count_low(bits.numpy(), high, found.mine())
            return
        for row, wanted, table in zip(bits, high.tolist(), found.mine(), strict=True):
            table += torch.bincount(row[row >> 16 == wanted] & 0xFFFF, minlength=65536).cpu().numpy()

    inputs.map(look)
    return found.total()


def bucket(histogram: np.ndarray, count: int) -> tuple[int, int]:
    """The bucket that holds the `count`-th largest entry, and how many are still wanted from that bucket."""
    from_top = np.cumsum(histogram[::-1])
    place = min(int(np.searchsorted(from_top, count)), len(histogram) - 1)
    above = int(from_top[place - 1]) if place else 0
    return len(histogram) - 1 - place, count - above


def from_bits(bits: int) -> float:
    """The float32 with these bits."""
    return float(np.array(bits, np.int32).view(np.float32))


def _places(inputs: Inputs, keys: Keys, row: int, threshold: float, needed: int, ties: str) -> tuple[int, int]:
    """The first and last place where elements equal to the threshold are taken, so that there are `needed` of them."""
    counts = inputs.map(lambda block: (block.start, int((keys(block)[row] == threshold).sum())))
    if ties == "last":
        counts.reverse()
    for start, found in counts:  # noqa: B007 - where it ends is the block wanted
        if found >= needed:
            break
        needed -= found

    def find(block: Block) -> int:
        places = (keys(block)[row] == threshold).nonzero().squeeze(1)
        return start + int(places[-needed] if ties == "last" else places[needed - 1])

    place = inputs.one(start, find)
    return (place, inputs.numel - 1) if ties == "last" else (0, place)
