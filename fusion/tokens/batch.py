"""Token sequences of unlike length together in batches."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def by_length(items: Sequence[T], lengths: Sequence[int], budget: int) -> Iterator[list[T]]:
    """Items of like length together, longest first, at most `budget` tokens with padding, at least one item each."""
    batch: list[T] = []
    longest = 0
    for n in sorted(range(len(items)), key=lambda n: (-lengths[n], n)):
        if batch and longest * (len(batch) + 1) > budget:
            yield batch
            batch = []
        if not batch:
            longest = lengths[n]
        batch.append(items[n])
    if batch:
        yield batch


def pad(sequences: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and attention mask, int64 (B, T), filled with 0 at the right."""
    ids = np.zeros((len(sequences), max(len(s) for s in sequences)), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    return ids, mask
