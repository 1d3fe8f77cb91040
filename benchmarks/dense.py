"""The published way to learn from several sources, dense: the peer of the figures in distill.py.

Written anew from FuseLLM (Wan et al. 2401.10491) and the known behaviour of its code: the collator fills, position by
position, a (tokens × vocabulary) distribution for the pivot and one for each source; the loss compares whole logits
with the distribution whose source has the lowest cross-entropy on the sample. No more and no less work.
"""

from collections.abc import Sequence

import torch

Entries = list[tuple[list[int], list[float]]]  # of each position: ids and their probabilities


def target_of(entries: Entries, width: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """(T, V): entries scattered into zeros, a row a position."""
    rows = []
    for ids, probs in entries:
        row = torch.zeros(width, dtype=dtype)
        row.scatter_(0, torch.tensor(ids, dtype=torch.long), torch.tensor(probs, dtype=dtype))
        rows.append(row)
    return torch.stack(rows)


def collate(samples: Sequence[Sequence[Entries]], longest: int, width: int) -> list[torch.Tensor]:
    """For each of the sources, its distributions (B, T, V) on all samples, padded."""
    out = []
    for source in range(len(samples[0])):
        whole = torch.zeros((len(samples), longest, width), dtype=torch.bfloat16)
        for row, sample in enumerate(samples):
            said = target_of(sample[source], width)
            whole[row, : len(said)] = said
        out.append(whole)
    return out


def loss(
    logits_BTV: torch.Tensor,
    labels_BT: torch.Tensor,
    targets: Sequence[torch.Tensor],
    best: Sequence[int],
    label_weight: float,
) -> torch.Tensor:
    """λ·CE(label) + (1 − λ)·CE(best source), means over positions whose label is not −100."""
    width = logits_BTV.shape[-1]
    chosen = torch.stack([targets[source][row] for row, source in enumerate(best)])
    logits, labels = logits_BTV.float().view(-1, width), labels_BT.view(-1)
    taught = torch.nn.functional.cross_entropy(logits, chosen.view(-1, width).float(), reduction="none")
    said = torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
    counts = (labels >= 0).float()
    return (label_weight * said + (1 - label_weight) * taught * counts).sum() / counts.sum()
