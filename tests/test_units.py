"""Which source teaches which sample, segment or token, how much, and what mixtures of several are: against loops."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sources import (
    TEXTS,
    Rows,
    chat,
    held,
    invented,
    on_tokens,
    plain,
    runs,
    said_by_hand,
    same,
    sizes,
    spread,
    taught,
    weigh,
)

from fusion.align import vocabulary
from fusion.distill.dataset import FusionDataset, Teacher
from fusion.distill.gate import Gate, Gating, Level
from fusion.distill.texts import Texts
from fusion.records import Heard, Sample, Sparse
from fusion.tokens.render import Renderer

TALKS = (TEXTS[0], chat("It is a day.", " a café", "no"), chat("a", "The cat sat"), TEXTS[3])
NAMES = "abcdef"
FIXED = {"a": 3.0, "b": 1.0, "d": 0.0, "f": 2.0}


def units(level: Level, renderer: Renderer, sample: Sample, source: Renderer, said: Heard) -> list[float]:
    """What a reading cost at each position of the target, in bits per byte of the unit that it lies in."""
    rendered, read, lengths = renderer.render(sample), source.render(sample), sizes(sample)
    if level == "token":
        return on_tokens(renderer, rendered, lengths, spread(source, read, said, lengths))
    turns = runs(rendered)
    if level == "sample":
        return [said.bits_per_byte()] * sum(len(c) + len(e) for c, e in turns)
    nats = [-float(said.logp[content].astype(float).sum()) for content, _ in runs(read)]
    costs = [n / size / math.log(2) for n, size in zip(nats, lengths, strict=True)]
    return [cost for cost, (c, e) in zip(costs, turns, strict=True) for _ in [*c, *e]]


def voices(renderer: Renderer, count: int, seed: int = 0) -> list[Rows]:
    """Sources better here and worse there; the second has not read the first talk, the third not the second."""
    found = []
    for n in range(count):
        rows = invented(renderer, TALKS, seed + n)
        for row in rows:
            row["logp"] = -np.random.default_rng([n, len(row["logp"])]).uniform(0.1, 6, len(row["logp"])).astype("f4")
        found.append([row for m, row in enumerate(rows) if (n, m) not in ((1, 0), (2, 1))])
    return found


@pytest.mark.parametrize("count", [1, 3, 6])
@pytest.mark.parametrize("gate", ["min_ce", "avg_ce", "all", "fixed"])
@pytest.mark.parametrize("of", ["sample", "segment", "token"])
def test_units_are_taught_as_by_hand(level: Renderer, of: Level, gate: Gate, count: int) -> None:
    """Mixtures, teachers and confidence; with three or more the last is a pivot that says nothing."""
    caches = [held(rows) for rows in voices(level, count)]
    silent = count - 1 if count > 1 else count
    teachers = [Teacher(NAMES[n], cache, same(level) if n != silent else None) for n, cache in enumerate(caches)]
    size, temperature = len(level.table), 0.8
    gating = Gating(gate, of, temperature, FIXED)
    dataset = FusionDataset(Texts.of(TALKS, level), teachers, gating, k=size)
    sure = FusionDataset(Texts.of(TALKS, level), teachers, replace(gating, confident=True), k=size)
    heard_once = set()
    for n, sample in enumerate(TALKS):
        example, said = dataset[n], [cache.get(sample.id) for cache in caches]
        costs = [[math.nan] * len(example.at) if h is None else units(of, level, sample, level, h) for h in said]
        for i in range(len(example.at)):
            bits = [cost[i] for cost in costs]
            weights = weigh(bits, gate, temperature, FIXED, NAMES)
            shares = weigh(bits, "avg_ce", temperature, FIXED, NAMES)
            speaking = {
                m: dict(row_of(h.entries, i))
                for m, h in enumerate(said)
                if h is not None and m != silent and weights[m] > 0 and row_of(h.entries, i)
            }
            total = sum(weights[m] for m in speaking)
            mean: dict[int, float] = {}
            for m, row in speaking.items():
                for token, p in row.items():
                    mean[token] = mean.get(token, 0.0) + weights[m] / total * p
            assert row_of(example.taught, i) == row_of(sure[n].taught, i)
            assert dict(row_of(example.taught, i)) == pytest.approx(mean, rel=1e-5)
            teacher = max(speaking, key=lambda m: (weights[m], -m), default=-1)
            assert example.teacher[i] == sure[n].teacher[i] == teacher
            assert example.confidence[i] == (1.0 if speaking else 0.0)
            assert sure[n].confidence[i] == pytest.approx(sum(shares[m] for m in speaking), rel=1e-5)
            heard_once.add(teacher)
        assert example.number == n and example.confidence.dtype == np.float32
    assert -1 in heard_once and len(heard_once) >= min(count, 2)


def row_of(rows: Sparse, n: int) -> list[tuple[int, float]]:
    """The entries of a row, in their order."""
    part = slice(int(rows.offsets[n]), int(rows.offsets[n + 1]))
    return list(zip(rows.ids[part].tolist(), rows.probs[part].tolist(), strict=True))


@pytest.mark.parametrize("gate", ["min_ce", "avg_ce"])
@pytest.mark.parametrize("of", ["sample", "segment", "token"])
def test_sources_of_other_tokenizers_are_weighed_on_the_targets_units(
    level: Renderer, piece: Renderer, of: Level, gate: Gate
) -> None:
    """Three sources, two that read otherwise; where a source says nothing at a position the others' share grows."""
    readers = [level, piece, piece]
    rows = [voices(reader, n + 1, seed=3)[n] for n, reader in enumerate(readers)]
    caches = [held(r) for r in rows]
    ends = vocabulary.pair(piece.end_id, level.end_id, (len(piece.table), len(level.table)))
    matrix = vocabulary.chain(vocabulary.exact(piece.table, level.table), ends)
    across = plain(matrix, piece, level)
    teachers = [Teacher(n, c, p) for n, c, p in zip("abc", caches, (same(level), across, across), strict=True)]
    dataset = FusionDataset(Texts.of(TALKS, level), teachers, Gating(gate, of, confident=True), k=len(level.table))
    taught_by = set()
    for n, sample in enumerate(TALKS):
        example, said = dataset[n], [cache.get(sample.id) for cache in caches]
        costs = [
            [math.nan] * len(example.at) if h is None else units(of, level, sample, reader, h)
            for reader, h in zip(readers, said, strict=True)
        ]
        boundary = level.render(sample).boundary[example.at]
        alone = [
            {} if h is None else dict(zip(*projected(t, h, boundary, example.labels, len(level.table)), strict=True))
            for t, h in zip(teachers, said, strict=True)
        ]
        for i in range(len(example.at)):
            weights = weigh([cost[i] for cost in costs], gate, 1.0, {}, "abc")
            shares = weigh([cost[i] for cost in costs], "avg_ce", 1.0, {}, "abc")
            speaking = [m for m in range(3) if weights[m] > 0 and i in alone[m]]
            total, mean = sum(weights[m] for m in speaking), dict[int, float]()
            for m in speaking:
                for token, p in alone[m][i]:
                    mean[token] = mean.get(token, 0.0) + weights[m] / total * p
            assert dict(row_of(example.taught, i)) == pytest.approx(mean, rel=1e-5)
            assert example.teacher[i] == max(speaking, key=lambda m: (weights[m], -m), default=-1)
            assert example.confidence[i] == pytest.approx(sum(shares[m] for m in speaking), rel=1e-5)
            taught_by.add(int(example.teacher[i]))
    assert taught_by == {-1, 0, 1, 2}


