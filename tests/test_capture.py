"""Capture: the cache of a source is what a naive reading of each sample by itself gives."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny import artifact, samples
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fusion.artifact import Artifact
from fusion.capture import stage
from fusion.capture.cache import Cache, shard_facts, shard_name
from fusion.capture.sample import top_k
from fusion.config import Capture, Config, Dataset, Model, Prepare
from fusion.corpus import Corpus, write_samples
from fusion.records import Carries, Message, Sample, Sparse, sample_id

K = 6


def fusion(source: Path, **settings: Any) -> Config:
    model = Model(str(source), "a", dtype="float32")
    data = (Dataset("none.jsonl"),)
    return Config("small", Model("none"), (model,), Prepare(data), capture=Capture(**({"sampler": "top_k", "k": K} | settings)))


def capture(root: Path, source: Path, prepared: Path, **settings: Any) -> tuple[Artifact, dict[str, Any]]:
    out = artifact(root, "capture", "a")
    return out, again(out, source, prepared, **settings)


def again(out: Artifact, source: Path, prepared: Path, **settings: Any) -> dict[str, Any]:
    facts = stage.run(fusion(source, **settings), {"prepare": prepared, "model": source}, out)
    out.publish(facts, 0.0)
    return facts


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of unlike lengths, one cut from a longer one, one beyond ASCII."""
    folder = tmp_path_factory.mktemp("prepared")
    made = samples(30, words=20)
    made += [Sample(sample_id(t), "odd", t) for t in ("a", "  spaces\n\n", "naïve 日本語 🙂", "<s> spelled </s>")]
    made.append(Sample(sample_id("cut off"), "odd", "cut off", complete=False))
    write_samples(folder / "train.parquet", made)
    return folder


