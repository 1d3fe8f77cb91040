"""Batches: side by side or packed, they say the same of each sample."""

from collections import Counter
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sources import SAMPLES, held, invented, plain, taught
from transformers import PreTrainedTokenizerFast

from fusion.align import vocabulary
from fusion.distill.batch import Collator, Packing, bins
from fusion.distill.dataset import Example, FusionDataset, Teacher
from fusion.distill.gate import Gating
from fusion.distill.order import StepOrder
from fusion.distill.texts import Texts
from fusion.records import Sparse
from fusion.tokens.render import Renderer

LENGTHS = (7, 3, 12, 2, 5, 12, 4)


def made(length: int, number: int, seed: int = 0, k: int = 4) -> Example:
    """A sample with random ids, of which some positions are learned and some taught, with 0 to k entries."""
    random = np.random.default_rng([seed, number])
    ids = random.integers(1, 90, length).astype(np.int32)
    learned = random.random(length - 1) < 0.7
    learned[-1] = True
    at = np.flatnonzero(learned)
    kept = random.integers(0, k + 1, len(at))
    taught_ids = [random.permutation(90)[:n] for n in kept]
    probs = [random.dirichlet(np.ones(n + 1))[:n] for n in kept]
    return Example(
        ids,
        at,
        ids[at + 1].astype(np.int64),
        np.where(kept > 0, random.integers(0, 3, len(at)), -1),
        np.where(kept > 0, random.random(len(at)), 0).astype(np.float32),
        Sparse(
            np.append(0, np.cumsum(kept)),
            np.concatenate([[], *taught_ids]).astype(np.int32),
            np.concatenate([[], *probs]).astype(np.float32),
        ),
        number,
    )


NOTHING = Sparse(np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))
EXAMPLES = [made(length, number) for number, length in enumerate(LENGTHS, start=100)]


# ---------------------------------------------------------------- bins


def test_bins_by_hand() -> None:
    assert bins([5, 4, 3, 2, 2], 8) == [[0, 2], [1, 3, 4]]
    assert bins([2, 2, 3, 4, 5], 8) == [[4, 2], [3, 0, 1]]  # longest first, of equals the first
    assert bins([8, 8, 1], 8) == [[0], [1], [2]]
    assert bins([4], 4) == [[0]]
    assert bins([], 4) == []


@given(lengths=st.lists(st.integers(1, 40), max_size=60), spare=st.integers(0, 30))
def test_bins_hold_each_item_once_and_no_more_than_fits(lengths: list[int], spare: int) -> None:
    capacity = max(lengths, default=1) + spare
    found = bins(lengths, capacity)
    loads = [sum(lengths[n] for n in members) for members in found]
    assert sorted(n for members in found for n in members) == list(range(len(lengths)))
    assert all(0 < load <= capacity for load in loads)
    # nothing that opened a later bin had room in an earlier one, so two bins never fit one
    assert all(a + b > capacity for n, a in enumerate(loads) for b in loads[:n])


# ---------------------------------------------------------------- batches


def told(batch: dict[str, torch.Tensor]) -> Counter[tuple[Any, ...]]:
    """What is learned where, whatever the order: sample, label, entries, teacher, confidence, weight."""
    columns = [batch[n].tolist() for n in ("sample", "labels", "teacher", "confidence", "weight")]
    entries = [
        frozenset((i, p) for i, p in zip(ids, probs, strict=True) if p > 0)
        for ids, probs in zip(batch["taught_ids"].tolist(), batch["taught_probs"].tolist(), strict=True)
    ]
    return Counter(zip(*columns, entries, strict=True))


def by_hand(examples: list[Example], average: str) -> Counter[tuple[Any, ...]]:
    return Counter(
        (e.number, label, teacher, confidence, float(np.float32(1 / len(e.at))) if average == "samples" else 1.0, said)
        for e in examples
        for label, teacher, confidence, said in zip(
            e.labels.tolist(),
            e.teacher.tolist(),
            e.confidence.tolist(),
            (frozenset(row.items()) for row in taught(e)),
            strict=True,
        )
    )


@pytest.mark.parametrize("average", ["tokens", "samples"])
@pytest.mark.parametrize("packing", get_args(Packing))
def test_a_batch_says_of_each_sample_what_its_example_says(packing: Packing, average: Any) -> None:
    for examples in (EXAMPLES, EXAMPLES[:1], EXAMPLES[2:4], EXAMPLES[::-1]):
        batch = Collator(packing, average)(examples)
        assert told(batch) == by_hand(examples, average)
        ids, rows = batch["input_ids"].flatten(), batch["rows"]
        assert (ids[rows + 1] == batch["labels"]).all()  # a label is the next token of its row
        assert batch["tokens"] == sum(len(e.ids) for e in examples)
        for e in examples:
            # the whole sample lies where its rows say
            mine = rows[batch["sample"] == e.number]
            start = int(mine[0]) - int(e.at[0])
            assert (mine - start).tolist() == e.at.tolist()
            assert ids[start : start + len(e.ids)].tolist() == e.ids.tolist()
            assert start // batch["input_ids"].shape[1] == (start + len(e.ids) - 1) // batch["input_ids"].shape[1]
        if average == "samples":
            for e in examples:
                assert batch["weight"][batch["sample"] == e.number].sum() == pytest.approx(1)
            assert float(batch["weight"].sum()) == pytest.approx(len(examples))
        types = {name: tensor.dtype for name, tensor in batch.items()}
        assert {types.pop(n) for n in ("taught_probs", "confidence", "weight")} == {torch.float32}
        assert set(types.values()) == {torch.int64}


