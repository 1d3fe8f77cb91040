"""Samples + caches + maps → what a target learns at each position."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from torch.utils.data import Dataset

from fusion.align.project import mix
from fusion.align.projector import Projector
from fusion.capture.cache import Cache
from fusion.distill.cost import Segments, Tokens, by_segment, by_token
from fusion.distill.gate import Gating, choose, soft
from fusion.distill.texts import Texts
from fusion.records import Heard, Rendered, Sparse

_MEMORY = 512 * 2**20  # bytes of finished examples that a rank keeps


@dataclass(frozen=True)
class Teacher:
    """A source as a target hears it: its cache, and what turns that into the target's ids.

    Without a projector it takes part in the gate and says nothing: a sample that it would win is left to its labels.
    """

    name: str
    cache: Cache
    projector: Projector | None


@dataclass(frozen=True, slots=True)
class Example:
    """A sample with T tokens, N of them to be learned.

    Attributes:
        ids: int32 (T,).
        at: int64 (N,), the positions that predict a token which carries loss.
        labels: int64 (N,), that token. This is the one place where labels shift.
        teacher: int64 (N,), number of the teacher heard, of several the one that weighs most, -1 where the position is
            not taught.
        confidence: float32 (N,), how much of the sources' share of the loss the position gets, 0 where not taught.
        taught: N rows over the target's ids, empty where not taught.
        number: the sample's number in its dataset.
    """

    ids: np.ndarray
    at: np.ndarray
    labels: np.ndarray
    teacher: np.ndarray
    confidence: np.ndarray
    taught: Sparse
    number: int

    def nbytes(self) -> int:
        """Memory that the arrays take."""
        taught = (self.taught.offsets, self.taught.ids, self.taught.probs)
        return sum(array.nbytes for array in (self.at, self.labels, self.teacher, self.confidence, *taught))


class FusionDataset(Dataset):
    """Examples for one target, built when they are asked for.

    Args:
        texts: what to learn from; those longer than `context` are left out or refused, never cut.
        teachers: may be empty: labels alone.
        k: entries a position keeps.

    Raises:
        ValueError: a sample is longer than the context and `too_long` is `refuse`.
    """

    def __init__(
        self,
        texts: Texts,
        teachers: Sequence[Teacher],
        gating: Gating,
        k: int,
        context: int | None = None,
        too_long: Literal["refuse", "skip"] = "refuse",
    ):
        self.teachers, self.gating, self.k = list(teachers), gating, k
        self.renderer = texts.renderer
        self._texts = texts
        self._built: dict[int, Example] = {}
        self._room = _MEMORY
        long = texts.tokens > (np.inf if context is None else context)
        if too_long == "refuse" and long.any():
            first = int(long.argmax())
            raise ValueError(
                f"{texts.renderer.name}: sample {texts.id(first)} has {texts.tokens[first]} tokens and the context is "
                f"{context}; lower prepare.max_bytes or set distill.too_long: skip"
            )
        self._numbers = np.flatnonzero(~long & (texts.taught > 0))

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, n: int) -> Example:
        """Example n; numbers beyond the last have nothing to learn: they fill up a step."""
        if n >= len(self):
            return _EMPTY
        example = self._built.get(n)
        if example is None:
            example = self._build(n)
            if example.nbytes() < self._room:  # what fits is built once and serves every epoch
                self._room -= example.nbytes()
                self._built[n] = example
        return example

    def share_memory(self, workers: int) -> None:
        """Each of so many processes that read this dataset keeps its part of the finished examples."""
        self._room = _MEMORY // max(workers, 1)

    def _build(self, n: int) -> Example:
        rendered = self.rendered(n)
        at = np.flatnonzero(rendered.carries)
        labels = rendered.ids[at + 1]
        said = [t.cache.get(self.id(n)) for t in self.teachers]
        weights, confidence = self._weigh(n, rendered, said)
        parts: list[tuple[np.ndarray, np.ndarray, Sparse]] = []
        speaking = [
            (number, heard, teacher.projector)
            for number, (teacher, heard) in enumerate(zip(self.teachers, said, strict=True))
            if heard is not None and teacher.projector is not None and weights[number].any()
        ]
        alone = not speaking or (weights[[number for number, _, _ in speaking]] > 0).sum(0).max(initial=0) < 2
        k = self.k if alone else len(self.renderer.table)  # of several, the mean is cut and not its parts
        teacher, most, share = np.full(len(at), -1), np.zeros(len(at)), np.zeros(len(at))
        for number, heard, projector in speaking:
            rows, taught = projector.project(heard, rendered.boundary[at], labels, k)
            wanted = weights[number, rows] > 0
            rows, taught = rows[wanted], taught.rows(wanted)
            parts.append((weights[number, rows], rows, taught))
            share[rows] += confidence[number, rows]
            more = rows[weights[number, rows] > most[rows]]
            teacher[more], most[more] = number, weights[number, more]
        taught = _mix(parts, labels, len(self.renderer.table), self.k)
        silent = np.diff(taught.offsets) == 0
        teacher[silent], share[silent] = -1, 0
        heard_by = np.minimum(share, 1).astype(np.float32)
        return Example(rendered.ids, at, labels.astype(np.int64), teacher.astype(np.int64), heard_by, taught, n)

    def _weigh(self, n: int, rendered: Rendered, said: Sequence[Heard | None]) -> tuple[np.ndarray, np.ndarray]:
        """Each source's weight, and its part of the confidence, at each position: float64 (S, N) both."""
        gating, positions = self.gating, int(np.count_nonzero(rendered.carries))
        if gating.gate == "none" or not said:
            return np.zeros((len(said), positions)), np.zeros((len(said), positions))
        unit = np.zeros(positions, dtype=np.int64)
        if gating.level == "sample":
            costs = [np.array([np.nan if h is None else h.bits(gating.unit)]) for h in said]
        else:
            segments = Segments.of(self._texts.sizes(int(self._numbers[n])))
            tokens = Tokens.of(rendered, segments)
            unit = tokens.segment if gating.level == "segment" else np.arange(positions)
            count = len(segments.first) if gating.level == "segment" else positions
            cost = by_segment if gating.level == "segment" else partial(by_token, tokens=tokens)
            costs = [np.full(count, np.nan) if h is None else cost(h, segments) for h in said]
        bits = np.stack(costs)
        names = [t.name for t in self.teachers]
        weights = choose(bits, gating.gate, gating.temperature, gating.fixed, names)
        shares = soft(bits, gating.temperature) if gating.confident else (weights > 0).astype(np.float64)
        return weights[:, unit], shares[:, unit]

    def id(self, n: int) -> str:
        """The id of sample n."""
        return self._texts.id(int(self._numbers[n]))

    def rendered(self, n: int) -> Rendered:
        """Sample n as the target reads it."""
        return self._texts[int(self._numbers[n])]

    def lengths(self) -> np.ndarray:
        """int64 (N,), tokens of each sample."""
        found: np.ndarray = self._texts.tokens[self._numbers]
        return found


_NONE = np.zeros(0, dtype=np.int64)
_EMPTY = Example(
    np.zeros(1, dtype=np.int32),
    *(_NONE, _NONE, _NONE),
    np.zeros(0, dtype=np.float32),
    Sparse(np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.float32)),
    -1,
)


def _mix(parts: list[tuple[np.ndarray, np.ndarray, Sparse]], labels: np.ndarray, width: int, k: int) -> Sparse:
    """The weighted mean, at each position, of the sources that teach it; its label is kept among the entries.

    Args:
        parts: of each source, its weight at those positions that it teaches, their numbers, and what it says there.
    """
    shares = np.zeros(len(labels))
    for weights, rows, _ in parts:
        shares[rows] += weights
    scaled = [np.zeros(0), *(weights / shares[rows] for weights, rows, _ in parts)]
    whole = Sparse.joined([taught for _, _, taught in parts])
    rows = np.concatenate([np.zeros(0, dtype=np.int64), *(rows for _, rows, _ in parts)])
    return mix(whole, rows, np.concatenate(scaled), labels, width, k)
