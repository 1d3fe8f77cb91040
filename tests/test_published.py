"""The published procedures as a run takes them: projector, FuseChat's counts, map on disk, refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_array
from sources import TEXTS
from test_paper import MARKS, TEXT, numbered, published, sparse, tokenizer, vocabulary_of
from tiny import load, tree

from fusion import pipeline
from fusion.align import paper
from fusion.align.map import Map
from fusion.align.projector import projector
from fusion.align.published import Published, paired
from fusion.align.spelling import Spelling
from fusion.align.stage import make_map, strings_of
from fusion.artifact import read_manifest
from fusion.config import Align, Config
from fusion.distill.dataset import FusionDataset, Teacher
from fusion.distill.gate import Gating
from fusion.distill.texts import Texts
from fusion.records import Carries, Heard, Sample, Sparse, sample_id
from fusion.tokens.render import Renderer

PAIR = ("mpt", "llama2")


def heard_of(ids: np.ndarray, entries: Sparse) -> Heard:
    """A reading of which the published procedures ask ids and entries alone."""
    count = len(ids)
    carries = np.full(count, Carries.CONTENT, np.uint8)
    return Heard(ids.astype(np.int32), np.arange(count), carries, np.zeros(count, np.float32), entries, count)


@pytest.mark.parametrize("method", ["fusellm", "fusechat"])
def test_a_run_teaches_what_the_published_code_does(method: Any) -> None:
    """Its row at a token is ours at the position after that token; it says nothing of the first position."""
    peer = published()
    source, target = (Renderer(tokenizer(name), name, "plain") for name in PAIR)
    counts = csr_array((len(source.table), len(target.table)), dtype=np.int64)
    first = csr_array((len(target.table), len(target.table)), dtype=np.int64)
    settings = Align(procedure=method)
    if method == "fusechat":  # its map is counted: some tokens to themselves, and one to any
        words = target.tokenizer.get_vocab()
        theirs = vocabulary_of("mpt")
        to = np.array([words.get((w or "").replace(*MARKS), n % 900 + 300) for n, w in enumerate(theirs)])
        counts = csr_array((np.ones(len(theirs), np.int64), (np.arange(len(theirs)), to)), shape=counts.shape)
    made = make_map(settings, source, target, counts, first, strings_of(source, target))
    best = made.matrix.argmax(axis=1)
    has = np.diff(made.matrix.indptr) > 0
    mine = vocabulary_of("llama2")
    mapping = {
        w.replace(*MARKS): mine[best[i]] for i, w in enumerate(vocabulary_of("mpt")) if w and i < len(has) and has[i]
    }
    reads, learns = (np.array(s.tokenizer(TEXT, add_special_tokens=False)["input_ids"]) for s in (source, target))
    random = np.random.default_rng(0)
    ids = [np.flatnonzero(has)[random.permutation(2000)[:6]].tolist() for _ in reads]
    probs = [np.sort(random.dirichlet(np.ones(8)).astype(np.float32))[:1:-1].tolist() for _ in reads]
    said = [(i, np.log(p).tolist()) for i, p in zip(ids, probs, strict=True)]
    # the published code has, at each token, the entries of the step after it; ours stand at the token they foretell
    expected = peer.align_sample(
        source.tokenizer,
        target.tokenizer,
        reads[:-1].tolist(),
        learns[:-1].tolist(),
        said[1:],
        target.tokenizer.get_vocab(),
        mapping,
        MARKS,
        method,
    )
    heard = heard_of(reads, sparse(*(dict(zip(i, p, strict=True)) for i, p in zip(ids, probs, strict=True))))
    hears = projector(made, settings)
    assert isinstance(hears, Published)
    rows, found = hears.project(heard, np.arange(len(learns)), learns, 64)
    assert rows.tolist() == [n + 1 for n, (wanted, _) in enumerate(expected) if wanted]
    assert 0.3 < np.mean([len(wanted) > 1 for wanted, _ in expected]) < 1
    told = [row for row in expected if row[0]]
    for n, (wanted, logits) in enumerate(told):
        part = slice(found.offsets[n], found.offsets[n + 1])
        assert found.ids[part].tolist() == wanted
        np.testing.assert_allclose(found.probs[part], np.exp(logits) / np.exp(logits).sum(), rtol=1e-5)
    nothing = heard_of(reads[:1], sparse({}))
    assert [len(part) for part in hears.project(nothing, np.zeros(3), learns[:3], 4)] == [0, 0]


def test_fusechat_counts_tokens_that_stand_alone_on_both_sides() -> None:
    """`Ġcafe` is taken by two of the target's, `▁on` takes two of the source's: neither is counted."""
    known, reads, learns = numbered(["The", "Ġcafe", "Ġis", "Ġo", "n"], ["▁The", "▁c", "afe", "▁is", "▁on"])
    assert [list(map(int, r)) for r in zip(*paper.pairs(known, reads, learns, "fusechat"), strict=True)] == [
        [0, 1],
        [1, 2],
        [1, 2],
        [2, 3],
        [3, 5],
    ]
    one, two = paired(known, heard_of(reads, sparse(*[{}] * len(reads))), learns)
    pairs = list(zip(one.tolist(), two.tolist(), strict=True))
    assert pairs == [(reads[0], learns[0]), (reads[2], learns[3])]
    assert all(len(part) == 0 for part in paired(known, heard_of(reads[:0], sparse()), learns))


def test_token_strings_on_disk(tmp_path: Path) -> None:
    one = Spelling(np.frombuffer(b"ab", np.uint8).copy(), np.array([0, 1, 2]), np.zeros(2, np.uint8), "one")
    two = Spelling(np.frombuffer(b"abc", np.uint8).copy(), np.array([0, 1, 2, 3]), np.zeros(3, np.uint8), "two")
    known = paper.strings(["Ġa", "b"], ["▁a", None, "c"], MARKS)
    path = tmp_path / "map.safetensors"
    plain = Map(csr_array((2, 3)), csr_array((3, 3)), one, two)
    plain.save(path)
    assert Map.load(path).strings is None
    with pytest.raises(ValueError, match="holds no token strings, which fusellm compares; run the align stage again"):
        projector(Map.load(path), Align(procedure="fusellm"))
    Map(csr_array((2, 3)), csr_array((3, 3)), one, two, known).save(path)
    back = Map.load(path).strings
    assert back is not None and back.words.alphabet == known.words.alphabet
    for name in ("source_bare", "target_bare", "source_marked", "target_marked"):
        assert np.array_equal(getattr(back, name), getattr(known, name))
    for changed in ({"source_bare": known.source_bare + 9}, {"target_marked": known.target_marked[:1]}):
        broken = paper.Strings(**{**{n: getattr(known, n) for n in known.__dataclass_fields__}, **changed})
        Map(csr_array((2, 3)), csr_array((3, 3)), one, two, broken).save(path)
        with pytest.raises(ValueError, match="is no map of this version .its token strings do not fit together"):
            Map.load(path)


def test_refusals(tmp_path: Path) -> None:
    holds = tree(tmp_path, Path("none"), {"a": Path("none")})
    with pytest.raises(ValueError, match=r"align.follow: False will not do: procedure fusellm asks no other setting"):
        load(tmp_path, holds, "align.procedure=fusellm", "align.follow=false")
    with pytest.raises(ValueError, match="distill.gate_unit: tokens will not do with gate_level token"):
        load(tmp_path, holds, "distill.gate_unit=tokens", "distill.gate_level=token")
    assert load(tmp_path, holds, "align.procedure=fusechat").align.procedure == "fusechat"


def test_the_gate_by_token_prefers_short_tokens(byte_level_tokenizer: Any) -> None:
    """Two sources say the same bytes in 8 bits each: with 4 tokens that is 2 a token, with 2 tokens it is 4."""
    target = Renderer(byte_level_tokenizer, "level")
    sample: Sample = TEXTS[0]
    size = len(target.render(sample).ids)

    def said(tokens: int, bits: float) -> Heard:
        logp = np.full(tokens, -bits / tokens * np.log(2), np.float32)
        carries = np.full(tokens, Carries.CONTENT, np.uint8)
        entries = sparse(*[{}] * tokens)
        return Heard(np.zeros(tokens, np.int32), np.full(tokens, -1), carries, logp, entries, 16)

    class Told:
        def __init__(self, heard: Heard):
            self.heard = heard

        def get(self, id: str) -> Heard:
            assert id == sample_id(sample.text)
            return self.heard

    class Speaks:
        def project(self, heard: Heard, places: np.ndarray, labels: np.ndarray, k: int) -> tuple[np.ndarray, Sparse]:
            return np.arange(len(labels)), sparse(*({int(label): 1.0} for label in labels))

    few, many = said(2, 8.0), said(4, 9.0)
    assert few.bits("tokens") == pytest.approx(4) and many.bits("tokens") == pytest.approx(2.25)
    assert few.bits_per_byte() == pytest.approx(0.5)
    teachers: Any = [Teacher("few", Told(few), Speaks()), Teacher("many", Told(many), Speaks())]  # type: ignore[arg-type]
    for unit, best in (("bytes", 0), ("tokens", 1)):
        gating = Gating("min_ce", unit=unit)  # type: ignore[arg-type]
        example = FusionDataset(Texts.of([sample], target), teachers, gating, k=5)[0]
        assert example.teacher.tolist() == [best] * (size - 1)


@pytest.mark.parametrize("procedure", ["fusellm", "fusechat"])
def test_the_stages_up_to_align(procedure: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """From samples to a map with strings, and what it covers, for a pair of kinds of tokenizer."""
    made = {}
    for kind, of in (("llama", "sentencepiece_tokenizer"), ("neox", "byte_level_tokenizer")):
        made[kind] = tmp_path / kind
        request.getfixturevalue(f"tiny_{kind}")(made[kind], request.getfixturevalue(of), seed=1)
    holds = tree(tmp_path, made["llama"], {"a": made["neox"]})
    config: Config = load(tmp_path, holds, f"align.procedure={procedure}", "capture.sampler=top_k", "capture.k=4")
    pipeline.run(config, only=["prepare", "capture", "align"])
    tasks = {t.out.label: t.out for t in pipeline.plan(config, pipeline.find(config))}
    folder = tasks["align/a"].folder
    facts = read_manifest(folder)["facts"]
    assert 0.3 < facts["coverage"] <= 1 and facts["ids mapped"] > (0.2 if procedure == "fusellm" else 0.02)
    known = Map.load(folder / "map.safetensors").strings
    assert known is not None and len(known.source_bare) == len(Map.load(folder / "map.safetensors").source)
