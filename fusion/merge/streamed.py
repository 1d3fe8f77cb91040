"""A tensor of all inputs as a method sees it, read from disk in stretches by a pool of threads."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fusion.merge.jobs import STORAGE, Job, View, numel
from fusion.merge.lazy import kernels, torch
from fusion.merge.methods.base import BLOCK, Block, Inputs, block_elements

T = TypeVar("T")
STRETCH = 2 * BLOCK  # elements a thread reads of each input at a time
HELD_BYTES = 256_000_000  # of a tensor's inputs; one that has more is read again for each pass
DEVICE_BLOCK = 1 << 23  # a GPU takes larger blocks: starting its operators is what small ones would cost


class Buffers:
    """Memory that a thread uses again for each tensor, so that the system need not clear new pages for all."""

    def __init__(self) -> None:
        self._own = threading.local()

    def arrays(self, purpose: str, sizes: Sequence[tuple[int, Any]]) -> list[NDArray[Any]]:
        """Arrays of so many elements of so many types; good until this thread asks again for the same purpose."""
        aligned = [-(-count * np.dtype(kind).itemsize // 64) * 64 for count, kind in sizes]
        memory = getattr(self._own, purpose, None)
        if memory is None or memory.nbytes < sum(aligned):
            setattr(self._own, purpose, None)  # the old memory goes before the new comes
            memory = np.empty(sum(aligned), np.uint8)
            setattr(self._own, purpose, memory)
        found, place = [], 0
        for (count, kind), size in zip(sizes, aligned, strict=True):
            found.append(memory[place : place + count * np.dtype(kind).itemsize].view(kind))
            place += size
        return found


class Streamed(Inputs):
    """The inputs of a job. With `hold` what was read stays in memory for the next pass, else it is read again."""

    def __init__(
        self,
        job: Job,
        pool: Executor,
        buffers: Buffers,
        *,
        hold: bool,
        seed: int = 0,
        surveyed: Any = None,
        device: str = "cpu",
    ) -> None:
        self.name, self.shape, self.models = job.name, job.shape, len(job.models)
        self.has_base, self.layer, self.layers = job.base is not None, job.layer, job.layers
        self.seed, self.surveyed, self.statistics_given = seed, surveyed, bool(job.statistics)
        self._job, self._pool, self._buffers, self._device = job, pool, buffers, device
        weights = [*([] if job.base is None else [job.base]), *job.models]
        alike = [view for view in job.statistics if view.shape == job.shape]
        self._rows: list[View] = [*weights, *(alike if len(alike) == len(job.statistics) else [])]
        self._wide = any(np.dtype(STORAGE[view.dtype]).itemsize > 2 for view in weights)
        self._looked_at = False  # every weight was seen to be finite
        self._held: list[NDArray[Any]] | None = None
        self._filled: set[int] = set()
        if hold:
            self._held = self._space("tensor", self.numel)

    def map(self, work: Callable[[Block], T], rows: bool = False) -> list[T]:
        block = self._block
        if rows:
            block = max(1, block // self.row) * self.row
        stretch = block * max(1, STRETCH // block)
        starts = range(0, self.numel, stretch)
        if self._held is not None and self._filled and self._filled != set(starts):
            self._filled = set(starts)  # read in other stretches, but read in full
        futures = [self._pool.submit(self._stretch, work, start, stretch, block) for start in starts]
        try:
            found = [result for future in futures for result in future.result()]
        finally:
            for future in futures:
                future.cancel()
        self._looked_at = True
        return found

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float64 if self._wide else torch.float32

    @property
    def _block(self) -> int:
        return block_elements(len(self._rows)) if self._device == "cpu" else DEVICE_BLOCK

    def one(self, start: int, work: Callable[[Block], T]) -> T:
        (found,) = self._stretch(work, start, self._block, self._block)
        return found

    def whole(self, index: int | None) -> torch.Tensor:
        place = 0 if index is None else self.has_base + index
        if self._held is None:
            return self._full(self._rows[place], finite=not self._looked_at).view(self.shape)
        if not self._looked_at:
            self.map(lambda block: None)
        stored = [row for rows in self._held for row in rows][place]
        tensor = _as_torch(stored, self._rows[place].dtype)
        return tensor.to(self._device, self._dtype, copy=True).view(self.shape)

    def statistic(self, index: int) -> torch.Tensor:
        view = self._job.statistics[index]
        return self._full(view, finite=True).view(view.shape)

    def _full(self, view: View, finite: bool) -> torch.Tensor:
        raw: NDArray[Any] = np.empty(numel(view.shape), STORAGE[view.dtype])
        list(self._pool.map(lambda at: view.read(at, raw[at : at + STRETCH]), range(0, raw.size, STRETCH)))
        tensor = _as_torch(raw, view.dtype).to(self._device, self._dtype)
        if finite and not _finite(tensor):
            raise _broken(view)
        return tensor

    def _stretch(self, work: Callable[[Block], T], start: int, length: int, block: int) -> list[T]:
        end = min(self.numel, start + length)
        stored = self._read(start, end)
        found = []
        for at in range(start, end, block):
            count = min(block, end - at)
            load = partial(self._numbers, stored, at - start, count)
            one = Block(at, count, load, self.has_base, self.models)
            if not self._looked_at:
                one.make()  # which is where they are looked at
            found.append(work(one))
        return found

    def _read(self, start: int, end: int) -> list[NDArray[Any]]:
        """A stretch of every input as it is stored; from memory if it was read before and is held."""
        if self._held is None:
            stored = self._space("stretch", end - start)
        else:
            stored = [rows[:, start:end] for rows in self._held]
        if self._held is None or start not in self._filled:
            for view, raw in zip(self._rows, (row for rows in stored for row in rows), strict=True):
                view.read(start, raw)
            self._filled.add(start)
        return stored

    def _space(self, purpose: str, count: int) -> list[NDArray[Any]]:
        """Memory for so many elements of each input: (R, count) where all are stored alike, else (1, count) each."""
        if len({view.dtype for view in self._rows}) == 1:
            sizes = [(len(self._rows) * count, STORAGE[self._rows[0].dtype])]
        else:
            sizes = [(count, STORAGE[view.dtype]) for view in self._rows]
        return [memory.reshape(-1, count) for memory in self._buffers.arrays(purpose, sizes)]

    def _numbers(self, stored: list[NDArray[Any]], start: int, count: int) -> NDArray[Any] | torch.Tensor:
        """Stored elements as numbers, (R, B), in memory that this thread uses again for the next block.

        ValueError for one that is not finite.
        """
        rows = len(self._rows)
        values: NDArray[Any] | torch.Tensor
        if self._device == "cpu":
            (memory,) = self._buffers.arrays("block", [(rows * count, np.float64 if self._wide else np.float32)])
            values = memory.reshape(rows, count)
        else:
            values = torch.empty(rows, count, dtype=self._dtype, device=self._device)
        place, finite = 0, True
        for raw in stored:
            part, into = raw[:, start : start + count], values[place : place + len(raw)]
            if isinstance(into, np.ndarray) and not self._wide and self._rows[place].dtype == "bfloat16":
                for row, target in zip(part, into, strict=True):
                    finite &= kernels.widen(row, target)
            else:
                numbers = torch.as_tensor(into)
                numbers.copy_(_as_torch(part, self._rows[place].dtype))
                finite &= self._looked_at or _finite(numbers)
            place += len(raw)
        if not finite:
            raise next(
                _broken(view) for view, row in zip(self._rows, values, strict=True) if not _finite(torch.as_tensor(row))
            )
        return values


def _as_torch(raw: NDArray[Any], dtype: str) -> torch.Tensor:
    tensor = torch.from_numpy(raw)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def _finite(values: torch.Tensor) -> bool:
    """One pass: the largest and smallest carry what is not finite."""
    if values.numel() == 0:
        return True
    low, high = torch.aminmax(values)
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _broken(view: View) -> ValueError:
    return ValueError(f"{view.source} holds a number that is not finite; that model, or statistic, is broken")
