"""The nearest token by edit distance, for whole vocabularies: FuseLLM's map (Wan et al. 2401.10491, `min_edit`)."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from fusion.compiled import compiled

_WORD = 64  # bits: strings up to this length are compared a whole column at a time
_CHUNK = 256  # strings that a thread takes at one time


@dataclass(frozen=True)
class Words:
    """Strings as flat arrays.

    Attributes:
        chars: int32 (total characters,), each character as a number below `alphabet`, the commonest one 0.
        offsets: int64 (n + 1,), string i is chars[offsets[i]:offsets[i + 1]].
        signs: uint64 (n,), the set of a string's characters, character c as bit c mod 64.
        alphabet: how many different characters there are.
    """

    chars: np.ndarray
    offsets: np.ndarray
    signs: np.ndarray
    alphabet: int


def spell(strings: Sequence[str]) -> Words:
    """Strings as flat arrays. A character is a code point, as in Python, lone surrogates included."""
    lengths = np.array([len(s) for s in strings], dtype=np.int64)
    points = np.frombuffer("".join(strings).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    known, at, counts = np.unique(points, return_inverse=True, return_counts=True)
    rank = np.empty(len(known), dtype=np.int32)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(known), dtype=np.int32)
    chars, offsets = rank[at], np.concatenate([[0], np.cumsum(lengths)])
    return Words(chars, offsets, _signs(chars, offsets), len(known))


def nearest(source: Sequence[str], target: Sequence[str], threads: int = 2) -> np.ndarray:
    """For each source string the target string of the smallest Levenshtein distance, of equals the first.

    The same as to compare each with each, bit for bit, with any number of threads. Most pairs are ruled out by a lower
    bound: a character of one that the other has not costs an edit (see `bound`); what is left is compared by Myers'
    bit-parallel algorithm (1999, in Hyyrö's form of 2003), given up once it is past the best.

    Args:
        source: n strings.
        target: m strings, the one looked for at equal distance before the others.
        threads: how many to use; the interpreter's lock is not held.

    Returns:
        int64 (n,), indices into `target`, -1 where it is empty.
    """
    first: dict[str, int] = {}
    for i, word in enumerate(target):
        first.setdefault(word, i)
    found = {word: first.get(word, -1) for word in source}
    missing = [word for word, i in found.items() if i < 0]
    if missing and first:
        kept, index = list(first), np.array(list(first.values()), dtype=np.int64)
        best = _search(spell([*kept, *missing]), len(kept), threads)
        found.update(zip(missing, index[best].tolist(), strict=True))
    return np.array([found[word] for word in source], dtype=np.int64)


def min_edit(
    source: Sequence[str | None], target: Sequence[str | None], marks: tuple[str, str], threads: int = 2
) -> csr_array:
    """Each source id to the target id of the same token string, else to that of the smallest edit distance.

    The published code takes the first of the nearest in the order of `get_vocab()`, which for fast tokenizers is that
    of a hash map and changes from process to process; here it is the smallest id. It also maps control tokens and
    compares with them; whether they take part is the caller's to say.

    Args:
        source: the token string of each source id, None for an id that takes no part.
        target: that of each target id, likewise.
        marks: the source's and the target's mark of a space (`▁`, `Ġ`); the first is replaced by the second. An
            empty source mark is left as it is.
        threads: as in `nearest`.

    Returns:
        (source ids, target ids), a single 1 in each row of a source id that takes part.
    """
    rows = np.array([i for i, word in enumerate(source) if word is not None], dtype=np.int64)
    ids = np.array([i for i, word in enumerate(target) if word is not None], dtype=np.int64)
    words = [replaced(word, *marks) for word in source if word is not None]
    at = nearest(words, [word for word in target if word is not None], threads)
    rows, at = rows[at >= 0], at[at >= 0]
    return csr_array((np.ones(len(rows)), (rows, ids[at])), shape=(len(source), len(target)))


def replaced(word: str, mark: str, other: str) -> str:
    """A token string with every space mark replaced."""
    return word.replace(mark, other) if mark else word


def _search(words: Words, targets: int, threads: int) -> np.ndarray:
    """For each word from number `targets` on, the nearest of those before."""
    lengths = np.diff(words.offsets)
    order = np.lexsort((np.arange(targets), lengths[:targets]))
    groups = np.searchsorted(lengths[order], np.arange(lengths.max() + 2))
    signs = words.signs[order]
    best = np.full(len(lengths) - targets, -1, dtype=np.int64)

    def part(start: int) -> None:
        stop = min(start + _CHUNK, len(best))
        _nearest(
            words.chars, words.offsets, words.signs, words.alphabet, targets, order, signs, groups, start, stop, best
        )

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, range(0, len(best), _CHUNK)))
    return best


@compiled
def _signs(chars: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    signs = np.zeros(len(offsets) - 1, dtype=np.uint64)
    for i in range(len(signs)):
        for c in chars[offsets[i] : offsets[i + 1]]:
            signs[i] |= np.uint64(1) << np.uint64(c % 64)
    return signs


@compiled
def bits(x: np.uint64) -> int:
    """How many bits are set; written as the compiler knows it for the machine's own instruction."""
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return int((x * np.uint64(0x0101010101010101)) >> np.uint64(56))


@compiled
def bound(a: np.uint64, b: np.uint64, length_a: int, length_b: int) -> int:
    """A lower bound of the edit distance of two strings from their signs and lengths.

    An alignment keeps at most those characters of each that the other has too, and each character of the longer string
    that is not kept costs an edit.
    """
    return max(length_a, length_b) - min(length_a - bits(a & ~b), length_b - bits(b & ~a))


@compiled
def _nearest(
    chars: np.ndarray,
    offsets: np.ndarray,
    signs: np.ndarray,
    alphabet: int,
    targets: int,
    order: np.ndarray,
    order_signs: np.ndarray,
    groups: np.ndarray,
    start: int,
    stop: int,
    best: np.ndarray,
) -> None:
    """Fill best[start:stop]. Targets are visited by length, from the nearest length outwards: `order`, `groups`."""
    masks = np.zeros(alphabet, dtype=np.uint64)
    for i in range(start, stop):
        word = chars[offsets[targets + i] : offsets[targets + i + 1]]
        length, sign = len(word), signs[targets + i]
        if length <= _WORD:
            for k in range(length):
                masks[word[k]] |= np.uint64(1) << np.uint64(k)
        least, at = 1 << 60, -1
        for step in range(2 * len(groups)):
            apart = (step + 1) // 2
            group = length + apart if step % 2 else length - apart
            if apart > least:
                break
            if group < 0 or group >= len(groups) - 1:
                continue
            for k in range(groups[group], groups[group + 1]):
                low = bound(sign, order_signs[k], length, group)
                if low > least or (low == least and order[k] > at):
                    continue
                other = chars[offsets[order[k]] : offsets[order[k] + 1]]
                found = _column(masks, length, other, least) if length <= _WORD else _cells(word, other, least)
                if found < least or (found == least and order[k] < at):
                    least, at = found, order[k]
        best[i] = at
        if length <= _WORD:
            for k in range(length):
                masks[word[k]] = 0


@compiled
def _column(masks: np.ndarray, length: int, other: np.ndarray, most: int) -> int:
    """Edit distance of a string of up to 64 characters, given as masks, to another; anything above `most` if above."""
    score, left = length, len(other)
    if length == 0:
        return left
    last = np.uint64(1) << np.uint64(length - 1)
    plus, minus, one = ~np.uint64(0), np.uint64(0), np.uint64(1)
    for c in other:
        equal = masks[c]
        down = equal | minus
        across = (((equal & plus) + plus) ^ plus) | equal
        up_step = minus | ~(across | plus)
        down_step = plus & across
        if up_step & last:
            score += 1
        elif down_step & last:
            score -= 1
        left -= 1
        if score - left > most:
            return score - left
        up_step = (up_step << one) | one
        down_step = down_step << one
        plus = down_step | ~(down | up_step)
        minus = up_step & down
    return score


@compiled
def _cells(a: np.ndarray, b: np.ndarray, most: int) -> int:
    """Edit distance cell by cell, for strings of any length; anything above `most` if above."""
    row = np.arange(len(b) + 1)
    for i in range(len(a)):
        corner, row[0] = row[0], i + 1
        least = row[0]
        for j in range(len(b)):
            value = min(corner + (a[i] != b[j]), row[j] + 1, row[j + 1] + 1)
            corner, row[j + 1] = row[j + 1], value
            least = min(least, value)
        if least > most:
            return least
    return row[len(b)]


@compiled
def distance(a: np.ndarray, b: np.ndarray) -> int:
    """Levenshtein distance of two strings of character numbers."""
    if len(a) > len(b):
        a, b = b, a
    if len(a) == 0:
        return len(b)
    if len(a) > _WORD:
        return _cells(a, b, len(a) + len(b))
    plus, minus, one = ~np.uint64(0), np.uint64(0), np.uint64(1)
    last, score = one << np.uint64(len(a) - 1), len(a)
    for c in b:
        equal = np.uint64(0)
        for k in range(len(a)):
            equal |= np.uint64(a[k] == c) << np.uint64(k)
        down = equal | minus
        across = (((equal & plus) + plus) ^ plus) | equal
        up_step = minus | ~(across | plus)
        down_step = plus & across
        score += int((up_step & last) != 0) - int((down_step & last) != 0)
        up_step = (up_step << one) | one
        down_step = down_step << one
        plus = down_step | ~(down | up_step)
        minus = up_step & down
    return score
