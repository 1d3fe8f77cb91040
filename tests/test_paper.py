"""The published alignment and the nearest tokens, against plain loops."""

import importlib.util
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ROOT
from transformers import AutoTokenizer

from fusion.align import edit, paper
from fusion.records import Sparse

SHARED = Path(__file__).parents[2] / "shared" / "tokenizers"
MARKS = ("Ġ", "▁")
METHODS: tuple[paper.Method, ...] = ("fusellm", "fusechat")


@cache
def levenshtein(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(last + (x != y), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def nearest_of(word: str, target: Sequence[str]) -> int:
    return min(range(len(target)), key=lambda k: (word != target[k], levenshtein(word, target[k]), k))


def warped(source: Sequence[str], target: Sequence[str], method: str, marks: tuple[str, str] = MARKS) -> list[range]:
    """The papers' dynamic time warping, cell by cell."""
    table = {(-1, -1): 0.0}
    far = float("inf")
    for i, a in enumerate(source):
        for j, b in enumerate(target):
            a_bare, b_bare = a.replace(marks[0], ""), b.replace(marks[1], "")
            cost: float = levenshtein(a_bare, b_bare)
            if method == "fusechat" and (a_bare in b_bare or b_bare in a_bare):
                cost *= 0.1
            before = [table.get(at, far) for at in ((i - 1, j), (i, j - 1), (i - 1, j - 1))]
            table[i, j] = cost + min(before)
    i, j = len(source) - 1, len(target) - 1
    found: list[set[int]] = [set() for _ in target]
    while (i, j) != (-1, -1):
        found[j].add(i)
        i, j = min(((i - 1, j - 1), (i - 1, j), (i, j - 1)), key=lambda at: table.get(at, far))  # of equals the first
    assert all(sorted(part) == list(range(min(part), max(part) + 1)) for part in found)
    return [range(min(part), max(part) + 1) for part in found]


def ranges(pairs: tuple[np.ndarray, np.ndarray]) -> list[range]:
    assert all(part.dtype == np.int64 for part in pairs)
    return [range(a, b) for a, b in zip(*(part.tolist() for part in pairs), strict=True)]


def numbered(source: Sequence[str], target: Sequence[str]) -> tuple[paper.Strings, np.ndarray, np.ndarray]:
    """Two sequences of token strings as ids of vocabularies that hold just these."""
    words = [list(dict.fromkeys(part)) for part in (source, target)]
    known = paper.strings(words[0], words[1], MARKS)
    numbers = [{w: i for i, w in enumerate(part)} for part in words]
    ids = [np.array([at[w] for w in part]) for at, part in zip(numbers, (source, target), strict=True)]
    return known, ids[0], ids[1]


# ---------------------------------------------------------------- edit distance

LONG = st.integers(60, 70).flatmap(lambda n: st.text("ab", min_size=n, max_size=n))
WORDS = st.one_of(st.text("ab▁", max_size=5), st.text("abcdeÃ©🙂\ud800", max_size=7), LONG)


@settings(max_examples=300)
@given(a=WORDS, b=WORDS)
def test_distance_and_bound(a: str, b: str) -> None:
    words = edit.spell([a, b])
    one, two = words.chars[: words.offsets[1]], words.chars[words.offsets[1] :]
    assert (len(one), len(two)) == (len(a), len(b))
    assert edit.distance(one, two) == edit.distance(two, one) == levenshtein(a, b)
    assert edit.bound(words.signs[0], words.signs[1], len(a), len(b)) <= levenshtein(a, b)


def test_bits() -> None:
    for value in (0, 1, 2**63, 2**64 - 1, 0x123456789ABCDEF0):
        assert edit.bits(np.uint64(value)) == value.bit_count()


@settings(max_examples=200)
@given(source=st.lists(WORDS, max_size=8), target=st.lists(WORDS, max_size=12))
def test_nearest(source: list[str], target: list[str]) -> None:
    expected = [nearest_of(word, target) if target else -1 for word in source]
    assert edit.nearest(source, target).tolist() == expected


def test_nearest_by_hand() -> None:
    assert edit.nearest(["abc", "", "xyz"], ["xbc", "abx", "ab", "abc", "abc"]).tolist() == [3, 2, 0]
    assert edit.nearest(["ab"], ["abcd", "x", "b"]).tolist() == [2]
    assert edit.nearest(["ab"], ["abcd", "xy", "cd"]).tolist() == [0]  # a longer one of a smaller id
    assert edit.nearest(["a" * 70], ["a" * 3, "b" * 70, "a" * 66, "a" * 74]).tolist() == [2]
    assert edit.nearest(["a" * 10], ["b" * 10, "a" * 80, ""]).tolist() == [0]
    assert edit.nearest([""], ["", "a"]).tolist() == [0]
    found = edit.nearest([], ["a"])
    assert (found.tolist(), found.dtype) == ([], np.int64)


def test_nearest_with_any_number_of_threads() -> None:
    random = Random(0)
    words = ["".join(random.choices("abcd▁", k=random.randint(1, 9))) for _ in range(3000)]
    source, target = words[:2000], [w + "c" for w in words[2000:]]
    found = [edit.nearest(source, target, threads).tolist() for threads in (1, 2, 5)]
    assert found[0] == found[1] == found[2]
    for at in range(0, 2000, 100):
        assert found[0][at] == nearest_of(source[at], target)


def test_min_edit() -> None:
    source = ["Ġthe", None, "Ġcat", "<s>", "Ġ", "dogs"]
    target = [None, "▁cats", "▁cut", "▁the", "▁▁", "Ġ", "dog"]
    found = edit.min_edit(source, target, MARKS)
    assert found.shape == (6, 7)
    # of equally near ones the smaller id: "▁cat" is one edit from two, "<s>" three from four, "▁" one from two
    assert list(zip(*(part.tolist() for part in found.nonzero()), strict=True)) == [
        (0, 3),
        (2, 1),
        (3, 4),
        (4, 4),
        (5, 6),
    ]
    assert found.data.tolist() == [1.0] * 5
    assert edit.min_edit(source, [None], MARKS).nnz == 0
    assert edit.min_edit(["Ġa"], ["Ġa", "▁a"], ("", "▁")).nonzero()[1].tolist() == [0]


# ---------------------------------------------------------------- dynamic time warping

TOKENS = st.lists(st.text("abĠ▁", max_size=3), min_size=1, max_size=25)


@settings(max_examples=150)
@given(source=TOKENS, target=TOKENS)
def test_pairs_against_every_cell(source: list[str], target: list[str]) -> None:
    known, source_ids, target_ids = numbered(source, target)
    for method in METHODS:
        assert ranges(paper.pairs(known, source_ids, target_ids, method)) == warped(source, target, method)


@pytest.mark.parametrize("lengths", [(1, 1), (1, 70), (70, 1), (63, 64), (64, 64), (65, 130), (200, 129)])
@pytest.mark.parametrize("method", METHODS)
def test_pairs_of_long_sequences(lengths: tuple[int, int], method: paper.Method) -> None:
    random = Random(sum(lengths))
    choice = ["a", "ab", "abc", "c", "cab", "", "dd", "🙂", "é🙂a", "x" * 63, "x" * 64, "x" * 65, "x" * 64 + "yz"]
    source, target = (
        random.choices([mark * (n % 3) + w for n, w in enumerate(choice)], k=length)
        for mark, length in zip(MARKS, lengths, strict=True)
    )
    known, source_ids, target_ids = numbered(source, target)
    assert ranges(paper.pairs(known, source_ids, target_ids, method)) == warped(source, target, method)


def test_pairs_by_hand() -> None:
    split = numbered(["The", "Ġcafe", "Ġis"], ["▁The", "▁c", "afe", "▁is"])
    assert ranges(paper.pairs(*split, "fusechat")) == [range(0, 1), range(1, 2), range(1, 2), range(2, 3)]
    # "c" is three edits from "cafe" and from "The": the diagonal gives it to the word before
    assert ranges(paper.pairs(*split, "fusellm")) == [range(0, 1), range(0, 1), range(1, 2), range(2, 3)]
    back = ranges(paper.pairs(*numbered(["The", "Ġc", "afe", "Ġis"], ["▁The", "▁cafe", "▁is"]), "fusechat"))
    assert back == [range(0, 1), range(1, 3), range(3, 4)]
    # a tie: the diagonal before the source's step before the target's
    assert ranges(paper.pairs(*numbered(["a", "a", "a"], ["a", "a"]), "fusellm")) == [range(0, 2), range(2, 3)]
    assert ranges(paper.pairs(*numbered(["a", "a"], ["a", "a", "a"]), "fusellm")) == [range(0, 1)] * 2 + [range(1, 2)]


def test_pairs_of_nothing() -> None:
    known, nothing, one = paper.strings(["a"], ["a"], MARKS), np.zeros(0, dtype=np.int32), np.zeros(1, dtype=np.int32)
    assert ranges(paper.pairs(known, nothing, nothing, "fusellm")) == []
    for source, target in ((nothing, one), (one, nothing)):
        with pytest.raises(ValueError, match=f"cannot pair {len(source)} source tokens with {len(target)} target"):
            paper.pairs(known, source, target, "fusechat")


@settings(max_examples=100)
@given(source=TOKENS, target=TOKENS, seed=st.integers(0, 1000))
def test_pairs_between_anchors(source: list[str], target: list[str], seed: int) -> None:
    random = Random(seed)
    count = random.randint(0, min(len(source), len(target)))
    anchors = [np.array(sorted(random.sample(range(len(part)), count)), dtype=np.int64) for part in (source, target)]
    known, source_ids, target_ids = numbered(source, target)
    cuts = [(i + 1, j + 1) for i, j in zip(*anchors, strict=True) if i < len(source) - 1 and j < len(target) - 1]
    for method in METHODS:
        expected = []
        for (a, b), (c, d) in pairwise([(0, 0), *cuts, (len(source), len(target))]):
            expected += [range(r.start + a, r.stop + a) for r in warped(source[a:c], target[b:d], method)]
        found = paper.pairs(known, source_ids, target_ids, method, (anchors[0], anchors[1]))
        assert ranges(found) == expected


# ---------------------------------------------------------------- which positions are taught


def taught_by_loop(
    source: Sequence[str],
    target: Sequence[str],
    partners: Sequence[range],
    method: str,
    mapped: dict[str, str],
    marks: tuple[str, str] = MARKS,
) -> list[int]:
    result = []
    for token, found in zip(target, partners, strict=True):
        spelled = source[found.start].replace(*marks)
        fits = token in spelled if method == "fusechat" else token == spelled or mapped.get(spelled) == token
        result.append(found.start if fits and len(found) == 1 else -1)
    return result


@settings(max_examples=100)
@given(source=TOKENS, target=TOKENS)
def test_taught(source: list[str], target: list[str]) -> None:
    known, source_ids, target_ids = numbered(source, target)
    words, theirs = list(dict.fromkeys(source)), list(dict.fromkeys(target))
    near = edit.nearest([w.replace(*MARKS) for w in words], theirs)
    near[::5] = -1
    mapped = {w.replace(*MARKS): theirs[k] for w, k in zip(words, near.tolist(), strict=True) if k >= 0}
    if len({w.replace(*MARKS) for w in words}) < len(words):
        mapped, near = {}, np.full(len(words), -1)  # two ids of one string: a dict cannot tell them apart
    for method in METHODS:
        pairs = paper.pairs(known, source_ids, target_ids, method)
        for nearest, told in ((None, {}), (near, mapped)):
            found = paper.taught(known, source_ids, target_ids, *pairs, method, nearest)
            assert found.tolist() == taught_by_loop(source, target, ranges(pairs), method, told)
            assert found.dtype == np.int64


# ---------------------------------------------------------------- the published projection


def sparse(*rows: dict[int, float]) -> Sparse:
    offsets = np.cumsum([0, *(len(r) for r in rows)]).astype(np.int64)
    ids = np.array([i for r in rows for i in r], dtype=np.int32)
    return Sparse(offsets, ids, np.array([p for r in rows for p in r.values()], dtype=np.float32))


def rows_of(entries: Sparse) -> list[list[tuple[int, float]]]:
    items = list(zip(entries.ids.tolist(), entries.probs.tolist(), strict=True))
    return [items[a:b] for a, b in pairwise(entries.offsets.tolist())]


def test_first_kept_by_hand() -> None:
    entries = sparse({0: 0.5, 1: 0.25, 2: 0.125}, {3: 0.5, 9: 0.25}, {}, {2: 0.25, 0: 0.125, 1: 0.5})
    mapping, at = np.array([4, 4, 1, -1]), np.array([0, -1, 1, 2, 3, 0])
    kept = paper.first_kept(entries, at, mapping, renormalise=False)
    first = [(4, 0.5), (1, 0.125)]  # 1 falls on 0's target and is dropped
    assert rows_of(kept) == [first, [], [], [], [(4, 0.5), (1, 0.25)], first]  # not in order: the most probable first
    assert (kept.offsets.dtype, kept.ids.dtype, kept.probs.dtype) == (np.int64, np.int32, np.float32)
    own = np.array([7, 8, 7, 7, 7, 7])
    shared_out = paper.first_kept(entries, at, mapping, own)
    np.testing.assert_allclose([p for _, p in rows_of(shared_out)[0]], [0.8, 0.2], rtol=1e-6)
    assert rows_of(shared_out)[1:4] == [[(8, 1.0)], [], []]
    assert rows_of(paper.first_kept(sparse(), np.array([-1]), mapping, np.array([2]))) == [[(2, 1.0)]]
    assert rows_of(paper.first_kept(sparse(), np.zeros(0, dtype=np.int64), mapping)) == []
    assert rows_of(paper.first_kept(entries, at[:1], np.zeros(0, dtype=np.int64))) == [[]]


@settings(max_examples=100)
@given(seed=st.integers(0, 10**6), renormalise=st.booleans(), hot=st.booleans())
def test_first_kept_against_loops(seed: int, renormalise: bool, hot: bool) -> None:
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(5):
        probs = np.sort(random.dirichlet(np.ones(9)).astype(np.float32))[::-1][: random.integers(0, 8)]
        rows.append(dict(zip(random.permutation(14)[: len(probs)].tolist(), probs.tolist(), strict=True)))
    mapping, at, own = random.integers(-1, 6, 12), random.integers(-1, 5, 8), random.integers(0, 6, 8)
    found = rows_of(paper.first_kept(sparse(*rows), at, mapping, own if hot else None, renormalise))
    for row, source, mine in zip(found, at.tolist(), own.tolist(), strict=True):
        expected: dict[int, float] = {mine: 1.0} if hot and source < 0 else {}
        for id, prob in rows[source].items() if source >= 0 else ():
            if id < 12 and mapping[id] >= 0 and mapping[id] not in expected:
                expected[int(mapping[id])] = prob
        mass = sum(expected.values()) if renormalise and source >= 0 else 1.0
        assert [id for id, _ in row] == list(expected)
        np.testing.assert_allclose([p for _, p in row], [p / mass for p in expected.values()], rtol=1e-6)


# ---------------------------------------------------------------- real tokenizers

TEXT = """The cat's naïve café: 12,345 km², “quoted”…\n\n\tdef add(a, b):\n        return a + b  # 日本語 🙂
Call me Ishmael. Some years ago--never mind how long precisely--having little or no money in my purse, and nothing
particular to interest me on shore, I thought I would sail about a little and see the watery part of the world.
"""


@cache
def tokenizer(name: str) -> Any:
    if not (SHARED / name).is_dir():
        pytest.skip(f"needs {SHARED / name}")
    return AutoTokenizer.from_pretrained(SHARED / name)


def vocabulary_of(name: str) -> list[str | None]:
    vocabulary = tokenizer(name).get_vocab()
    words: list[str | None] = [None] * (max(vocabulary.values()) + 1)
    for word, i in vocabulary.items():
        words[i] = word
    return words


@pytest.mark.parametrize(
    ("target", "source", "marks"), [("llama2", "mpt", ("Ġ", "▁")), ("gpt2", "mistral-v0.1", ("▁", "Ġ"))]
)
def test_real_tokenizers(target: str, source: str, marks: tuple[str, str]) -> None:
    theirs, mine = vocabulary_of(source), vocabulary_of(target)
    known = paper.strings(theirs, mine, marks)
    reads, learns = (np.array(tokenizer(name)(TEXT)["input_ids"]) for name in (source, target))
    said = tokenizer(source).convert_ids_to_tokens(reads.tolist())
    wanted = tokenizer(target).convert_ids_to_tokens(learns.tolist())
    for method in METHODS:
        pairs = paper.pairs(known, reads, learns, method)
        assert ranges(pairs) == warped(said, wanted, method, marks)
        found = paper.taught(known, reads, learns, *pairs, method)
        assert found.tolist() == taught_by_loop(said, wanted, ranges(pairs), method, {}, marks)
        assert (found >= 0).mean() > 0.5
    random = Random(1)
    some, others = random.sample([w for w in theirs if w], 60), random.sample([w for w in mine if w], 3000)
    spelled = [w.replace(*marks) for w in some]
    assert edit.nearest(spelled, others).tolist() == [nearest_of(w, others) for w in spelled]


def published() -> ModuleType:
    pytest.importorskip("editdistance")
    spec = importlib.util.spec_from_file_location("published", ROOT / "benchmarks" / "published.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("method", METHODS)
def test_the_peer_of_our_speed_figures_agrees(method: paper.Method) -> None:
    peer, (source, target) = published(), (tokenizer("mpt"), tokenizer("llama2"))
    theirs, mine = vocabulary_of("mpt"), vocabulary_of("llama2")
    reads, learns = (np.array(t(TEXT)["input_ids"]) for t in (source, target))
    random = np.random.default_rng(0)
    near = random.integers(0, len(mine), len(theirs))
    vocabulary = target.get_vocab()
    for id in range(0, len(theirs), 2):  # every other id to its equal, where it has one
        near[id] = vocabulary.get((theirs[id] or "").replace(*MARKS), near[id])
    mapping = {word.replace(*MARKS): mine[i] for word, i in zip(theirs, near.tolist(), strict=True) if word}
    ids = [random.permutation(2000)[:6].tolist() for _ in reads]
    probs = [np.sort(random.dirichlet(np.ones(8)).astype(np.float32))[:1:-1].tolist() for _ in reads]
    entries = [(i, np.log(p).tolist()) for i, p in zip(ids, probs, strict=True)]
    expected = peer.align_sample(
        source, target, reads.tolist(), learns.tolist(), entries, vocabulary, mapping, MARKS, method
    )
    known = paper.strings(theirs, mine, MARKS)
    at = paper.taught(known, reads, learns, *paper.pairs(known, reads, learns, method), method, near)
    made = sparse(*(dict(zip(i, p, strict=True)) for i, p in zip(ids, probs, strict=True)))
    found = rows_of(paper.first_kept(made, at, near, learns))
    for row, (wanted, logits) in zip(found, expected, strict=True):
        assert [id for id, _ in row] == wanted
        np.testing.assert_allclose([p for _, p in row], np.exp(logits) / np.exp(logits).sum(), rtol=1e-5)


def test_the_peer_finds_the_same_nearest_tokens() -> None:
    words = [["Ġthe", "Ġcat", "x", "<s>", "Ġ"], ["▁cats", "▁cut", "▁the", "y", "▁▁"]]
    source, target = ({w: i for i, w in enumerate(part)} for part in words)
    found = published().min_edit(source, target, MARKS)
    ours = edit.min_edit(words[0], words[1], MARKS)
    assert [target[found[w.replace(*MARKS)]] for w in words[0]] == ours.nonzero()[1].tolist()
