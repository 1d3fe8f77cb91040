"""Samples + caches + maps → what a target learns at each position, and batches of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.sparse import csr_array
from torch.utils.data import Dataset

from fusion.align.project import project
from fusion.align.spans import shared
from fusion.capture.cache import Cache
from fusion.distill.gate import choose
from fusion.records import Heard, Rendered, Sample, Sparse
from fusion.tokens.batch import pad
from fusion.tokens.render import Renderer

_MEMORY = 512 * 2**20  # bytes of finished examples that a rank keeps


@dataclass(frozen=True)
class Teacher:
    """A source as a target hears it: its cache and the map to the target's ids.

    Without a map it takes part in the gate and says nothing: a sample that it would win is left to its labels.
    """

    name: str
    cache: Cache
    matrix: csr_array | None


@dataclass(frozen=True, slots=True)
class Example:
    """A sample with T tokens, N of them to be learned.

    Attributes:
        ids: int32 (T,).
        at: int64 (N,), the positions that predict a token which carries loss.
        labels: int64 (N,), that token. This is the one place where labels shift.
        teacher: int64 (N,), number of the teacher heard most, -1 where the position is not taught.
        taught: N rows over the target's ids, empty where not taught.
    """

    ids: np.ndarray
    at: np.ndarray
    labels: np.ndarray
    teacher: np.ndarray
    taught: Sparse

    def nbytes(self) -> int:
        """Memory that the arrays take."""
        arrays = (self.at, self.labels, self.teacher, self.taught.offsets, self.taught.ids, self.taught.probs)
        return sum(array.nbytes for array in arrays)


class FusionDataset(Dataset):
    """Examples for one target, built when they are asked for.

    Args:
        samples: what to learn from; those longer than `context` are left out or refused, never cut.
        teachers: may be empty: labels alone.
        k: entries a position keeps.

    Raises:
        ValueError: a sample is longer than the context and `too_long` is `refuse`.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        renderer: Renderer,
        teachers: Sequence[Teacher],
        gate: Literal["min_ce", "all", "none"],
        k: int,
        context: int | None = None,
        too_long: Literal["refuse", "skip"] = "refuse",
    ):
        self.renderer, self.teachers, self.gate, self.k = renderer, list(teachers), gate, k
        self._built: dict[int, Example] = {}
        self._room = _MEMORY
        self.samples: list[Sample] = []
        self.rendered: list[Rendered] = []
        for sample in samples:
            rendered = renderer.render(sample)
            if context is not None and len(rendered.ids) > context:
                if too_long == "skip":
                    continue
                raise ValueError(
                    f"{renderer.name}: sample {sample.id} has {len(rendered.ids)} tokens and the context is {context}; "
                    "lower prepare.max_bytes or set distill.too_long: skip"
                )
            if rendered.carries.any():
                self.samples.append(sample)
                self.rendered.append(rendered)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, n: int) -> Example:
        example = self._built.get(n)
        if example is None:
            example = self._build(n)
            if example.nbytes() < self._room:  # what fits is built once and serves every epoch
                self._room -= example.nbytes()
                self._built[n] = example
        return example

    def _build(self, n: int) -> Example:
        rendered = self.rendered[n]
        at = np.flatnonzero(rendered.carries)
        heard = {t.name: h for t in self.teachers if (h := t.cache.get(self.samples[n].id)) is not None}
        weights = choose({name: h.bits_per_byte() for name, h in heard.items()}, self.gate)
        teacher = np.full(len(at), -1, dtype=np.int64)
        parts: list[tuple[float, np.ndarray, Sparse]] = []
        speaking = [(n, t, t.matrix) for n, t in enumerate(self.teachers) if t.name in weights and t.matrix is not None]
        k = self.k if len(speaking) < 2 else len(self.renderer.table)  # of several, the mean is cut and not its parts
        for number, source, matrix in speaking:
            rows, taught = _hear(heard[source.name], rendered.boundary[at], matrix, k)
            parts.append((weights[source.name], rows, taught))
            teacher[rows] = np.where(teacher[rows] < 0, number, teacher[rows])
        taught = _mix(parts, len(at), len(self.renderer.table), self.k)
        teacher[np.diff(taught.offsets) == 0] = -1
        return Example(rendered.ids, at, rendered.ids[at + 1].astype(np.int64), teacher, taught)

    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return [len(r.ids) for r in self.rendered]


def _hear(heard: Heard, places: np.ndarray, matrix: csr_array, k: int) -> tuple[np.ndarray, Sparse]:
    """The rows among `places` at which a source stands too, and what it says there in the target's ids."""
    source_at, rows = shared(heard.boundary, places)
    taught = project(heard.entries, source_at, matrix, k)
    counts = np.diff(taught.offsets)
    said = counts > 0  # a row that the map loses whole teaches nothing, and must not weigh in the mean of the others
    return rows[said], Sparse(np.append(0, np.cumsum(counts[said])), taught.ids, taught.probs)


def _mix(parts: list[tuple[float, np.ndarray, Sparse]], n: int, width: int, k: int) -> Sparse:
    """The weighted mean, at each of n positions, of the sources that teach it."""
    total, shares = csr_array((n, width)), np.zeros(n)
    for weight, rows, taught in parts:
        spread = np.zeros(n + 1, dtype=np.int64)
        spread[rows + 1] = np.diff(taught.offsets)
        total = total + weight * csr_array((taught.probs, taught.ids, np.cumsum(spread)), shape=(n, width))
        shares[rows] += weight
    scale = np.divide(1, shares, out=np.zeros(n), where=shares > 0)
    total = csr_array(total.multiply(scale[:, None]))
    whole = Sparse(total.indptr.astype(np.int64), total.indices.astype(np.int32), total.data.astype(np.float32))
    return whole if len(parts) < 2 else project(whole, np.arange(n), csr_array(_eye(width)), k)


def _eye(width: int) -> csr_array:
    each = np.arange(width)
    return csr_array((np.ones(width), (each, each)), shape=(width, width))


def collate(examples: Sequence[Example], label_weight: float) -> dict[str, torch.Tensor]:
    """A batch: (B, T) ids and mask, and for the N positions of all samples one after the other, what to learn.

    `rows` (N,) are their numbers among the B·T positions. Labels of different samples never meet.
    """
    ids, mask = pad([e.ids for e in examples])
    kept = np.concatenate([np.diff(e.taught.offsets) for e in examples])
    used = np.arange(max(int(kept.max(initial=0)), 1)) < kept[:, None]
    taught_ids = np.zeros(used.shape, dtype=np.int64)
    probs = np.zeros(used.shape, dtype=np.float32)
    taught_ids[used] = np.concatenate([e.taught.ids for e in examples])
    probs[used] = np.concatenate([e.taught.probs for e in examples])
    teacher = np.concatenate([e.teacher for e in examples])
    arrays = {
        "input_ids": ids,
        "attention_mask": mask,
        "rows": np.concatenate([row * ids.shape[1] + e.at for row, e in enumerate(examples)]),
        "labels": np.concatenate([e.labels for e in examples]),
        "taught_ids": taught_ids,
        "taught_probs": probs,
        "label_weight": np.where(teacher < 0, 1.0, label_weight).astype(np.float32),
        "teacher": teacher,
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
