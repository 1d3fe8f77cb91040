"""What a target is taught: the gate, caches read through maps, mixtures, batches; and the entries that are kept."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from fusion.align import vocabulary
from fusion.align.follow import Follower
from fusion.align.map import Map
from fusion.align.projector import Plain
from fusion.align.spelling import Spelling
from fusion.capture.sample import top_k
from fusion.distill.dataset import Example, FusionDataset, Teacher, collate
from fusion.distill.gate import choose
from fusion.distill.loss import Targets, sparse_cross_entropy
from fusion.records import Carries, Heard, Message, Sample, Sparse, sample_id
from fusion.tokens.render import Renderer

CONTENTS = (
    "The cat sat on the mat.",
    "def add(one, two):\n    return one + two\n",
    "Führer naïve café 🙂 48",
    "  two spaces, the end  ",
    "a",
)
TEXTS = tuple(Sample(sample_id(text), "test", text) for text in CONTENTS)
CHAT_MESSAGES = (
    Message("user", "q"),
    Message("assistant", "It is a day."),
    Message("user", "q"),
    Message("assistant", "a"),
)
CHAT = Sample(sample_id(None, CHAT_MESSAGES), "test", None, CHAT_MESSAGES)
SAMPLES = (*TEXTS, CHAT)

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def level(byte_level_tokenizer: PreTrainedTokenizerFast) -> Renderer:
    return Renderer(byte_level_tokenizer, "level")


@pytest.fixture(scope="module")
def piece(sentencepiece_tokenizer: PreTrainedTokenizerFast) -> Renderer:
    return Renderer(sentencepiece_tokenizer, "piece")


def invented(renderer: Renderer, samples: Sequence[Sample], seed: int, logp: float = -1.0, k: int = 5) -> Rows:
    """Cache rows of a source that says something at random, 0 to k entries a position, and is as sure as told."""
    random, rows = np.random.default_rng(seed), []
    for sample in samples:
        r = renderer.render(sample)
        at = np.flatnonzero(r.carries)
        kept = random.integers(0, k + 1, len(at))
        ids = [random.permutation(len(renderer.table))[:n] for n in kept]
        probs = [np.sort(random.dirichlet(np.ones(n + 1)))[::-1][:n] for n in kept]
        rows.append(
            {
                "id": sample.id,
                "content_bytes": r.content_bytes,
                "tokens": r.ids[at + 1],
                "boundary": r.boundary[at].astype(np.int32),
                "carries": r.carries[at],
                "logp": np.full(len(at), logp, dtype=np.float32),
                "kept": kept.astype(np.uint16),
                "entry_ids": np.concatenate([[], *ids]).astype(np.int32),
                "entry_logp": np.log(np.concatenate([[], *probs])).astype(np.float16),
            }
        )
    return rows


class Held:
    """What a cache gives back of these rows, held in memory."""

    def __init__(self, rows: Rows):
        self._heard = {str(row["id"]): _heard(row) for row in rows}

    def get(self, id: str) -> Heard | None:
        return self._heard.get(id)


def _heard(row: Mapping[str, Any]) -> Heard:
    offsets = np.concatenate([[0], np.cumsum(row["kept"], dtype=np.int64)])
    said = Sparse(offsets, row["entry_ids"], np.exp(row["entry_logp"].astype(np.float32)))
    boundary = row["boundary"].astype(np.int64)
    return Heard(row["tokens"], boundary, row["carries"], row["logp"], said, row["content_bytes"])


def held(rows: Rows) -> Any:
    return Held(rows)


def entries(row: Mapping[str, Any]) -> list[dict[int, float]]:
    """The kept entries of each position of a cache row, id → probability."""
    stops = np.cumsum(row["kept"], dtype=int)
    return [
        {
            int(i): float(np.exp(p.astype(np.float32)))
            for i, p in zip(row["entry_ids"][a:b], row["entry_logp"][a:b], strict=True)
        }
        for a, b in zip(stops - row["kept"], stops, strict=True)
    ]


def taught(example: Example) -> list[dict[int, float]]:
    of, t = example.taught.offsets, example.taught
    return [
        dict(zip(t.ids[a:b].tolist(), t.probs[a:b].tolist(), strict=True)) for a, b in zip(of, of[1:], strict=False)
    ]


def plain(matrix: csr_array, source: Renderer, target: Renderer) -> Plain:
    """A map that is used as it is, nothing followed along the text."""
    size = len(target.table)
    return Plain(Map(matrix, csr_array((size, size)), Spelling.of(source.table), Spelling.of(target.table)), size)


def same(renderer: Renderer) -> Plain:
    return plain(vocabulary.identity(len(renderer.table)), renderer, renderer)


# ---------------------------------------------------------------- gate


def test_gate() -> None:
    bits = {"a": 2.0, "b": 1.0, "c": 1.0}
    assert choose(bits, "min_ce") == {"b": 1.0}  # the first named of equals
    assert choose(bits, "all") == {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}
    assert choose(bits, "none") == {}
    assert choose({"a": float("inf")}, "min_ce") == {"a": 1.0}
    assert choose({"a": float("inf"), "b": 9.0}, "min_ce") == {"b": 1.0}
    for gate in ("min_ce", "all", "none"):
        assert choose({}, gate) == {}  # type: ignore[arg-type]


# ---------------------------------------------------------------- the dataset


def test_a_source_that_is_the_target(tmp_path: Path, level: Renderer) -> None:
    rows = invented(level, SAMPLES, seed=0)
    source = Teacher("own", held(rows), same(level))
    dataset = FusionDataset(SAMPLES, level, [source], "min_ce", k=5)
    assert len(dataset) == len(SAMPLES) and dataset.lengths() == [len(level.render(s).ids) for s in SAMPLES]
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


def test_another_tokenizer_teaches_where_both_have_read_the_same(
    tmp_path: Path, level: Renderer, piece: Renderer
) -> None:
    rows = invented(piece, SAMPLES, seed=1)
    ends = vocabulary.pair(piece.end_id, level.end_id, (len(piece.table), len(level.table)))
    matrix = vocabulary.chain(vocabulary.exact(piece.table, level.table), ends)
    dense = matrix.toarray()
    dataset = FusionDataset(SAMPLES, level, [Teacher("sp", held(rows), plain(matrix, piece, level))], "min_ce", k=300)
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


def test_the_best_source_teaches(tmp_path: Path, level: Renderer, piece: Renderer) -> None:
    eye = same(level)
    likes = {"poor": -2.0, "good": -1.0, "fair": -1.5}
    rows = {name: invented(level, SAMPLES, seed=n, logp=logp) for n, (name, logp) in enumerate(likes.items())}
    for number in (0, 3):  # on these the poor one is good
        rows["poor"][number]["logp"][:] = -0.5
    teachers = [Teacher(name, held(r), eye) for name, r in rows.items()]
    dataset = FusionDataset(SAMPLES, level, teachers, "min_ce", k=5)
    for n in range(len(SAMPLES)):
        best = 0 if n in (0, 3) else 1
        assert set(dataset[n].teacher.tolist()) <= {best, -1} and best in dataset[n].teacher
        assert taught(dataset[n]) == entries(rows[("poor", "good")[best]][n])
    # a pivot without a map: where it would win, nobody teaches
    silent = [*teachers, Teacher("pivot", held(invented(level, SAMPLES, 7, -0.7)), None)]
    dataset = FusionDataset(SAMPLES, level, silent, "min_ce", k=5)
    for n in range(len(SAMPLES)):
        assert set(dataset[n].teacher.tolist()) <= ({0, -1} if n in (0, 3) else {-1})
        if n not in (0, 3):
            assert len(dataset[n].taught.ids) == 0 and len(dataset[n].taught) == len(dataset[n].at)


def test_the_gate_counts_bytes_and_not_tokens(tmp_path: Path, level: Renderer, piece: Renderer) -> None:
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
    assert choose({"many": bits[0], "few": bits[1]}, "min_ce") == {"few": 1.0}


def test_a_sample_that_no_source_has_read(tmp_path: Path, level: Renderer) -> None:
    eye = same(level)
    for gate in ("min_ce", "all"):
        cache = held(invented(level, SAMPLES[:2], seed=0))
        dataset = FusionDataset(SAMPLES, level, [Teacher("a", cache, eye)], gate, k=5)  # type: ignore[arg-type]
        assert (dataset[1].teacher == 0).any()
        assert (dataset[2].teacher == -1).all() and len(dataset[2].taught.ids) == 0
        assert len(dataset[2].labels) == len(dataset[2].at) > 0


@pytest.mark.parametrize("gate", ["none", "min_ce", "all"])
def test_labels_alone(tmp_path: Path, level: Renderer, gate: Any) -> None:
    cache = held(invented(level, SAMPLES, seed=0))
    teachers = [Teacher("a", cache, same(level))] if gate == "none" else []
    dataset = FusionDataset(SAMPLES, level, teachers, gate, k=5)
    for n in range(len(SAMPLES)):
        assert (dataset[n].teacher == -1).all() and len(dataset[n].taught.ids) == 0
    batch = collate([dataset[n] for n in range(len(SAMPLES))], 0.9)
    assert (batch["label_weight"] == 1).all() and not batch["taught_probs"].any()
    assert batch["taught_ids"].shape == (len(batch["labels"]), 1)


def said_by_hand(renderer: Renderer, sample: Sample, said: Sequence[Mapping[int, float]]) -> Rows:
    """A cache row with these entries, whose probabilities are powers of two: exact in float16 logarithms or nearly."""
    row = invented(renderer, [sample], seed=0)[0]
    row["kept"] = np.array([len(s) for s in said], dtype=np.uint16)
    row["entry_ids"] = np.array([i for s in said for i in s], dtype=np.int32)
    row["entry_logp"] = np.log(np.array([p for s in said for p in s.values()])).astype(np.float16)
    return [row]


def test_all_sources_together(tmp_path: Path, level: Renderer) -> None:
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
        example = FusionDataset([sample], level, teachers, "all", k)[0]
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
        FusionDataset(SAMPLES, level, [], "none", 5, context)
    kept = FusionDataset(SAMPLES, level, [], "none", 5, context, "skip")
    assert [s.id for s in kept.samples] == [s.id for s, n in zip(SAMPLES, lengths, strict=True) if n <= context]
    assert kept.lengths() == [n for n in lengths if n <= context]
    assert len(FusionDataset(SAMPLES, level, [], "none", 5, max(lengths))) == len(SAMPLES)
    question = (Message("user", "q"),)  # nothing in it carries loss
    assert len(FusionDataset([Sample("x", "test", None, question)], level, [], "none", 5)) == 0


def test_collate(tmp_path: Path, level: Renderer, piece: Renderer) -> None:
    cache = held(invented(piece, SAMPLES[:4], seed=2))
    teacher = Teacher("sp", cache, plain(vocabulary.exact(piece.table, level.table), piece, level))
    dataset = FusionDataset(SAMPLES, level, [teacher], "min_ce", k=3)
    examples = [dataset[n] for n in (2, 5, 0)]
    batch = collate(examples, 0.25)
    width = max(len(e.ids) for e in examples)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, width)
    flat, n = batch["input_ids"].flatten().tolist(), 0
    for row, e in enumerate(examples):
        padded = [*e.ids.tolist(), *[0] * (width - len(e.ids))]
        assert batch["input_ids"][row].tolist() == padded
        assert batch["attention_mask"][row].tolist() == [1] * len(e.ids) + [0] * (width - len(e.ids))
        for position, said, who in zip(e.at, taught(e), e.teacher, strict=True):
            at = int(batch["rows"][n])
            assert at == row * width + position and position + 1 < len(e.ids)
            assert batch["labels"][n] == flat[at + 1]  # shifted by one, within its own sample
            used = batch["taught_probs"][n] > 0
            assert (
                dict(zip(batch["taught_ids"][n][used].tolist(), batch["taught_probs"][n][used].tolist(), strict=True))
                == said
            )
            assert not batch["taught_ids"][n][~used].any()
            assert batch["label_weight"][n] == (0.25 if who >= 0 else 1.0)
            assert batch["teacher"][n] == who
            n += 1
    assert n == len(batch["rows"]) == len(batch["labels"])
    assert (batch["label_weight"] == 0.25).any() and (batch["label_weight"] == 1).any()
    types = {name: t.dtype for name, t in batch.items()}
    assert {types.pop("taught_probs"), types.pop("label_weight")} == {torch.float32}
    assert set(types.values()) == {torch.int64}


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
        rows.append(
            {
                "id": sample.id,
                "content_bytes": r.content_bytes,
                "tokens": r.ids[at + 1],
                "boundary": r.boundary[at].astype(np.int32),
                "carries": r.carries[at],
                "logp": kept.next_logp.numpy(),
                "kept": np.full(len(at), kept.ids.shape[1], dtype=np.uint16),
                "entry_ids": kept.ids.numpy().astype(np.int32).ravel(),
                "entry_logp": kept.logp.numpy().astype(np.float16).ravel(),
            }
        )
    projector = Follower(same(renderer).map, 4) if followed else same(renderer)
    own = Teacher("own", held(rows), projector)
    dataset = FusionDataset(SAMPLES, renderer, [own], "min_ce", k=len(renderer.table))
    sizes = []
    for label_weight in (1.0, 0.0):
        batch = collate([dataset[n] for n in range(len(SAMPLES))], label_weight)
        model.zero_grad()
        hidden = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        targets = Targets(batch["labels"], batch["taught_ids"], batch["taught_probs"], batch["label_weight"])
        total, label, _ = sparse_cross_entropy(hidden.flatten(0, 1)[batch["rows"]], model.lm_head.weight, None, targets)
        total.backward()
        sizes.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
        said = torch.cat([torch.from_numpy(row["logp"]) for row in rows])
        torch.testing.assert_close(label, -said, rtol=1e-4, atol=1e-4)  # labels and cache meet at the same positions
    assert sizes[1] < 2e-3 * sizes[0]  # float16 logarithms


def test_an_empty_map_teaches_nothing(tmp_path: Path, level: Renderer) -> None:
    cache = held(invented(level, SAMPLES, seed=0))
    nothing = plain(csr_array((len(level.table), len(level.table))), level, level)
    dataset = FusionDataset(SAMPLES, level, [Teacher("a", cache, nothing)], "min_ce", k=5)
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
