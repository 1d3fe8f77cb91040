"""Samples + caches + maps → what a target learns at each position, and batches of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from fusion.align.project import mix
from fusion.align.projector import Projector
from fusion.capture.cache import Cache
from fusion.distill.gate import choose
from fusion.records import Rendered, Sample, Sparse
from fusion.tokens.batch import pad
from fusion.tokens.render import Renderer

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
        teacher: int64 (N,), number of the teacher heard, the first of several, -1 where the position is not taught.
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
        labels = rendered.ids[at + 1]
        parts: list[tuple[float, np.ndarray, Sparse]] = []
        speaking = [
            (n, t.name, t.projector)
            for n, t in enumerate(self.teachers)
            if t.name in weights and t.projector is not None
        ]
        k = self.k if len(speaking) < 2 else len(self.renderer.table)  # of several, the mean is cut and not its parts
        for number, name, projector in speaking:
            rows, taught = projector.project(heard[name], rendered.boundary[at], labels, k)
            parts.append((weights[name], rows, taught))
            teacher[rows] = np.where(teacher[rows] < 0, number, teacher[rows])
        taught = _mix(parts, labels, len(self.renderer.table), self.k)
        teacher[np.diff(taught.offsets) == 0] = -1
        return Example(rendered.ids, at, labels.astype(np.int64), teacher, taught)

    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return [len(r.ids) for r in self.rendered]


def _mix(parts: list[tuple[float, np.ndarray, Sparse]], labels: np.ndarray, width: int, k: int) -> Sparse:
    """The weighted mean, at each position, of the sources that teach it; its label is kept among the entries."""
    weights, shares = [], np.zeros(len(labels))
    for weight, rows, _ in parts:
        shares[rows] += weight
    for weight, rows, _ in parts:
        weights.append(weight / shares[rows])
    whole = Sparse.joined([taught for _, _, taught in parts])
    rows = np.concatenate([np.zeros(0, dtype=np.int64), *(rows for _, rows, _ in parts)])
    return mix(whole, rows, np.concatenate([np.zeros(0), *weights]), labels, width, k)


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