def test_side_by_side() -> None:
    batch = Collator()(EXAMPLES)
    assert batch["input_ids"].shape == (len(LENGTHS), 12) and "position_ids" not in batch
    for row, e in zip(batch["input_ids"].tolist(), EXAMPLES, strict=True):
        assert row == [*e.ids.tolist(), *[0] * (12 - len(e.ids))]


@pytest.mark.parametrize(("packing", "members"), [("rows", [[2], [5], [0, 4], [6, 1, 3]]), ("flat", None)])
def test_positions_begin_again_at_each_sample(packing: Packing, members: list[list[int]] | None) -> None:
    batch = Collator(packing)(EXAMPLES)
    members = members or [[2, 5, 0, 4, 6, 1, 3]]
    width = max(LENGTHS) if packing == "rows" else sum(LENGTHS)
    assert batch["input_ids"].shape == batch["position_ids"].shape == (len(members), width)
    for ids, places, row in zip(batch["input_ids"].tolist(), batch["position_ids"].tolist(), members, strict=True):
        space = [0] * (width - sum(LENGTHS[n] for n in row))
        assert ids == [i for n in row for i in EXAMPLES[n].ids.tolist()] + space
        spans = [LENGTHS[n] for n in row]
        spans[-1] += len(space)  # what fills the row comes after everything
        assert places == [i for span in spans for i in range(span)]


def test_no_row_holds_more_than_the_longest_sample() -> None:
    """However many there are; and the fewer rows the better."""
    examples = [made(2 + n % 9, n) for n in range(50)]
    batch = Collator("rows")(examples)
    tokens = sum(len(e.ids) for e in examples)
    assert batch["input_ids"].shape[1] == 10 and -(-tokens // 10) <= len(batch["input_ids"]) <= 1.1 * tokens / 10 + 1
    assert Collator("flat")(examples)["input_ids"].shape == (1, tokens)


@pytest.mark.parametrize("packing", get_args(Packing))
def test_nothing_is_taught(packing: Packing) -> None:
    examples = [made(length, n, k=0) for n, length in enumerate((4, 6, 2))]
    batch = Collator(packing)(examples)
    assert batch["taught_ids"].shape == (len(batch["labels"]), 1) and not batch["taught_ids"].any()
    assert not batch["taught_probs"].any() and not batch["confidence"].any() and (batch["teacher"] == -1).all()


@pytest.mark.parametrize("average", ["tokens", "samples"])
@pytest.mark.parametrize("packing", get_args(Packing))
def test_an_example_of_which_nothing_is_learned_changes_nothing(packing: Packing, average: Any) -> None:
    """It fills up a step: its tokens do not count."""
    none = made(5, 7)
    empty = Example(none.ids, none.at[:0], none.labels[:0], none.teacher[:0], none.confidence[:0], NOTHING, 7)
    batch, plain = (Collator(packing, average)(examples) for examples in ([empty, *EXAMPLES, empty], EXAMPLES))
    assert told(batch) == told(plain) and batch["tokens"] == plain["tokens"]
    assert (batch["input_ids"].flatten()[batch["rows"] + 1] == batch["labels"]).all()
    alone = Collator(packing, average)([empty])
    assert alone["input_ids"].shape == (1, 5) and alone["tokens"] == 0
    assert [len(alone[n]) for n in ("rows", "labels", "taught_ids", "weight", "sample")] == [0] * 5


def test_examples_of_a_dataset(
    byte_level_tokenizer: PreTrainedTokenizerFast, sentencepiece_tokenizer: PreTrainedTokenizerFast
) -> None:
    level, piece = Renderer(byte_level_tokenizer, "level"), Renderer(sentencepiece_tokenizer, "piece")
    cache = held(invented(piece, SAMPLES[:4], seed=2))
    teacher = Teacher("sp", cache, plain(vocabulary.exact(piece.table, level.table), piece, level))
    dataset = FusionDataset(Texts.of(SAMPLES, level), [teacher], Gating("min_ce"), k=3)
    examples = [dataset[n] for n in (2, 5, 0)]
    for packing in get_args(Packing):
        batch = Collator(packing)(examples)
        assert told(batch) == by_hand(examples, "tokens")
        assert sorted(set(batch["sample"].tolist())) == [0, 2, 5]
        assert set(batch["confidence"].tolist()) == {0.0, 1.0}
        unused = batch["taught_probs"] == 0
        assert batch["taught_probs"].shape[1] <= 3 and not batch["taught_ids"][unused].any()


# ---------------------------------------------------------------- order


def test_every_epoch_reads_every_sample_once_in_whole_steps() -> None:
    for count, batch_size in ((10, 4), (12, 4), (3, 8), (1, 1)):
        order = StepOrder(count, batch_size, seed=7)
        epochs = []
        for epoch in range(3):
            order.set_epoch(epoch)
            found = list(order)
            assert len(found) == len(order) and len(order) % batch_size == 0 and len(order) - count < batch_size
            assert sorted(found) == list(range(len(order)))  # numbers beyond the last stand for nothing
            assert all(n < count for n in found[:count])
            epochs.append(found)
        order.set_epoch(1)
        assert list(order) == epochs[1] and list(StepOrder(count, batch_size, seed=7)) == epochs[0]
        assert count < 9 or epochs[0] != epochs[1]
        assert count < 9 or list(StepOrder(count, batch_size, seed=8)) != epochs[0]
