"""Examples together in one batch: side by side, or packed with no sample seeing another."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from fusion.distill.dataset import Example

Packing = Literal["none", "rows", "flat"]


def bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Numbers of items in bins of a capacity that each item fits: first-fit decreasing (Johnson 1973)."""
    filled: list[list[int]] = []
    room: list[int] = []
    for n in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        place = next((b for b, left in enumerate(room) if left >= lengths[n]), None)
        if place is None:
            filled.append([])
            room.append(capacity)
            place = len(room) - 1
        filled[place].append(n)
        room[place] -= lengths[n]
    return filled


@dataclass
class Collator:
    """Examples → a batch.

    Attributes:
        packing: `none`, a row a sample; `rows`, rows as long as the longest sample, as few as will do; `flat`, one row
            of all, for attention that skips what it does not see (FlashAttention's variable lengths). Where one sample
            ends and the next begins `position_ids` start again at 0, and transformers cuts attention there; it does so
            only without an attention mask, and what fills a row at its right is after everything, so there is none.
        average: `tokens`, every position weighs alike; `samples`, every sample.
    """

    packing: Packing = "none"
    average: Literal["tokens", "samples"] = "tokens"

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """A batch: ids (B, T), and for the N positions of all samples one after the other, what to learn.

        `rows` (N,) are their numbers among the B·T positions, `sample` (N,) those of their samples; `tokens` counts
        what is no padding. Labels of different samples never meet.
        """
        lengths = [len(e.ids) for e in examples]
        width = sum(lengths) if self.packing == "flat" else max(lengths)
        packed = [[n] for n in range(len(examples))] if self.packing == "none" else bins(lengths, width)
        ids = np.zeros((len(packed), width), dtype=np.int64)
        places = np.zeros_like(ids)
        ordered, rows = [], []
        for row, members in enumerate(packed):
            start = 0
            for n in members:
                places[row, start:] = np.arange(width - start)  # padding goes on as its last sample's future
                ids[row, start : start + lengths[n]] = examples[n].ids
                ordered.append(examples[n])
                rows.append(row * width + start + examples[n].at)
                start += lengths[n]
        batch = {"input_ids": ids, "rows": np.concatenate(rows), **_taught(ordered, self.average)}
        if self.packing != "none":
            batch["position_ids"] = places
        batch["tokens"] = np.array(sum(n for n, e in zip(lengths, examples, strict=True) if len(e.at)))
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def _taught(examples: Sequence[Example], average: str) -> dict[str, np.ndarray]:
    """What is learned, as arrays over the positions of all examples."""
    kept = np.concatenate([np.diff(e.taught.offsets) for e in examples])
    used = np.arange(max(int(kept.max(initial=0)), 1)) < kept[:, None]
    taught_ids = np.zeros(used.shape, dtype=np.int64)
    probs = np.zeros(used.shape, dtype=np.float32)
    taught_ids[used] = np.concatenate([e.taught.ids for e in examples])
    probs[used] = np.concatenate([e.taught.probs for e in examples])
    sizes = [len(e.at) for e in examples]
    weights = np.ones(sum(sizes)) if average == "tokens" else np.repeat(1 / np.maximum(sizes, 1), sizes)
    return {
        "labels": np.concatenate([e.labels for e in examples]),
        "taught_ids": taught_ids,
        "taught_probs": probs,
        "confidence": np.concatenate([e.confidence for e in examples]),
        "teacher": np.concatenate([e.teacher for e in examples]),
        "weight": weights.astype(np.float32),
        "sample": np.repeat([e.number for e in examples], sizes),
    }
