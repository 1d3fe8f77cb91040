"""Places that meet, maps between vocabularies and projections, against dense and quadratic references."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from scipy.sparse import csr_array

from fusion.align import report, vocabulary
from fusion.align.map import Map
from fusion.align.project import mix, project
from fusion.align.spans import shared
from fusion.align.spelling import Spelling
from fusion.align.stage import make_map
from fusion.config import Align
from fusion.records import Sparse
from fusion.tokens.bytes import ByteTable, Kind
from fusion.tokens.render import Renderer

T, B, C, U = Kind.TEXT, Kind.BYTE, Kind.CONTROL, Kind.UNUSED


def table(*pieces: tuple[bytes, Kind]) -> ByteTable:
    spelled = tuple(p for p, _ in pieces)
    lengths = np.array([len(p) for p in spelled], dtype=np.int64)
    return ByteTable(spelled, np.array([k for _, k in pieces], dtype=np.uint8), lengths, False, "")


def sparse(*rows: dict[int, float]) -> Sparse:
    offsets = np.cumsum([0, *(len(r) for r in rows)]).astype(np.int64)
    ids = np.array([i for r in rows for i in r], dtype=np.int32)
    return Sparse(offsets, ids, np.array([p for r in rows for p in r.values()], dtype=np.float32))


def dense(entries: Sparse, width: int) -> np.ndarray:
    full = np.zeros((len(entries), width))
    for row in range(len(entries)):
        for e in range(entries.offsets[row], entries.offsets[row + 1]):
            full[row, entries.ids[e]] += entries.probs[e]
    return full


def matrix(rows: list[list[float]]) -> csr_array:
    return csr_array(np.array(rows, dtype=np.float64))


# ---------------------------------------------------------------- spans

HAND = [
    ([], [], [], []),
    ([1, 2, 3], [], [], []),
    ([-1, -1], [-1, 0], [], []),
    ([0, 1, 5, 9], [1, 2, 5, 6, 9], [1, 2, 3], [0, 2, 4]),
    ([-1, 1, -1, 4, -1], [-1, -1, 1, 4], [1, 3], [2, 3]),
    ([1, 1, 1, 2], [0, 1, 1, 3], [2], [2]),
    ([1, -1, 1, 2], [1, 2, 2], [2, 3], [0, 2]),  # positions at one place with one of no place between
    ([0], [0], [0], [0]),
]


@pytest.mark.parametrize(("source", "target", "at_source", "at_target"), HAND)
def test_shared_by_hand(source: list[int], target: list[int], at_source: list[int], at_target: list[int]) -> None:
    i, j = shared(np.array(source, dtype=np.int64), np.array(target, dtype=np.int64))
    assert (i.tolist(), j.tolist()) == (at_source, at_target)
    j, i = shared(np.array(target, dtype=np.int64), np.array(source, dtype=np.int64))
    assert (i.tolist(), j.tolist()) == (at_source, at_target)


def climb(steps: list[tuple[int, bool]]) -> np.ndarray:
    """Places that go up by some steps, known or not."""
    return np.where([known for _, known in steps], np.cumsum([s for s, _ in steps], dtype=np.int64), -1)


PLACES = st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=25).map(climb)


@settings(max_examples=200)
@given(source=PLACES, target=PLACES)
def test_shared_against_every_pair(source: np.ndarray, target: np.ndarray) -> None:
    last = {}
    for i, a in enumerate(source.tolist()):
        for j, b in enumerate(target.tolist()):
            if a == b >= 0:
                last[a] = (i, j)
    at_source, at_target = shared(source, target)
    assert list(zip(at_source.tolist(), at_target.tolist(), strict=True)) == [last[p] for p in sorted(last)]


# ---------------------------------------------------------------- maps between vocabularies

SOURCE = table((b"", C), (b"ab", T), (b"abc", T), (b"x", B), (b"\xc3", B), (b" the cat", T), (b"", U), (b"q", T))
TARGET = table((b"ab", T), (b"x", B), (b"x", T), (b"", C), (b" the", T), (b"a", T), (b"ab", T), (b" ", T))


def test_exact_map() -> None:
    found = vocabulary.exact(SOURCE, TARGET).toarray()
    expected = np.zeros((8, 8))
    expected[1, 0] = 1  # the smaller id of two with one spelling
    expected[3, 2] = 1  # a text token before a byte token
    assert (found == expected).all()
    assert (vocabulary.exact(SOURCE, SOURCE).toarray().sum(1) == [0, 1, 1, 1, 1, 1, 0, 1]).all()


def test_prefix_map() -> None:
    found = vocabulary.prefix(SOURCE, TARGET).toarray()
    expected = np.zeros((8, 8))
    for t, s in ((1, 0), (2, 0), (3, 2), (5, 4)):  # "abc" → "ab", " the cat" → " the"
        expected[t, s] = 1
    assert (found == expected).all()
    assert vocabulary.prefix(SOURCE, table()).shape == (8, 0)
    assert vocabulary.prefix(table(), TARGET).nnz == 0


COUNTS = matrix([[0, 6, 3, 1], [0, 0, 0, 0], [2, 2, 0, 0], [0, 0, 0, 5]])


def test_statistics() -> None:
    soft = vocabulary.statistics(COUNTS, hard=False, width=4).toarray()
    assert soft.tolist() == [[0, 0.6, 0.3, 0.1], [0, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0, 1]]
    narrow = vocabulary.statistics(COUNTS, hard=False, width=1).toarray()
    assert narrow.tolist() == [[0, 0.6, 0, 0], [0, 0, 0, 0], [0.5, 0, 0, 0], [0, 0, 0, 1]]  # what is cut off is lost
    hard = vocabulary.statistics(COUNTS, hard=True, width=4).toarray()
    assert hard.tolist() == [[0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]  # of equals the smaller id
    assert vocabulary.statistics(csr_array((3, 2), dtype=np.int64), hard=True, width=2).nnz == 0


def test_statistics_against_dense_counts() -> None:
    random = np.random.default_rng(0)
    counts = random.integers(0, 5, (30, 40)) * (random.random((30, 40)) < 0.3)
    counts[4] = 0
    for width in (1, 3, 40):
        expected = np.zeros(counts.shape)
        for row in range(30):
            order = np.lexsort((np.arange(40), -counts[row]))[:width]
            expected[row, order] = counts[row, order] / max(counts[row].sum(), 1)
        assert np.array_equal(vocabulary.statistics(csr_array(counts), hard=False, width=width).toarray(), expected)


def test_count_pairs() -> None:
    random = np.random.default_rng(1)
    pairs = [(random.integers(0, 7, n), random.integers(0, 5, n)) for n in (0, 1, 50, 300)]
    expected = np.zeros((7, 5), dtype=np.int64)
    for t, s in pairs:
        for a, b in zip(t, s, strict=True):
            expected[a, b] += 1
    found = vocabulary.count_pairs(((t.astype(np.int32), s.astype(np.int32)) for t, s in pairs), (7, 5))
    assert np.array_equal(found.toarray(), expected)
    assert vocabulary.count_pairs([], (7, 5)).toarray().tolist() == np.zeros((7, 5)).tolist()


def test_count_pairs_in_parts() -> None:
    many = np.zeros(2_500_000, dtype=np.int32)  # more than are counted at one time
    found = vocabulary.count_pairs([(many, many), (many, many + 1), (many[:3] + 200_000, many[:3])], (300_000, 2))
    assert {(int(r), int(c)): int(v) for r, c, v in zip(*found.tocoo().coords, found.tocoo().data, strict=True)} == {
        (0, 0): 2_500_000,
        (0, 1): 2_500_000,
        (200_000, 0): 3,
    }


def test_chain() -> None:
    first = matrix([[0, 0.5, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]])
    second = matrix([[1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]])
    third = matrix([[0, 0, 1], [1, 0, 0], [0.2, 0.3, 0], [0, 0, 0]])
    found = vocabulary.chain(first, second, third)
    assert found.toarray().tolist() == [[0, 0.5, 0], [0, 0, 1], [0.2, 0.3, 0], [0, 0, 0]]
    assert found.has_sorted_indices and found.nnz == 4
    assert first.toarray().tolist()[0] == [0, 0.5, 0] and second.nnz == 2  # what went in is as it was
    assert np.array_equal(vocabulary.chain(third).toarray(), third.toarray())


def test_pair_and_identity() -> None:
    assert vocabulary.pair(2, 1, (3, 2)).toarray().tolist() == [[0, 0], [0, 0], [0, 1]]
    for source, target in ((None, 1), (2, None), (None, None)):
        assert vocabulary.pair(source, target, (3, 2)).nnz == 0
    assert np.array_equal(vocabulary.identity(5).toarray(), np.eye(5))


def test_widest() -> None:
    unsorted = csr_array((np.array([0.2, 0.3, 0.3, 0.1]), np.array([4, 3, 1, 0]), np.array([0, 3, 3, 4])), (3, 5))
    assert vocabulary.widest(unsorted, 2).toarray().tolist() == [[0, 0.3, 0, 0.3, 0], [0] * 5, [0.1, 0, 0, 0, 0]]
    assert vocabulary.widest(unsorted, 1).toarray().tolist() == [[0, 0.3, 0, 0, 0], [0] * 5, [0.1, 0, 0, 0, 0]]
    assert np.array_equal(vocabulary.widest(unsorted, 9).toarray(), unsorted.toarray())
    assert vocabulary.widest(csr_array((0, 5)), 2).shape == (0, 5)


def spelled(digest: str, *pieces: bytes) -> Spelling:
    return Spelling.of(replace(table(*((p, T) for p in pieces)), digest=digest))


def test_maps_on_disk(tmp_path: Path) -> None:
    source, target = spelled("one", b"a", b"b", b"\xff\0", b"d"), spelled("two", b"a", b"b", b"ab")
    for name, made in {
        "some": vocabulary.statistics(matrix([[0, 6, 3], [0, 0, 0], [2, 2, 0], [0, 0, 5]]), hard=False, width=3),
        "none": csr_array((4, 3)),
    }.items():
        Map(made, vocabulary.identity(3), source, target).save(tmp_path / name)
        back = Map.load(tmp_path / name, "one", "two")
        assert back.matrix.shape == made.shape
        assert np.array_equal(back.matrix.toarray(), made.toarray().astype(np.float32))
        assert np.array_equal(back.first.toarray(), np.eye(3))
        assert [back.source.piece(i) for i in range(4)] == [b"a", b"b", b"\xff\0", b"d"]
        assert [back.target.piece(i) for i in range(3)] == [b"a", b"b", b"ab"]
        assert back.rows_mass == pytest.approx([*made.toarray().sum(1), 0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["none", "some"]


def test_a_map_of_another_pair_or_no_map(tmp_path: Path) -> None:
    path = tmp_path / "map.safetensors"
    with pytest.raises(ValueError, match="there is no map; run the align stage first"):
        Map.load(path)
    Map(csr_array((1, 1)), csr_array((1, 1)), spelled("one", b"a"), spelled("two", b"a")).save(path)
    with pytest.raises(ValueError, match="made for another pair: its source's vocabulary is not this source's"):
        Map.load(path, source="three")
    with pytest.raises(ValueError, match="made for another pair: its target's vocabulary is not this target's"):
        Map.load(path, source="one", target="one")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="is no map of this version"):
        Map.load(path)

    def damaged(**changes: np.ndarray) -> None:
        made = Map(matrix([[0.5, 0.25]]), csr_array((2, 2)), spelled("one", b"a"), spelled("two", b"a", b"bc"))
        made.save(path)
        tensors = load_file(path) | {n.replace("__", "."): a for n, a in changes.items()}
        save_file(tensors, path, {"source": "one", "target": "two"})
        Map.load(path)

    damaged()
    for changes in (
        {"matrix__shape": np.array([5, 8])},
        {"matrix__values": np.array([0.5, np.nan], np.float32)},
        {"matrix__values": np.array([0.5, -1], np.float32)},
        {"matrix__columns": np.array([0, 7], np.int32)},
        {"target__offsets": np.array([0, 1, 3000])},
        {"target__offsets": np.array([0, 3])},
        {"target__offsets": np.array([0, 5, 3])},
    ):
        with pytest.raises(ValueError, match="is no map of this version .*run the align stage again"):
            damaged(**changes)
    save_file({"values": np.zeros(3)}, path)  # what version 0.1.0 wrote had no bytes of vocabularies
    with pytest.raises(ValueError, match="run the align stage again"):
        Map.load(path)


def test_first_tokens_do_not_reach_over_what_spells_nothing() -> None:
    target = Spelling.of(replace(table((b"a", T), (b"b", T), (b"ab", T), (b"", C)), digest="x"))
    first = vocabulary.FirstTokens(target)
    first.add(np.array([0, 3, 1], dtype=np.int32), np.array([True, True, True]))
    found = first.counts().tocoo()
    assert sorted(zip(*(c.tolist() for c in found.coords), strict=True)) == [(0, 0), (1, 1)]


def test_first_tokens() -> None:
    target = spelled("two", b"a", b"b", b"ab", b" ", b"  ", b" b")
    first = vocabulary.FirstTokens(target)
    first.add(
        np.array([0, 1, 3, 5], dtype=np.int32), np.array([False, True, True, True])
    )  # a b ␣ ␣b, where ab was there
    first.add(np.array([0, 1], dtype=np.int32), np.array([True, False]))  # a, and elsewhere b
    found = {
        (int(i), int(j)): int(n) for i, j, n in zip(*first.counts().tocoo().coords, first.counts().data, strict=True)
    }
    assert found == {(2, 0): 1, (1, 1): 2, (4, 3): 1, (5, 5): 1, (0, 0): 1}


# ---------------------------------------------------------------- projections


def test_project_by_hand() -> None:
    entries = sparse({0: 0.5, 1: 0.25, 2: 0.125}, {}, {3: 1.0}, {9: 0.75, 0: 0.25})
    maps = matrix([[1, 0, 0], [1, 0, 0], [0, 0.5, 0.25], [0, 0, 0]])
    found = project(entries, np.array([0, 1, 2, 3]), maps, 10)
    assert found.offsets.tolist() == [0, 3, 3, 3, 4]
    assert found.ids.tolist() == [0, 1, 2, 0]  # 0 and 1 fell together; 3 has no target, 9 is an embedding's padding
    assert found.probs.tolist() == [0.75, 0.0625, 0.03125, 0.25]
    assert found.ids.dtype == np.int32 and found.probs.dtype == np.float32 and found.offsets.dtype == np.int64
    pruned = project(entries, np.array([3, 0]), maps, 1)
    assert (pruned.offsets.tolist(), pruned.ids.tolist(), pruned.probs.tolist()) == ([0, 1, 2], [0, 0], [0.25, 0.75])
    empty = project(entries, np.zeros(0, dtype=np.int64), maps, 10)
    assert (len(empty), empty.ids.tolist()) == (0, [])
    assert len(project(sparse(), np.zeros(0, dtype=np.int64), maps, 3)) == 0


def test_a_sum_never_passes_one() -> None:
    third = float(np.float32(1 / 3) + np.float32(3e-8))
    found = project(sparse({0: third, 1: third, 2: third}), np.array([0]), matrix([[1.0], [1.0], [1.0]]), 4)
    assert found.probs.tolist() == [1.0]


@settings(max_examples=100)
@given(seed=st.integers(0, 10**6), k=st.sampled_from([1, 2, 5, 50]), beyond=st.integers(0, 4))
def test_project_against_dense(seed: int, k: int, beyond: int) -> None:
    random = np.random.default_rng(seed)
    width, target = 12, 9
    rows = []
    for _ in range(6):
        ids = random.permutation(width + beyond)[: random.integers(0, width)]
        probs = random.dirichlet(np.ones(len(ids) + 1))[:-1]
        rows.append(dict(zip(ids.tolist(), probs, strict=True)))
    entries = sparse(*rows)
    shares = random.random((width, target)) * (random.random((width, target)) < 0.3)
    shares /= np.maximum(shares.sum(1, keepdims=True), 1)
    at = random.integers(0, len(entries), 8)
    found = project(entries, at, csr_array(shares), k)
    whole = dense(entries, width + beyond)[at][:, :width] @ shares
    kept = np.where(whole >= -np.sort(-whole, axis=1)[:, [min(k, target) - 1]], whole, 0)
    np.testing.assert_allclose(dense(found, target), kept, atol=1e-6)
    assert (found.mass() <= entries.mass()[at] + 1e-6).all()
    for row in range(len(found)):
        part = found.probs[found.offsets[row] : found.offsets[row + 1]]
        ids = found.ids[found.offsets[row] : found.offsets[row + 1]]
        assert len(part) <= k and (part > 0).all() and len(set(ids)) == len(ids)


def test_identity_gives_the_distribution_back() -> None:
    random = np.random.default_rng(3)
    rows = []
    for _ in range(20):
        probs = np.sort(random.dirichlet(np.ones(8)).astype(np.float32))[::-1][:5]
        rows.append(dict(zip(random.permutation(30)[:5].tolist(), probs, strict=True)))
    entries = sparse(*rows)
    back = project(entries, np.arange(20), vocabulary.identity(30), 5)
    for field in ("offsets", "ids", "probs"):
        assert np.array_equal(getattr(back, field), getattr(entries, field))


def test_an_id_out_of_range() -> None:
    with pytest.raises(ValueError, match="token id -1 is out of range"):
        project(sparse({-1: 0.5}), np.array([0]), vocabulary.identity(3), 5)


def test_equals_at_the_border_are_the_first_met() -> None:
    entries = sparse({4: 0.1, 2: 0.3, 0: 0.1, 3: 0.1, 1: 0.3})
    for k, kept in ((1, [2]), (2, [2, 1]), (3, [4, 2, 1]), (4, [4, 2, 0, 1]), (5, [4, 2, 0, 3, 1])):
        assert project(entries, np.array([0]), vocabulary.identity(5), k).ids.tolist() == kept


@settings(max_examples=100)
@given(
    values=st.lists(st.sampled_from([0.125, 0.25]), min_size=1, max_size=9),
    k=st.integers(1, 9),
    keep=st.integers(-1, 9),
)
def test_equals_and_one_that_is_kept(values: list[float], k: int, keep: int) -> None:
    one = mix(sparse(dict(enumerate(values))), np.zeros(1, dtype=np.int64), np.ones(1), np.array([keep]), 10, k)
    first = sorted(range(len(values)), key=lambda i: (i != keep, -values[i], i))[:k]
    assert one.ids.tolist() == sorted(first) and one.probs.tolist() == [values[i] for i in sorted(first)]


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), k=st.sampled_from([1, 3, 50]))
def test_mix_against_dense(seed: int, k: int) -> None:
    random = np.random.default_rng(seed)
    width, n, m = 15, 5, int(random.integers(0, 9))
    rows = [
        dict(zip(random.permutation(width)[:4].tolist(), random.dirichlet(np.ones(5))[:4], strict=True))
        for _ in range(m)
    ]
    of, weights, keep = random.integers(0, n, m), random.random(m), random.integers(-1, width, n).astype(np.int32)
    whole = np.zeros((n, width))
    for row, to, weight in zip(dense(sparse(*rows), width), of, weights, strict=True):
        whole[to] += weight * row
    told = mix(sparse(*rows), of, weights, keep, width, k)
    assert (np.diff(told.offsets) <= k).all()
    found = dense(told, width)
    for row in range(n):
        order = sorted(np.flatnonzero(whole[row]).tolist(), key=lambda i: (i != keep[row], -whole[row, i]))[:k]
        assert np.flatnonzero(found[row]).tolist() == sorted(order)
        assert found[row, order] == pytest.approx(whole[row, order], rel=1e-5)


# ---------------------------------------------------------------- what a reader is told of a map


def test_examples_are_the_tokens_that_matter() -> None:
    source, target = spelled("one", b"a", b"b", b"\xff", b"d", b"e"), spelled("two", b"a", b"b")
    made = Map(matrix([[1, 0], [0.5, 0.5], [0, 0.25], [0, 0], [0, 1]]), csr_array((2, 2)), source, target)
    told = report.examples(made, np.array([2.0, 4.0, 3.0, 0.0, 1.0]))
    assert [e["token"] for e in told["best"]] == ["a", "e"]
    assert told["worst"] == [
        {"id": 2, "token": "\\xff", "share of mass": 0.3, "mapped": 0.25, "to": {"b": 0.25}},
        {"id": 1, "token": "b", "share of mass": 0.4, "mapped": 1.0, "to": {"a": 0.5, "b": 0.5}},
    ]
    assert [len(found) for found in report.examples(made, np.ones(5), count=1).values()] == [1, 1]
    empty = Map(csr_array((1, 2)), csr_array((2, 2)), spelled("one", b"a"), target)
    assert report.examples(empty, np.zeros(1)) == {"best": [], "worst": []}


@pytest.mark.parametrize("kind", ["soft", "hard", "exact", "prefix", "min_edit"])
def test_every_kind_of_map_by_config(kind: str, byte_level_tokenizer: Any, sentencepiece_tokenizer: Any) -> None:
    source, target = Renderer(byte_level_tokenizer, "level"), Renderer(sentencepiece_tokenizer, "piece")
    shape = (len(source.table), len(target.table))
    one, two = (r.table.pieces.index(b" the") for r in (source, target))
    counts = csr_array((np.array([3, 1]), (np.array([one, one]), np.array([two, two + 1]))), shape=shape)
    first = csr_array((shape[1], shape[1]), dtype=np.int64)
    made = make_map(Align(maps=(kind,)), source, target, counts, first)
    assert made.matrix.shape == shape and (made.matrix.sum(axis=1) < 1 + 1e-9).all()
    row = made.matrix[[one]].toarray()[0]
    assert np.argmax(row) == two and row[two] == (0.75 if kind == "soft" else 1)
    assert made.matrix[[source.end_id]].toarray()[0].argmax() == target.end_id
    if kind in ("soft", "hard"):
        assert np.flatnonzero(made.matrix.sum(axis=1)).tolist() == sorted([one, source.end_id])
        more = make_map(Align(maps=(kind, "exact")), source, target, counts, first).matrix
        assert np.array_equal(more[[one]].toarray(), made.matrix[[one]].toarray())
        assert more.nnz > made.matrix.nnz
    square = csr_array((shape[0], shape[0]), dtype=np.int64)
    same = make_map(Align(maps=(kind,)), source, source, square, square)
    assert np.array_equal(same.matrix.toarray(), np.eye(shape[0]))


def test_the_end_of_a_turn_whatever_the_map(sentencepiece_tokenizer: Any) -> None:
    """One vocabulary, two templates: what ends a turn in one is not what ends it in the other."""
    both = Renderer(sentencepiece_tokenizer, "piece")
    size = len(both.table)
    turn = next(i for i in np.flatnonzero(both.table.kinds == Kind.CONTROL) if i != both.end_id)
    square, text = csr_array((size, size), dtype=np.int64), int(np.flatnonzero(both.table.lengths)[0])
    counts = csr_array((np.array([7, 5]), (np.array([turn, text]), np.array([both.end_id, turn]))), shape=(size, size))
    for maps in (("soft",), ("exact",), ("prefix",), ("min_edit",)):
        row = make_map(Align(maps=maps), both, both, counts, square).matrix[[int(turn)]].toarray()[0]
        assert np.flatnonzero(row).tolist() == [both.end_id]
