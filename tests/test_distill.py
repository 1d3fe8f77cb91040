"""What a target is taught: caches read through maps, the mean of several, labels alone; and the records in between."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from sources import (
    CONTENTS,
    SAMPLES,
    TEXTS,
    Rows,
    chat,
    entries,
    held,
    invented,
    plain,
    row_of,
    said_by_hand,
    same,
    taught,
)
from tiny import samples
from transformers import AutoModelForCausalLM

from fusion import cluster
from fusion.align import vocabulary
from fusion.align.follow import Follower
from fusion.capture.sample import top_k
from fusion.corpus import Corpus, write_samples
from fusion.distill.batch import Collator
from fusion.distill.dataset import FusionDataset, Teacher
from fusion.distill.gate import Gating, choose
from fusion.distill.loss import Targets, sparse_cross_entropy
from fusion.distill.texts import Texts
from fusion.records import Carries, Heard, Message, Sample, Sparse
from fusion.tokens.render import Renderer

# ---------------------------------------------------------------- the dataset


def test_a_source_that_is_the_target(level: Renderer) -> None:
    rows = invented(level, SAMPLES, seed=0)
    source = Teacher("own", held(rows), same(level))
    dataset = FusionDataset(Texts.of(SAMPLES, level), [source], Gating("min_ce"), k=5)
    assert len(dataset) == len(SAMPLES) and dataset.lengths().tolist() == [len(level.render(s).ids) for s in SAMPLES]
    for n, (sample, row) in enumerate(zip(SAMPLES, rows, strict=True)):
        rendered, example = level.render(sample), dataset[n]
        assert example.at.tolist() == [i for i, c in enumerate(rendered.carries) if c]
        assert example.labels.tolist() == [int(rendered.ids[i + 1]) for i in example.at]
        assert example.labels.tolist() == row["tokens"].tolist()
        assert taught(example) == entries(row)  # to the last bit
        assert example.teacher.tolist() == [0 if kept else -1 for kept in row["kept"]]
        assert dataset[n] is example  # built once


def naive_places(row: Mapping[str, Any]) -> dict[int, int]:
    return {int(place): n for n, place in enumerate(row["boundary"]) if place >= 0}


def test_another_tokenizer_teaches_where_both_have_read_the_same(level: Renderer, piece: Renderer) -> None:
    rows = invented(piece, SAMPLES, seed=1)
    ends = vocabulary.pair(piece.end_id, level.end_id, (len(piece.table), len(level.table)))
    matrix = vocabulary.chain(vocabulary.exact(piece.table, level.table), ends)
    dense = matrix.toarray()
    dataset = FusionDataset(
        Texts.of(SAMPLES, level), [Teacher("sp", held(rows), plain(matrix, piece, level))], Gating("min_ce"), k=300
    )
    met = 0
    for n, (sample, row) in enumerate(zip(SAMPLES, rows, strict=True)):
        rendered, example, said, places = level.render(sample), dataset[n], entries(row), naive_places(row)
        for number, (i, found) in enumerate(zip(example.at, taught(example), strict=True)):
            heard = said[places[p]] if (p := int(rendered.boundary[i])) in places else {}
            expected = sum((p * dense[t] for t, p in heard.items()), np.zeros(len(level.table)))
            assert found == pytest.approx({i: p for i, p in enumerate(expected) if p})
            assert example.teacher[number] == (0 if expected.any() else -1)
            met += bool(heard)
    assert met > 20


def test_the_best_source_teaches(level: Renderer, piece: Renderer) -> None:
    eye = same(level)
    likes = {"poor": -2.0, "good": -1.0, "fair": -1.5}
    rows = {name: invented(level, SAMPLES, seed=n, logp=logp) for n, (name, logp) in enumerate(likes.items())}
    for number in (0, 3):  # on these the poor one is good
        rows["poor"][number]["logp"][:] = -0.5
    teachers = [Teacher(name, held(r), eye) for name, r in rows.items()]
    dataset = FusionDataset(Texts.of(SAMPLES, level), teachers, Gating("min_ce"), k=5)
    for n in range(len(SAMPLES)):
        best = 0 if n in (0, 3) else 1
        assert set(dataset[n].teacher.tolist()) <= {best, -1} and best in dataset[n].teacher
        assert taught(dataset[n]) == entries(rows[("poor", "good")[best]][n])
    # a pivot without a map: where it would win, nobody teaches
    silent = [*teachers, Teacher("pivot", held(invented(level, SAMPLES, 7, -0.7)), None)]
    dataset = FusionDataset(Texts.of(SAMPLES, level), silent, Gating("min_ce"), k=5)
    for n in range(len(SAMPLES)):
        assert set(dataset[n].teacher.tolist()) <= ({0, -1} if n in (0, 3) else {-1})
        if n not in (0, 3):
            assert len(dataset[n].taught.ids) == 0 and len(dataset[n].taught) == len(dataset[n].at)


def test_the_gate_counts_bytes_and_not_tokens(level: Renderer, piece: Renderer) -> None:
    sample = TEXTS[4]  # "a": one content token in both
    longer = TEXTS[2]  # more tokens in one than in the other
    tokens = [int((r.render(longer).carries == Carries.CONTENT).sum()) for r in (level, piece)]
    assert tokens[0] != tokens[1]
    many, few = (level, piece) if tokens[0] > tokens[1] else (piece, level)
    # per token the first is the surer one, per byte the second
    caches = [
        held(invented(many, (sample, longer), 0, logp=-1.0)),
        held(invented(few, (sample, longer), 0, logp=-1.0001)),
    ]
    bits = [cache.get(longer.id).bits_per_byte() for cache in caches]  # type: ignore[union-attr]
    size = len(CONTENTS[2].encode())
    assert bits == pytest.approx([n * p / size / np.log(2) for n, p in ((max(tokens), 1.0), (min(tokens), 1.0001))])
    assert choose(np.array(bits)[:, None], "min_ce").tolist() == [[0.0], [1.0]]


def test_a_sample_that_no_source_has_read(level: Renderer) -> None:
    eye = same(level)
    for gate in ("min_ce", "avg_ce", "all"):
        cache = held(invented(level, SAMPLES[:2], seed=0))
        dataset = FusionDataset(Texts.of(SAMPLES, level), [Teacher("a", cache, eye)], Gating(gate), k=5)
        assert (dataset[1].teacher == 0).any()
        assert (dataset[2].teacher == -1).all() and len(dataset[2].taught.ids) == 0
        assert len(dataset[2].labels) == len(dataset[2].at) > 0


@pytest.mark.parametrize("gate", ["none", "min_ce", "all"])
def test_labels_alone(level: Renderer, gate: Any) -> None:
    cache = held(invented(level, SAMPLES, seed=0))
    teachers = [Teacher("a", cache, same(level))] if gate == "none" else []
    dataset = FusionDataset(Texts.of(SAMPLES, level), teachers, Gating(gate), k=5)
    for n in range(len(SAMPLES)):
        assert (dataset[n].teacher == -1).all() and len(dataset[n].taught.ids) == 0
    batch = Collator()([dataset[n] for n in range(len(SAMPLES))])
    assert not batch["confidence"].any() and not batch["taught_probs"].any()
    assert batch["taught_ids"].shape == (len(batch["labels"]), 1)


def test_all_sources_together(level: Renderer) -> None:
    sample = Sample("x", "test", "a", complete=True)  # two positions: the text's one token, and its end
    size = len(level.table)
    first = [{1: 0.5, 2: 0.25}, {}]
    second = [{2: 0.5, 3: 0.5}, {7: 0.25, 9: 0.5}]
    third = [{4: 1.0}, {4: 1.0}]
    lost = plain(vocabulary.pair(5, 6, (size, size)), level, level)  # loses all that the third says
    eye = same(level)
    caches = [held(said_by_hand(level, sample, s)) for n, s in enumerate((first, second, third))]
    teachers = [Teacher("a", caches[0], eye), Teacher("b", caches[1], eye)]
    mean = {2: 0.375, 1: 0.25, 3: 0.25}

    def found(teachers: Sequence[Teacher], k: int) -> tuple[list[dict[int, float]], list[int]]:
        example = FusionDataset(Texts.of([sample], level), teachers, Gating("all"), k)[0]
        return taught(example), example.teacher.tolist()

    rows, teacher = found(teachers, 5)  # near: float16 logarithms
    assert rows[0] == pytest.approx(mean, rel=1e-3)
    assert rows[1] == pytest.approx({9: 0.5, 7: 0.25}, rel=1e-3)  # where one says nothing, the other is heard whole
    assert teacher == [0, 1]
    assert found(teachers, 1)[0][0] == pytest.approx({2: 0.375}, rel=1e-3)  # the best of the mean, not of its parts
    for more in (Teacher("c", caches[2], lost), Teacher("c", caches[2], None)):
        for order in ([*teachers, more], [more, *teachers]):
            rows, teacher = found(order, 5)
            assert rows[0] == pytest.approx(mean, rel=1e-3) and rows[1] == pytest.approx({9: 0.5, 7: 0.25}, rel=1e-3)
            assert [order[t].name for t in teacher] == ["a", "b"]
    rows, teacher = found([Teacher("c", caches[2], lost)], 5)
    assert rows == [{}, {}] and teacher == [-1, -1]


def test_too_long(level: Renderer) -> None:
    lengths = [len(level.render(s).ids) for s in SAMPLES]
    context = sorted(lengths)[2]
    with pytest.raises(
        ValueError, match=r"level: sample \w{16} has \d+ tokens and the context is \d+; .*too_long: skip"
    ):
        FusionDataset(Texts.of(SAMPLES, level), [], Gating("none"), 5, context)
    kept = FusionDataset(Texts.of(SAMPLES, level), [], Gating("none"), 5, context, "skip")
    assert [kept.id(n) for n in range(len(kept))] == [
        s.id for s, n in zip(SAMPLES, lengths, strict=True) if n <= context
    ]
    assert kept.lengths().tolist() == [n for n in lengths if n <= context]
    assert len(FusionDataset(Texts.of(SAMPLES, level), [], Gating("none"), 5, max(lengths))) == len(SAMPLES)
    question = (Message("user", "q"),)  # nothing in it carries loss
    assert len(FusionDataset(Texts.of([Sample("x", "test", None, question)], level), [], Gating("none"), 5)) == 0


@pytest.mark.parametrize("followed", [True, False])
def test_a_model_teaches_itself_nothing(
    tmp_path: Path, byte_level_tokenizer: Any, tiny_llama: Any, followed: bool
) -> None:
    """Capture, cache, gate, map, batch and loss in one line: a source that is the target gives no gradient."""
    renderer = Renderer(byte_level_tokenizer, "tiny")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "model", byte_level_tokenizer)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # else it is nearly uniform
    rows: Rows = []
    for sample in SAMPLES:
        r = renderer.render(sample)
        at = torch.from_numpy(np.flatnonzero(r.carries))
        ids = torch.from_numpy(r.ids).long()
        with torch.no_grad():
            kept = top_k(model(ids[None]).logits[0, at], ids[at + 1], len(renderer.table))
        each = np.full(len(at), kept.ids.shape[1])
        rows.append(
            row_of(sample, r, kept.next_logp.numpy(), each, kept.ids.numpy().ravel(), kept.logp.numpy().ravel())
        )
    projector = Follower(same(renderer).map, 4) if followed else same(renderer)
    own = Teacher("own", held(rows), projector)
    dataset = FusionDataset(Texts.of(SAMPLES, renderer), [own], Gating("min_ce"), k=len(renderer.table))
    sizes = []
    for label_weight in (1.0, 0.0):
        batch = Collator()([dataset[n] for n in range(len(SAMPLES))])
        model.zero_grad()
        hidden = model.model(input_ids=batch["input_ids"]).last_hidden_state
        targets = Targets(
            batch["labels"], batch["taught_ids"], batch["taught_probs"], 1 - (1 - label_weight) * batch["confidence"]
        )
        total, label, _ = sparse_cross_entropy(hidden.flatten(0, 1)[batch["rows"]], model.lm_head.weight, None, targets)
        total.backward()
        sizes.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
        said = torch.cat([torch.from_numpy(row["logp"]) for row in rows])
        torch.testing.assert_close(label, -said, rtol=1e-4, atol=1e-4)  # labels and cache meet at the same positions
    assert sizes[1] < 2e-3 * sizes[0]  # float16 logarithms


def test_an_empty_map_teaches_nothing(level: Renderer) -> None:
    cache = held(invented(level, SAMPLES, seed=0))
    nothing = plain(csr_array((len(level.table), len(level.table))), level, level)
    dataset = FusionDataset(Texts.of(SAMPLES, level), [Teacher("a", cache, nothing)], Gating("min_ce"), k=5)
    for n in range(len(SAMPLES)):
        assert (dataset[n].teacher == -1).all() and len(dataset[n].taught.ids) == 0


# ---------------------------------------------------------------- records


def test_mass() -> None:
    probs = np.array([0.5, 0.25, 0.125, 1.0], dtype=np.float32)
    for offsets, expected in (
        ([0, 2, 2, 3, 4, 4], [0.75, 0, 0.125, 1, 0]),
        ([0, 0, 0, 4], [0, 0, 1.875]),
        ([0, 4], [1.875]),
        ([0], []),
    ):
        sparse = Sparse(np.array(offsets, dtype=np.int64), np.arange(4, dtype=np.int32), probs)
        assert sparse.mass().tolist() == expected and len(sparse) == len(expected)
        assert sparse.mass().dtype == np.float32
    empty = Sparse(np.zeros(4, dtype=np.int64), np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.float32))
    assert empty.mass().tolist() == [0, 0, 0]


def test_bits_per_byte() -> None:
    def heard(carries: list[int], logp: list[float], size: int) -> Heard:
        nothing = Sparse(np.zeros(len(logp) + 1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))
        ids = np.zeros(len(logp), np.int32)
        return Heard(ids, ids.astype(np.int64), np.array(carries, np.uint8), np.array(logp, np.float32), nothing, size)

    ln2 = float(np.log(2))
    assert heard([1, 1, 2], [-2 * ln2, -4 * ln2, -100.0], 3).bits_per_byte() == pytest.approx(2)  # the end is no byte
    assert heard([2], [-1.0], 0).bits_per_byte() == float("inf")
    assert heard([1], [0.0], 5).bits_per_byte() == 0


@pytest.mark.parametrize("count", [60, 9, 2, 0])
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_ranks_render_together(
    level: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, ranks: int
) -> None:
    """Each its share of the groups, of which some have none; what is read is what `of` holds in memory."""
    here = [0]

    def together(work: Callable[[], Any]) -> list[Any]:
        """All ranks render; one looks at what they left."""
        if not list(folder.iterdir()):
            return [work() for here[0] in range(ranks)]
        assert {path.name.partition("-")[2] for path in folder.iterdir()} == {str(n) for n in range(ranks)}
        return [work()]

    folder = tmp_path / "rendered"
    folder.mkdir()
    (folder / "ids-9").write_bytes(bytes(8))  # of an older launch

    monkeypatch.setattr(cluster, "world", lambda: ranks)
    monkeypatch.setattr(cluster, "rank", lambda: here[0])
    monkeypatch.setattr(cluster, "together", together)
    monkeypatch.setattr(cluster, "on_main", lambda work: work())
    chats = [chat(f"It is day {n}.", *"ab"[: n % 3]) for n in range(10)]
    given = [*SAMPLES, *samples(count, seed=5), *chats][:count]
    write_samples(tmp_path / "train.parquet", given)
    whole = Texts.of(given, level)
    for texts in (Texts.shared(Corpus(tmp_path, "train"), level, folder), whole):
        assert len(texts) == count == len(list(texts))
        for n, sample in enumerate(given):
            rendered, expected = texts[n], level.render(sample)
            for name in ("ids", "boundary", "carries"):
                assert getattr(rendered, name).dtype == getattr(expected, name).dtype
                assert not rendered.ids.flags.writeable  # mapped to be written to, none may be larger than memory
                np.testing.assert_array_equal(getattr(rendered, name), getattr(expected, name))
            assert (rendered.content_bytes, rendered.lossy) == (expected.content_bytes, expected.lossy)
            assert texts.id(n) == sample.id and texts.sizes(n) == [len(s.encode()) for s in sample.segments()]
            assert texts.tokens[n] == len(expected.ids) and texts.taught[n] == np.count_nonzero(expected.carries)


def test_a_rank_that_does_not_see_what_another_wrote(level: Renderer, tmp_path: Path) -> None:
    write_samples(tmp_path / "train.parquet", SAMPLES)
    folder = tmp_path / "rendered"
    whole = cluster.together

    def together(work: Callable[[], Any]) -> list[Any]:
        found = whole(work)
        os.truncate(folder / "boundary-0", 8)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "together", together)
        with pytest.raises(ValueError, match=r"boundary-0: has 8 bytes and \d+ were written; all ranks want one disk"):
            Texts.shared(Corpus(tmp_path, "train"), level, folder)