def projected(
    teacher: Teacher, heard: Heard, places: np.ndarray, labels: np.ndarray, k: int
) -> tuple[list[int], list[list[tuple[int, float]]]]:
    """The positions that a teacher speaks at by itself, and what it says there."""
    assert teacher.projector is not None
    rows, said = teacher.projector.project(heard, places, labels, k)
    return rows.tolist(), [row_of(said, n) for n in range(len(rows))]


@pytest.mark.parametrize("of", ["segment", "token"])
def test_a_silent_pivot_leaves_just_its_own_to_the_labels(level: Renderer, of: Level) -> None:
    """The pivot is better on the second turn, or on every other token: there nobody teaches."""
    sample = chat("It is a day.", "The cat sat")
    rows = invented(level, [sample], seed=5)
    rows[0]["kept"], n = np.full(len(rows[0]["tokens"]), 1, dtype=np.uint16), len(rows[0]["tokens"])
    rows[0]["entry_ids"], rows[0]["entry_logp"] = np.arange(n, dtype=np.int32), np.full(n, -1, dtype=np.float16)
    own = invented(level, [sample], seed=6)
    turns = runs(level.render(sample))
    of_pivot = np.zeros(n, dtype=bool)
    of_pivot[sum(turns[1], []) if of == "segment" else slice(1, None, 2)] = True
    own[0]["logp"] = np.where(of_pivot, -0.5, -2).astype(np.float32)
    teachers = [Teacher("a", held(rows), same(level)), Teacher("pivot", held(own), None)]
    for order in (teachers, teachers[::-1]):
        example = FusionDataset(Texts.of([sample], level), order, Gating("min_ce", of), k=5)[0]
        number = next(m for m, t in enumerate(order) if t.name == "a")
        assert example.teacher.tolist() == [-1 if silent else number for silent in of_pivot]
        assert example.confidence.tolist() == [0.0 if silent else 1.0 for silent in of_pivot]
        said = [{} if silent else {i: pytest.approx(math.exp(-1), rel=1e-3)} for i, silent in enumerate(of_pivot)]
        assert taught(example) == said


