"""The compiled part of `follow`: one position after the other, its mass collected by target id.

Arrays go one by one and not as records: a record is copied at every call that is not inlined.
"""

import numpy as np

from fusion.align.project import select
from fusion.align.trie import HIGH, LONGER, LOW, TOKEN, walk
from fusion.compiled import compiled

_SETTLED = 0.01  # a row whose longer tokens hold less of it than this is not followed any further
_NEGLIGIBLE = 1e-4  # nor is mass below this
_TINY = 1e-9  # less is not written down
_FAINT = 1e-5  # nor are shares of a row below this, largest first, of a token that did not follow


@compiled
def _put_row(mass, used, size, starts, columns, values, row, share):  # type: ignore[no-untyped-def]  # pragma: no cover
    for at in range(starts[row], starts[row + 1]):
        i = columns[at]
        if mass[i] == 0.0:
            used[size] = i
            size += 1
        mass[i] += share * values[at]
    return size


@compiled
def _first_at(columns, low, high, rank):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Where among columns[low:high] the ranks from `rank` on begin."""
    while low < high:
        middle = (low + high) // 2
        if columns[middle] < rank:
            low = middle + 1
        else:
            high = middle
    return low


@compiled
def _settle(mass, used, size, share, node, longest, row, rs, rc, rv, rr, fs, fc, fv, nodes, ids):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Give out a share whose bytes are at `node` (-1: no token goes on so; `longest` is the longest that was read).

    Tokens that go on beyond these bytes, or are these bytes, as W's row has them (rs, rc, rv, rr); else the longest
    token read, as the target cuts such a beginning (fs, fc, fv).
    """
    if share < _TINY:
        return size
    if node >= 0 and row >= 0:
        start = _first_at(rc, rs[row], rs[row + 1], nodes[node, LOW])
        stop = _first_at(rc, start, rs[row + 1], nodes[node, HIGH])
        whole = rr[stop] - rr[start]
        if stop > start:
            for at in range(start, stop):
                i = ids[rc[at]]
                if mass[i] == 0.0:
                    used[size] = i
                    size += 1
                mass[i] += share * rv[at] / whole
            return size
    if longest >= 0:
        if fs[longest + 1] > fs[longest]:
            size = _put_row(mass, used, size, fs, fc, fv, longest, share)
        else:
            if mass[longest] == 0.0:
                used[size] = longest
                size += 1
            mass[longest] += share
    return size


@compiled
def goes_on(node, row, rs, rc, rr, nodes):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Whether the target's token may well be longer than what is read."""
    if nodes[node, HIGH] <= nodes[node, LONGER]:
        return False
    if row >= 0:
        start = _first_at(rc, rs[row], rs[row + 1], nodes[node, LOW])
        exact = _first_at(rc, start, rs[row + 1], nodes[node, LONGER])
        stop = _first_at(rc, exact, rs[row + 1], nodes[node, HIGH])
        if stop > start:
            return rr[stop] - rr[exact] > _SETTLED * (rr[stop] - rr[start])
    return True


@compiled
def opens(ends, ranked, nodes):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """For each source token whether the target's may well be longer; bool (V,)."""
    rs, rc, _, rr = ranked
    found = np.zeros(len(ends), dtype=np.bool_)
    for t in range(len(ends)):
        found[t] = ends[t] >= 0 and goes_on(ends[t], t, rs, rc, rr, nodes)
    return found


@compiled
def fitted(tokens, follows, offsets, kept_ids, probs):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """What the entries of each position other than the token that followed are multiplied by, and what is left then.

    Entries are kept in half precision and the token that followed in full: their sum can pass 1 by a little. float64
    (n,) both.
    """
    scales, left = np.ones(len(tokens)), np.empty(len(tokens))
    for at in range(len(tokens)):
        others = 0.0
        for e in range(offsets[at], offsets[at + 1]):
            if kept_ids[e] != tokens[at]:
                others += probs[e]
        if others > 1.0 - follows[at]:
            scales[at] = (1.0 - follows[at]) / others
        left[at] = max(1.0 - follows[at] - others * scales[at], 0.0)
    return scales, left


