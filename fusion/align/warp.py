"""Dynamic time warping of two token sequences by edit distance: the whole table, or only stretches between anchors."""

import numpy as np

from fusion.align.edit import Words, distance
from fusion.compiled import compiled

_ROWS = 64  # rows of the table that are solved side by side
_LANES = 8  # words that one word is compared with side by side
_FAR = 1 << 28  # more than any path costs
_UP, _LEFT = 1, 2  # steps back; 0 is the diagonal


def warp(
    words: Words,
    source: np.ndarray,
    target: np.ndarray,
    parts: bool,
    anchors: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The source positions that the cheapest path pairs with each target position: always a range.

    D[i, j] = cost(i, j) + min(D[i-1, j-1], D[i-1, j], D[i, j-1]), read back from the end; of equal predecessors the
    diagonal is taken, then the source's. Equal to the plain loops to the last position: whole costs are summed as
    integers, tenths as the same floats in the same order. Takes n · m bytes.

    Args:
        words: the distinct strings.
        source: int64 (n,), the word at each source position.
        target: int64 (m,), the word at each target position.
        parts: FuseChat's cost, a tenth where one word is part of the other.
        anchors: ascending positions in both where the same bytes have been read; each stretch from one to the next is
            then solved by itself, in linear time: another path than that of the whole table, which need not pass them.

    Returns:
        first and stop, int64 (m,): target position j is paired with the source positions first[j] to stop[j] - 1.

    Raises:
        ValueError: one sequence is empty and the other not.
    """
    n, m = len(source), len(target)
    if not n and not m:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    if not n or not m:
        raise ValueError(f"cannot pair {n} source tokens with {m} target tokens")
    if anchors is not None:
        low, high = _windows(n, m, *anchors)
        starts = np.concatenate([[0], np.cumsum(high - low)])
        zero = 0.0 if parts else 0
        steps = _stretches(words.chars, words.offsets, source, target, zero, low, high, starts)
        return _back(steps, starts[:-1] - low, np.ones(n, dtype=np.int64), m)
    classes, rows = np.unique(source, return_inverse=True)
    others, columns = np.unique(target, return_inverse=True)
    lengths = np.diff(words.offsets)[others]
    order = np.argsort(lengths, kind="stable")
    costs = _distances(words.chars, words.offsets, words.alphabet, classes, others[order])
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    if parts:
        costs = _tenths(words.chars, words.offsets, words.signs, classes, others[order], costs)
    steps = _table(costs, rows, place[columns])
    lanes, strips = np.arange(n) % _ROWS, np.arange(n) // _ROWS
    return _back(steps, (strips * (m + _ROWS - 1) + lanes) * _ROWS + lanes, np.full(n, _ROWS), m)


def _windows(n: int, m: int, at_source: np.ndarray, at_target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The columns low[i] to high[i] - 1 of each row: blocks that touch at corners, where the path has to pass."""
    inner = (at_source < n - 1) & (at_target < m - 1)  # what follows the last of these is one stretch
    rows = np.append(at_source[inner], n - 1)
    columns = np.append(at_target[inner], m - 1)
    at = np.searchsorted(rows, np.arange(n))
    return np.append(0, columns + 1)[at], columns[at] + 1


@compiled
def contained(short: np.ndarray, long: np.ndarray) -> bool:
    """Whether one string of character numbers is a substring of another."""
    for start in range(len(long) - len(short) + 1):
        k = 0
        while k < len(short) and short[k] == long[start + k]:
            k += 1
        if k == len(short):
            return True
    return False


@compiled
def _distances(
    chars: np.ndarray, offsets: np.ndarray, alphabet: int, classes: np.ndarray, others: np.ndarray
) -> np.ndarray:
    """Edit distances, int32 (classes, others + 1), the last column 0; `others` by length, shortest first.

    Myers' algorithm as in `edit.py`, one word against eight at a time, in loops that compile to vector instructions.
    """
    count = len(others)
    blocks = (count + _LANES - 1) // _LANES
    lengths = np.zeros(blocks * _LANES, dtype=np.int64)
    for k in range(count):
        lengths[k] = offsets[others[k] + 1] - offsets[others[k]]
    starts = np.zeros(blocks + 1, dtype=np.int64)
    for block in range(blocks):
        starts[block + 1] = starts[block] + lengths[block * _LANES : (block + 1) * _LANES].max()
    text = np.full((starts[blocks], _LANES), alphabet, dtype=np.int64)  # a block's words side by side
    for k in range(count):
        for at in range(lengths[k]):
            text[starts[k // _LANES] + at, k % _LANES] = chars[offsets[others[k]] + at]
    one = np.uint64(1)
    masks = np.zeros(alphabet + 1, dtype=np.uint64)
    plus, minus = np.empty(_LANES, dtype=np.uint64), np.empty(_LANES, dtype=np.uint64)
    equal, score = np.empty(_LANES, dtype=np.uint64), np.empty(_LANES, dtype=np.int64)
    result = np.zeros((len(classes), count + 1), dtype=np.int32)
    for row in range(len(classes)):
        word = chars[offsets[classes[row]] : offsets[classes[row] + 1]]
        size = len(word)
        if size == 0 or size > 64:
            for k in range(count):
                result[row, k] = distance(word, chars[offsets[others[k]] : offsets[others[k] + 1]])
            continue
        for k in range(size):
            masks[word[k]] |= one << np.uint64(k)
        last = np.uint64(size - 1)
        for block in range(blocks):
            plus[:], minus[:], score[:] = ~np.uint64(0), np.uint64(0), size
            ends = lengths[block * _LANES : (block + 1) * _LANES]
            for at in range(starts[block + 1] - starts[block]):
                line = text[starts[block] + at]
                for k in range(_LANES):
                    equal[k] = masks[line[k]]
                for k in range(_LANES):
                    down = equal[k] | minus[k]
                    across = (((equal[k] & plus[k]) + plus[k]) ^ plus[k]) | equal[k]
                    up_step = minus[k] | ~(across | plus[k])
                    down_step = plus[k] & across
                    change = np.int64((up_step >> last) & one) - np.int64((down_step >> last) & one)
                    score[k] += change if at < ends[k] else 0
                    up_step = (up_step << one) | one
                    plus[k] = (down_step << one) | ~(down | up_step)
                    minus[k] = up_step & down
            for k in range(min(_LANES, count - block * _LANES)):
                result[row, block * _LANES + k] = score[k]
        for k in range(size):
            masks[word[k]] = 0
    return result


@compiled
def _tenths(
    chars: np.ndarray,
    offsets: np.ndarray,
    signs: np.ndarray,
    classes: np.ndarray,
    others: np.ndarray,
    distances: np.ndarray,
) -> np.ndarray:
    """FuseChat's cost, float64: a tenth of the distance where one word is part of the other."""
    result = distances.astype(np.float64)
    for row in range(len(classes)):
        a = classes[row]
        one = chars[offsets[a] : offsets[a + 1]]
        for k in range(len(others)):
            b = others[k]
            extra, lack = signs[a] & ~signs[b], signs[b] & ~signs[a]
            if extra == 0 or lack == 0:
                two = chars[offsets[b] : offsets[b + 1]]
                if contained(one, two) if len(one) <= len(two) else contained(two, one):
                    result[row, k] *= 0.1
    return result


@compiled
def _table(costs: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Solve the whole table; returns the step back from each cell.

    A strip of rows at a time, each one column behind the one above: such cells do not wait for one another, and the
    inner loops compile to vector instructions. The step of row `strip * _ROWS + lane` and column j is at (strip,
    j + lane, lane). Cells beside the table cost nothing (the last column of `costs`) and stay far on its left.
    """
    n, m = len(rows), len(columns)
    strips, turns = (n + _ROWS - 1) // _ROWS, m + _ROWS - 1
    steps = np.empty(strips * turns * _ROWS, dtype=np.uint8)
    flat, wide = costs.ravel(), costs.shape[1]
    far = costs[0, wide - 1] + costs.dtype.type(_FAR)
    column = np.full(m + 2 * _ROWS, wide - 1, dtype=np.int64)  # from the last to the first: lanes read it forwards
    column[_ROWS : _ROWS + m] = columns[::-1]
    above = np.full(turns + 1, far)  # the row above the strip, from column -1
    above[0] = costs[0, wide - 1]
    base, pay = np.zeros(_ROWS, dtype=np.int64), np.full(_ROWS, far)
    old, last, new = np.full(_ROWS + 1, far), np.full(_ROWS + 1, far), np.full(_ROWS + 1, far)  # lane + 1
    for strip in range(strips):
        for lane in range(_ROWS):
            base[lane] = rows[min(strip * _ROWS + lane, n - 1)] * wide
        old[:], last[:] = far, far
        for turn in range(turns):
            old[0], last[0] = above[turn], above[turn + 1]
            at, behind = (strip * turns + turn) * _ROWS, column[_ROWS + m - 1 - turn :]
            for lane in range(_ROWS):
                pay[lane] = flat[base[lane] + behind[lane]]
            step, before, fresh = steps[at : at + _ROWS], last[1:], new[1:]
            for lane in range(_ROWS):
                corner, up, left = old[lane], last[lane], before[lane]
                least = up if up < left else left
                step[lane] = np.uint8(corner > least) * (np.uint8(1) + np.uint8(up > left))
                fresh[lane] = pay[lane] + (corner if corner < least else least)
            if turn >= _ROWS - 1:
                above[turn - _ROWS + 2] = new[_ROWS]
            old, last, new = last, new, old
        above[0] = far
    return steps


@compiled
def _stretches(
    chars: np.ndarray,
    offsets: np.ndarray,
    source: np.ndarray,
    target: np.ndarray,
    zero: float,
    low: np.ndarray,
    high: np.ndarray,
    starts: np.ndarray,
) -> np.ndarray:
    """Solve the columns low[i] to high[i] - 1 of each row i, all else far; tenths if `zero` is a float."""
    steps = np.empty(starts[-1], dtype=np.uint8)
    far = zero + _FAR
    line = np.full(len(target) + 1, far)  # element j + 1: the row above at column j, until this row has overwritten it
    line[0] = zero
    for i in range(len(source)):
        corner, before = line[low[i]], far
        line[low[i]] = far
        one = chars[offsets[source[i]] : offsets[source[i] + 1]]
        for j in range(low[i], high[i]):
            cost = zero
            if source[i] != target[j]:
                two = chars[offsets[target[j]] : offsets[target[j] + 1]]
                cost += distance(one, two)
                if isinstance(zero, float) and (contained(one, two) if len(one) <= len(two) else contained(two, one)):
                    cost *= 0.1
            above = line[j + 1]
            least = min(above, before)
            steps[starts[i] + j - low[i]] = (corner > least) * (1 + (above > before))
            before = cost + min(corner, least)
            corner, line[j + 1] = above, before
    return steps


@compiled
def _back(steps: np.ndarray, start: np.ndarray, stride: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Read the path back; the step of cell (i, j) is steps[start[i] + j * stride[i]]."""
    first, stop = np.zeros(columns, dtype=np.int64), np.zeros(columns, dtype=np.int64)
    i, j = len(start) - 1, columns - 1
    stop[j] = i + 1
    while True:
        first[j] = i
        if i == 0 and j == 0:
            return first, stop
        step = steps[start[i] + j * stride[i]]
        if step != _LEFT:
            i -= 1
        if step != _UP:
            j -= 1
            stop[j] = i + 1
