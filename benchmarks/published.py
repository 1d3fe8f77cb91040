"""FuseLLM's and FuseChat's published alignment in plain Python, as its structure is: the peer of our speed figures.

Written anew from the papers and the known behaviour of their code (Wan et al. 2401.10491 and 2402.16107): a table
filled cell by cell, a C edit distance in each, Python loops over positions and entries. No more and no less work.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import editdistance
import numpy as np

from fusion.align.edit import replaced

Entries = list[tuple[list[int], list[float]]]  # of each position: ids, most probable first, and their logits


def cost_of(marks: tuple[str, str], method: str) -> Callable[[str, str], float]:
    """The cost of a cell: edit distance without space marks; for `fusechat` a tenth where one is part of the other."""

    def cost(source: str, target: str) -> float:
        one, two = source.replace(marks[0], ""), target.replace(marks[1], "")
        distance = editdistance.eval(one, two)
        if method == "fusechat" and (one in two or two in one):
            distance *= 0.1
        return distance

    return cost


def warp(source: Sequence[str], target: Sequence[str], cost: Callable[[str, str], float]) -> list[list[int]]:
    """Dynamic time warping of two token sequences.

    Returns:
        For each target position the source positions on the path, ascending.
    """
    table = np.zeros((len(source) + 1, len(target) + 1))
    table[0, 1:], table[1:, 0] = np.inf, np.inf
    for i, one in enumerate(source):
        for j, two in enumerate(target):
            table[i + 1, j + 1] = cost(one, two) + min(table[i, j + 1], table[i + 1, j], table[i, j])
    table = table[1:, 1:]
    i, j = len(source) - 1, len(target) - 1
    partners: list[list[int]] = [[] for _ in target]
    while i > 0 or j > 0:
        partners[j].append(i)
        diagonal = table[i - 1, j - 1] if i > 0 and j > 0 else np.inf
        up = table[i - 1, j] if i > 0 else np.inf
        left = table[i, j - 1] if j > 0 else np.inf
        step = int(np.argmin([diagonal, up, left]))
        i, j = i - (step != 2), j - (step != 1)
    partners[0].append(0)
    return [found[::-1] for found in partners]


def align_sample(
    source_tokenizer: Any,
    target_tokenizer: Any,
    source_ids: Sequence[int],
    target_ids: Sequence[int],
    entries: Entries,
    vocabulary: Mapping[str, int],
    mapping: Mapping[str, str],
    marks: tuple[str, str],
    method: str = "fusellm",
) -> Entries:
    """One sample's source logits in target ids.

    Args:
        source_tokenizer, target_tokenizer: of transformers.
        source_ids, target_ids: the sample as each reads it.
        entries: the source's top-k at each of its positions.
        vocabulary: the target's `get_vocab()`.
        mapping: source token with the target's mark → target token, see `min_edit`.
        marks: the source's and the target's space mark.
        method: `fusellm` or `fusechat`.

    Returns:
        Ids and logits at each target position; where it has not one fitting partner, its own token with a 1.
    """
    source = source_tokenizer.convert_ids_to_tokens(list(source_ids))
    target = target_tokenizer.convert_ids_to_tokens(list(target_ids))
    result: Entries = []
    for i, partners in enumerate(warp(source, target, cost_of(marks, method))):
        token = target[i]
        spelled = replaced(source[partners[0]], *marks)
        if method == "fusechat":
            fits = len(partners) == 1 and token in spelled
        else:
            fits = len(partners) == 1 and (token == spelled or mapping.get(spelled) == token)
        if not fits:
            result.append(([vocabulary[token]], [1.0]))
            continue
        ids: list[int] = []
        logits: list[float] = []
        for id, logit in zip(*entries[partners[0]], strict=True):
            found = mapping.get(replaced(source_tokenizer.convert_ids_to_tokens([id])[0], *marks))
            if found is not None and found in vocabulary and vocabulary[found] not in ids:
                ids.append(vocabulary[found])
                logits.append(logit)
        result.append((ids, logits))
    return result


def min_edit(source: Mapping[str, int], target: Mapping[str, int], marks: tuple[str, str]) -> dict[str, str]:
    """Each source token, its mark replaced, to the same or else the nearest target token.

    Args:
        source, target: vocabularies as `get_vocab()` gives them; of equally near tokens the first in this order wins.
        marks: the source's and the target's space mark.
    """
    result = {}
    for token in source:
        spelled = replaced(token, *marks)
        if spelled in target:
            result[spelled] = spelled
        else:
            result[spelled] = min(target, key=lambda other: editdistance.eval(spelled, other))
    return result
