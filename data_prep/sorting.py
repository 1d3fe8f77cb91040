"""Samples in the order of their ids, however many: what memory does not hold waits on disk in sorted files."""

import heapq
import shutil
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

from fusion.corpus import Corpus, write_samples
from fusion.records import Sample

_HELD = 256 << 20  # characters that memory holds
_OBJECTS = 500  # what a sample takes beside its characters


class Sorted:
    """Samples of distinct ids, given in any order and written in that of their ids.

    Args:
        folder: for what memory does not hold; what is there is removed.
        held: characters that memory holds.

    Attributes:
        bytes: what the samples' segments take.
    """

    def __init__(self, folder: Path, held: int = _HELD):
        self._folder, self._held, self._room = folder, held, held
        shutil.rmtree(folder, ignore_errors=True)
        self._waiting: list[Sample] = []
        self._dropped: set[str] = set()
        self._files = self._count = self.bytes = 0

    def __len__(self) -> int:
        return self._count

    def add(self, sample: Sample) -> None:
        """One more."""
        self._waiting.append(sample)
        self._count += 1
        self.bytes += sum(sample.sizes())
        self._room -= _OBJECTS + len(sample.text or "") + sum(_OBJECTS + len(m.content) for m in sample.messages)
        if self._room < 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_samples(self._folder / f"{self._files}.parquet", self._taken(), len(self._waiting))
            self._waiting, self._room, self._files = [], self._held, self._files + 1

    def drop(self, sample: Sample) -> None:
        """Leave out one that was given."""
        self._dropped.add(sample.id)
        self._count -= 1
        self.bytes -= sum(sample.sizes())

    def write(self, path: Path) -> None:
        """All of them as a part of a prepared folder; afterwards none is held."""
        files = [Corpus(self._folder, str(n)) for n in range(self._files)]
        merged = heapq.merge(*files, self._taken(), key=_ID)
        write_samples(path, (sample for sample in merged if sample.id not in self._dropped), self._count)
        self._waiting = []
        shutil.rmtree(self._folder, ignore_errors=True)

    def _taken(self) -> Iterator[Sample]:
        return iter(sorted(self._waiting, key=_ID))


_ID = attrgetter("id")
