"""Samples in the order of their ids, however many: what memory does not hold waits on disk in sorted files."""

import heapq
import itertools
import shutil
from collections.abc import Iterable
from operator import attrgetter
from pathlib import Path

from fusion.corpus import Corpus, group_size, write_samples
from fusion.records import Sample

_HELD = 256 << 20  # characters that memory holds
_OBJECTS = 500  # what a sample takes beside its characters
_OPEN = 128  # files that are read side by side
_GROUP = 64  # samples of each of them that memory holds


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
        self._files: list[list[Path]] = []  # of samples as they came; merged of such; merged of these; and so on
        self._count = self._written = self.bytes = 0

    def __len__(self) -> int:
        return self._count

    def add(self, sample: Sample) -> None:
        """One more."""
        self._waiting.append(sample)
        self._count += 1
        self.bytes += sum(sample.sizes())
        self._room -= _OBJECTS + len(sample.text or "") + sum(_OBJECTS + len(m.content) for m in sample.messages)
        if self._room < 0:
            self._put_aside(self._sorted(), 0)
            self._waiting, self._room = [], self._held

    def drop(self, sample: Sample) -> None:
        """Leave out one that was given."""
        self._dropped.add(sample.id)
        self._count -= 1
        self.bytes -= sum(sample.sizes())

    def write(self, path: Path) -> None:
        """All of them as a part of a prepared folder; afterwards none is held."""
        merged = heapq.merge(*map(_read, itertools.chain(*self._files)), self._sorted(), key=_ID)
        kept = (sample for sample in merged if sample.id not in self._dropped)
        write_samples(path, kept, group_size(self._count))
        self._waiting, self._files = [], []
        shutil.rmtree(self._folder, ignore_errors=True)

    def _sorted(self) -> list[Sample]:
        return sorted(self._waiting, key=_ID)

    def _put_aside(self, samples: Iterable[Sample], level: int) -> None:
        path = self._folder / f"{self._written}.parquet"
        self._written += 1
        self._folder.mkdir(parents=True, exist_ok=True)
        write_samples(path, samples, _GROUP)
        if level == len(self._files):
            self._files.append([])
        self._files[level].append(path)
        if len(self._files[level]) == _OPEN:
            merged, self._files[level] = self._files[level], []
            self._put_aside(heapq.merge(*map(_read, merged), key=_ID), level + 1)
            for path in merged:
                path.unlink()


def _read(path: Path) -> Corpus:
    return Corpus(path.parent, path.stem)


_ID = attrgetter("id")