@pytest.fixture(scope="module", params=["llama", "neox"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two architectures, each with another kind of tokenizer. Weights are large, so that distributions are uneven."""
    folder = tmp_path_factory.mktemp(request.param)
    kinds = {"llama": "sentencepiece_tokenizer", "neox": "byte_level_tokenizer"}
    tokenizer = request.getfixturevalue(kinds[request.param])
    make = request.getfixturevalue(f"tiny_{request.param}")
    return make(folder, tokenizer, seed=3, initializer_range=0.4)


def naive(model: Any, tokenizer: Any, text: str, complete: bool) -> tuple[list[int], torch.Tensor]:
    """Ids of a text with its start and end, and float32 log-probabilities (T - 1, V), without padding or batches."""
    end = tokenizer.eos_token_id
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end
    tokenizer.backend_tokenizer.encode_special_tokens = True
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    tokenizer.backend_tokenizer.encode_special_tokens = False
    ids = [start, *ids, *([end] if complete else [])]
    with torch.no_grad():
        return ids, model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)


def test_rows_are_a_naive_reading(tmp_path: Path, prepared: Path, source: Path) -> None:
    out, facts = capture(tmp_path, source, prepared)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    cache, nats, positions, size = Cache(out.folder), 0.0, 0, 0
    for sample in Corpus(prepared, "train"):
        assert sample.text is not None
        heard = cache.get(sample.id)
        assert heard is not None
        ids, logp_TV = naive(model, tokenizer, sample.text, sample.complete)
        n = len(ids) - 1
        assert heard.ids.tolist() == ids[1:]
        assert heard.carries.tolist() == [Carries.CONTENT] * (n - 1) + [
            Carries.END if sample.complete else Carries.CONTENT
        ]
        assert heard.content_bytes == len(sample.text.encode())
        next_T = logp_TV[range(n), ids[1:]]
        assert np.allclose(heard.logp, next_T, atol=1e-4)
        top_TK = logp_TV.topk(K)
        assert heard.entries.offsets.tolist() == [K * i for i in range(n + 1)]
        kept_TK = torch.tensor(heard.entries.ids.reshape(n, K)).long()
        # the kept entries are true log-probabilities, and no larger one is left out
        told_TK = np.log(heard.entries.probs.reshape(n, K))
        assert np.allclose(told_TK, logp_TV.gather(-1, kept_TK), rtol=1e-3, atol=1e-3)
        assert np.allclose(logp_TV.gather(-1, kept_TK), top_TK.values, atol=1e-4)
        assert all(len(set(row)) == K for row in kept_TK.tolist())
        assert (heard.entries.mass() <= 1 + 1e-3).all()
        content = n if not sample.complete else n - 1
        bits = -float(next_T[:content].double().sum()) / len(sample.text.encode()) / np.log(2)
        assert heard.bits_per_byte() == pytest.approx(bits, rel=1e-4)
        nats, positions, size = nats - float(next_T[:content].double().sum()), positions + n, size + heard.content_bytes
    assert len(cache) == facts["samples"] == 35 and facts["tokens"] == positions
    assert facts["train bits per byte"] == pytest.approx(nats / size / np.log(2), abs=1e-3)
    assert facts["bytes on disk"] == sum(p.stat().st_size for p in out.folder.glob("*.parquet"))
    assert facts["model"] == str(source)


def test_places_of_a_text_are_its_bytes(
    tmp_path: Path, prepared: Path, tiny_neox: Any, byte_level_tokenizer: PreTrainedTokenizerFast
) -> None:
    out, _ = capture(tmp_path, tiny_neox(tmp_path / "m", byte_level_tokenizer), prepared)
    cache = Cache(out.folder)
    for sample in Corpus(prepared, "train"):
        heard = cache.get(sample.id)
        assert heard is not None and sample.text is not None
        spelled = [byte_level_tokenizer.convert_ids_to_tokens(int(i)) for i in heard.ids[heard.carries == 1]]
        read = np.cumsum([0, *map(len, spelled)])  # byte-level pieces have one character a byte
        assert heard.boundary.tolist() == (1 + read[: len(heard.ids)]).tolist()


def test_batches_do_not_matter(tmp_path: Path, prepared: Path, source: Path) -> None:
    caches = [Cache(capture(tmp_path / str(n), source, prepared, batch_tokens=n)[0].folder) for n in (1, 90, 100_000)]
    for sample in Corpus(prepared, "train"):
        first, *others = [cache.get(sample.id) for cache in caches]
        assert first is not None
        for heard in others:
            assert heard is not None
            assert heard.ids.tolist() == first.ids.tolist() and heard.boundary.tolist() == first.boundary.tolist()
            assert np.abs(heard.logp - first.logp).max() < 1e-4
            assert np.allclose(np.log(heard.entries.probs), np.log(first.entries.probs), rtol=1e-3, atol=1e-3)


def test_only_assistant_turns_are_kept(tmp_path: Path, source: Path) -> None:
    turns = ("user", "one?"), ("assistant", "Two three."), ("user", "four?"), ("assistant", "five")
    messages = tuple(Message(*turn) for turn in turns)
    chat = Sample(sample_id(None, messages), "chat", None, messages)
    write_samples(tmp_path / "train.parquet", [chat])
    out, _ = capture(tmp_path, source, tmp_path)
    heard = Cache(out.folder).get(chat.id)
    tokenizer = AutoTokenizer.from_pretrained(source)
    assert heard is not None and heard.content_bytes == len("Two three.five")
    content, ends = heard.ids[heard.carries == Carries.CONTENT], heard.ids[heard.carries == Carries.END]
    assert "".join(str(tokenizer.decode(content)).split()) == "Twothree.five"
    assert ends.tolist() == [tokenizer.eos_token_id] * 2


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path, prepared: Path, source: Path) -> None:
    out, facts = capture(tmp_path, source, prepared)
    shards = sorted(out.folder.glob("shard-*.parquet"))
    assert [s.name for s in shards] == [shard_name(n) for n in range(5)]  # groups of 8 of 35 samples
    before = {s: (s.read_bytes(), s.stat().st_mtime_ns, s.stat().st_ino) for s in shards}
    shards[1].unlink()
    shards[3].write_bytes(before[shards[3]][0][:-9])  # no whole parquet file
    assert shard_rows(shards[1]) is None and shard_rows(shards[3]) is None and shard_rows(shards[4]) == 3
    resumed = again(out, source, prepared)
    for n, shard in enumerate(shards):
        content, changed, inode = before[shard]
        assert shard.read_bytes() == content
        assert (shard.stat().st_mtime_ns == changed and shard.stat().st_ino == inode) == (n not in (1, 3))
    idle = again(out, source, prepared)
    assert idle["tokens a second"] is None and resumed["tokens a second"] > 0
    speeds = {"tokens a second": 0}
    assert idle | speeds == resumed | speeds == facts | speeds
    assert all(s.stat().st_ino == before[s][2] for n, s in enumerate(shards) if n not in (1, 3))


def test_a_finished_capture_loads_no_model(
    tmp_path: Path, prepared: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = capture(tmp_path, source, prepared)
    monkeypatch.setattr(stage.hub, "load_model", lambda *_: pytest.fail("the model was loaded"))
    again(out, source, prepared)


@pytest.fixture
def long(tmp_path: Path) -> list[Sample]:
    made = [Sample(sample_id(t), "d", t) for t in ("short", "long " * 90, "also short")]
    write_samples(tmp_path / "train.parquet", made)
    return made


def test_too_long_is_refused(
    tmp_path: Path, long: list[Sample], tiny_llama: Any, byte_level_tokenizer: PreTrainedTokenizerFast
) -> None:
    source = tiny_llama(tmp_path / "m", byte_level_tokenizer, max_position_embeddings=64)
    out = artifact(tmp_path, "capture", "a")
    with pytest.raises(ValueError) as refused:
        again(out, source, tmp_path)
    tokens = len(byte_level_tokenizer.backend_tokenizer.encode(str(long[1].text)).ids) + 2
    assert str(refused.value) == (
        f"a: sample {long[1].id} has {tokens} tokens and the context is 64; "
        "lower prepare.max_bytes or set capture.too_long: skip"
    )
    assert list(out.folder.iterdir()) == []


def test_too_long_is_skipped(
    tmp_path: Path, long: list[Sample], tiny_llama: Any, byte_level_tokenizer: PreTrainedTokenizerFast
) -> None:
    source = tiny_llama(tmp_path / "m", byte_level_tokenizer, max_position_embeddings=64)
    out, facts = capture(tmp_path, source, tmp_path, too_long="skip")
    cache = Cache(out.folder)
    assert list(cache.ids()) == [long[0].id, long[2].id] and facts["samples"] == 2
    assert cache.get(long[1].id) is None and long[1].id not in cache and long[0].id in cache


def test_a_sample_as_long_as_the_context_is_read(
    tmp_path: Path, tiny_llama: Any, byte_level_tokenizer: PreTrainedTokenizerFast
) -> None:
    text = "one two"
    tokens = len(byte_level_tokenizer.backend_tokenizer.encode(text).ids) + 2
    write_samples(tmp_path / "train.parquet", [Sample("0" * 16, "d", text)])
    exact = tiny_llama(tmp_path / "m", byte_level_tokenizer, max_position_embeddings=tokens)
    assert capture(tmp_path / "c", exact, tmp_path)[1]["tokens"] == tokens - 1
    less = tiny_llama(tmp_path / "n", byte_level_tokenizer, max_position_embeddings=tokens - 1)
    with pytest.raises(ValueError, match=f"has {tokens} tokens and the context is {tokens - 1}"):
        capture(tmp_path / "d", less, tmp_path)


def test_logits_that_are_not_finite_name_the_sample(
    tmp_path: Path, prepared: Path, tiny_llama: Any, byte_level_tokenizer: PreTrainedTokenizerFast
) -> None:
    source = tiny_llama(tmp_path / "m", byte_level_tokenizer)
    model: Any = AutoModelForCausalLM.from_pretrained(source)
    sun = byte_level_tokenizer.backend_tokenizer.encode("日").ids
    with torch.no_grad():
        model.get_input_embeddings().weight[sun] = float("nan")
    model.save_pretrained(source)
    odd = [s for s in Corpus(prepared, "train") if "日" in str(s.text)]
    assert len(odd) == 1
    out = artifact(tmp_path, "capture", "a")
    with pytest.raises(ValueError) as refused:
        again(out, source, prepared)
    said = f"a: logits are not finite on sample {odd[0].id}, position "
    assert str(refused.value).startswith(said) and str(refused.value).endswith("; try dtype: float32 for this source")
    int(str(refused.value).removeprefix(said).partition(";")[0])
    broken = next(n for n in range(5) if odd[0] in Corpus(prepared, "train").group(n))
    assert {p.name for p in out.folder.iterdir()} == {shard_name(n) for n in range(broken)}


def test_a_tokenizer_larger_than_its_model_is_refused(
    tmp_path: Path, prepared: Path, tiny_llama: Any, byte_level_tokenizer: PreTrainedTokenizerFast
) -> None:
    size = len(byte_level_tokenizer)
    source = tiny_llama(tmp_path / "m", byte_level_tokenizer, vocab_size=size - 1)
    with pytest.raises(ValueError) as refused:
        capture(tmp_path, source, prepared)
    assert str(refused.value) == f"a: its tokenizer has {size} ids and its model {size - 1}; they are not a pair"


def test_a_model_larger_than_its_tokenizer_is_read(
    tmp_path: Path, prepared: Path, tiny_llama: Any, byte_level_tokenizer: PreTrainedTokenizerFast
) -> None:
    source = tiny_llama(tmp_path / "m", byte_level_tokenizer, vocab_size=len(byte_level_tokenizer) + 60)
    assert capture(tmp_path, source, prepared)[1]["samples"] == 35


@pytest.mark.parametrize("damage", ["cut", "lacks"])
def test_weights_that_do_not_load_are_named(
    tmp_path: Path, prepared: Path, tiny_llama: Any, byte_level_tokenizer: PreTrainedTokenizerFast, damage: str
) -> None:
    from safetensors.torch import load_file, save_file

    source = tiny_llama(tmp_path / "m", byte_level_tokenizer)
    path = source / "model.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
        said = f"a: {source} does not load as a causal language model: "
    else:
        tensors = load_file(path)
        del tensors["lm_head.weight"]
        save_file(tensors, path, {"format": "pt"})
        said = f"a: {source} lacks weights: lm_head.weight"
    with pytest.raises(ValueError) as refused:
        capture(tmp_path, source, prepared)
    assert str(refused.value).startswith(said) and "\n" not in str(refused.value)


# The sampler and the store by themselves


def test_top_k_by_hand() -> None:
    probs = torch.tensor([[0.5, 0.125, 0.375], [0.25, 0.5, 0.25]])
    kept = top_k(probs.log() + 7, torch.tensor([1, 0]), 2)
    assert kept.ids[0].tolist() == [0, 2] and kept.ids[1, 0] == 1
    assert torch.allclose(kept.logp.exp(), torch.tensor([[0.5, 0.375], [0.5, 0.25]]))
    assert torch.allclose(kept.next_logp.exp(), torch.tensor([0.125, 0.25]))


def test_top_k_in_blocks_is_top_k_as_a_whole() -> None:
    torch.manual_seed(0)
    logits, after = torch.randn(37, 50), torch.randint(0, 50, (37,))
    whole = top_k(logits, after, 5, block=100)
    for block in (1, 7, 37):
        part = top_k(logits, after, 5, block)
        assert torch.equal(part.ids, whole.ids)
        assert torch.equal(part.logp, whole.logp) and torch.equal(part.next_logp, whole.next_logp)
    everything = top_k(logits, after, 500)
    assert everything.ids.shape == (37, 50) and torch.allclose(everything.logp.exp().sum(-1), torch.ones(37))
    half = top_k(logits.bfloat16(), after, 5)
    assert half.logp.dtype == torch.float32
    assert torch.equal(half.logp, top_k(logits.bfloat16().float(), after, 5).logp)


def test_top_k_of_nothing_and_of_infinities() -> None:
    none = top_k(torch.zeros(0, 9), torch.zeros(0, dtype=torch.long), 4)
    assert none.ids.shape == none.logp.shape == (0, 4) and none.next_logp.shape == (0,)
    logits = torch.zeros(9, 4)
    logits[5, 1] = float("nan")
    logits[7, 2] = float("inf")
    with pytest.raises(FloatingPointError) as bad:
        top_k(logits, torch.zeros(9, dtype=torch.long), 2, block=4)
    assert bad.value.args == (5,)
    masked = torch.tensor([[0.0, float("-inf"), 0.0]])
    assert torch.allclose(top_k(masked, torch.tensor([0]), 2).logp.exp(), torch.full((1, 2), 0.5))


def test_a_cache_gives_back_what_was_written(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {
            "id": f"{n:016x}",
            "content_bytes": n,
            "tokens": list(range(n)),
            "boundary": [-1] * n,
            "carries": [1] * n,
            "logp": [-0.5] * n,
            "kept": [n % 3] * n,
            "entry_ids": list(range(n * (n % 3))),
            "entry_logp": [-1.0] * (n * (n % 3)),
        }
        for n in range(40)
    ]
    out = artifact(tmp_path, "capture", "a")
    write_shard(out.folder / shard_name(0), rows[:25])
    write_shard(out.folder / shard_name(1), rows[25:])
    out.publish({"tokenizer": "t", "model": "m"}, 0.0)
    cache = Cache(out.folder, "t", "a")
    assert list(cache.ids()) == [row["id"] for row in rows]
    for n in (39, 0, 25, 24, 7, 0):
        heard = cache.get(f"{n:016x}")
        assert heard is not None and heard.ids.tolist() == list(range(n)) and heard.boundary.tolist() == [-1] * n
        assert heard.entries.offsets.tolist() == [(n % 3) * i for i in range(n + 1)]
        assert heard.entries.ids.tolist() == list(range(n * (n % 3)))
        assert np.allclose(heard.entries.probs, np.exp(-1))
        expected = 0.5 * n / n / np.log(2) if n else float("inf")
        assert heard.bits_per_byte() == pytest.approx(expected)
    assert pq.read_metadata(out.folder / shard_name(0)).num_rows == shard_rows(out.folder / shard_name(0)) == 25


def test_a_cache_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    out = artifact(tmp_path, "capture", "a")
    with pytest.raises(ValueError, match="has no manifest.json: it is not a finished stage folder"):
        Cache(out.folder)
    out.publish({"tokenizer": "t", "model": "m"}, 0.0)
    assert len(Cache(out.folder, "t")) == 0
    with pytest.raises(ValueError) as refused:
        Cache(out.folder, "u", "math")
    line = f"math: the cache {out.folder} was made by m, whose tokenizer is not math's; capture it again"
    assert str(refused.value) == line
    out.publish({}, 0.0)
    with pytest.raises(ValueError) as refused:
        Cache(out.folder, None, "math")
    assert str(refused.value) == f"math: {out.folder} is not a cache; give the folder of a capture stage"


def test_mass_by_hand() -> None:
    offsets, probs = np.array([0, 2, 2, 3, 3]), np.array([0.5, 0.25, 1.0], dtype=np.float32)
    assert Sparse(offsets, np.arange(3), probs).mass().tolist() == [0.75, 0, 1, 0]
