"""All samples as one model reads them: rendered once, by all ranks together, and read from files that memory maps."""

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fusion import cluster
from fusion.corpus import Corpus
from fusion.records import Rendered, Sample
from fusion.tokens.render import Renderer

_FACTS = np.dtype(
    [
        ("id", "S16"),
        ("tokens", np.int64),
        ("taught", np.int64),  # positions that carry loss
        ("segments", np.int64),
        ("content_bytes", np.int64),
        ("lossy", np.bool_),
    ]
)
# of all samples, one after the other; a place within a sample is less than its bytes and gaps, which 32 bits hold
_ARRAYS = {
    "facts": _FACTS,
    "ids": np.dtype(np.int32),
    "boundary": np.dtype(np.int32),
    "carries": np.dtype(np.uint8),
    "sizes": np.dtype(np.int64),
}


class Texts:
    """Samples as one model reads them, by number; what a process holds of each is some forty bytes.

    Attributes:
        renderer: the model's.
        tokens: int64 (N,), token ids of each.
        taught: int64 (N,), how many of its positions carry loss.
    """

    def __init__(self, renderer: Renderer, arrays: Sequence[Mapping[str, np.ndarray]]):
        self.renderer = renderer
        self._parts = [_Part(part) for part in arrays]
        self._first = np.cumsum([0, *(len(part) for part in self._parts)])
        self.tokens: np.ndarray = np.concatenate([part.facts["tokens"] for part in self._parts])
        self.taught: np.ndarray = np.concatenate([part.facts["taught"] for part in self._parts])

    @staticmethod
    def of(samples: Iterable[Sample], renderer: Renderer) -> "Texts":
        """These samples, held in memory.

        Raises:
            ValueError: a chat that the template refuses, or that is not found in what it renders.
        """
        files = {name: BytesIO() for name in _ARRAYS}
        _render(samples, renderer, files)
        return Texts(renderer, [{name: np.frombuffer(files[name].getvalue(), t) for name, t in _ARRAYS.items()}])

    @staticmethod
    def shared(corpus: Corpus, renderer: Renderer, folder: Path) -> "Texts":
        """All of a corpus; every rank takes part, renders its share and reads that of the others.

        Args:
            folder: where all ranks write; what it holds is removed.

        Raises:
            ValueError: as `of`; or a rank does not see what another wrote.
        """
        cluster.on_main(lambda: _emptied(folder))  # what an older launch has open is no longer there to write to
        written = cluster.together(lambda: _write(corpus, renderer, folder))
        parts: list[dict[str, np.ndarray]] = []
        cluster.together(lambda: parts.extend(_read(folder, rank, sizes) for rank, sizes in enumerate(written)))
        return Texts(renderer, parts)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, n: int) -> Rendered:
        part, row = self._at(n)
        return part.rendered(row)

    def id(self, n: int) -> str:
        """The sample's id."""
        part, row = self._at(n)
        return bytes(part.facts["id"][row]).decode()

    def sizes(self, n: int) -> list[int]:
        """Bytes of each of its segments."""
        part, row = self._at(n)
        found: list[int] = part.sizes(row).tolist()
        return found

    def _at(self, n: int) -> "tuple[_Part, int]":
        part = int(np.searchsorted(self._first, n, side="right")) - 1
        return self._parts[part], n - int(self._first[part])


class _Part:
    """What one rank rendered."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self.facts = arrays["facts"]
        self._arrays = arrays
        self._tokens, self._segments = (
            np.concatenate([[0], np.cumsum(self.facts[name])]) for name in ("tokens", "segments")
        )

    def __len__(self) -> int:
        return len(self.facts)

    def rendered(self, n: int) -> Rendered:
        here = slice(self._tokens[n], self._tokens[n + 1])
        ids, boundary, carries = (self._arrays[name][here] for name in ("ids", "boundary", "carries"))
        facts = self.facts[n]
        return Rendered(ids, boundary.astype(np.int64), carries, int(facts["content_bytes"]), bool(facts["lossy"]))

    def sizes(self, n: int) -> np.ndarray:
        return self._arrays["sizes"][self._segments[n] : self._segments[n + 1]]


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write(corpus: Corpus, renderer: Renderer, folder: Path) -> dict[str, int]:
    """Render this rank's share; the bytes of each file."""
    groups = np.array_split(np.arange(corpus.groups), cluster.world())[cluster.rank()]
    with ExitStack() as opened:
        files = {name: opened.enter_context(_path(folder, name, cluster.rank()).open("wb")) for name in _ARRAYS}
        _render((sample for n in groups for sample in corpus.group(int(n))), renderer, files)
        return {name: file.tell() for name, file in files.items()}


def _render(samples: Iterable[Sample], renderer: Renderer, files: Mapping[str, BinaryIO]) -> None:
    for sample in samples:
        shown, sizes = renderer.render(sample), sample.sizes()
        id, taught = sample.id.encode(), np.count_nonzero(shown.carries)
        assert len(id) <= _FACTS["id"].itemsize
        facts = (id, len(shown.ids), taught, len(sizes), shown.content_bytes, shown.lossy)
        found = (facts, shown.ids, shown.boundary, shown.carries, sizes)
        for (name, dtype), values in zip(_ARRAYS.items(), found, strict=True):
            files[name].write(np.array(values, dtype).tobytes())


def _read(folder: Path, rank: int, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """A rank's arrays as they lie on disk, so that the ranks of a machine hold them once."""
    found = {}
    for name, dtype in _ARRAYS.items():
        path = _path(folder, name, rank)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != sizes[name]:
                raise ValueError(
                    f"{path}: has {size} bytes and {sizes[name]} were written; all ranks want one disk that they share"
                )
            # an empty file cannot be mapped; one that may be written to can be no larger than memory
            found[name] = np.memmap(file, dtype, mode="r").view(np.ndarray) if size else np.zeros(0, dtype)
    return found


def _path(folder: Path, name: str, rank: int) -> Path:
    return folder / f"{name}-{rank}"
