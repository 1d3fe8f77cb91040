"""Distributions followed along the text, against a reference that spells everything out, and by hand."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from fusion.align import vocabulary
from fusion.align.follow import KNOWN, Follower
from fusion.align.map import Map
from fusion.align.spelling import Spelling
from fusion.align.trie import HIGH, LONGER, LOW, TOKEN, make_trie, walk
from fusion.records import Carries, Heard, Sparse
from fusion.tokens.bytes import Kind
from fusion.tokens.render import GAP


def spelling(*pieces: bytes, control: int = 0) -> Spelling:
    """A vocabulary: these pieces, and after them some control ids."""
    kinds = np.array([Kind.TEXT] * len(pieces) + [Kind.CONTROL] * control, dtype=np.uint8)
    offsets = np.cumsum([0, *(len(p) for p in pieces), *([0] * control)], dtype=np.int64)
    return Spelling(np.frombuffer(b"".join(pieces), dtype=np.uint8), offsets, kinds, repr(pieces))


def heard(steps: list[tuple[int, dict[int, float], float]], vocabulary: Spelling, start: int = 1) -> Heard:
    """A reading: (token that followed, entries, its probability) at each position, one after the other in the text."""
    ids = np.array([t for t, _, _ in steps], dtype=np.int32)
    sizes = vocabulary.lengths[ids]
    boundary = start + np.append(0, np.cumsum(sizes))[:-1]
    entries = Sparse(
        np.cumsum([0, *(len(e) for _, e, _ in steps)], dtype=np.int64),
        np.array([i for _, e, _ in steps for i in e], dtype=np.int32),
        np.array([p for _, e, _ in steps for p in e.values()], dtype=np.float32),
    )
    carries = np.where(sizes > 0, Carries.CONTENT, Carries.END).astype(np.uint8)
    return Heard(ids, boundary, carries, np.log([p for _, _, p in steps]).astype(np.float32), entries, 0)


def make_map(source: Spelling, target: Spelling, rows: dict[int, dict[int, float]], first: dict | None = None) -> Map:
    def matrix(told: dict, n: int) -> csr_array:
        full = np.zeros((n, len(target)))
        for i, row in told.items():
            for j, share in row.items():
                full[i, j] = share
        return csr_array(full)

    return Map(matrix(rows, len(source)), matrix(first or {}, len(target)), source, target)


def rows_of(said: Sparse) -> list[dict[int, float]]:
    return [
        {int(i): float(p) for i, p in zip(said.ids[a:b], said.probs[a:b], strict=True)}
        for a, b in zip(said.offsets[:-1], said.offsets[1:], strict=True)
    ]


def project(follower: Follower, reading: Heard, places: list[int], k: int = 99) -> dict[int, dict[int, float]]:
    keep = np.full(len(places), -1, dtype=np.int32)
    rows, said = follower.project(reading, np.array(places, dtype=np.int64), keep, k)
    return dict(zip(rows.tolist(), rows_of(said), strict=True))


# ---------------------------------------------------------------- the trie


@settings(max_examples=60)
@given(pieces=st.lists(st.binary(min_size=1, max_size=4).map(lambda b: bytes(c % 3 for c in b)), max_size=12))
def test_trie_against_every_token(pieces: list[bytes]) -> None:
    target = spelling(*pieces)
    trie = make_trie(target)
    assert [target.piece(i) for i in trie.ids] == sorted(pieces)
    assert (trie.ranks[trie.ids] == np.arange(len(pieces))).all()
    for text in {p[:n] for p in [*pieces, b"\0\1\2\0"] for n in range(len(p) + 1)}:
        node, longest = walk(
            trie.slots, trie.bits, trie.nodes, np.int64(0), np.int32(-1), np.frombuffer(text, np.uint8), 0, len(text)
        )
        begun = [p for p in pieces if p.startswith(text)]
        assert (node >= 0) == bool(begun or not text)
        if node >= 0:
            low, longer, high = (int(trie.nodes[node, n]) for n in (LOW, LONGER, HIGH))
            assert sorted(begun) == [target.piece(i) for i in trie.ids[low:high]]
            if text:
                assert longer - low == pieces.count(text)
                assert int(trie.nodes[node, TOKEN]) == (pieces.index(text) if text in pieces else -1)
        read = [p for p in pieces if text.startswith(p)]
        assert (longest >= 0) == bool(read)
        if read:
            assert target.piece(int(longest)) == max(read, key=len)


# ---------------------------------------------------------------- by hand

DIGITS = spelling(b"1", b"2", b"3", b" ", control=1)  # a source that reads digits apart; 4 ends a text
NUMBERS = spelling(b"1", b"2", b"12", b"123", b" ", b"3", control=1)
AVERAGE = {0: {0: 0.5, 2: 0.3, 3: 0.2}, 1: {1: 1.0}, 2: {5: 1.0}, 3: {4: 1.0}, 4: {6: 1.0}}


def test_a_number_is_followed_digit_by_digit() -> None:
    # the text is "12 ": after "1" the source expects 2 (0.8) or a space, after "12" a 3 (0.4) or a space
    reading = heard(
        [(0, {0: 0.5, 3: 0.5}, 0.5), (1, {1: 0.8, 3: 0.2}, 0.8), (3, {2: 0.4, 3: 0.6}, 0.6), (4, {4: 1.0}, 1.0)], DIGITS
    )
    follower = Follower(make_map(DIGITS, NUMBERS, AVERAGE), 4)
    found = project(follower, reading, [1, 3, 4])
    assert found[0] == pytest.approx({0: 0.5 * 0.2, 2: 0.5 * 0.8 * 0.6, 3: 0.5 * 0.8 * 0.4, 4: 0.5})
    assert found[1] == pytest.approx({4: 0.6, 5: 0.4})
    assert found[2] == pytest.approx({6: 1.0})  # the end of the text


def test_mass_that_was_not_kept_goes_by_the_row_as_far_as_it_agrees() -> None:
    reading = heard([(0, {3: 0.5}, 0.25), (1, {}, 0.5), (3, {3: 0.6}, 0.6)], DIGITS)
    found = project(Follower(make_map(DIGITS, NUMBERS, AVERAGE), 4), reading, [1])[0]
    # "1" is known to have 0.25 though it is not kept; half of that goes on with "2", 0.6 of which ends there
    row, agrees = {0: 0.5, 2: 0.3, 3: 0.2}, {2: 0.6, 3: 0.4}
    expected = {t: 0.25 * 0.5 * share for t, share in row.items()}
    for t, share in agrees.items():
        expected[t] += 0.25 * 0.5 * 0.4 * share
    expected[2] += 0.25 * 0.5 * 0.6
    assert found == pytest.approx({4: 0.5, **expected})
    assert sum(found.values()) == pytest.approx(0.75)


SPACES = spelling(b"    ", b"  x", b"  ", b"y")
SINGLE = spelling(b" ", b"x", b"y", b"  ")


def test_a_target_position_inside_a_source_token() -> None:
    rows = {0: {0: 1.0}, 1: {0: 1.0}, 2: {0: 1.0}, 3: {2: 1.0}}
    reading = heard([(0, {0: 0.5, 1: 0.2, 2: 0.1, 3: 0.2}, 0.5), (3, {3: 1.0}, 1.0)], SPACES)
    follower = Follower(make_map(SPACES, SINGLE, rows, {3: {0: 1.0}}), 4)
    found = project(follower, reading, [1, 2, 3, 4, 5])
    assert found[0] == pytest.approx({0: 0.8, 2: 0.2})
    # one space read: "y" is out; 0.8 is left, of which "  x" and "  " and "    " go on with a space
    assert found[1] == pytest.approx({0: 1.0})
    # two read: "    " goes on with a space and "  x" with an x; what follows "  " nobody asked
    assert found[2] == pytest.approx({0: 0.5 / 0.8, 1: 0.2 / 0.8})
    assert found[3] == pytest.approx({0: 1.0})
    assert found[4] == pytest.approx({2: 1.0})
    assert list(project(Follower(make_map(SPACES, SINGLE, rows), 4, inside=False), reading, [1, 2, 3, 4, 5])) == [0, 4]


def test_inside_a_token_that_was_hardly_expected_nobody_teaches() -> None:
    rows = {0: {0: 1.0}, 3: {2: 1.0}}
    few = heard([(0, {3: 0.6}, 0.05), (3, {3: 1.0}, 1.0)], SPACES)  # 0.35 unknown, 0.05 known to go on so
    assert list(project(Follower(make_map(SPACES, SINGLE, rows), 4), few, [1, 2, 5])) == [0, 2]


def test_inside_a_token_draws_do_not_give_the_label_away() -> None:
    """What no draw met is not impossible: else the token that followed, which is known exactly, would seem sure."""
    source, target = spelling(b"ab", b"ac", b"x"), spelling(b"a", b"b", b"c", b"x")
    rows = {0: {0: 1.0}, 1: {0: 1.0}, 2: {3: 1.0}}
    follower = Follower(make_map(source, target, rows, {1: {1: 1.0}, 2: {2: 1.0}}), 4)
    q, draws, random = np.array([0.05, 0.1, 0.85]), 20, np.random.default_rng(0)
    found: dict[str, list[float]] = {"grain": [], "no grain": []}
    for _ in range(2000):
        counts = random.multinomial(draws, q)
        grain = (1 - q[0]) / counts[1:].sum()
        said = {0: q[0], **{i: float(counts[i] * grain) for i in (1, 2) if counts[i]}}
        reading = heard([(0, said, q[0]), (2, {2: 1.0}, 1.0)], source)
        for name, told in (("grain", np.array([grain, 0], np.float32)), ("no grain", None)):
            row = project(follower, replace(reading, grain=told), [1, 2]).get(1)
            if row is not None:
                found[name].append(row.get(1, 0.0))
    # after "a" there is a "b" one time in three; rather too little of it is said, and the rest is left out
    assert 0.25 < np.mean(found["grain"]) < 1 / 3 and len(found["grain"]) == 2000
    assert np.mean(found["no grain"]) > 0.4


def test_nothing_is_read_beyond_a_gap() -> None:
    reading = heard([(0, {0: 0.5, 3: 0.5}, 0.5), (1, {1: 0.8, 3: 0.2}, 0.8), (3, {3: 1.0}, 1.0)], DIGITS)
    reading.boundary[1] = -1
    found = project(Follower(make_map(DIGITS, NUMBERS, AVERAGE), 4), reading, [-1, 1, 2])
    assert found == {1: pytest.approx({0: 0.25, 2: 0.15, 3: 0.1, 4: 0.5})}


def test_a_token_that_runs_over_its_segment_does_not_reach_the_next() -> None:
    # ")." ends a segment and runs over its end; GAP places on, another segment begins
    source, target = spelling(b").\n\n", b")", b"Hi"), spelling(b")", b".", b"\n", b"Hi")
    rows = {0: {0: 1.0}, 1: {0: 1.0}, 2: {3: 1.0}}
    reading = heard([(0, {0: 0.9}, 0.9), (2, {2: 0.5}, 0.5)], source)
    reading.boundary[1] = 1 + 2 + 1 + GAP + 1
    found = project(Follower(make_map(source, target, rows), 4), reading, [1, 2, 3, int(reading.boundary[1])])
    assert found == {0: pytest.approx({0: 0.9}), 3: pytest.approx({3: 0.5})}


def test_twenty_spaces_are_followed_to_their_end() -> None:
    pieces = [b" " * n for n in range(1, 31)]
    target = spelling(*pieces, b"x")
    source = spelling(b" ", b"x")
    rows = {0: {n: 1 / 30 for n in range(30)}, 1: {30: 1.0}}
    reading = heard([*[(0, {0: 1.0}, 1.0)] * 20, (1, {1: 1.0}, 1.0)], source)
    assert project(Follower(make_map(source, target, rows), 4), reading, [1])[0] == pytest.approx({19: 1.0})


def test_two_threads_and_a_mistake_between() -> None:
    follower = Follower(make_map(DIGITS, NUMBERS, AVERAGE), 4)
    steps = [
        (0, {0: 0.5, 3: 0.5}, 0.5),
        (1, {1: 0.8, 3: 0.2}, 0.8),
        (3, {2: 0.4, 3: 0.6}, 0.6),
        (4, {4: 1.0}, 1.0),
    ] * 50
    readings = [heard(steps[n:], DIGITS) for n in range(8)]
    expected = [project(follower, r, r.boundary.tolist()) for r in readings]
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(lambda n: project(follower, readings[n % 8], readings[n % 8].boundary.tolist()), range(64))
        )
    assert all(found[n] == expected[n % 8] for n in range(64))
    bad = heard(steps, DIGITS)
    bad.entries.probs[3] = np.nan
    with pytest.raises(ValueError, match="probabilities that are no numbers"):
        project(follower, bad, bad.boundary.tolist())
    assert project(follower, readings[0], readings[0].boundary.tolist()) == expected[0]


def test_half_precision_does_not_pass_one() -> None:
    source = spelling(b"a", b"b", b"c")
    same = Map(vocabulary.identity(3), csr_array((3, 3)), source, source)
    reading = heard([(2, {0: 0.6003, 1: 0.3, 2: 0.1}, 0.1)], source)  # 1.0003
    found = project(Follower(same, 4), reading, [1])[0]
    assert found[2] == pytest.approx(0.1) and sum(found.values()) == pytest.approx(1, abs=1e-6)


def test_what_was_impossible_teaches_nothing() -> None:
    rows = {0: {0: 1.0}, 3: {2: 1.0}}
    reading = heard([(0, {3: 1.0}, 1e-300), (3, {3: 1.0}, 1.0)], SPACES)
    reading.logp[0] = -np.inf
    follower = Follower(make_map(SPACES, SINGLE, rows), 4, known=0.0)
    assert project(follower, reading, [1, 2, 3, 5]) == {0: {2: 1.0}, 3: {2: 1.0}}


def test_the_label_is_kept_and_the_rest_by_size() -> None:
    source, target = spelling(b"a", b"b", b"c", b"d"), spelling(b"a", b"b", b"c", b"d")
    same = Map(vocabulary.identity(4), csr_array((4, 4)), source, target)
    reading = heard([(3, {0: 0.4, 1: 0.3, 2: 0.2}, 0.01)], source)
    for keep, kept in ((3, {0: 0.4, 3: 0.01}), (-1, {0: 0.4, 1: 0.3}), (1, {0: 0.4, 1: 0.3})):
        _, said = Follower(same, 4).project(reading, np.array([1]), np.array([keep], dtype=np.int32), 2)
        assert rows_of(said) == [pytest.approx(kept)]


def test_ids_beyond_the_vocabulary() -> None:
    follower = Follower(make_map(DIGITS, NUMBERS, AVERAGE), 4)
    padded = heard([(3, {3: 0.5, 77: 0.25}, 0.5)], DIGITS)
    assert project(follower, padded, [1]) == {0: {4: 0.5}}  # an entry of an embedding's padding is mass lost
    padded.ids[0] = 9
    with pytest.raises(ValueError, match="token id 9 is out of range: the vocabulary has 5 ids"):
        project(follower, padded, [1])


# ---------------------------------------------------------------- against a reference


def naive(map: Map, reading: Heard, place: int, inside: bool = True) -> dict[int, float] | None:
    """One position, with byte strings and dictionaries."""
    source, target = map.source, map.target
    spelled = {i: target.piece(i) for i in range(len(target)) if target.piece(i)}
    rows = [dict(zip(*part, strict=True)) for part in _sparse_rows(map.matrix)]
    first = [dict(zip(*part, strict=True)) for part in _sparse_rows(map.first)]
    result: dict[int, float] = {}
    p = np.exp(reading.logp.astype(np.float64))

    def put(i: int, mass: float) -> None:
        result[i] = result.get(i, 0.0) + mass

    def longest(text: bytes) -> int | None:
        best = [i for i, piece in spelled.items() if text.startswith(piece)]
        return max(best, key=lambda i: (len(spelled[i]), -i)) if best else None

    def settle(mass: float, text: bytes, row: dict[int, float] | None, over: bool = False) -> None:
        agree = {i: w for i, w in (row or {}).items() if spelled.get(i, b"").startswith(text)} if not over else {}
        if agree:
            for i, w in agree.items():
                put(i, mass * w / sum(agree.values()))
        elif (t := longest(text)) is not None:
            for i, w in (first[t] or {t: 1.0}).items():
                put(i, mass * w)

    def goes_on(text: bytes, row: dict[int, float] | None) -> bool:
        if not any(piece.startswith(text) and piece != text for piece in spelled.values()):
            return False
        agree = {i: w for i, w in (row or {}).items() if spelled.get(i, b"").startswith(text)}
        if agree:
            more = sum(w for i, w in agree.items() if spelled[i] != text)
            return more > 0.01 * sum(agree.values())
        return True

    def entries(n: int) -> dict[int, float]:
        part = slice(reading.entries.offsets[n], reading.entries.offsets[n + 1])
        return dict(zip(reading.entries.ids[part].tolist(), reading.entries.probs[part].tolist(), strict=True))

    before = [n for n in range(len(reading.ids)) if 0 <= reading.boundary[n] <= place]
    if not before:
        return None
    n = before[-1]
    read, t = place - int(reading.boundary[n]), int(reading.ids[n])
    piece, row, scale = source.piece(t), rows[t], 1.0
    if read == 0:
        for other, mass in entries(n).items():
            if other != t:
                for i, w in rows[other].items():
                    put(i, mass * w)
        if not piece:
            for i, w in row.items():
                put(i, p[n] * w)
            return result
    else:
        if not inside or read >= len(piece) or n + 1 == len(reading.ids):
            return None
        known, left, row = p[n], 1 - p[n] - sum(m for o, m in entries(n).items() if o != t), None
        for other, mass in entries(n).items():
            if other != t and source.piece(other).startswith(piece[:read]):
                known += mass
                if len(source.piece(other)) > read:
                    settle(mass, source.piece(other)[read:], None)
        left = max(left, 0)
        if known < KNOWN * (known + left):
            return None
        scale = (1 - left) / known
    text, mass = piece[read:], p[n]
    ended = False
    while not ended and goes_on(text, row) and n + 1 < len(reading.ids) and mass > 1e-4:
        n += 1
        t, kept = int(reading.ids[n]), entries(n)
        exact = text in spelled.values()
        rest = 1 - p[n]
        for other, q in kept.items():
            if other == t:
                continue
            rest -= q
            if source.piece(other):
                settle(mass * q, text + source.piece(other), row)
            else:
                settle(mass * q, text, row, over=exact)
        settle(mass * rest, text, row)
        mass *= p[n]
        ended = not source.piece(t)
        if ended and exact:
            row = {i: 1.0 for i in [longest(text)]}
        text += source.piece(t)
    settle(mass, text, row, over=ended and text in spelled.values())
    return {i: q * scale for i, q in result.items()}


def _sparse_rows(matrix: csr_array) -> list[tuple[list[int], list[float]]]:
    spans = zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True)
    return [(matrix.indices[a:b].tolist(), matrix.data[a:b].tolist()) for a, b in spans]


@settings(max_examples=150)
@given(seed=st.integers(0, 10**6))
def test_against_a_reference(seed: int) -> None:
    random = np.random.default_rng(seed)
    letters = [b"a", b"b"]

    def pieces(count: int) -> list[bytes]:
        made = {bytes(random.choice(np.frombuffer(b"ab", np.uint8), random.integers(2, 5))) for _ in range(count)}
        return [*letters, *sorted(made)]

    source, target = spelling(*pieces(6), control=1), spelling(*pieces(6), control=1)
    rows = {}
    for t in range(len(source) - 1):
        piece = source.piece(t)
        able = [
            i for i in range(len(target) - 1) if target.piece(i).startswith(piece) or piece.startswith(target.piece(i))
        ]
        chosen = random.choice(able, min(len(able), 3), replace=False)
        rows[t] = dict(zip(chosen.tolist(), random.dirichlet(np.ones(len(chosen))), strict=True))
    rows[len(source) - 1] = {len(target) - 1: 1.0}
    first = {i: {i: 0.75, 0: 0.25} for i in range(1, len(target) - 1, 2)}
    steps = []
    for n in range(8):
        t = len(source) - 1 if n == 7 else int(random.integers(len(source) - 1))
        probs = random.dirichlet(np.ones(len(source)))
        kept = random.choice(len(source), random.integers(1, len(source) + 1), replace=False)
        steps.append((t, {int(i): float(np.float32(probs[i])) for i in kept}, float(np.float32(probs[t]))))
    made, reading = make_map(source, target, rows, first), heard(steps, source)
    places = np.arange(0, int(reading.boundary[-1]) + 2)
    found = project(Follower(made, 99), reading, places.tolist())
    for n, place in enumerate(places.tolist()):
        expected = naive(made, reading, place)
        assert (n in found) == bool(expected)
        if expected:
            for i in {*found[n], *expected}:  # shares that are too small are not written down
                assert found[n].get(i, 0) == pytest.approx(expected.get(i, 0), abs=2e-4)
            assert sum(found[n].values()) <= 1 + 1e-5


def test_the_same_vocabulary_loses_nothing() -> None:
    random = np.random.default_rng(5)
    same = spelling(b"a", b"b", b"ab", b"ba", b"aab", b" ", control=1)
    steps = []
    for t in (2, 0, 0, 1, 3, 5, 4, 6):
        probs = random.dirichlet(np.ones(7)).astype(np.float32)
        kept = sorted(random.choice(7, 4, replace=False).tolist(), key=lambda i: -probs[i])
        steps.append((t, {i: float(probs[i]) for i in kept}, float(probs[t])))
    reading = heard(steps, same)
    follower = Follower(Map(vocabulary.identity(7), csr_array((7, 7)), same, same), 4)
    found = project(follower, reading, reading.boundary.tolist())
    for n, (t, kept, p) in enumerate(steps):
        assert found[n] == pytest.approx({**kept, t: p}, rel=1e-6)
