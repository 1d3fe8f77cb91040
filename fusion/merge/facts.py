"""What the report says of a tensor, counted block by block while it is merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusion.merge.jobs import Job, numel
from fusion.merge.lazy import kernels
from fusion.merge.methods import Block, Merged
from fusion.merge.pools import TensorReport


@dataclass(frozen=True)
class Facts:
    """What the report says of a block."""

    gram: Any  # (K, K) float64, None without a base
    moved: int
    conflicts: int
    kept: Sequence[int]
    erased: Sequence[int]

    @classmethod
    def of(cls, block: Block, kept: Sequence[int], erased: Sequence[int]) -> Facts:
        """Of a block, with what the method kept and erased of it."""
        if not block.has_base:
            return cls(None, 0, 0, kept, erased)
        if block.on_cpu:
            gram = np.empty((block.count, block.count))
            moved, conflicts = kernels.account(block.array, gram)
            if not np.isfinite(gram).all():  # the products of weights that large do not fit their type
                models = block.array[1 : 1 + block.count].astype(np.float64)
                models -= block.array[0]
                gram = models @ models.T
            return cls(gram, moved, conflicts, kept, erased)
        deltas = block.deltas
        up, down = (deltas > 0).any(0), (deltas < 0).any(0)
        moved, conflicts = int((up | down).sum()), int((up & down).sum())
        return cls(np.array((deltas @ deltas.T).tolist()), moved, conflicts, kept, erased)


def report(job: Job, merged: Merged, facts: list[Facts]) -> TensorReport:
    """What became of a tensor, from the facts of its blocks in order."""

    def summed(rows: list[Sequence[int]]) -> tuple[int, ...]:
        return tuple(sum(column) for column in zip(*rows, strict=True)) if rows and rows[0] else ()

    gram: tuple[tuple[float, ...], ...] = ()
    if job.base is not None:
        empty = np.zeros((len(job.models), len(job.models)))
        gram = tuple(map(tuple, sum((fact.gram for fact in facts), empty).tolist()))
    moved = sum(fact.moved for fact in facts)
    return TensorReport(
        job.name,
        numel(job.shape),
        job.bytes_to_read,
        job.layer,
        job.order,
        tuple(merged.weights),
        gram,
        moved,
        moved - sum(fact.conflicts for fact in facts),
        summed([fact.kept for fact in facts]),
        summed([fact.erased for fact in facts]),
    )