def test_confidence_by_hand(level: Renderer) -> None:
    """Of one byte at 1, 2 and 3 nats; a fourth source has not read it, a fifth does not speak."""
    sample = TEXTS[4]
    said = [{1: 0.5}, {}]

    def cache(nats: float) -> Any:
        rows = said_by_hand(level, sample, said)
        rows[0]["logp"][:] = -nats
        return held(rows)

    eye = same(level)
    teachers = [
        Teacher("a", cache(1), eye),
        Teacher("b", cache(2), eye),
        Teacher("pivot", cache(3), None),
        Teacher("away", held([]), eye),
    ]
    temperature = 2.0
    raw = [math.exp(-nats / math.log(2) / temperature) for nats in (1, 2, 3)]

    def found(gate: Gate, teachers: Sequence[Teacher], fixed: Mapping[str, float] = {}) -> list[float]:
        dataset = FusionDataset(
            Texts.of([sample], level), teachers, Gating(gate, "sample", temperature, fixed, True), k=5
        )
        return dataset[0].confidence.tolist()  # type: ignore[no-any-return]

    assert found("min_ce", teachers) == pytest.approx([raw[0] / sum(raw), 0])
    assert found("avg_ce", teachers) == pytest.approx([(raw[0] + raw[1]) / sum(raw), 0])
    assert found("all", teachers) == pytest.approx([(raw[0] + raw[1]) / sum(raw), 0])
    assert found("fixed", teachers, {"b": 1.0}) == pytest.approx([raw[1] / sum(raw), 0])
    assert found("none", teachers) == [0, 0]
    assert found("avg_ce", teachers[:2]) == pytest.approx([1, 0])
    assert found("min_ce", teachers[:1]) == pytest.approx([1, 0])
    assert found("min_ce", teachers[3:]) == [0, 0]
    assert found("all", []) == [0, 0]


def test_fixed_weights_mix_as_told(level: Renderer) -> None:
    sample, eye = TEXTS[4], same(level)
    said = {"a": [{1: 0.5}, {3: 0.5}], "b": [{1: 0.25, 2: 0.5}, {}], "c": [{4: 1.0}, {4: 1.0}]}
    teachers = [Teacher(name, held(said_by_hand(level, sample, s)), eye) for name, s in said.items()]

    def found(fixed: Mapping[str, float]) -> tuple[list[dict[int, float]], list[int]]:
        example = FusionDataset(Texts.of([sample], level), teachers, Gating("fixed", fixed=fixed), k=5)[0]
        return taught(example), example.teacher.tolist()

    rows, teacher = found({"a": 3, "b": 1})  # c is not named
    assert rows[0] == pytest.approx({1: 0.4375, 2: 0.125}, rel=1e-3)
    assert rows[1] == pytest.approx({3: 0.5}, rel=1e-3) and teacher == [0, 0]
    rows, teacher = found({"b": 0.2, "c": 0.3, "nobody": 9.0})
    assert rows[0] == pytest.approx({1: 0.1, 2: 0.2, 4: 0.6}, rel=1e-3)
    assert rows[1] == pytest.approx({4: 1.0}, rel=1e-3) and teacher == [2, 2]
    assert found({"nobody": 1.0}) == ([{}, {}], [-1, -1])
