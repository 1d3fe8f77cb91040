"""In which order samples are read: the same for any number of ranks."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

_PART = 1 << 16  # numbers that are Python's at a time: those take five times the room


class StepOrder(Sampler[int]):
    """A permutation of the samples for each epoch, in whole steps.

    An epoch whose last step lacks samples is filled up with numbers from `count` on, which stand for nothing: every
    rank then reads as many, and the step is the same for any number of them.

    Args:
        count: samples.
        batch_size: those of a step, all ranks together.
    """

    def __init__(self, count: int, batch_size: int, seed: int):
        self._count, self._seed, self._epoch = count, seed, 0
        self._steps = -(-count // batch_size)
        self._length = self._steps * batch_size

    def set_epoch(self, epoch: int) -> None:
        """Called by the loader before each."""
        self._epoch = epoch

    def go_on(self, step: int) -> None:
        """Take the epoch that a step, counted over all epochs, is in."""
        self._epoch = step // self._steps

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self._seed, self._epoch]).permutation(self._count)
        for start in range(0, self._count, _PART):
            yield from order[start : start + _PART].tolist()
        yield from range(self._count, self._length)