@compiled
def follow(heard, entries, wanted, spelled, spread, ranked, first, trie, whole, bag, least, k):  # type: ignore[no-untyped-def]  # pragma: no cover
    """See `follow.Follower.project`; returns offsets of a row a place, ids and probabilities. `bag` is left clean."""
    tokens, places, follows, scales, left, grain = heard
    offsets, kept_ids, probs = entries
    targets, keep = wanted
    flat, ends = spelled
    ss, sc, sv = spread
    rs, rc, rv, rr = ranked
    fs, fc, fv = first
    slots, bits, nodes, children, ids = trie
    whole_node, whole_longest, whole_opens, heads = whole
    mass, used = bag
    known_ids = len(ends) - 1
    out_offsets = np.zeros(len(targets) + 1, dtype=np.int64)
    out_ids = np.empty(32 * len(targets) + 16, dtype=np.int32)
    out_probs = np.empty(len(out_ids), dtype=np.float32)
    others = np.empty(len(mass))
    at, ahead, filled = -1, 0, 0
    for n in range(len(targets)):
        out_offsets[n + 1] = filled
        if targets[n] < 0:
            continue
        while ahead < len(tokens) and places[ahead] <= targets[n]:
            if places[ahead] >= 0:
                at = ahead
            ahead += 1
        if at < 0:
            continue
        read, followed, size, scale = targets[n] - places[at], tokens[at], 0, 1.0
        length, share = ends[followed + 1] - ends[followed], follows[at]
        row, node, longest = np.int64(followed), whole_node[followed], whole_longest[followed]
        going = length > 0 and whole_opens[followed]
        if read == 0:
            for e in range(offsets[at], offsets[at + 1]):
                t, part = kept_ids[e], probs[e] * scales[at]
                if t != followed and t < known_ids and part > _TINY:
                    for m in range(ss[t], ss[t + 1]):  # as _put_row does: this is the innermost loop of all
                        if part * sv[m] < _FAINT:
                            break
                        i = sc[m]
                        if mass[i] == 0.0:
                            used[size] = i
                            size += 1
                        mass[i] += part * sv[m]
            if length == 0:
                if share > _TINY:
                    size = _put_row(mass, used, size, ss, sc, sv, followed, share)
                share = 0.0
        elif least <= 1 and read < length and at + 1 < len(tokens) and places[at + 1] == places[at] + length:
            known, row = share, np.int64(-1)
            for e in range(offsets[at], offsets[at + 1]):
                t, part = kept_ids[e], probs[e] * scales[at]
                if t == followed or t >= known_ids or ends[t + 1] - ends[t] < read:
                    continue
                agrees = True
                for b in range(read):
                    if flat[ends[t] + b] != flat[ends[followed] + b]:
                        agrees = False
                        break
                if not agrees:
                    continue
                known += part
                if ends[t + 1] - ends[t] > read:  # else the token ends here, and nobody asked what it is followed by
                    node, longest = walk(
                        slots, bits, nodes, np.int64(0), np.int32(-1), flat, ends[t] + read, ends[t + 1]
                    )
                    size = _settle(mass, used, size, part, node, longest, -1, rs, rc, rv, rr, fs, fc, fv, nodes, ids)
            if known < _TINY or known < least * (known + left[at] + grain[at]):
                for m in range(size):
                    mass[used[m]] = 0.0
                continue
            # of the mass that nobody knows as much may have led here as of the rest; of what no draw met, a draw more
            scale = 1.0 / (known / (1.0 - left[at]) + grain[at])
            node, longest = walk(
                slots, bits, nodes, np.int64(0), np.int32(-1), flat, ends[followed] + read, ends[followed + 1]
            )
            going = node >= 0 and nodes[node, HIGH] > nodes[node, LONGER]
        else:
            continue
        # the mass of the token that did follow, by the source's next steps
        now = at
        while going and share > _NEGLIGIBLE:
            after = now + 1
            if after >= len(tokens) or places[after] < 0 or places[after] != places[now] + length:
                break
            now, followed = after, tokens[after]
            length, exact = ends[followed + 1] - ends[followed], nodes[node, TOKEN]
            rest, over = left[now], 0.0
            for e in range(offsets[now], offsets[now + 1]):
                t, part = kept_ids[e], probs[e] * scales[now]
                if t == followed:
                    continue
                if t >= known_ids:
                    rest += part
                    continue
                head = heads[t]
                if head < 0 and exact < 0:  # the text ends here, and this is no token
                    rest += part
                    continue
                if head < 0 or not (children[node, head >> 6] >> np.uint64(head & 63)) & np.uint64(1):
                    over += part  # as most do: the text ends or a new word begins, the token is over
                    continue
                there, met = walk(slots, bits, nodes, node, longest, flat, ends[t], ends[t + 1])
                size = _settle(mass, used, size, share * part, there, met, row, rs, rc, rv, rr, fs, fc, fv, nodes, ids)
            size = _settle(mass, used, size, share * over, -1, longest, row, rs, rc, rv, rr, fs, fc, fv, nodes, ids)
            size = _settle(mass, used, size, share * rest, node, longest, row, rs, rc, rv, rr, fs, fc, fv, nodes, ids)
            share *= follows[now]
            if length == 0:  # the text ended here
                node = node if exact < 0 else np.int64(-1)
                break
            node, longest = walk(slots, bits, nodes, node, longest, flat, ends[followed], ends[followed + 1])
            going = node >= 0 and goes_on(node, row, rs, rc, rr, nodes)
        size = _settle(mass, used, size, share, node, longest, row, rs, rc, rv, rr, fs, fc, fv, nodes, ids)
        while filled + min(k, size) > len(out_ids):
            out_ids, out_probs = np.append(out_ids, out_ids), np.append(out_probs, out_probs)
        filled = select(mass, used, size, scale, k, keep[n], others, out_ids, out_probs, filled)
        for m in range(size):
            mass[used[m]] = 0.0
        out_offsets[n + 1] = filled
    return out_offsets, out_ids[:filled].copy(), out_probs[:filled].copy()
